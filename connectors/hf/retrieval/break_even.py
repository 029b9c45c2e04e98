"""From which length on retrieval pays: both kinds of attention timed here, on one layer, and the lines they make."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ....blend.attention import causal_attention
from ....retrieval.attention import attend, merge
from ....retrieval.pages import Pages
from ....retrieval.selector import LayerShape, LearnsFromQueries
from ....retrieval.settings import CHUNK_TOKENS, Retrieval

NEVER = 1 << 40
_SIZES = (2048, 8192, 32768)  # tokens
_ROUNDS = 9
_QUERIES = 256  # what an index learns from


def break_even(retrieval: Retrieval, shape: LayerShape, value_dim: int, dtype: torch.dtype) -> int:
    """Tokens of the shortest context of which a decoding step is faster with retrieval, on this machine; `NEVER`.

    Times one layer's step at growing lengths, on random keys, until retrieval wins; between two lengths, and beyond the
    last, both kinds of attention are taken for lines.
    """
    dense, sparse = [], []
    for tokens in _SIZES:
        of_dense, of_sparse = _steps(retrieval, shape, value_dim, dtype, tokens)
        dense.append(median_s(of_dense))
        sparse.append(median_s(of_sparse))
        if sparse[-1] <= dense[-1]:
            break
    return crossing(dense, sparse)


def crossing(dense_s: Sequence[float], sparse_s: Sequence[float]) -> int:
    """Where dense attention becomes the slower one, by its times at the first of `_SIZES` and those of the other."""
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
    selector, pages = retrieval.selector(shape, retrieval.dense_layers), Pages(CHUNK_TOKENS)
    for first in range(0, tokens, CHUNK_TOKENS):
        here = slice(first, first + CHUNK_TOKENS)
        pages.append(keys[:, here].contiguous(), values[:, here].contiguous())
        behind = slice(max(first, retrieval.sink_tokens), first + CHUNK_TOKENS)
        selector.add(keys[:, behind], values[:, behind])
    if isinstance(selector, LearnsFromQueries):
        selector.observe(queries, torch.arange(tokens - _QUERIES, tokens))
        selector.build()
    near = slice(-retrieval.sink_tokens - retrieval.window_tokens - CHUNK_TOKENS // 2, None)
    near_keys, near_values = keys[:, near].contiguous(), values[:, near].contiguous()
    query, position = queries[:, 0], torch.tensor([tokens - 1])
    budget = retrieval.budget(len(selector))

    def dense() -> Tensor:
        return causal_attention(query[:, None], keys, values, position, scale=shape.scale)

    def sparse() -> Tensor:
        chosen = selector.select(query, tokens, budget)
        parts = [attend(query, near_keys, near_values, scale=shape.scale)]
        parts.append(pages.attend(query, chosen.ids, scale=shape.scale))
        return merge(parts if chosen.rest is None else [*parts, chosen.rest])[0]

    return dense, sparse


def median_s(step: Callable[[], object]) -> float:
    """Seconds of a call, when the first two are over: an index may be built in them."""
    step()
    step()
    taken = []
    for _ in range(_ROUNDS):
        began_s = time.perf_counter()
        step()
        taken.append(time.perf_counter() - began_s)
    return statistics.median(taken)
