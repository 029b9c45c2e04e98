"""KV of the tokens that are always attended to, the sinks and the window, for one layer."""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST_TOKENS = 512  # of a buffer


class SinkWindow:
    """Keys and values of sinks and window in their order, in one buffer that grows.

    Parameters
    ----------
    heads, dim, value_dim : H, D, Dv.
    """

    def __init__(self, heads: int, dim: int, value_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self._keys = torch.empty(heads, 0, dim, dtype=dtype, device=device)
        self._values = torch.empty(heads, 0, value_dim, dtype=dtype, device=device)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def keys(self) -> Tensor:
        """`[H, T, D]`, valid until the next change."""
        return self._keys[:, : self._count]

    @property
    def values(self) -> Tensor:
        """`[H, T, Dv]`, valid until the next change."""
        return self._values[:, : self._count]

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Copy the next tokens, `[H, T, D]` and `[H, T, Dv]`, behind the others."""
        stop = self._count + keys.shape[1]
        if stop > self._keys.shape[1]:
            self._resize(max(2 * self._count, stop, _LEAST_TOKENS))
        self._keys[:, self._count : stop] = keys
        self._values[:, self._count : stop] = values
        self._count = stop

    def remove(self, first: int, stop: int) -> None:
        """Remove the tokens at places `[first, stop)`, and shrink a buffer that is mostly empty."""
        rest = self._count - stop
        for buffer in (self._keys, self._values):
            buffer[:, first : first + rest] = buffer[:, stop : self._count].clone()
        self._count = first + rest
        if self._keys.shape[1] > 4 * max(self._count, _LEAST_TOKENS):
            self._resize(2 * self._count)

    def _resize(self, capacity: int) -> None:
        keys = self._keys.new_empty(self._keys.shape[0], capacity, self._keys.shape[2])
        values = self._values.new_empty(self._values.shape[0], capacity, self._values.shape[2])
        keys[:, : self._count], values[:, : self._count] = self.keys, self.values
        self._keys, self._values = keys, values
