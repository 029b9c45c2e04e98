"""Attention over single tokens where they lie in an engine's blocks, by the kernel compiled for the processor."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from ....retrieval.attention import PartialAttention
from ....retrieval.kernels.ops import compiled_for_cpu
from ..packings import Packing

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True, eq=False)
class RowsInPlace:
    """Views `[B, H, N, D]` and `[B, H, N, Dv]` of a cache; rows of values are contiguous, those of keys may not be."""

    keys: Tensor
    values: Tensor
    kernel: ModuleType

    def attend(
        self,
        queries: Tensor,
        blocks: Tensor,
        block_tokens: int,
        ids: Tensor,
        *,
        scale: float,
        keys: Tensor | None = None,
    ) -> PartialAttention:
        """Attention of queries `[Hq, D]` over the tokens `ids` `[H, K]` of a row of blocks `[n]`.

        Ids are positions in the row; -1 is none.

        Parameters
        ----------
        keys : `[H, S, D]`, a copy of the first keys of the row in the cache's dtype, which are read there; ids are
            below S.
        """
        if keys is not None:
            blocks = blocks[: keys.shape[1] // block_tokens]
        numbers = blocks.numpy()
        pages = np.empty((len(numbers), 6), np.int64)
        for first, rows in ((0, self.keys), (3, self.values)):
            width = rows.element_size()
            pages[:, first] = rows.data_ptr() + numbers * (rows.stride(0) * width)
            pages[:, first + 1 : first + 3] = rows.stride(1) * width, rows.stride(2) * width
        channel_bytes = self.keys.stride(3) * self.keys.element_size()
        if keys is not None:
            address, head_bytes, channel_bytes = keys.data_ptr(), keys.stride(0), keys.element_size()
            row_bytes = keys.stride(1) * channel_bytes
            pages[:, 0] = address + np.arange(len(numbers)) * (block_tokens * row_bytes)
            pages[:, 1:3] = head_bytes * channel_bytes, row_bytes
        found: PartialAttention = self.kernel.gather_attend(
            queries.float(),
            pages,
            block_tokens,
            (self.keys.dtype, self.values.dtype),
            self.values.shape[3],
            ids,
            scale,
            channel_bytes=channel_bytes,
        )
        return found


def rows_in_place(packing: Packing, cache: Tensor, key_dim: int) -> RowsInPlace | None:
    """How the kernel reads a cache `[B, H, N, C]`; None where it cannot: on a device, without numba, of other numbers,
    or if the packing's views are copies.
    """
    kernel = None if cache.device.type != "cpu" or cache.dtype not in _DTYPES else compiled_for_cpu()
    if kernel is None:
        return None
    keys, values = packing(cache, key_dim, cache.shape[3] - key_dim)
    memory = cache.untyped_storage().data_ptr()
    if any(rows.untyped_storage().data_ptr() != memory for rows in (keys, values)):
        return None
    if values.shape[3] > 1 and values.stride(3) != 1:
        return None
    return RowsInPlace(keys, values, kernel)
