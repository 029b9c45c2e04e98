"""A tensor that grows by its rows."""

from __future__ import annotations

import torch
from torch import Tensor


class Rows:
    """Tensors of one shape but for one dimension, one behind the other in memory of their own.

    The memory doubles when it is full, so that adding a row at a time costs what adding all at once costs.

    Parameters
    ----------
    dim : the dimension that grows.
    """

    def __init__(self, dim: int = 0) -> None:
        self._dim = dim
        self._memory: Tensor | None = None
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def all(self) -> Tensor:
        """What was added so far, a view that stays as it is when more is added.

        Raises
        ------
        ValueError : nothing was ever added, so nobody knows its shape.
        """
        if self._memory is None:
            raise ValueError("nothing was added yet, not even an empty tensor")
        return self._memory.narrow(self._dim, 0, self._count)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows, without the memory kept for more."""
        return 0 if self._memory is None else self.all.nbytes

    def add(self, rows: Tensor) -> None:
        """Copied; the first tensor decides dtype, device and the other dimensions."""
        stop = self._count + rows.shape[self._dim]
        if self._memory is None or stop > self._memory.shape[self._dim]:
            like = rows if self._memory is None else self._memory
            sizes = list(like.shape)
            sizes[self._dim] = stop if self._memory is None else max(stop, 2 * sizes[self._dim])
            grown = torch.empty(sizes, dtype=like.dtype, device=like.device)
            if self._memory is not None:
                grown.narrow(self._dim, 0, self._count).copy_(self.all)
            self._memory = grown
        self._memory.narrow(self._dim, self._count, stop - self._count).copy_(rows)
        self._count = stop
