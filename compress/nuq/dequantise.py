"""Keys (rotated) or values from codes, levels and outliers: the reference in torch, and the dispatch to numba."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ...core import RopeSpec
from ...errors import CodecError
from ..capabilities import Allocator
from ..kernels.ops import unpack_bits
from .outliers import unpack_channels

_ALIGNMENT_BYTES = 64


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """Tables that turn codes into numbers, `level * scale + zero`, for some layers. All float32, contiguous.

    Attributes
    ----------
    levels : `[L, H, 2 ** bits]`, ascending.
    scale, zero : `[L, H, D]`.
    """

    levels: Tensor
    scale: Tensor
    zero: Tensor

    @property
    def bits(self) -> int:
        return (self.levels.shape[-1] - 1).bit_length()


@dataclass(frozen=True, slots=True, eq=False)
class Codes:
    """A quantised tensor `[L, H, T, D]`; a channel is a number `h * D + d`.

    Attributes
    ----------
    packed : `[L, H, T, packed_bytes(D, bits)]` uint8, by `pack_bits`.
    ranges : `[L, T, 2]` float32: a token's levels are first multiplied by the one and raised by the other; None for 1
        and 0.
    channels : `[L, T, channel_bytes(k, H * D)]` uint8, by `pack_channels`; unequal within a token.
    outliers : `[L, T, k]` float32, the numbers of these channels.
    """

    packed: Tensor
    ranges: Tensor | None
    channels: Tensor
    outliers: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class RotaryAngles:
    """Rotary angles of T tokens: `cos`, `sin` `[T, D / 2]` float32, as `RopeSpec.cos_sin` gives them."""

    cos: Tensor
    sin: Tensor
    interleaved: bool

    @classmethod
    def at(cls, positions: Tensor, rope: RopeSpec) -> RotaryAngles:
        """The angles of tokens at `positions`."""
        return cls(*rope.cos_sin(positions), rope.interleaved)

    def rotate(self, rows: Tensor) -> Tensor:
        """`[..., T, D]` rotated. Every product is rounded, so that all implementations give the same bits.

        (`rotate_pairs` may fuse a product and a sum.)
        """
        if self.interleaved:
            a, b = rows[..., 0::2], rows[..., 1::2]
        else:
            a, b = rows.chunk(2, dim=-1)
        turned = a * self.cos - b * self.sin, b * self.cos + a * self.sin
        return torch.stack(turned, -1).flatten(-2) if self.interleaved else torch.cat(turned, -1)


def fresh_memory(nbytes: int) -> Tensor:
    """New memory, `[nbytes]` uint8, aligned to 64 bytes.

    It comes from numpy, which asks for huge pages: faults of small pages would take longer than dequantising.
    """
    memory = np.empty(nbytes + _ALIGNMENT_BYTES, np.uint8)
    first = -memory.ctypes.data % _ALIGNMENT_BYTES
    return torch.from_numpy(memory[first : first + nbytes])


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


def channel_error(channels: int) -> CodecError:
    """The error of `dequantise` for a damaged channel number."""
    return CodecError(f"nuq chunk: an outlier has a channel number beyond its {channels} channels")


@lru_cache(maxsize=1)
def _kernel() -> Callable[[Grid, Codes, RotaryAngles | None, torch.dtype, Allocator], Tensor] | None:
    # numba takes a second to import, and only decoding needs it
    try:
        from .dequantise_numba import dequantise_compiled
    except ImportError:
        return None
    return dequantise_compiled
