"""What a chunk of `nuq` holds of one half, keys or values, and what decoding it takes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...core import RopeSpec
from ...errors import CodecError

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


def channel_error(channels: int) -> CodecError:
    """The error of `dequantise` for a damaged channel number."""
    return CodecError(f"nuq chunk: an outlier has a channel number beyond its {channels} channels")
