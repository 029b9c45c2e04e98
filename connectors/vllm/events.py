"""KV events for routers: which of the engine's blocks kvloom's tiers hold, under the names that vLLM gives them.

A tier knows chunks by their keys. vLLM and the routers that listen to it know blocks by hashes that only the scheduler
has. So the scheduler's half remembers, of every chunk that is to be stored or was found, which blocks it holds
(`describe`); the workers tell which chunks enter and leave tiers (`hear`); and both together are events (`take`).
What other engines store is told when a request here uses it: until then nobody here knows its hashes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
    """All ranks hold a chunk in a tier now, or no longer do."""

    blocks: StoredBlocks
    tier: str
    is_there: bool


@dataclass(slots=True)
class _Chunk:
    keys: tuple[ChunkKey, ...]  # one for each rank
    blocks: StoredBlocks
    holders: dict[str, set[ChunkKey]] = field(default_factory=dict)  # by tier: the keys that it holds


class Residences:
    """Which described chunks are in which tiers. What has left all tiers is forgotten."""

    def __init__(self) -> None:
        self._chunks: dict[ChunkKey, _Chunk] = {}  # under the key of every rank
        self._told: list[Residence] = []

    def describe(self, keys: tuple[ChunkKey, ...], blocks: StoredBlocks) -> None:
        """Remember a chunk of these keys, one for each rank, before it is heard of."""
        if keys[0] not in self._chunks:
            self._chunks.update(dict.fromkeys(keys, _Chunk(keys, blocks)))

    def hear(self, moves: Iterable[PlacementChange]) -> None:
        """Chunks that entered or left a tier. One that left without having been there was not stored after all."""
        for move in moves:
            chunk = self._chunks.get(move.key)
            if chunk is None:
                continue
            holders = chunk.holders.setdefault(move.tier, set())
            was_there = len(holders) == len(chunk.keys)
            (holders.add if move.is_there else holders.discard)(move.key)
            is_there = len(holders) == len(chunk.keys)
            if is_there != was_there:
                self._told.append(Residence(chunk.blocks, move.tier, is_there))
            if not any(chunk.holders.values()):
                self._forget(chunk)

    def clear(self) -> None:
        """No chunk that is stored will be found again."""
        for chunk in {id(chunk): chunk for chunk in self._chunks.values()}.values():
            tiers = [tier for tier, holders in chunk.holders.items() if len(holders) == len(chunk.keys)]
            self._told += [Residence(chunk.blocks, tier, is_there=False) for tier in tiers]
        self._chunks.clear()

    def take(self) -> list[Residence]:
        """What was not told yet, in order."""
        told, self._told = self._told, []
        return told

    def _forget(self, chunk: _Chunk) -> None:
        for key in chunk.keys:
            del self._chunks[key]


class KVEvents:
    """The scheduler's half of the connector, as far as vLLM's KV events go.

    Parameters
    ----------
    block_tokens : of the engine; chunks consist of whole blocks.
    chunk_tokens : of a chunk.
    """

    def __init__(self, block_tokens: int, chunk_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._chunk_tokens = chunk_tokens
        self._requests: dict[str, Any] = {}
        self.residences = Residences()

    def open(self, request: Any) -> None:
        """A vLLM `Request` that kvloom serves."""
        self._requests[request.request_id] = request

    def close(self, request_id: str) -> None:
        self._requests.pop(request_id, None)

    def describe(self, plan: StepPlan) -> None:
        """Of all chunks of prefixes that the workers are to store or load, which blocks they hold."""
        for save in plan.saves:
            if save.is_prefix and save.request_id in self._requests:
                self._describe(self._requests[save.request_id], save.keys, save.start)
        for load in (*plan.loads, *plan.layerwise):
            if load.request_id in self._requests:
                for chunk, keys in enumerate(zip(*load.keys, strict=True)):
                    self._describe(self._requests[load.request_id], keys, load.first + chunk * self._chunk_tokens)

    def take(self) -> list[Any]:
        """VLLM's `BlockStored` and `BlockRemoved`, as its own offloading has them: `CPU` for memory, else `STORAGE`."""
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
