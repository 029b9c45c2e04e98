"""Codes of 1 to 8 bits as bytes and back, and numbers from codes, rotated: the reference in torch, and the dispatcher.

Tensors on a CUDA device go to the kernels of the same names and signatures in ops_triton.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core import rotate_pairs

_BLOCK_NUMBERS = 1 << 18  # 1 MiB of float32, which a second-level cache holds


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take: `count` is rounded up to a multiple of 8."""
    return -(-count // 8) * bits


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes as bytes, row by row.

    A row of N codes (padded with zeros to a multiple of 8) becomes one plane for each set bit of `bits`, widest first:
    3 bits are a plane of 2 and one of 1. A plane of width w holds bits `[shift, shift + w)` of every code, the lowest
    bits in the first plane; byte j of its n = N w / 8 holds codes j, j + n, j + 2n, ..., the first in the lowest bits.
    So each shift of a run of bytes gives a run of codes, in any instruction set.

    Parameters
    ----------
    codes : `[..., N]` uint8, each below `2 ** bits`.
    bits : 1 to 8.

    Returns
    -------
    `[..., packed_bytes(N, bits)]` uint8.
    """
    _check_bits(bits)
    if codes.is_cuda:
        from . import ops_triton

        with torch.cuda.device(codes.device):
            return ops_triton.pack_bits(codes, bits)
    count = codes.shape[-1]
    padded = -(-count // 8) * 8
    if padded != count:
        codes = torch.nn.functional.pad(codes, (0, padded - count))
    planes, shift = [], 0
    for width in _plane_widths(bits):
        part = (codes >> shift) & ((1 << width) - 1)
        runs = part.unflatten(-1, (8 // width, padded * width // 8))
        plane = runs[..., 0, :].clone()
        for i in range(1, 8 // width):
            plane |= runs[..., i, :] << (width * i)
        planes.append(plane)
        shift += width
    return torch.cat(planes, -1)


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack_bits`: `[..., packed_bytes(count, bits)]` uint8 to `[..., count]` uint8.

    Raises
    ------
    ValueError : the last dimension is not what `count` codes take.
    """
    _check_bits(bits)
    if packed.shape[-1] != packed_bytes(count, bits):
        raise ValueError(f"{packed.shape[-1]} bytes; {count} codes of {bits} bits take {packed_bytes(count, bits)}")
    if packed.is_cuda:
        from . import ops_triton

        with torch.cuda.device(packed.device):
            return ops_triton.unpack_bits(packed, bits, count)
    padded = -(-count // 8) * 8
    codes = torch.zeros(*packed.shape[:-1], padded, dtype=torch.uint8, device=packed.device)
    start, shift = 0, 0
    for width in _plane_widths(bits):
        n = padded * width // 8
        plane = packed[..., start : start + n]
        for i in range(8 // width):
            codes[..., i * n : (i + 1) * n] |= ((plane >> (width * i)) & ((1 << width) - 1)) << shift
        start, shift = start + n, shift + width
    return codes[..., :count]


def dequantize_rotate(
    packed: Tensor,
    bits: int,
    scale: Tensor,
    zero: Tensor,
    out: Tensor,
    *,
    levels: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
) -> None:
    """Writes numbers from packed codes: unpack, `level * scale + zero` in float32, rotate, round once.

    Parameters
    ----------
    packed : `[N, T, packed_bytes(D, bits)]` uint8, see `pack_bits`; N is layers times heads.
    scale, zero : `[N, G, C]` of one floating dtype: of G runs of T / G tokens and C runs of D / C channels. G divides T
        and C divides D.
    out : `[N, T, D]` of a floating dtype; its rows (the last dimension) are contiguous, but may lie apart.
    levels : `[N, 2 ** bits]` float32, what each code stands for; None for the code itself.
    cos, sin : `[T, D / 2]` float32 (`RopeSpec.cos_sin`); None leaves the numbers as they are.
    interleaved : channel pairs are (2i, 2i + 1) instead of (i, i + D / 2).

    Raises
    ------
    ValueError : a shape or dtype is another.
    """
    _check_dequantize(packed, bits, scale, zero, out, levels, cos, sin)
    if out.numel() == 0:
        return
    if packed.is_cuda:
        from . import ops_triton

        with torch.cuda.device(packed.device):
            ops_triton.dequantize_rotate(
                packed, bits, scale, zero, out, levels=levels, cos=cos, sin=sin, interleaved=interleaved
            )
        return
    (N, T, D), (_, G, C) = out.shape, scale.shape
    block = max(1, _BLOCK_NUMBERS // (T * D))
    for start in range(0, N, block):
        rows = slice(start, min(N, start + block))
        codes = unpack_bits(packed[rows], bits, D)
        x = codes.float() if levels is None else levels[rows, None].expand(-1, T, -1).gather(2, codes.long())
        runs = x.view(-1, G, T // G, C, D // C)
        runs.mul_(scale[rows, :, None, :, None].float()).add_(zero[rows, :, None, :, None].float())
        out[rows] = x if cos is None or sin is None else rotate_pairs(x, cos, sin, interleaved)


def _plane_widths(bits: int) -> list[int]:
    return [width for width in (8, 4, 2, 1) if bits & width]


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits is {bits}; expected 1 to 8")


def _check_dequantize(
    packed: Tensor,
    bits: int,
    scale: Tensor,
    zero: Tensor,
    out: Tensor,
    levels: Tensor | None,
    *angles: Tensor | None,
) -> None:
    _check_bits(bits)
    _check_out(out)
    N, T, D = out.shape
    if packed.dtype != torch.uint8 or packed.shape != (N, T, packed_bytes(D, bits)):
        expected = [N, T, packed_bytes(D, bits)]
        raise ValueError(f"packed is {packed.dtype} {list(packed.shape)}; expected torch.uint8 {expected}")
    if scale.ndim != 3 or scale.shape != zero.shape or scale.dtype != zero.dtype or len(scale) != N:
        raise ValueError(
            f"scale is {scale.dtype} {list(scale.shape)}, zero {zero.dtype} {list(zero.shape)}; expected [{N}, G, C]"
        )
    G, C = scale.shape[1:]
    if out.numel() and (G == 0 or T % G or C == 0 or D % C):
        raise ValueError(f"scale is {list(scale.shape)}; its runs must divide {T} tokens and {D} channels")
    if levels is not None and (levels.dtype != torch.float32 or levels.shape != (N, 1 << bits)):
        raise ValueError(f"levels are {levels.dtype} {list(levels.shape)}; expected torch.float32 [{N}, {1 << bits}]")
    _check_angles(T, D, *angles)


def _check_out(out: Tensor) -> None:
    if out.ndim != 3 or not out.is_floating_point() or (out.shape[-1] > 1 and out.stride(-1) != 1):
        raise ValueError(
            f"out is {out.dtype} {list(out.shape)} in steps of {list(out.stride())}; expected floats in rows"
        )


def _check_angles(T: int, D: int, cos: Tensor | None, sin: Tensor | None) -> None:
    if cos is None and sin is None:
        return
    for name, table in (("cos", cos), ("sin", sin)):
        if table is None or D % 2 or table.dtype != torch.float32 or table.shape != (T, D // 2):
            found = None if table is None else f"{table.dtype} {list(table.shape)}"
            raise ValueError(f"{name} is {found}; expected torch.float32 [{T}, {D // 2}]")
