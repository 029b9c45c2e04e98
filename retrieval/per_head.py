"""A selector made of one maximum inner product index for each KV head."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..core import GrowableIndex, KeyIndex
from .selector import LayerShape, Pooling, Selection, pooled, top_ids


class PerHeadSelector:
    """`Selector` of one `KeyIndex` for each KV head: whatever does maximum inner product search.

    Every query head of a group searches for `budget` tokens; what they find together is weighed by the softmax of each
    over it, so that one set of `budget` tokens is chosen for the group.

    Parameters
    ----------
    make : an empty index of keys of so many dimensions.
    """

    def __init__(
        self,
        shape: LayerShape,
        make: Callable[[int], GrowableIndex],
        *,
        name: str,
        start: int = 0,
        pooling: Pooling = "max",
    ) -> None:
        self.shape, self.start, self.name, self._pooling = shape, start, name, pooling
        self.heads: Sequence[GrowableIndex] = [make(shape.head_dim) for _ in range(shape.kv_heads)]

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
        ids = torch.full((self.shape.kv_heads, min(budget, len(self))), -1)
        read, compared = 0, 0
        for h, of_group in enumerate(queries.view(self.shape.kv_heads, self.shape.group, -1)):
            found = self._of_group(self.heads[h], of_group, budget)
            ids[h, : len(found)] = found + self.start
            compared += len(self)
            read += len(self) * self.shape.head_dim * 4
        return Selection(ids, read, compared)

    def _of_group(self, head: KeyIndex, queries: Tensor, budget: int) -> Tensor:
        scores, ids = head.search(queries, min(budget, len(self)))
        union, places = ids[ids >= 0].unique(return_inverse=True)
        weighed = torch.full((self.shape.group, len(union)), -torch.inf)
        rows = torch.arange(self.shape.group)[:, None].expand_as(ids)[ids >= 0]
        weighed[rows, places] = scores[ids >= 0].float() * self.shape.scale
        one = LayerShape(1, self.shape.group, self.shape.head_dim, self.shape.scale)
        chosen: Tensor = union[top_ids(pooled(weighed, one, self._pooling), budget)[0]]
        return chosen
