"""The functions of code_ops.py as Triton kernels, for tensors on a CUDA device; they give the reference's values.

code_ops.py has checked what it dispatches here. With `TRITON_INTERPRET=1`, set before Triton is imported, the kernels
run on the cpu.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError as exc:
    raise ImportError("kernels need Triton: pip install 'kvloom[triton]'") from exc

from .thresholds import thresholds

_BLOCK = 1024


def code_counts(packed: Tensor, bits: int, tokens: int, band_starts: Sequence[int]) -> Tensor:
    """See code_ops.py; all codes of so many bits for each band."""
    counts = torch.zeros(len(packed), len(band_starts) + 1 << bits, dtype=torch.int32, device=packed.device)
    if tokens:
        packed = packed.contiguous()
        _count[(len(packed), triton.cdiv(tokens, _BLOCK))](
            packed,
            counts,
            _first(band_starts, packed),
            packed.shape[1],
            tokens,
            len(band_starts),
            BITS=bits,
            BLOCK=_BLOCK,
        )
    return counts.long()


def vq_scores(table: Tensor, packed: Tensor, bits: int, tokens: int, band_starts: Sequence[int]) -> Tensor:
    """See code_ops.py."""
    scores = torch.empty(table.shape[0], tokens, device=table.device)
    if tokens:
        table, packed = table.float().contiguous(), packed.contiguous()
        _look_up[(len(packed), triton.cdiv(tokens, _BLOCK))](
            table, packed, scores, _first(band_starts, packed), packed.shape[1], table.shape[1], tokens,
            len(band_starts), len(table) // len(packed), BITS=bits, BLOCK=_BLOCK,
        )  # fmt: skip
    return scores


def vq_select(
    importance: Tensor, packed: Tensor, bits: int, tokens: int, counts: Tensor, budget: int, band_starts: Sequence[int]
) -> Tensor:
    """See code_ops.py; `budget` is above 0 and below `tokens`, which is the sum of each row of `counts`."""
    least, skipped = thresholds(importance, counts, budget)
    ids = torch.empty(len(packed), budget, dtype=torch.int64, device=packed.device)
    blocks = triton.cdiv(tokens, _BLOCK)
    found = torch.empty(len(packed), 2, blocks, dtype=torch.int32, device=packed.device)
    importance, packed, grid = importance.contiguous(), packed.contiguous(), (len(packed), blocks)
    sizes = packed.shape[1], importance.shape[1], tokens, len(band_starts), blocks
    first = _first(band_starts, packed)
    _count_chosen[grid](importance, packed, first, least, found, *sizes, BITS=bits, BLOCK=_BLOCK)
    before = found.cumsum(2) - found
    _write_chosen[grid](importance, packed, first, least, skipped, before, ids, *sizes, budget, BITS=bits, BLOCK=_BLOCK)
    return ids


def _first(band_starts: Sequence[int], packed: Tensor) -> Tensor:
    if not band_starts:  # the kernel takes a pointer, but reads nothing; no copy, which a captured graph cannot hold
        return torch.zeros(1, dtype=torch.int64, device=packed.device)
    return torch.tensor(band_starts, device=packed.device)


@triton.jit
def _code(row, n, mask, BITS: tl.constexpr):
    """Codes n of the packed row at pointer `row`: two bytes each, of which neighbours share one."""
    odd = n % 2
    first = n // 2 * 3 + odd if BITS == 12 else 2 * n
    low = tl.load(row + first, mask=mask, other=0).to(tl.int32)
    code = low | tl.load(row + first + 1, mask=mask, other=0).to(tl.int32) << 8
    return (code >> (4 * odd)) & 4095 if BITS == 12 else code


@triton.jit
def _band(first, n, band_starts):
    """How many bands begin at or before tokens n, the first not counted."""
    band = n * 0
    for i in range(band_starts):
        band += (n >= tl.load(first + i)).to(tl.int32)
    return band


@triton.jit
def _count(packed, counts, first, row_bytes, tokens, band_starts, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """For each block of tokens of a head: unpack codes, add 1 to the count of each.

    Grid: (H, ceil(T / BLOCK)). Tokens past T are masked. A token reads BITS / 8 bytes and makes one atomic addition.
    """
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = n < tokens
    code = _code(packed + row * row_bytes, n, mask, BITS) + (_band(first, n, band_starts) << BITS)
    tl.atomic_add(counts + row * ((band_starts + 1) << BITS) + code, tl.full((BLOCK,), 1, tl.int32), mask=mask)


@triton.jit
def _look_up(
    table, packed, scores, first, row_bytes, C, tokens, band_starts, group, BITS: tl.constexpr, BLOCK: tl.constexpr
):
    """For each block of tokens of a KV head: unpack codes once, then for each query head of the group load and store.

    Grid: (H, ceil(T / BLOCK)). Tokens past T are masked. A token reads BITS / 8 bytes and, for each query head, 4 of
    the table, from the cache, and writes 4.
    """
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = n < tokens
    code = _code(packed + row * row_bytes, n, mask, BITS) + _band(first, n, band_starts) * (C // (band_starts + 1))
    for g in range(group):
        head = row * group + g
        tl.store(scores + head * tokens + n, tl.load(table + head * C + code, mask=mask, other=0.0), mask=mask)


@triton.jit
def _standing(importance, packed, first, threshold, row, row_bytes, C, n, mask, band_starts, BITS: tl.constexpr):
    """Whether tokens stand above the threshold of their head, and at it: 0 or 1."""
    code = _code(packed + row * row_bytes, n, mask, BITS) + _band(first, n, band_starts) * (C // (band_starts + 1))
    found = tl.load(importance + row * C + code, mask=mask, other=0.0)
    least = tl.load(threshold + row)
    return (mask & (found > least)).to(tl.int32), (mask & (found == least)).to(tl.int32)


@triton.jit
def _count_chosen(
    importance,
    packed,
    first,
    threshold,
    found,
    row_bytes,
    C,
    tokens,
    band_starts,
    blocks,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """For each block of tokens of a head: how many stand above the threshold, and how many at it.

    Grid: (H, ceil(T / BLOCK)). Tokens past T are masked. A token reads BITS / 8 bytes, and 4 from the cache; a block
    writes 8.
    """
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n = block * BLOCK + tl.arange(0, BLOCK)
    above, at = _standing(importance, packed, first, threshold, row, row_bytes, C, n, n < tokens, band_starts, BITS)
    tl.store(found + row * 2 * blocks + block, tl.sum(above, 0))
    tl.store(found + (row * 2 + 1) * blocks + block, tl.sum(at, 0))


@triton.jit
def _write_chosen(
    importance,
    packed,
    first,
    threshold,
    skipped,
    before,
    ids,
    row_bytes,
    C,
    tokens,
    band_starts,
    blocks,
    budget,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """For each block of tokens of a head: those above the threshold, and those at it but the first `skipped` of the
    head, are written behind what the blocks before write.

    Grid: (H, ceil(T / BLOCK)). Tokens past T are masked. Reads as `_count_chosen`, writes 8 bytes a token chosen.
    """
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n = block * BLOCK + tl.arange(0, BLOCK)
    above, at = _standing(importance, packed, first, threshold, row, row_bytes, C, n, n < tokens, band_starts, BITS)
    above_before = tl.load(before + row * 2 * blocks + block)
    at_before = tl.load(before + (row * 2 + 1) * blocks + block)
    out = tl.load(skipped + row)
    taken = above | (at & ((at_before + tl.cumsum(at, 0)) > out).to(tl.int32))
    place = above_before + tl.maximum(at_before - out, 0) + tl.cumsum(taken, 0) - 1
    tl.store(ids + row * budget + place, n.to(tl.int64), mask=taken == 1)
