"""Codes of 1 to 8 bits as bytes and back: the reference in torch."""

from __future__ import annotations

import torch
from torch import Tensor


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


def _plane_widths(bits: int) -> list[int]:
    return [width for width in (8, 4, 2, 1) if bits & width]


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits is {bits}; expected 1 to 8")
