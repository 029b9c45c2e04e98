"""Pieces of chunks on their way into the groups of an engine that has several, or windows. Imports no engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ....core import ChunkKey, KVSpec
from ....kvstore.store import Hit, KVStore
from ..groups import GroupShape
from ..messages import FoundTiers, Load, LookUp
from .arrivals import fits
from .pending_writes import PagedCache


@dataclass(frozen=True, slots=True)
class CacheGroup:
    """A group of an engine's layers: its part of the cache, its spec on this rank, and what it keeps."""

    cache: PagedCache
    spec: KVSpec
    shape: GroupShape


def all_keys(message: LookUp | Load, rank: int) -> tuple[ChunkKey, ...]:
    """Of all groups."""
    rows = [each.keys if isinstance(each, Load) else each for each in message.further]
    return (*message.keys[rank], *(key for keys in rows for key in keys[rank]))


def find_pieces(
    store: KVStore, lookup: LookUp, rank: int, groups: Sequence[CacheGroup], chunk_tokens: int
) -> tuple[FoundTiers, Sequence[ChunkKey]]:
    """The last chunk behind which a request can go on: tiers up to it, and the keys of the pieces that this needs.

    Where the first group does not need all chunks, those that it does not are given the last one's tier.
    """
    rows = (lookup.keys[rank], *(keys[rank] for keys in lookup.further))
    shapes = [group.shape for group in groups]
    if shapes[0].is_full:
        tiers: Sequence[str | None] = store.locate_prefix(rows[0])
    else:
        tiers = store.locate_each(rows[0])
    # States are stored where a step of the engine ended, which is at few chunks of many.
    states = [
        store.locate_each(keys[: len(tiers)])
        for shape, keys in zip(shapes, rows, strict=True)
        if shape.keeps_state and keys is not rows[0]
    ]
    index = len(tiers) - 1
    while index >= 0:
        if tiers[index] is None or any(there[index] is None for there in states):
            index -= 1
            continue
        needed: list[ChunkKey] = []
        places: list[int] = []
        for shape, keys in zip(shapes, rows, strict=True):
            first = max(shape.first_chunk(lookup.first + index, chunk_tokens) - lookup.first, 0)
            needed += keys[first : index + 1]
            places += range(first, index + 1)
        found = len(store.locate_prefix(needed))
        if found == len(needed):
            last = tiers[index]
            return tuple(tier or last or "" for tier in tiers[: index + 1]), needed
        index = min(index, places[found]) - 1  # behind a chunk that needs the missing piece, nothing goes on
    return (), ()


@dataclass(slots=True)
class PieceReader:
    """Reads the pieces of a load in one group, in order, up to the first that is lost.

    `done`: tokens before this one are there. `read` gives the piece of a key, and None if it is lost.
    """

    load: Load
    group: CacheGroup
    rank: int
    chunk_tokens: int
    done: int = 0

    def hits(self, read: Callable[[ChunkKey], Hit | None]) -> Iterator[tuple[Hit, int, slice]]:
        """Each piece, the token from which on it is to be written, and which of its tokens are."""
        load, shape = self.load, self.group.shape
        self.done = load.start
        first_chunk = load.first // self.chunk_tokens
        for chunk, key in enumerate(load.keys[self.rank], start=first_chunk):
            first, end = shape.piece(chunk, self.chunk_tokens)
            start, stop = max(first, load.start), min(end, load.stop)
            hit = read(key) if start <= self.done else None
            if hit is None or not fits(hit.chunk, self.group.spec, end - first, first):
                return
            yield hit, start, slice(start - first, stop - first)
            self.done = stop
