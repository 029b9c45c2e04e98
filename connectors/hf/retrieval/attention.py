"""How transformers asks: a cache that keeps only what is near, and an attention function that looks further."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

try:
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
    from transformers.cache_utils import Cache, CacheLayerMixin
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask
except ImportError as error:
    raise ImportError(
        'kvloom.connectors.hf.retrieval.attention needs transformers: pip install "kvloom[transformers]"'
    ) from error

from ....errors import EngineError
from .sequence import Context

IMPLEMENTATION = "kvloom"
_LAYER = "kvloom_layer"  # by this attribute of the keys that the cache gives, attention knows whose they are
_switching: WeakKeyDictionary[PreTrainedModel, threading.Lock] = WeakKeyDictionary()


class RetrievalLayer(CacheLayerMixin):
    """One layer of a batch: takes new tokens, gives the model nothing but them, and attends where they belong.

    Rows of a batch are sequences of their own, of different lengths and without padding. Finished ones stay as they
    are, and their attention is zero.
    """

    is_sliding = False

    def __init__(self, index: int, cache: RetrievalCache) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._index, self._cache = index, cache

    def lazy_initialization(self, *_: Any) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self._cache.expect_turn(self._index)
        if len(key_states) != len(self._cache.contexts):
            raise EngineError(
                f"{len(key_states)} sequences where there are {len(self._cache.contexts)}; use num_beams=1 and "
                "num_return_sequences=1"
            )
        for context, keys, values in zip(self._cache.contexts, key_states, value_states, strict=True):
            if not context.is_done:
                context.append(self._index, keys, values)
        setattr(key_states, _LAYER, self)
        return key_states, value_states

    def attend(self, queries: Tensor, value_dim: int) -> Tensor:
        """`[B, Hq, T, D]` -> `[B, T, Hq, Dv]`."""
        batch, heads, count, _ = queries.shape
        out = queries.new_zeros(batch, count, heads, value_dim)
        for row, context in enumerate(self._cache.contexts):
            if not context.is_done:
                out[row] = context.attend(self._index, queries[row]).transpose(0, 1)
        self._cache.attended(self._index, count)
        return out

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The new tokens alone: what is behind them is masked where it lies."""
        return query_length, self.get_seq_length()

    def get_seq_length(self) -> int:
        return self._cache.seen_tokens

    def get_max_length(self) -> int:
        return -1

    def reorder_cache(self, *_: Any) -> None:
        raise EngineError("sequences cannot be exchanged while they are decoded with retrieval; use num_beams=1")


class RetrievalCache(Cache):
    """The cache of a batch of contexts, for the length of one call.

    Attributes
    ----------
    seen_tokens : of the longest row, padding included, as `generate` counts.
    """

    def __init__(self, contexts: Sequence[Context], num_layers: int) -> None:
        self.contexts = contexts
        self.seen_tokens = max(context.length for context in contexts)
        self._next = 0
        self._is_attending = False
        super().__init__(layers=[RetrievalLayer(index, self) for index in range(num_layers)])

    def expect_turn(self, layer: int) -> None:
        """Raises `EngineError` unless the layer before has attended here, which only our attention does."""
        if layer != self._next or self._is_attending:
            raise EngineError(
                f"layer {layer} takes tokens, but layer {self._next} is due: the model's attention implementation "
                "was changed while it was decoding with retrieval"
            )
        self._is_attending = True

    def expect_end(self) -> None:
        """Raises `EngineError` unless the last layer, too, has attended here."""
        if self._next or self._is_attending:
            raise EngineError(
                f"layer {self._next} has not attended: the model's attention implementation was changed while it was "
                "decoding with retrieval"
            )

    def attended(self, layer: int, count: int) -> None:
        """The layer is through; after the last one the contexts go on."""
        self._is_attending, self._next = False, layer + 1
        if self._next == len(self.layers):
            self._next = 0
            self.seen_tokens += count
            for context in self.contexts:
                if not context.is_done:
                    context.advance(count)


def attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention function: ours for keys from a `RetrievalCache`, what `sdpa` does for any others."""
    layer = getattr(key, _LAYER, None)
    if layer is None:
        found: tuple[Tensor, Tensor | None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **options
        )
        return found
    return layer.attend(query, value.shape[-1]), None


@contextmanager
def retrieving(model: PreTrainedModel) -> Iterator[None]:
    """Within, the model attends through `attention`. One caller at a time: it is the model's own setting.

    Raises
    ------
    EngineError : the model does not let its attention be chosen.
    """
    with _switching.setdefault(model, threading.Lock()):
        AttentionInterface.register(IMPLEMENTATION, attention)
        AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
        before = model.config._attn_implementation  # noqa: SLF001  the only way to ask
        model.set_attn_implementation(IMPLEMENTATION)
        try:
            if model.config._attn_implementation != IMPLEMENTATION:  # noqa: SLF001
                raise EngineError(f"{type(model).__name__} does not let its attention be chosen")
            yield
        finally:
            model.set_attn_implementation(before)
