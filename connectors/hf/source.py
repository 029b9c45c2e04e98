"""Chunks of a fusion, read layer by layer: from memory, else from the store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...core import ChunkKey, KVChunk
from ...kvstore.chunk_store import ChunkStore


class LostChunksError(Exception):
    """Stored chunks that cannot be read any more: the fusion computes them again and starts over."""

    def __init__(self, keys: set[ChunkKey]) -> None:
        self.keys = keys


class StoreSource:
    """The `LayerSource` of one fusion.

    Parameters
    ----------
    keys, starts : of the chunks: names, and positions in the context, which has `total` tokens.
    held : chunks in memory; all others are read from the store.
    """

    def __init__(
        self,
        store: ChunkStore,
        keys: Sequence[ChunkKey],
        starts: Sequence[int],
        total: int,
        held: Mapping[ChunkKey, KVChunk],
    ) -> None:
        self._store = store
        self._held = held
        self._places = [
            (key, start, torch.arange(start, stop))
            for key, start, stop in zip(keys, starts, [*starts[1:], total], strict=True)
        ]

    def load(self, layer: int, keys: Tensor, values: Tensor) -> None:
        total = keys.shape[1]
        lost: set[ChunkKey] = set()  # all of the layer: a tier that is gone costs one start, not one for each chunk
        for key, start, positions in self._places:
            if start >= total:
                break
            here = slice(start, start + len(positions))
            chunk = self._held.get(key)
            if chunk is not None:
                rope = chunk.spec.rope
                moved = chunk.keys[layer]
                keys[:, here] = moved if rope is None else rope.shift(moved, positions - chunk.positions)
                values[:, here] = chunk.values[layer]
                continue
            hit = self._store.read(key, positions, layers=(layer, layer + 1))
            if hit is None:
                lost.add(key)
                continue
            keys[:, here] = hit.chunk.keys[0]
            values[:, here] = hit.chunk.values[0]
        if lost:
            raise LostChunksError(lost)
