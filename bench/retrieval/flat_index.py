"""Exact search over the keys of one KV head, the oracle that every other index is measured against."""

from __future__ import annotations

import torch
from torch import Tensor

from ...retrieval.growable import GrowableTensor


class FlatIndex:
    """`GrowableIndex` of the keys of one KV head: compares each with every query.

    Parameters
    ----------
    dim : D.
    """

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self._rows = GrowableTensor()
        self._rows.add(torch.empty(0, dim))

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, keys: Tensor) -> None:
        """`[T, D]`, copied."""
        if keys.ndim != 2 or keys.shape[1] != self.dim:
            raise ValueError(f"keys are {list(keys.shape)}; expected [T, {self.dim}]")
        self._rows.add(keys)

    @property
    def keys(self) -> Tensor:
        """All of them, `[T, D]` float32."""
        return self._rows.all

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k largest inner products, exactly; see `KeyIndex`."""
        if queries.ndim != 2 or queries.shape[1] != self.dim or bool(queries.isnan().any()):
            raise ValueError(f"queries are {list(queries.shape)}; expected [Q, {self.dim}] without NaN")
        found = min(k, len(self))
        scores, ids = (queries.float() @ self.keys.T).topk(found, dim=1)
        pad = (0, k - found)
        scores = torch.nn.functional.pad(scores, pad, value=-torch.inf)
        return scores, torch.nn.functional.pad(ids, pad, value=-1)
