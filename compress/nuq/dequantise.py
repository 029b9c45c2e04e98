"""Keys (rotated) or values from codes, levels and outliers: the reference in torch, and the dispatch to numba."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from ..capabilities import Allocator
from ..kernels.ops import unpack_bits
from .codes import Codes, Grid, RotaryAngles, channel_error, fresh_memory
from .outliers import unpack_channels


def dequantise(
    grid: Grid, codes: Codes, angles: RotaryAngles | None, dtype: torch.dtype, allocate: Allocator = fresh_memory
) -> Tensor:
    """The tensor that `codes` stand for, rotated, rounded once to `dtype`: `[L, H, T, D]`.

    Computed by compiled code where numba is installed, otherwise by `dequantise_slowly`; both give the same bits.

    Raises
    ------
    CodecError : the channel number of an outlier is not below `H * D`.
    """
    kernel = _kernel()
    if kernel is None:
        return dequantise_slowly(grid, codes, angles, dtype)
    return kernel(grid, codes, angles, dtype, allocate)


def dequantise_slowly(grid: Grid, codes: Codes, angles: RotaryAngles | None, dtype: torch.dtype) -> Tensor:
    """The reference in torch; see `dequantise`."""
    (L, H, T, _), D = codes.packed.shape, grid.scale.shape[-1]
    out = torch.empty(L, H, T, D, dtype=dtype)
    channels = unpack_channels(codes.channels, codes.outliers.shape[-1], H * D).long()
    if not bool((channels < H * D).all()):
        raise channel_error(H * D)
    for layer in range(L):
        numbers = unpack_bits(codes.packed[layer], grid.bits, D).long()
        rows = grid.levels[layer].gather(1, numbers.view(H, T * D)).view(H, T, D)
        if codes.ranges is not None:
            scale, zero = codes.ranges[layer, :, :, None].unbind(1)
            rows = rows * scale + zero
        rows = rows * grid.scale[layer, :, None] + grid.zero[layer, :, None]
        by_token = rows.transpose(0, 1).reshape(T, H * D)
        by_token.scatter_(1, channels[layer], codes.outliers[layer])
        rows = by_token.view(T, H, D).transpose(0, 1)
        out[layer] = rows if angles is None else angles.rotate(rows)
    return out


@lru_cache(maxsize=1)
def _kernel() -> Callable[[Grid, Codes, RotaryAngles | None, torch.dtype, Allocator], Tensor] | None:
    # numba takes a second to import, and only decoding needs it
    try:
        from .dequantise_numba import dequantise_compiled
    except ImportError:
        return None
    return dequantise_compiled
