"""Chunks of a fusion, read in groups of layers: from memory, else from the store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...core import ChunkKey, KVChunk
from ...kvstore.chunk_store import ChunkStore
from ...kvstore.store import Hit

_GROWTH = 8
_MOST_LAYERS = 16


class LostChunksError(Exception):
    """Stored chunks that cannot be read any more: the fusion computes them again and starts over."""

    def __init__(self, keys: set[ChunkKey]) -> None:
        self.keys = keys


class StoreSource:
    """The `LayerSource` of one fusion.

    The first layer is read alone, so that computing can begin; then groups of 8 and of 16 layers. A read of a chunk
    costs as much as copying several of its layers, and keys are rotated by one table for a whole group.

    Parameters
    ----------
    keys, starts : of the chunks: names, and positions in the context, which has `total` tokens.
    num_layers : of every chunk.
    held : chunks in memory; all others are read from the store.

    Attributes
    ----------
    reads : of each chunk that was read: its tier, and bytes and seconds of all layers.
    """

    def __init__(
        self,
        store: ChunkStore,
        keys: Sequence[ChunkKey],
        starts: Sequence[int],
        total: int,
        num_layers: int,
        held: Mapping[ChunkKey, KVChunk],
    ) -> None:
        self._store = store
        self._num_layers = num_layers
        self._held = held
        self.reads: dict[ChunkKey, tuple[str, int, float]] = {}
        self._places = [
            (key, start, torch.arange(start, stop))
            for key, start, stop in zip(keys, starts, [*starts[1:], total], strict=True)
        ]
        self._first, self._stop = 0, 0  # layers that were read last
        self._group: list[tuple[Tensor, Tensor]] = []

    def load(self, layer: int, keys: Tensor, values: Tensor) -> None:
        total = keys.shape[1]
        if not self._first <= layer < self._stop:
            self._read(layer, total)
        for (_, start, positions), (group_keys, group_values) in zip(self._places, self._group, strict=False):
            here = slice(start, start + len(positions))
            keys[:, here] = group_keys[layer - self._first]
            values[:, here] = group_values[layer - self._first]
        if layer + 1 == self._stop:
            self._group = []  # what is copied need not be kept

    def _read(self, layer: int, total: int) -> None:
        """The group of layers that begins with `layer`, of all chunks in the first `total` tokens."""
        count = min(_MOST_LAYERS, _GROWTH * (self._stop - self._first)) if layer else 1
        stop = min(layer + count, self._num_layers)
        lost: set[ChunkKey] = set()  # all of the group: a tier that is gone costs one start, not one for each chunk
        self._group, self._first = [], layer
        for key, start, positions in self._places:
            if start >= total:
                break
            chunk = self._held.get(key)
            if chunk is None:
                hit = self._store.read(key, positions, layers=(layer, stop))
                if hit is None:
                    lost.add(key)
                    continue
                self._note(key, hit)
                self._group.append((hit.chunk.keys, hit.chunk.values))
                continue
            moved = chunk.spec.shift(chunk.keys[layer:stop], positions - chunk.positions, layer)
            self._group.append((moved, chunk.values[layer:stop]))
        if lost:
            raise LostChunksError(lost)
        self._stop = stop

    def _note(self, key: ChunkKey, hit: Hit) -> None:
        _, nbytes, before_s = self.reads.get(key, ("", 0, 0.0))
        nbytes += hit.chunk.keys.nbytes + hit.chunk.values.nbytes
        self.reads[key] = hit.tier, nbytes, before_s + hit.load_s
