"""The indexes of all layers of one sequence, and what of them is stored with chunks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..core import KVChunk
from ..errors import CodecError
from ..retrieval.selector import LayerShape, LearnsFromQueries, Selector, TravelsWithChunks
from .hf_retrieval import Retrieval

Extras = dict[str, Tensor]


class ContextIndex:
    """One selector for each layer that retrieves. Only one thread at a time may use it.

    An extra of a chunk is named `METHOD:DIGEST:LAYER:TENSOR`; layers whose tensors are alike share one, stacked, as
    layer `all`, which can be read layer by layer if every layer of the model is in it.

    Parameters
    ----------
    shapes : of every layer of the model; None for those that attend to everything.
    """

    def __init__(self, retrieval: Retrieval, shapes: Sequence[LayerShape | None]) -> None:
        self.layers: list[Selector | None] = [
            None if shape is None else retrieval.selector(shape, layer) for layer, shape in enumerate(shapes)
        ]
        self._first = retrieval.sink_tokens
        self._name = retrieval.index_name

    @property
    def learns(self) -> bool:
        """Whether queries are worth keeping for `observe`."""
        return any(isinstance(selector, LearnsFromQueries) for selector in self.layers)

    @property
    def travels(self) -> bool:
        """Whether chunks carry their part of it."""
        return any(isinstance(selector, TravelsWithChunks) for selector in self.layers)

    @property
    def held_bytes(self) -> int:
        return sum(selector.held_bytes for selector in self.layers if selector is not None)

    def take(self, chunk: KVChunk) -> bool:
        """Adds the next chunk; whether it brought its part of the index with it."""
        parts = self._parts(chunk)
        first = max(0, self._first - int(chunk.positions[0]))
        if parts is not None:
            try:
                return self._restore(parts, len(chunk) - first)
            except CodecError:
                pass  # of another making, for instance by another release: computed anew below
        for layer, selector in enumerate(self.layers):
            if selector is not None and len(selector) + self._first < int(chunk.positions[0]) + len(chunk):
                selector.add(chunk.keys[layer][:, first:], chunk.values[layer][:, first:])
        return False

    def extras_of(self, first: int, stop: int) -> tuple[Extras, frozenset[str]]:
        """What belongs to the chunk of tokens `[first, stop)`, and the names of what is layered in it."""
        by_name: dict[str, dict[int, Tensor]] = {}
        for layer, selector in enumerate(self.layers):
            if isinstance(selector, TravelsWithChunks):
                for name, tensor in selector.export(max(first, self._first), stop).items():
                    by_name.setdefault(name, {})[layer] = tensor
        extras: Extras = {}
        layered = set()
        for name, of_layers in by_name.items():
            tensors = list(of_layers.values())
            if len({(t.dtype, t.shape) for t in tensors}) == 1:
                extras[f"{self._name}:all:{name}"] = torch.stack(tensors)
                if len(tensors) == len(self.layers):
                    layered.add(f"{self._name}:all:{name}")
            else:
                extras.update({f"{self._name}:{layer}:{name}": tensor for layer, tensor in of_layers.items()})
        return extras, frozenset(layered)

    def observe(self, layer: int, queries: Tensor, positions: Tensor) -> None:
        """Queries `[Hq, Q, D]` of one layer, at `positions` `[Q]`."""
        selector = self.layers[layer]
        if isinstance(selector, LearnsFromQueries):
            selector.observe(queries, positions)

    def build(self) -> None:
        for selector in self.layers:
            if isinstance(selector, LearnsFromQueries):
                selector.build()

    def state(self) -> Extras:
        """What belongs to the whole sequence, as extras of one chunk."""
        return {}

    def expect_state(self, extras: Mapping[str, Tensor]) -> None:
        """What `state` gave of the sequence that is about to be taken chunk by chunk."""

    def _parts(self, chunk: KVChunk) -> list[Mapping[str, Tensor]] | None:
        """What the chunk holds for each retrieving layer; None unless all of them find something."""
        retrieving = [layer for layer, selector in enumerate(self.layers) if isinstance(selector, TravelsWithChunks)]
        parts: dict[int, Extras] = {layer: {} for layer in retrieving}
        for name, tensor in chunk.extras.items():
            if not name.startswith(f"{self._name}:"):
                continue
            where, _, inner = name.removeprefix(f"{self._name}:").partition(":")
            if where == "all" and len(tensor) == len(retrieving):
                for layer, of_layer in zip(retrieving, tensor, strict=True):
                    parts[layer][inner] = of_layer
            elif where.isdigit() and int(where) in parts:
                parts[int(where)][inner] = tensor
        return [parts[layer] for layer in retrieving] if retrieving and all(parts.values()) else None

    def _restore(self, parts: Sequence[Mapping[str, Tensor]], tokens: int) -> bool:
        """Raises `CodecError` where a part is not its layer's; layers before it have taken theirs."""
        retrieving = [selector for selector in self.layers if isinstance(selector, TravelsWithChunks)]
        for selector, of_layer in zip(retrieving, parts, strict=True):
            selector.restore(of_layer, tokens)
        return True
