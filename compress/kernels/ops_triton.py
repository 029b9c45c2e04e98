"""The functions of ops.py as Triton kernels, for tensors on a CUDA device; values are those of the torch reference.

ops.py has checked shapes and dtypes of what it dispatches here, and has made the tensors' device the current one. With
`TRITON_INTERPRET=1`, set before Triton is imported, the kernels run on the cpu.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError as exc:
    raise ImportError("kernels need Triton: pip install 'kvloom[triton]'") from exc

_BLOCK = 1024
_BLOCK_TOKENS = 32


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """See ops.py."""
    rows, count = _rows(codes), codes.shape[-1]
    eighth = -(-count // 8)
    packed = torch.empty(len(rows), eighth * bits, dtype=torch.uint8, device=codes.device)
    if packed.numel():
        _pack[(len(rows), triton.cdiv(eighth, _BLOCK))](rows, packed, count, eighth, BITS=bits, BLOCK=_BLOCK)
    return packed.view(*codes.shape[:-1], eighth * bits)


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """See ops.py."""
    rows = _rows(packed)
    codes = torch.empty(len(rows), count, dtype=torch.uint8, device=packed.device)
    if codes.numel():
        _unpack[(len(rows), triton.cdiv(count, _BLOCK))](rows, codes, count, -(-count // 8), BITS=bits, BLOCK=_BLOCK)
    return codes.view(*packed.shape[:-1], count)


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
    """See ops.py."""
    (N, T, D), (_, G, C) = out.shape, scale.shape
    tokens = min(_BLOCK_TOKENS, triton.next_power_of_2(T))
    _dequantize_rotate[(N, triton.cdiv(T, tokens))](
        packed.contiguous(),
        scale.contiguous(),
        zero.contiguous(),
        _or(levels, out),
        _or(cos, out),
        _or(sin, out),
        out,
        *out.stride()[:2],
        T,
        D,
        G,
        C,
        BITS=bits,
        HAS_LEVELS=levels is not None,
        ROTATES=cos is not None,
        INTERLEAVED=interleaved,
        BLOCK_TOKENS=tokens,
        BLOCK_PAIRS=triton.next_power_of_2(-(-D // 2)),
    )


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1]).contiguous()


def _or(table: Tensor | None, other: Tensor) -> Tensor:
    """`table`, or any other tensor in its place if the kernel does not read it."""
    return other if table is None else table.contiguous()


@triton.jit
def _code(row, index, eighth, mask, BITS: tl.constexpr):
    """Codes at `index` of the packed row at pointer `row`: a load for each plane, see `pack_bits` in ops.py."""
    code = tl.zeros_like(index)
    start = eighth * 0
    if BITS & 8:
        code = tl.load(row + index, mask=mask, other=0).to(tl.int32)
    if BITS & 4:
        n = eighth * 4
        byte = tl.load(row + start + index % n, mask=mask, other=0).to(tl.int32)
        code = code | ((byte >> (index // n * 4)) & 15)
        start += n
    if BITS & 2:
        n = eighth * 2
        byte = tl.load(row + start + index % n, mask=mask, other=0).to(tl.int32)
        code = code | (((byte >> (index // n * 2)) & 3) << (BITS & 4))
        start += n
    if BITS & 1:
        n = eighth
        byte = tl.load(row + start + index % n, mask=mask, other=0).to(tl.int32)
        code = code | (((byte >> (index // n)) & 1) << (BITS & 6))
    return code


@triton.jit
def _unpack(packed, codes, count, eighth, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """For each run of BLOCK codes of a row: load the byte of each plane, shift, mask, join, store.

    Grid: (rows, ceil(count / BLOCK)). Codes past `count` are masked. A code loads a byte of each plane, which it shares
    with others (BITS / 8 bytes a code from memory), and writes 1 byte.
    """
    row = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = index < count
    code = _code(packed + row * eighth * BITS, index, eighth, mask, BITS)
    tl.store(codes + row * count + index, code.to(tl.uint8), mask=mask)


@triton.jit
def _pack(codes, packed, count, eighth, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """For each plane, for each run of its bytes: load the 8 / width codes of a byte, join them, store.

    Grid: (rows, ceil(eighth / BLOCK)), where `eighth` is a plane's bytes per bit of width; a program makes `width` runs
    of BLOCK bytes in each plane. Codes past `count` are 0. A code reads 1 byte for each plane and writes BITS / 8.
    """
    row = tl.program_id(0).to(tl.int64)
    codes += row * count
    packed += row * eighth * BITS
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    start = eighth * 0
    if BITS & 8:
        _pack_plane(codes, packed, column, count, eighth, 8, 0)
    if BITS & 4:
        _pack_plane(codes, packed + start, column, count, eighth, 4, 0)
        start += eighth * 4
    if BITS & 2:
        _pack_plane(codes, packed + start, column, count, eighth, 2, BITS & 4)
        start += eighth * 2
    if BITS & 1:
        _pack_plane(codes, packed + start, column, count, eighth, 1, BITS & 6)


@triton.jit
def _pack_plane(codes, plane, column, count, eighth, WIDTH: tl.constexpr, LOW: tl.constexpr):
    """Bits `[LOW, LOW + WIDTH)` of the codes of a row, as bytes `column + i * eighth` of their plane."""
    for run in tl.static_range(WIDTH):
        j = column + run * eighth
        byte = tl.zeros_like(column)
        for i in tl.static_range(8 // WIDTH):
            index = j + i * eighth * WIDTH
            code = tl.load(codes + index, mask=(column < eighth) & (index < count), other=0).to(tl.int32)
            byte = byte | (((code >> LOW) & ((1 << WIDTH) - 1)) << (i * WIDTH))
        tl.store(plane + j, byte.to(tl.uint8), mask=column < eighth)


@triton.jit
def _number(
    row,
    scale,
    zero,
    levels,
    channel,
    eighth,
    run,
    mask,
    BITS: tl.constexpr,
    HAS_LEVELS: tl.constexpr,
):
    """Dequantised channels in float32; `run` is the offset of their scale and zero."""
    code = _code(row, channel, eighth, mask, BITS)
    x = tl.load(levels + code, mask=mask, other=0.0) if HAS_LEVELS else code.to(tl.float32)
    x = x * tl.load(scale + run, mask=mask, other=0.0).to(tl.float32)
    return x + tl.load(zero + run, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _dequantize_rotate(
    packed,
    scale,
    zero,
    levels,
    cos,
    sin,
    out,
    out_row,
    out_token,
    T,
    D,
    G,
    C,
    BITS: tl.constexpr,
    HAS_LEVELS: tl.constexpr,
    ROTATES: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
):
    """For each block of tokens of a row (a layer's head), unpack, dequantise and rotate both channels of each pair.

    Grid: (N, ceil(T / BLOCK_TOKENS)); a tile is BLOCK_TOKENS by all pairs, padded to a power of 2. Tokens past T and
    channels past D are masked. A number reads BITS / 8 bytes of codes, its share of scale and zero, 4 bytes of cos and
    sin (shared by all rows, so from the cache), and writes one of `out`.
    """
    row = tl.program_id(0).to(tl.int64)
    token = (tl.program_id(1) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS))[:, None]
    pair = tl.arange(0, BLOCK_PAIRS)[None, :]
    half = (D + 1) // 2
    first = 2 * pair if INTERLEAVED else pair
    second = first + 1 if INTERLEAVED else pair + half
    eighth = (D + 7) // 8
    codes = packed + (row * T + token) * eighth * BITS
    levels += row * (1 << BITS)
    run = (row * G + token // (T // G)) * C
    mask_a = (token < T) & (pair < half) & (first < D)
    mask_b = (token < T) & (pair < half) & (second < D)
    width = D // C
    a = _number(
        codes, scale, zero, levels, first + token * 0, eighth, run + first // width, mask_a,
        BITS, HAS_LEVELS,
    )  # fmt: skip
    b = _number(
        codes, scale, zero, levels, second + token * 0, eighth, run + second // width, mask_b,
        BITS, HAS_LEVELS,
    )  # fmt: skip
    target = out + row * out_row + token * out_token
    _store_pairs(a, b, cos, sin, target, token, pair, half, first, second, mask_a, mask_b, ROTATES)


@triton.jit
def _store_pairs(
    a,
    b,
    cos,
    sin,
    out,
    token,
    pair,
    half,
    first,
    second,
    mask_a,
    mask_b,
    ROTATES: tl.constexpr,
):
    """Rotates pairs by the angles of their tokens and stores both halves; `out` points to the rows of the tokens."""
    if ROTATES:
        c = tl.load(cos + token * half + pair, mask=mask_a, other=0.0)
        s = tl.load(sin + token * half + pair, mask=mask_a, other=0.0)
        a, b = a * c - b * s, b * c + a * s
    tl.store(out + first, a.to(out.dtype.element_ty), mask=mask_a)
    tl.store(out + second, b.to(out.dtype.element_ty), mask=mask_b)
