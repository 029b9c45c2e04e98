"""Replays traces through the store, through a policy alone, or through a cache that knows the future."""

from __future__ import annotations

import heapq
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from ...core import ChunkKey, EncodedChunk, KVChunk, KVSpec
from ...errors import TierFullError
from ...kvstore.eviction.policy import EvictionPolicy
from ...kvstore.store import KVStore
from ...kvstore.tiers.host import HostTier
from .families import Trace
from .policies import SIMULATED_POLICIES

Requests: TypeAlias = Sequence[Sequence[ChunkKey]]

FIELDS = ("timestamp", "input_length", "output_length", "hash_ids")


@dataclass(frozen=True, slots=True)
class TimedRequest:
    """A request of a trace.

    Attributes
    ----------
    arrival_s : seconds since the trace began.
    keys : of its prompt's blocks, each chained on those before it, or of the documents that it names.
    """

    arrival_s: float
    keys: Sequence[ChunkKey]
    input_tokens: int
    output_tokens: int


def read_trace(path: Path) -> list[list[ChunkKey]]:
    """The keys of every request's blocks, in order of `timestamp`; see `read_timed_trace`."""
    return [list(request.keys) for request in read_timed_trace(path)]


def read_timed_trace(path: Path) -> list[TimedRequest]:
    """Every request, in order of `timestamp`.

    Raises
    ------
    ValueError : there is no such file, or it is not a trace; with the line and what was expected there.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file; give a trace of JSON lines with {', '.join(FIELDS)}")
    found: list[TimedRequest] = []
    keys: dict[int, ChunkKey] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                timestamp, tokens, answer_tokens, hash_ids = _request(line, f"{path.name}, line {number}")
                for block in hash_ids:
                    if block not in keys:
                        keys[block] = ChunkKey(blake2b(b"%d" % block, digest_size=32).digest())
                blocks = [keys[block] for block in hash_ids]
                found.append(TimedRequest(timestamp / 1e3, blocks, int(tokens), int(answer_tokens)))
    if not keys:
        raise ValueError(f"{path} names no blocks; give a trace with at least one request that does")
    return sorted(found, key=lambda request: request.arrival_s)


def _request(line: bytes, where: str) -> tuple[float, float, float, list[int]]:
    try:
        fields = json.loads(line)
    except ValueError as error:  # also bytes that are no text
        raise ValueError(f"{where} is not JSON; expected one object a line") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{where} is {type(fields).__name__}; expected an object with {', '.join(FIELDS)}")
    missing = [name for name in FIELDS if name not in fields]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}; expected {', '.join(FIELDS)}")
    for name in FIELDS[:-1]:
        value = fields[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ValueError(f"{where}: {name} is {value!r}; expected a number from 0")
    hash_ids = fields["hash_ids"]
    if not isinstance(hash_ids, list) or not all(type(block) is int for block in hash_ids):
        raise ValueError(f"{where}: hash_ids is not a list of integers; expected the ids of the request's blocks")
    return fields["timestamp"], fields["input_length"], fields["output_length"], hash_ids


class _Placeholder:
    """A codec for which all chunks are one and the same, of a given size: the store moves names, not data."""

    name = "placeholder"
    is_lossless = True  # of what the store is given here

    def __init__(self, nbytes: int) -> None:
        spec = KVSpec("placeholder", 1, 1, 1, torch.uint8, None)
        nothing, one = torch.zeros(1, dtype=torch.int64), torch.zeros(1, 1, 1, 1, dtype=torch.uint8)
        self.chunk = KVChunk(spec, nothing, nothing, one, one)
        self._blob = EncodedChunk(self.name, {"block": torch.empty(nbytes, dtype=torch.uint8)}, {})

    def encode(self, chunk: KVChunk) -> EncodedChunk:
        return self._blob

    def decode(self, blob: EncodedChunk, positions: Tensor | None = None) -> KVChunk:
        return self.chunk


def replay(
    requests: Requests, capacity_bytes: int, block_bytes: int, policy: str, advance: Callable[[], object] = lambda: None
) -> int:
    """Hits of a store with one tier in memory, by a policy of `SIMULATED_POLICIES`."""
    hits = replay_tiers(requests, [capacity_bytes // block_bytes], policy, advance=advance)
    return sum(found for (found,) in hits)


def replay_tiers(
    requests: Requests,
    capacities: Sequence[int],
    policy: str,
    *,
    is_chained: bool = True,
    advance: Callable[[], object] = lambda: None,
) -> list[tuple[int, ...]]:
    """Hits of every request in each tier of a store, by a policy of `SIMULATED_POLICIES`.

    A request reads its hits, which promotes them to the first tier, and stores all its other blocks, in every tier.

    Parameters
    ----------
    capacities : blocks that fit into each tier, fastest first.
    is_chained : a block is a hit only if all blocks before it are; otherwise blocks are documents, each for itself.
    """
    codec = _Placeholder(1)
    tiers = [HostTier(blocks, name=str(i), pinned=False) for i, blocks in enumerate(capacities)]
    hits: list[tuple[int, ...]] = []
    with KVStore(tiers, codec=codec, policy=SIMULATED_POLICIES[policy]) as store:
        for keys in requests:
            places: list[str | None] = [*store.locate_prefix(keys)] if is_chained else [*store.locate_each(keys)]
            places += [None] * (len(keys) - len(places))
            found = [key for key, place in zip(keys, places, strict=True) if place is not None]
            with store.pinned(found):
                for key in found:
                    store.get(key)
            counts = Counter(places)
            hits.append(tuple(counts[tier.name] for tier in tiers))
            for i, key in enumerate(keys):
                if places[i] is not None:
                    continue
                try:
                    store.put(key, codec.chunk, after=keys[i - 1] if i and is_chained else None)
                except TierFullError:
                    if is_chained:
                        break  # what follows would lack its prefix
            advance()
    return hits


def matched_by(policy: EvictionPolicy, trace: Trace, capacity_bytes: float) -> list[int]:
    """Leading chunks of each chain that are hits, by a policy alone: as `replay`, in a tenth of the time.

    What goes is chosen as a store with one tier chooses it: never the chunk that is written, and what that continues
    only if nothing else can go.
    """
    held: dict[ChunkKey, int] = {}
    used_bytes = 0
    kept: tuple[ChunkKey | None, ...] = ()

    def may_go(key: ChunkKey) -> bool:
        return key not in kept

    found = []
    for chain in trace.chains:
        matched = next((i for i, key in enumerate(chain) if key not in held), len(chain))
        for key in chain[:matched]:
            policy.touch(key)
        found.append(matched)
        after = chain[matched - 1] if matched else None
        for key in chain[matched:]:
            nbytes, recompute_s = trace.costs[key]
            if nbytes > capacity_bytes:
                break
            kept = key, after
            while key not in held and used_bytes + nbytes > capacity_bytes:
                victim = policy.victim(may_go) or after
                if victim is None:
                    raise ValueError(f"the policy names no victim, with {len(held)} chunks held")
                policy.remove(victim, evicted=True)
                used_bytes -= held.pop(victim)
            used_bytes += 0 if key in held else nbytes
            held[key] = nbytes
            policy.add(key, nbytes, after, recompute_s)
            after = key
    return found


def belady_hits(requests: Requests, capacity_blocks: int) -> int:
    """Hits of `belady_matched`."""
    return sum(belady_matched(requests, capacity_blocks))


def belady_matched(requests: Requests, capacity_blocks: int) -> list[int]:
    """Leading hits of each request in a cache that knows the future: no policy has more, for blocks of one size.

    After a request it keeps, among what it held and the request's blocks, those that are needed again soonest, and
    nothing that is not needed again. Whoever needs a block needs its prefix too, so a prefix is never needed later than
    what continues it; equal times are decided for the earlier block of a request. No block is held without its prefix.

    Notes
    -----
    Belady, A study of replacement algorithms for a virtual-storage computer, 1966: MIN, with bypass, a request at a
    time.
    """
    never = len(requests)
    next_uses: list[list[int]] = []
    upcoming: dict[ChunkKey, int] = {}
    for index in range(len(requests) - 1, -1, -1):
        next_uses.append([upcoming.get(key, never) for key in requests[index]])
        upcoming.update(dict.fromkeys(requests[index], index))
    next_uses.reverse()
    held: dict[ChunkKey, tuple[int, int]] = {}
    latest_first: list[tuple[int, int, ChunkKey]] = []  # with outdated entries
    matched = []
    for keys, uses in zip(requests, next_uses, strict=True):
        matched.append(next((i for i, key in enumerate(keys) if key not in held), len(keys)))
        for place, (key, use) in enumerate(zip(keys, uses, strict=True)):
            held.pop(key, None)
            if use < never:
                held[key] = (-use, -place)
                heapq.heappush(latest_first, (-use, -place, key))
        while len(held) > capacity_blocks:
            use, place, key = heapq.heappop(latest_first)
            if held.get(key) == (use, place):
                del held[key]
    return matched
