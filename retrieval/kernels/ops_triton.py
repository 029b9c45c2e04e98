"""The functions of ops.py as Triton kernels, for tensors on a CUDA device; they give the reference's values.

ops.py has checked what it dispatches here. With `TRITON_INTERPRET=1`, set before Triton is imported, the kernels run
on the cpu.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError as exc:
    raise ImportError("kernels need Triton: pip install 'kvloom[triton]'") from exc

_BLOCK_LANDMARKS = 64
_BLOCK_TILED = 128
_BLOCK_TOKENS = 32


def landmark_scores(queries: Tensor, landmarks: Tensor, scale: float) -> Tensor:
    """See ops.py."""
    (Hq, D), (H, C, _) = queries.shape, landmarks.shape
    scores = torch.empty(Hq, C, device=queries.device)
    _landmark_scores[(H, triton.cdiv(C, _BLOCK_LANDMARKS))](
        queries.contiguous(), landmarks, scores, *landmarks.stride()[:2], C, D, Hq // H, scale,
        IS_ONE_DTYPE=queries.dtype == landmarks.dtype, BLOCK=_BLOCK_LANDMARKS, BLOCK_GROUP=power(Hq // H),
        BLOCK_DIM=32,
    )  # fmt: skip
    return scores


def tile_scores(queries: Tensor, tiles: Tensor, ids: Tensor, scale: float) -> Tensor:
    """See ops.py; `ids` `[H, K]` int64 are the tokens of all runs, in their order."""
    (Hq, r), (H, K) = queries.shape, ids.shape
    scores = torch.empty(Hq, K, device=queries.device)
    _tile_scores[(H, triton.cdiv(K, _BLOCK_TILED))](
        queries.contiguous(), tiles, ids.contiguous(), scores, K, tiles.shape[1], r, Hq // H, scale,
        IS_ONE_DTYPE=queries.dtype == tiles.dtype, TILE=tiles.shape[3], BLOCK=_BLOCK_TILED,
        BLOCK_GROUP=power(Hq // H), BLOCK_RANK=32,
    )  # fmt: skip
    return scores


def rebuild_keys(
    factor: Tensor,
    basis: Tensor,
    ids: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
) -> Tensor:
    """See ops.py."""
    (H, r, D), K = basis.shape, ids.shape[1]
    keys = torch.empty(H, K, D, dtype=basis.dtype, device=basis.device)
    _rebuild_keys[(H, triton.cdiv(K, _BLOCK_TOKENS))](
        factor.contiguous(), basis.contiguous(), ids.contiguous(), _or(scale, keys), _or(bias, keys),
        _or(cos, keys), _or(sin, keys), keys, K, r, factor.shape[1], D,
        BITS=4 if factor.dtype == torch.uint8 else 8, SCALES=scale is not None, SHIFTS=bias is not None,
        ROTATES=cos is not None, INTERLEAVED=interleaved, IS_ONE_DTYPE=scale is None and factor.dtype == basis.dtype,
        BLOCK_TOKENS=_BLOCK_TOKENS, BLOCK_RANK=32, BLOCK_PAIRS=power(-(-D // 2)),
    )  # fmt: skip
    return keys


def power(count: int) -> int:
    """Size of the tile for `count` numbers: a power of 2, at least 16, which `tl.dot` asks for."""
    return max(16, int(triton.next_power_of_2(count)))


def _or(table: Tensor | None, other: Tensor) -> Tensor:
    """`table`, or any other tensor in its place if the kernel does not read it."""
    return other if table is None else table.contiguous()


@triton.jit
def _landmark_scores(
    queries,
    rows,
    scores,
    head_step,
    step,
    count,
    D,
    group,
    scale,
    IS_ONE_DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """For each block of rows of a KV head: over runs of channels, add `rows @ queries` of the group; scale.

    Grid: (H, ceil(count / BLOCK)). Rows, query heads and channels past the end are masked to 0. Sums are float32;
    operands of different dtypes are widened, and float32 is not rounded to TF32. A row is read once for its group and
    gives 4 bytes for each query head.
    """
    head = tl.program_id(0).to(tl.int64)
    n = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    g = tl.arange(0, BLOCK_GROUP)
    total = tl.zeros((BLOCK, BLOCK_GROUP), dtype=tl.float32)
    for start in range(0, D, BLOCK_DIM):
        d = start + tl.arange(0, BLOCK_DIM)
        of_rows = tl.load(
            rows + head * head_step + n[:, None] * step + d[None, :],
            mask=(n[:, None] < count) & (d[None, :] < D),
            other=0.0,
        )
        of_group = tl.load(
            queries + (head * group + g[None, :]) * D + d[:, None],
            mask=(g[None, :] < group) & (d[:, None] < D),
            other=0.0,
        )
        if not IS_ONE_DTYPE:
            of_rows, of_group = of_rows.to(tl.float32), of_group.to(tl.float32)
        total = tl.dot(of_rows, of_group, total, input_precision="ieee")
    target = scores + (head * group + g[None, :]) * count + n[:, None]
    tl.store(target, total * scale, mask=(n[:, None] < count) & (g[None, :] < group))


@triton.jit
def _tile_scores(
    queries,
    tiles,
    ids,
    scores,
    K,
    N,
    R,
    group,
    scale,
    IS_ONE_DTYPE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):
    """For each block of chosen tokens of a KV head: over runs of dimensions, add `rows @ queries` of the group; scale.

    Grid: (H, ceil(K / BLOCK)). Tokens, query heads and dimensions past the end are masked to 0. Sums are float32;
    operands of different dtypes are widened, and float32 is not rounded to TF32. A tile `[R, TILE]` holds one dimension
    of TILE tokens side by side, so tokens of one run are read in whole lines. A token reads 8 bytes of its id and 2 a
    dimension, once for its group, and gives 4 bytes for each query head.
    """
    head = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(ids + head * K + n, mask=n < K, other=0)
    first = tiles + (head * N + token // TILE) * R * TILE + token % TILE
    g = tl.arange(0, BLOCK_GROUP)
    total = tl.zeros((BLOCK, BLOCK_GROUP), dtype=tl.float32)
    for start in range(0, R, BLOCK_RANK):
        r = start + tl.arange(0, BLOCK_RANK)
        of_rows = tl.load(first[:, None] + r[None, :] * TILE, mask=(n[:, None] < K) & (r[None, :] < R), other=0.0)
        of_group = tl.load(
            queries + (head * group + g[None, :]) * R + r[:, None],
            mask=(g[None, :] < group) & (r[:, None] < R),
            other=0.0,
        )
        if not IS_ONE_DTYPE:
            of_rows, of_group = of_rows.to(tl.float32), of_group.to(tl.float32)
        total = tl.dot(of_rows, of_group, total, input_precision="ieee")
    target = scores + (head * group + g[None, :]) * K + n[:, None]
    tl.store(target, total * scale, mask=(n[:, None] < K) & (g[None, :] < group))


@triton.jit
def _rebuild_keys(
    factor,
    basis,
    ids,
    scale,
    bias,
    cos,
    sin,
    keys,
    K,
    R,
    row_width,
    D,
    BITS: tl.constexpr,
    SCALES: tl.constexpr,
    SHIFTS: tl.constexpr,
    ROTATES: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    IS_ONE_DTYPE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
):
    """For each block of chosen tokens of a head: over runs of ranks, gather and widen their rows, add `rows @ basis`
    for both channels of pairs; rotate by the angles of the tokens; round once.

    Grid: (H, ceil(K / BLOCK_TOKENS)). Rows of -1, and tokens, ranks and channels past the end, are masked to 0. Sums
    are float32, and float32 operands are not rounded to TF32. A token reads its row, and its angles; a program reads
    all of its head's basis; a token writes D numbers.
    """
    head = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    token = tl.load(ids + head * K + n, mask=n < K, other=-1)[:, None]
    pair = tl.arange(0, BLOCK_PAIRS)[None, :]
    half = (D + 1) // 2
    first = 2 * pair if INTERLEAVED else pair
    second = first + 1 if INTERLEAVED else pair + half
    has_a, has_b = (pair < half) & (first < D), (pair < half) & (second < D)
    a = tl.zeros((BLOCK_TOKENS, BLOCK_PAIRS), dtype=tl.float32)
    b = tl.zeros((BLOCK_TOKENS, BLOCK_PAIRS), dtype=tl.float32)
    for start in range(0, R, BLOCK_RANK):
        rank = start + tl.arange(0, BLOCK_RANK)
        mask = (token >= 0) & (rank[None, :] < R)
        if BITS == 4:
            byte = tl.load(factor + token * row_width + rank[None, :] % row_width, mask=mask, other=0).to(tl.int32)
            rows = tl.where(mask, ((byte >> (rank[None, :] // row_width * 4)) & 15) - 8, 0)
        else:
            rows = tl.load(factor + token * row_width + rank[None, :], mask=mask, other=0)
        base, in_rank = basis + (head * R + rank[:, None]) * D, rank[:, None] < R
        of_a = tl.load(base + first, mask=in_rank & has_a, other=0.0)
        of_b = tl.load(base + second, mask=in_rank & has_b, other=0.0)
        if not IS_ONE_DTYPE:
            rows, of_a, of_b = rows.to(tl.float32), of_a.to(tl.float32), of_b.to(tl.float32)
        if SCALES:
            rows = rows * tl.load(scale + rank, mask=rank < R, other=0.0)[None, :]
        a = tl.dot(rows, of_a, a, input_precision="ieee")
        b = tl.dot(rows, of_b, b, input_precision="ieee")
    if SHIFTS:
        a += tl.load(bias + head * D + first, mask=(token >= 0) & has_a, other=0.0)
        b += tl.load(bias + head * D + second, mask=(token >= 0) & has_b, other=0.0)
    if ROTATES:
        c = tl.load(cos + token * half + pair, mask=(token >= 0) & has_a, other=0.0)
        s = tl.load(sin + token * half + pair, mask=(token >= 0) & has_a, other=0.0)
        a, b = a * c - b * s, b * c + a * s
    target = keys + (head * K + n[:, None]) * D
    tl.store(target + first, a.to(keys.dtype.element_ty), mask=(n[:, None] < K) & has_a)
    tl.store(target + second, b.to(keys.dtype.element_ty), mask=(n[:, None] < K) & has_b)
