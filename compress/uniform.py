"""Uniform integer codes: each group of values has a scale and a zero, from its least and greatest value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core import EncodedChunk
from .envelope import expect_tensor
from .exact import put_exact, read_exact
from .kernels.ops import dequantize_rotate, pack_bits, packed_bytes
from .rotation import KeyRotation

PARTS = ("", "_scale", "_zero")
"""What follows the prefix in the names of the tensors that `quantize` makes."""


@dataclass(frozen=True, slots=True)
class Grouping:
    """How many heads, tokens and channels share a scale and a zero. They divide H, T and D."""

    heads: int
    tokens: int
    channels: int

    def shape(self, L: int, H: int, T: int, D: int) -> tuple[int, int, int, int]:
        """Shape of the scales of a tensor `[L, H, T, D]`."""
        return L, H // self.heads, T // self.tokens, D // self.channels


def quantize(prefix: str, x: Tensor, bits: int, grouping: Grouping, skip: Tensor) -> dict[str, Tensor]:
    """Asymmetric min/max codes: a value is near `code * scale + zero`, off by at most half of `scale`.

    The zero is rounded down and the scale up to float16, so that the levels of a group span all its values: the bound
    holds for the numbers as they are stored.

    Parameters
    ----------
    x : `[L, H, T, D]` float32; the tokens that are not skipped are none of the `unusual_tokens` (exact.py).
    bits : 2 to 8.
    skip : `[T]` bool, tokens that count for no group and whose codes mean nothing.

    Returns
    -------
    `{prefix}`: packed codes `[L, H, T, packed_bytes(D, bits)]` uint8. `{prefix}_scale`, `{prefix}_zero`: float16 of
    `grouping.shape`. All on the cpu.
    """
    shape = grouping.shape(*x.shape)
    L, A, B, C = shape
    grid = x.reshape(L, A, grouping.heads, B, grouping.tokens, C, grouping.channels)
    if bool(skip.any()):
        mask = skip.view(B, grouping.tokens, 1, 1)
        least, greatest = grid.masked_fill(mask, torch.inf), grid.masked_fill(mask, -torch.inf)
        grid = grid.masked_fill(mask, 0.0)
    else:
        least = greatest = grid
    if grid.numel():
        least, greatest = least.amin((2, 4, 6), keepdim=True), greatest.amax((2, 4, 6), keepdim=True)
    else:
        least = greatest = grid.new_zeros(L, A, 1, B, 1, C, 1)
    is_empty = least > greatest  # every token of the group is skipped
    zero = _half_at_most(least.masked_fill(is_empty, 0.0))
    top = (1 << bits) - 1
    scale = -_half_at_most((zero.float() - greatest.masked_fill(is_empty, 0.0)) / top)
    step = scale.float()
    step = step.masked_fill(step == 0.0, 1.0)  # the group has one value, which its zero is
    codes = ((grid - zero.float()) / step).round_().clamp_(0, top).to(torch.uint8).view(x.shape)
    return {
        prefix: pack_bits(codes, bits).cpu(),
        f"{prefix}_scale": scale.reshape(shape).cpu(),
        f"{prefix}_zero": zero.reshape(shape).cpu(),
    }


def dequantize(
    codec: str,
    tensors: Mapping[str, Tensor],
    prefix: str,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    bits: int,
    grouping: Grouping,
    covered: int,
    *,
    rotation: KeyRotation | None = None,
) -> Tensor:
    """A tensor `[L, H, T, D]`: its first `covered` tokens from codes, the others as `take_exact` kept them.

    Parameters
    ----------
    rotation : None for values, and for keys without rotary positions.

    Raises
    ------
    CodecError : the tensors contradict dtype or shape; raised before anything is allocated.
    """
    L, H, _, D = shape
    coded = (L, H, covered, D)
    blob = EncodedChunk(codec, tensors, {})
    packed = expect_tensor(blob, prefix, torch.uint8, (*coded[:3], packed_bytes(D, bits)))
    scale = expect_tensor(blob, f"{prefix}_scale", torch.float16, grouping.shape(*coded))
    zero = expect_tensor(blob, f"{prefix}_zero", torch.float16, grouping.shape(*coded))
    tokens, rows = read_exact(codec, tensors, prefix, dtype, shape, covered, rotation)
    if grouping.heads > 1:
        scale, zero = (x.repeat_interleave(grouping.heads, 1) for x in (scale, zero))
    out = torch.empty(shape, dtype=dtype, device=packed.device)
    cos, sin = (None, None) if rotation is None else rotation.cos_sin(covered, out.device)
    plain = None if rotation is None else rotation.plain
    turns_later = rotation is not None and plain is None
    wide = out.new_empty(coded, dtype=torch.float32) if turns_later else out
    dequantize_rotate(
        packed.flatten(0, 1),
        bits,
        scale.flatten(0, 1),
        zero.flatten(0, 1),
        wide.flatten(0, 1)[:, :covered],
        cos=cos,
        sin=sin,
        interleaved=plain is not None and plain.interleaved,
    )
    if rotation is not None and turns_later:
        out[:, :, :covered] = rotation.turn(wide, dtype)
    put_exact(out, tokens, rows, rotation)
    return out


def _half_at_most(x: Tensor) -> Tensor:
    """The greatest float16 that is not above `x`."""
    half = x.half()
    bits = half.view(torch.int16)  # `nextafter` does not take float16 on every device
    below = torch.where(half > 0, bits - 1, torch.where(half < 0, bits + 1, -0x7FFF)).to(torch.int16)
    return torch.where(half.float() > x, below.view(torch.float16), half)
