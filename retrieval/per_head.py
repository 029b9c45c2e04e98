"""A selector made of one maximum inner product index for each KV head."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ..core import GrowableIndex, KeyIndex
from .selector import LayerShape, Pooling, Selection, pooled, top_ids


@dataclass(frozen=True, slots=True, eq=False)
class SearchResult:
    """Result and cost of a search.

    Attributes
    ----------
    scores, ids : see `KeyIndex.search`.
    compared_keys : keys compared with the queries; a key that several queries met counts once, if the index shares it.
    read_bytes : bytes read: these keys, and edges or codes.
    """

    scores: Tensor
    ids: Tensor
    compared_keys: int
    read_bytes: int


@runtime_checkable
class ReportsSearchCost(Protocol):
    """Optional capability of a `KeyIndex`: it reports the cost of a search for the queries of one group."""

    def search_with_cost(self, queries: Tensor, k: int) -> SearchResult: ...


class PerHeadSelector:
    """`Selector` made of one `KeyIndex` for each KV head.

    Every query head of a group searches for its share of `budget` tokens. The tokens found by the group are weighed by
    each head's softmax over them, and at most `budget` of them are chosen.

    Parameters
    ----------
    make : an empty index of keys of so many dimensions.
    query_ratio : share of the budget that each query head searches for.
    threads : number of threads that search KV heads in parallel; useful if the index releases the interpreter's lock.
    """

    def __init__(
        self,
        shape: LayerShape,
        make: Callable[[int], GrowableIndex],
        *,
        name: str,
        start: int = 0,
        pooling: Pooling = "max",
        query_ratio: float = 1.0,
        threads: int = 1,
    ) -> None:
        if not 0 < query_ratio <= 1 or threads < 1:
            raise ValueError(f"query_ratio {query_ratio}, threads {threads}; expected one in (0, 1], at least 1")
        self.shape, self.start, self.name, self._pooling = shape, start, name, pooling
        self.heads: Sequence[GrowableIndex] = [make(shape.head_dim) for _ in range(shape.kv_heads)]
        self._query_ratio = query_ratio
        self.run = map if threads == 1 else ThreadPoolExecutor(threads).map
        """`map`, in threads if there are several."""

    def __len__(self) -> int:
        return len(self.heads[0])

    @property
    def held_bytes(self) -> int:
        return sum(getattr(head, "held_bytes", 0) for head in self.heads)

    def add(self, keys: Tensor, values: Tensor) -> None:
        self.shape.check_keys(keys)
        for head, of_head in zip(self.heads, keys, strict=True):
            head.add(of_head)

    def select(self, queries: Tensor, position: int, budget: int) -> Selection:
        self.shape.check_query(queries, budget)
        if budget == 0 or not len(self):
            return Selection(torch.empty(self.shape.kv_heads, 0, dtype=torch.int64), 0)
        share = budget if budget >= len(self) else max(1, math.ceil(budget * self._query_ratio))
        grouped = queries.view(self.shape.kv_heads, self.shape.group, -1)
        found = list(self.run(lambda head, of_group: search_with_cost(head, of_group, share), self.heads, grouped))
        ids = torch.full((self.shape.kv_heads, min(budget, len(self))), -1)
        for row, of_head in zip(ids, found, strict=True):
            chosen = self._of_group(of_head, budget)
            row[: len(chosen)] = chosen + self.start
        return Selection(ids, sum(f.read_bytes for f in found), sum(f.compared_keys for f in found))

    def _of_group(self, found: SearchResult, budget: int) -> Tensor:
        is_found = found.ids >= 0
        union, places = found.ids[is_found].unique(return_inverse=True)
        weighed = torch.full((self.shape.group, len(union)), -torch.inf)
        rows = torch.arange(self.shape.group)[:, None].expand_as(found.ids)[is_found]
        weighed[rows, places] = found.scores[is_found].float() * self.shape.scale
        one = LayerShape(1, self.shape.group, self.shape.head_dim, self.shape.scale)
        chosen: Tensor = union[top_ids(pooled(weighed, one, self._pooling), budget)[0]]
        return chosen


def search_with_cost(index: KeyIndex, queries: Tensor, k: int) -> SearchResult:
    """Searches an index; one that does not report its cost is charged for all its keys."""
    k = min(k, len(index))
    if isinstance(index, ReportsSearchCost):
        return index.search_with_cost(queries, k)
    scores, ids = index.search(queries, k)
    return SearchResult(scores, ids, len(index), len(index) * index.dim * 4)
