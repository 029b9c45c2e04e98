"""Exact search, the reference for every other selector, and random choice, their lower bound."""

from __future__ import annotations

import torch
from torch import Tensor

from .growable import GrowableTensor
from .selector import LayerShape, Pooling, Selection, pooled, top_ids


class ExactSelector:
    """`Selector` that computes all scores.

    Parameters
    ----------
    start : first token of the context that it covers.
    pooling : see `pooled`.
    """

    name = "exact"

    def __init__(self, shape: LayerShape, *, start: int = 0, pooling: Pooling = "max") -> None:
        self.shape, self.start, self._pooling = shape, start, pooling
        self._keys = GrowableTensor(dim=1)
        self._keys.add(torch.empty(shape.kv_heads, 0, shape.head_dim))

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def held_bytes(self) -> int:
        return 0

    def add(self, keys: Tensor, values: Tensor) -> None:
        self.shape.check_keys(keys)
        self._keys.add(keys)

    def select(self, queries: Tensor, position: int, budget: int) -> Selection:
        self.shape.check_query(queries, budget)
        keys = self._keys.all
        grouped = queries.float().view(self.shape.kv_heads, self.shape.group, -1)
        scores = (grouped @ keys.mT).flatten(0, 1) * self.shape.scale
        ids = top_ids(pooled(scores, self.shape, self._pooling), budget, self.start)
        return Selection(ids, keys.nbytes, keys.shape[0] * keys.shape[1])


class RandomSelector:
    """`Selector` that draws tokens at random.

    Parameters
    ----------
    seed : equal seeds draw equally.
    """

    name = "random"

    def __init__(self, shape: LayerShape, *, start: int = 0, seed: int = 0) -> None:
        self.shape, self.start = shape, start
        self._random = torch.Generator().manual_seed(seed)
        self._tokens = 0

    def __len__(self) -> int:
        return self._tokens

    @property
    def held_bytes(self) -> int:
        return 0

    def add(self, keys: Tensor, values: Tensor) -> None:
        self.shape.check_keys(keys)
        self._tokens += keys.shape[1]

    def select(self, queries: Tensor, position: int, budget: int) -> Selection:
        self.shape.check_query(queries, budget)
        drawn = torch.rand(self.shape.kv_heads, self._tokens, generator=self._random)
        return Selection(top_ids(drawn, budget, self.start), 0)
