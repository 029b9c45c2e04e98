"""Retrieval inside transformers: a cache that gives the model its new tokens only, and its attention function."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

try:
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
    from transformers.cache_utils import Cache, CacheLayerMixin
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import eager_mask, sdpa_mask
except ImportError as error:
    raise ImportError(
        'kvloom.connectors.hf.retrieval.attention needs transformers: pip install "kvloom[transformers]"'
    ) from error

from ....errors import EngineError
from .sequence import DecodedSequence

IMPLEMENTATION = "kvloom"
_BESIDE_EAGER = "kvloom_beside_eager"
_LAYER = "kvloom_layer"  # an attribute of the keys that the cache gives: the layer that attends for them
_SWITCHING: WeakKeyDictionary[PreTrainedModel, threading.Lock] = WeakKeyDictionary()
_Result = TypeVar("_Result")


class RetrievalLayer(CacheLayerMixin):
    """One layer of a batch. It gives the model only the new tokens, and attends to all others on the model's behalf.

    The rows of a batch are sequences of their own, of different lengths and without padding. A sequence that is done
    takes no tokens, and its attention is zero.
    """

    is_sliding = False

    def __init__(self, index: int, cache: RetrievalCache) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._index, self._cache = index, cache

    def lazy_initialization(self, *_: Any) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self._cache.expect_turn(self._index)
        if len(key_states) != len(self._cache.sequences):
            raise EngineError(
                f"the model decodes {len(key_states)} sequences; the cache has {len(self._cache.sequences)}"
            )
        for sequence, keys, values in zip(self._cache.sequences, key_states, value_states, strict=True):
            if not sequence.is_done:
                sequence.append(self._index, keys, values)
        setattr(key_states, _LAYER, self)
        return key_states, value_states

    def attend(self, queries: Tensor, value_dim: int) -> Tensor:
        """Attention of the new tokens: `[B, Hq, T, D]` -> `[B, T, Hq, Dv]`."""
        batch, heads, count, _ = queries.shape
        out = queries.new_zeros(batch, count, heads, value_dim)
        for row, sequence in enumerate(self._cache.sequences):
            if not sequence.is_done:
                out[row] = sequence.attend(self._index, queries[row]).transpose(0, 1)
        self._cache.end_layer(self._index, count)
        return out

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Length and offset of the mask: of the new tokens alone, since `attend` masks the others."""
        # The first releases of transformers 5 give the positions in place of their number.
        return query_length if isinstance(query_length, int) else len(query_length), self.get_seq_length()

    def get_seq_length(self) -> int:
        return self._cache.seen_tokens

    def get_max_length(self) -> int:
        return -1

    def reorder_cache(self, *_: Any) -> None:
        raise EngineError("sequences cannot be reordered while they are decoded with retrieval; use num_beams=1")


class RetrievalCache(Cache):
    """The cache of a batch of sequences, for one call of the model or of `generate`.

    Attributes
    ----------
    seen_tokens : tokens of the longest row, padding included, as `generate` counts.
    """

    def __init__(self, sequences: Sequence[DecodedSequence], num_layers: int) -> None:
        self.sequences = sequences
        self.seen_tokens = max(sequence.length for sequence in sequences)
        self._next = 0
        self._is_attending = False
        super().__init__(layers=[RetrievalLayer(index, self) for index in range(num_layers)])

    def expect_turn(self, layer: int) -> None:
        """Begin a layer; raises `EngineError` unless the layer before has attended, which only our function does."""
        if layer != self._next or self._is_attending:
            raise EngineError(
                f"layer {layer} takes tokens, but layer {self._next} is due: the model's attention implementation "
                "was changed while it was decoding with retrieval"
            )
        self._is_attending = True

    def expect_end(self) -> None:
        """Raises `EngineError` unless the last layer, too, has attended."""
        if self._next or self._is_attending:
            raise EngineError(
                f"layer {self._next} has not attended: the model's attention implementation was changed while it was "
                "decoding with retrieval"
            )

    def end_layer(self, layer: int, count: int) -> None:
        """End a layer, which attended for `count` tokens; after the last one the sequences advance."""
        self._is_attending, self._next = False, layer + 1
        if self._next == len(self.layers):
            self._next = 0
            self.seen_tokens += count
            for sequence in self.sequences:
                if not sequence.is_done:
                    sequence.advance(count)


def attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention function: it retrieves for keys from a `RetrievalCache`, and does what `sdpa` does for others."""
    layer = getattr(key, _LAYER, None)
    if layer is None:
        found: tuple[Tensor, Tensor | None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **options
        )
        return found
    return layer.attend(query, value.shape[-1]), None


def attention_beside_eager(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """The same for models that attend by their own code: for caps and sinks, which `sdpa` leaves out, for instance."""
    layer = getattr(key, _LAYER, None)
    if layer is None:
        eager = sys.modules[type(module).__module__].eager_attention_forward
        found: tuple[Tensor, Tensor | None] = eager(module, query, key, value, attention_mask, **options)
        return found
    return layer.attend(query, value.shape[-1]), None


def with_retrieval(model: PreTrainedModel, call: Callable[[], _Result]) -> _Result:
    """The result of `call`, during which the model attends through `attention`.

    One caller at a time, since the attention function is a setting of the model; calls by others that go on meanwhile
    get what `sdpa` gives, or what the model's own code does if the model attends by that.

    Raises
    ------
    EngineError : the model does not let its attention be chosen.
    """
    with _SWITCHING.setdefault(model, threading.Lock()):
        before = _implementation(model)
        implementation = IMPLEMENTATION
        if before == "eager" or not getattr(model, "_supports_sdpa", True):
            implementation = _BESIDE_EAGER
            AttentionInterface.register(implementation, attention_beside_eager)
            AttentionMaskInterface.register(implementation, eager_mask)
        else:
            AttentionInterface.register(implementation, attention)
            AttentionMaskInterface.register(implementation, sdpa_mask)
        try:
            try:
                model.set_attn_implementation(implementation)
                if _implementation(model) != implementation:
                    raise EngineError(f"{type(model).__name__} does not let its attention be chosen")
                return call()
            finally:
                model.set_attn_implementation(before)
        finally:
            if _implementation(model) != before:  # a Ctrl-C came in the line above
                model.set_attn_implementation(before)


def _implementation(model: PreTrainedModel) -> str:
    name: str = model.config._attn_implementation  # noqa: SLF001  the only way to ask
    return name
