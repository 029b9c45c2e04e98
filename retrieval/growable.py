"""A tensor that grows along one dimension."""

from __future__ import annotations

import torch
from torch import Tensor


class GrowableTensor:
    """Tensors appended along one dimension, in memory that doubles when it is full.

    So appending one row at a time takes as long, all in all, as appending them at once.

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
        """A view of all rows; its content does not change when more are added.

        Raises
        ------
        ValueError : no tensor was added, so the shape is unknown.
        """
        if self._memory is None:
            raise ValueError("no tensor was added yet; add one first, which may be empty")
        return self._memory.narrow(self._dim, 0, self._count)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows, without the memory that is reserved."""
        return 0 if self._memory is None else self.all.nbytes

    def add(self, rows: Tensor) -> None:
        """Copies rows behind the others; the first ones decide dtype, device and the other dimensions."""
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
