"""The context length from which a decode step with retrieval beats dense attention, measured on this machine."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ..blend.attention import causal_attention
from ..retrieval.attention import attend, attend_selected
from ..retrieval.paged_kv import PagedKV
from ..retrieval.selector import LayerShape, LearnsFromQueries
from ..retrieval.settings import CHUNK_TOKENS, Retrieval

NEVER = 1 << 40  # tokens: longer than any context
_SIZES = (2048, 8192, 32768)  # tokens
_ROUNDS = 9
_QUERIES = 256  # what an index learns from


def break_even(retrieval: Retrieval, shape: LayerShape, value_dim: int, dtype: torch.dtype) -> int:
    """Tokens of the shortest context for which a decode step with retrieval is faster; `NEVER` if there is none.

    It times one layer's step at growing lengths, on random keys, until retrieval wins. Between two lengths, and beyond
    the last, it assumes that the times of both kinds of attention grow linearly.
    """
    dense, sparse = [], []
    for tokens in _SIZES:
        dense_step, sparse_step = _steps(retrieval, shape, value_dim, dtype, tokens)
        dense.append(median_s(dense_step))
        sparse.append(median_s(sparse_step))
        if sparse[-1] <= dense[-1]:
            break
    return crossing(dense, sparse)


def crossing(dense_s: Sequence[float], sparse_s: Sequence[float]) -> int:
    """Length in tokens from which dense attention is slower, given both kinds' times at the first sizes of `_SIZES`."""
    if len(dense_s) == 1:
        return _SIZES[0]
    first, second = len(dense_s) - 2, len(dense_s) - 1
    gain = (dense_s[second] - sparse_s[second]) - (dense_s[first] - sparse_s[first])
    if gain <= 0:
        return NEVER
    step = _SIZES[second] - _SIZES[first]
    tokens = _SIZES[first] + (sparse_s[first] - dense_s[first]) * step / gain
    return min(NEVER, math.ceil(tokens / CHUNK_TOKENS) * CHUNK_TOKENS)


def _steps(
    retrieval: Retrieval, shape: LayerShape, value_dim: int, dtype: torch.dtype, tokens: int
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    random = torch.Generator().manual_seed(0)
    keys = torch.randn(shape.kv_heads, tokens, shape.head_dim, generator=random).to(dtype)
    values = torch.randn(shape.kv_heads, tokens, value_dim, generator=random).to(dtype)
    queries = torch.randn(shape.query_heads, _QUERIES, shape.head_dim, generator=random).to(dtype)
    selector, pages = retrieval.selector(shape, retrieval.dense_layers), PagedKV(CHUNK_TOKENS)
    for first in range(0, tokens, CHUNK_TOKENS):
        here = slice(first, first + CHUNK_TOKENS)
        pages.append(keys[:, here].contiguous(), values[:, here].contiguous())
        behind = slice(max(first, retrieval.sink_tokens), first + CHUNK_TOKENS)
        selector.add(keys[:, behind], values[:, behind])
    if isinstance(selector, LearnsFromQueries):
        selector.observe(queries, torch.arange(tokens - _QUERIES, tokens))
        selector.build()
    ends = slice(-retrieval.sink_tokens - retrieval.window_tokens - CHUNK_TOKENS // 2, None)
    near_keys, near_values = keys[:, ends].contiguous(), values[:, ends].contiguous()
    query, position = queries[:, 0], torch.tensor([tokens - 1])
    budget = retrieval.budget(len(selector))

    def dense() -> Tensor:
        return causal_attention(query[:, None], keys, values, position, scale=shape.scale)

    def sparse() -> Tensor:
        chosen = selector.select(query, tokens, budget)
        near = attend(query, near_keys, near_values, scale=shape.scale)
        return attend_selected(near, chosen, partial(pages.attend, query, scale=shape.scale))[0]

    return dense, sparse


def median_s(step: Callable[[], object]) -> float:
    """Median seconds of a call, without the first two, in which an index may be built."""
    step()
    step()
    taken = []
    for _ in range(_ROUNDS):
        began_s = time.perf_counter()
        step()
        taken.append(time.perf_counter() - began_s)
    return statistics.median(taken)
