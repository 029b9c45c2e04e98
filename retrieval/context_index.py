"""The indexes of all layers of one sequence, and the parts of them that are stored with chunks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..core import KVChunk
from ..errors import CodecError
from .selector import KeepsState, LayerShape, LearnsFromQueries, Selector, TravelsWithChunks
from .settings import Retrieval

Extras = dict[str, Tensor]


class ContextIndex:
    """One selector for each layer that retrieves. Only one thread at a time may use it.

    An extra of a chunk is named `METHOD:DIGEST:LAYER:TENSOR`. Layers whose tensors have one dtype and shape share an
    extra, stacked, with `all` for the layer; it can be read layer by layer if every layer of the model is in it. What
    belongs to the whole sequence has `state.LAYER` for the layer.

    Parameters
    ----------
    shapes : of every layer of the model; None for layers that attend to everything.

    Attributes
    ----------
    start : first token that is indexed, the one behind the sinks.
    layers : the selectors; None for layers that attend to everything.
    """

    def __init__(self, retrieval: Retrieval, shapes: Sequence[LayerShape | None]) -> None:
        self.start = retrieval.sink_tokens
        self.layers: list[Selector | None] = [
            None if shape is None else retrieval.selector(shape, layer) for layer, shape in enumerate(shapes)
        ]
        self._name = retrieval.index_name

    @property
    def learns(self) -> bool:
        """Whether `observe` makes use of queries."""
        return any(isinstance(selector, LearnsFromQueries) for selector in self.layers)

    @property
    def travels(self) -> bool:
        """Whether chunks carry their part of the index."""
        return bool(self._traveling())

    @property
    def held_bytes(self) -> int:
        return sum(selector.held_bytes for selector in self.layers if selector is not None)

    # ------------------------------------------------------------------------------------------------- chunks

    def add(self, chunk: KVChunk) -> bool:
        """Index the next chunk; whether it brought its part of the index with it, so that nothing was computed."""
        first, stop = int(chunk.positions[0]), int(chunk.positions[0]) + len(chunk)
        skip = max(0, self.start - first)
        parts = self._parts_of(chunk)
        if parts is not None:
            try:
                for layer, traveling in self._traveling().items():
                    traveling.restore(parts[layer], len(chunk) - skip)
            except CodecError:
                pass  # made by another release, for instance: computed again below
            else:
                return True
        for layer, selector in enumerate(self.layers):
            if selector is not None and self.start + len(selector) < stop:
                selector.add(chunk.keys[layer][:, skip:], chunk.values[layer][:, skip:])
        return False

    def extras_of(self, first: int, stop: int) -> tuple[Extras, frozenset[str]]:
        """The part of the index that belongs to the chunk of tokens `[first, stop)`, and which extras are layered."""
        by_name: dict[str, dict[int, Tensor]] = {}
        for layer, selector in self._traveling().items():
            for name, tensor in selector.export(max(first, self.start), stop).items():
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

    def _parts_of(self, chunk: KVChunk) -> dict[int, Extras] | None:
        """What a chunk has for each layer whose index travels; None unless it has something for all of them."""
        parts: dict[int, Extras] = {layer: {} for layer in self._traveling()}
        for name, tensor in chunk.extras.items():
            if not name.startswith(f"{self._name}:"):
                continue
            where, _, inner = name.removeprefix(f"{self._name}:").partition(":")
            if where == "all" and len(tensor) == len(parts):
                for layer, of_layer in zip(parts, tensor, strict=True):
                    parts[layer][inner] = of_layer
            elif where.isdigit() and int(where) in parts:
                parts[int(where)][inner] = tensor
        return parts if parts and all(parts.values()) else None

    # ------------------------------------------------------------------------------------------------ queries

    def observe(self, layer: int, queries: Tensor, positions: Tensor) -> None:
        """Let a layer's index learn from queries `[Hq, Q, D]` at `positions` `[Q]`, if it can."""
        selector = self.layers[layer]
        if isinstance(selector, LearnsFromQueries):
            selector.observe(queries, positions)

    def build(self) -> None:
        """Build the indexes that learn from queries, over what was added."""
        for selector in self.layers:
            if selector is not None and len(selector) and isinstance(selector, LearnsFromQueries):
                selector.build()

    # -------------------------------------------------------------------------------------------------- state

    def state(self) -> Extras:
        """What the indexes know of the whole sequence, as extras of one chunk."""
        return {
            f"{self._name}:state.{layer}:{name}": tensor
            for layer, selector in enumerate(self.layers)
            if selector is not None and len(selector) and isinstance(selector, KeepsState)
            for name, tensor in selector.state().items()
        }

    def restore_state(self, extras: Mapping[str, Tensor]) -> bool:
        """Restore what `state` gave for the same tokens; whether there was such a state, and all of it fitted."""
        took = False
        for layer, selector in enumerate(self.layers):
            prefix = f"{self._name}:state.{layer}:"
            parts = {name.removeprefix(prefix): t for name, t in extras.items() if name.startswith(prefix)}
            if not parts or selector is None or not isinstance(selector, KeepsState):
                continue
            try:
                selector.restore_state(parts)
            except CodecError:
                return False
            took = True
        return took

    def _traveling(self) -> Mapping[int, TravelsWithChunks]:
        return {
            layer: selector
            for layer, selector in enumerate(self.layers)
            if selector is not None and isinstance(selector, TravelsWithChunks)
        }
