"""KV events for routers: which of the engine's blocks kvloom's tiers hold, under the names that vLLM gives them.

A tier knows chunks by their keys. vLLM and the routers that listen to it know blocks by hashes that only the scheduler
has. So the scheduler's half remembers, for every chunk that is to be stored or was found, which blocks it holds
(`describe`); the workers report which chunks enter and leave tiers (`apply`); and both together are events (`take`).
A chunk that another engine stored is published when a request of this engine uses it: before, its hashes are not known.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...core import ChunkKey
from ...kvstore.placement.catalog import PlacementChange
from ..serving.messages import StepPlan


@dataclass(frozen=True, slots=True)
class StoredBlocks:
    """The blocks of a chunk, as vLLM describes blocks: their hashes, that of the block before, their tokens."""

    hashes: tuple[bytes, ...]
    parent: bytes | None
    token_ids: tuple[int, ...]
    extra_keys: tuple[tuple[Any, ...] | None, ...]
    lora_id: int | None = None
    lora_name: str | None = None


@dataclass(frozen=True, slots=True)
class Residence:
    """A chunk that all ranks hold in a tier now, or no longer do."""

    blocks: StoredBlocks
    tier: str
    is_there: bool


@dataclass(slots=True)
class _Chunk:
    keys: tuple[ChunkKey, ...]  # one for each rank
    blocks: StoredBlocks
    holders: dict[str, set[ChunkKey]] = field(default_factory=dict)  # by tier: the keys that it holds


class Residences:
    """Which described chunks are in which tiers. A chunk that has left all tiers is forgotten."""

    def __init__(self) -> None:
        self._chunks: dict[ChunkKey, _Chunk] = {}  # under the key of every rank
        self._changes: list[Residence] = []

    def describe(self, keys: tuple[ChunkKey, ...], blocks: StoredBlocks) -> None:
        """Remember a chunk of these keys, one for each rank, before its placement is reported."""
        if keys[0] not in self._chunks:
            self._chunks.update(dict.fromkeys(keys, _Chunk(keys, blocks)))

    def apply(self, changes: Iterable[PlacementChange]) -> None:
        """Take note of chunks that entered or left a tier. One that left without having been there was not stored."""
        for change in changes:
            chunk = self._chunks.get(change.key)
            if chunk is None:
                continue
            holders = chunk.holders.setdefault(change.tier, set())
            was_there = len(holders) == len(chunk.keys)
            (holders.add if change.is_there else holders.discard)(change.key)
            is_there = len(holders) == len(chunk.keys)
            if is_there != was_there:
                self._changes.append(Residence(chunk.blocks, change.tier, is_there))
            if not any(chunk.holders.values()):
                self._forget(chunk)

    def clear(self) -> None:
        """Publish every chunk as removed: none of them will be found again."""
        for chunk in {id(chunk): chunk for chunk in self._chunks.values()}.values():
            tiers = [tier for tier, holders in chunk.holders.items() if len(holders) == len(chunk.keys)]
            self._changes += [Residence(chunk.blocks, tier, is_there=False) for tier in tiers]
        self._chunks.clear()

    def take(self) -> list[Residence]:
        """Changes since the last call, in order."""
        changes, self._changes = self._changes, []
        return changes

    def _forget(self, chunk: _Chunk) -> None:
        for key in chunk.keys:
            del self._chunks[key]


class KVEvents:
    """VLLM's KV events of what kvloom stores.

    Parameters
    ----------
    block_tokens : of the engine; chunks consist of whole blocks.
    chunk_tokens : of a chunk.
    requests : vLLM's requests that kvloom serves, by id; kept up to date by the caller.
    """

    def __init__(self, block_tokens: int, chunk_tokens: int, requests: Mapping[str, Any]) -> None:
        self._block_tokens = block_tokens
        self._chunk_tokens = chunk_tokens
        self._requests = requests
        self.residences = Residences()

    def describe(self, plan: StepPlan) -> None:
        """Remember which blocks the chunks of prefixes hold that the workers are to store or load."""
        for save in plan.saves:
            if save.is_prefix and save.request_id in self._requests:
                self._describe(self._requests[save.request_id], save.keys, save.start)
        for load in (*plan.loads, *plan.layer_loads):
            if load.request_id in self._requests:
                for chunk, keys in enumerate(zip(*load.keys, strict=True)):
                    self._describe(self._requests[load.request_id], keys, load.first + chunk * self._chunk_tokens)

    def take(self) -> list[Any]:
        """VLLM's `BlockStored` and `BlockRemoved`, like those of its offloading: `CPU` for memory, else `STORAGE`."""
        from vllm.distributed.kv_events import MEDIUM_CPU, MEDIUM_STORAGE, BlockRemoved, BlockStored
        from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash, to_event_extra_keys

        events: list[Any] = []
        for each in self.residences.take():
            blocks, medium = each.blocks, MEDIUM_CPU if each.tier == "host" else MEDIUM_STORAGE
            hashes = [maybe_convert_block_hash(block_hash) for block_hash in blocks.hashes]
            if not each.is_there:
                events.append(BlockRemoved(block_hashes=hashes, medium=medium, group_idx=0))
                continue
            events.append(
                BlockStored(
                    block_hashes=hashes,
                    parent_block_hash=None if blocks.parent is None else maybe_convert_block_hash(blocks.parent),
                    token_ids=list(blocks.token_ids),
                    block_size=self._block_tokens,
                    lora_id=blocks.lora_id,
                    medium=medium,
                    lora_name=blocks.lora_name,
                    extra_keys=to_event_extra_keys(blocks.extra_keys),
                    group_idx=0,
                    kv_cache_spec_kind="full_attention",
                )
            )
        return events

    def _describe(self, request: Any, keys: tuple[ChunkKey, ...], start: int) -> None:
        from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys

        size, stop = self._block_tokens, start + self._chunk_tokens
        hashes: Sequence[bytes] = request.block_hashes
        adapter = request.lora_request
        starts = range(start, stop, size)
        self.residences.describe(
            keys,
            StoredBlocks(
                tuple(hashes[start // size : stop // size]),
                hashes[start // size - 1] if start else None,
                tuple(request.all_token_ids[start:stop]),
                tuple(generate_block_hash_extra_keys(request, first, first + size, 0)[0] for first in starts),
                None if adapter is None else adapter.adapter_id,
                None if adapter is None else adapter.name,
            ),
        )
