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

from ..attention import PartialAttention, merge

_BLOCK_LANDMARKS = 64
_BLOCK_TILED = 128
_BLOCK_TOP = 1024
_BLOCK_TOKENS = 32
_SPLIT_TOKENS = 256  # so that few heads and a budget of some thousand tokens still fill a device
_LEAST = torch.iinfo(torch.int64).min


def landmark_scores(queries: Tensor, landmarks: Tensor, scale: float) -> Tensor:
    """See ops.py."""
    (Hq, D), (H, C, _) = queries.shape, landmarks.shape
    scores = torch.empty(Hq, C, device=queries.device)
    _landmark_scores[(H, triton.cdiv(C, _BLOCK_LANDMARKS))](
        queries.contiguous(), landmarks, scores, *landmarks.stride()[:2], C, D, Hq // H, scale,
        IS_ONE_DTYPE=queries.dtype == landmarks.dtype, BLOCK=_BLOCK_LANDMARKS, BLOCK_GROUP=_power(Hq // H),
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
        BLOCK_GROUP=_power(Hq // H), BLOCK_RANK=32,
    )  # fmt: skip
    return scores


def top_pooled(scores: Tensor, kv_heads: int, k: int, pooling: str, *, block: int = _BLOCK_TOP) -> Tensor:
    """See ops.py; k is above 0 and below N. The best of each block are chosen first, then the best of those."""
    (Hq, N), kept = scores.shape, min(k, block)
    blocks = triton.cdiv(N, block)
    best = torch.empty(kv_heads, blocks * kept, dtype=torch.int64, device=scores.device)
    _top[(kv_heads, blocks)](
        scores.contiguous(), scores.logsumexp(1), best, N, Hq // kv_heads, kept, _LEAST,
        ADDS=pooling == "sum", BLOCK=block,
    )  # fmt: skip
    return (best.topk(k, dim=1, sorted=False).values & 0x7FFFFFFF).sort(dim=1).values


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
        BLOCK_TOKENS=_BLOCK_TOKENS, BLOCK_RANK=32, BLOCK_PAIRS=_power(-(-D // 2)),
    )  # fmt: skip
    return keys


def gather_attend(queries: Tensor, keys: Tensor, values: Tensor, ids: Tensor, scale: float) -> PartialAttention:
    """See ops.py; runs of ids are attended to apart, and merged."""
    (Hq, D), (H, K), v_dim = queries.shape, ids.shape, values.shape[2]
    splits = triton.cdiv(K, _SPLIT_TOKENS)
    out = torch.empty(splits, Hq, v_dim, device=queries.device)
    lse = torch.empty(splits, Hq, device=queries.device)
    _gather_attend[(H, splits)](
        queries.contiguous(), keys, values, ids.contiguous(), out, lse,
        *keys.stride()[:2], *values.stride()[:2], K, D, v_dim, Hq // H, Hq, scale,
        IS_ONE_DTYPE=queries.dtype == keys.dtype == values.dtype, SPLIT=_SPLIT_TOKENS, BLOCK=_BLOCK_TOKENS,
        BLOCK_GROUP=_power(Hq // H), BLOCK_DIM=_power(D), BLOCK_V_DIM=_power(v_dim),
    )  # fmt: skip
    return (out[0], lse[0]) if splits == 1 else merge(list(zip(out, lse, strict=True)))


def _power(count: int) -> int:
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
def _top(
    scores,
    lse,
    best,
    N,
    group,
    kept,
    least,
    ADDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """For each block of candidates of a KV head: pool the group's softmax, sort, store the best `kept`.

    Grid: (H, ceil(N / BLOCK)). A candidate is sorted as 64 bits: the float's, made to order as integers do, above its
    number. Those past N are `least`. A candidate reads 4 bytes for each query head; a block writes 8 for each kept.
    """
    head, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n = block * BLOCK + tl.arange(0, BLOCK)
    mask = n < N
    pooled = tl.full((BLOCK,), 0.0 if ADDS else -float("inf"), tl.float32)
    for g in range(group):
        at = head * group + g
        weight = tl.load(scores + at * N + n, mask=mask, other=0.0) - tl.load(lse + at)
        pooled = pooled + tl.exp(weight) if ADDS else tl.maximum(pooled, weight)
    bits = (pooled + 0.0).to(tl.int32, bitcast=True)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
    key = tl.where(mask, (ordered << 32) | n.to(tl.int64), least)
    place = tl.arange(0, BLOCK)
    target = best + (head * tl.num_programs(1) + block) * kept + place
    tl.store(target, tl.sort(key, descending=True), mask=place < kept)


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


@triton.jit
def _gather_attend(
    queries,
    keys,
    values,
    ids,
    out,
    lse,
    key_head_step,
    key_step,
    value_head_step,
    value_step,
    K,
    D,
    v_dim,
    group,
    query_heads,
    scale,
    IS_ONE_DTYPE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_V_DIM: tl.constexpr,
):
    """For each run of SPLIT chosen tokens of a KV head: over blocks, gather keys, score them with the group's queries,
    rescale what was summed to the new maximum, gather values, add them weighted.

    Grid: (H, ceil(K / SPLIT)). Ids of -1 or past K score -inf and are not read; query heads and channels past the end
    are masked to 0. Scores and sums are float32. Where queries, keys and values are of one dtype, weights are rounded
    to it; otherwise all are widened. A token's key and value are read once for its group; a run writes its output and
    log-sum-exp in float32.
    """
    head, run = tl.program_id(0).to(tl.int64), tl.program_id(1)
    g = tl.arange(0, BLOCK_GROUP)
    d, v = tl.arange(0, BLOCK_DIM), tl.arange(0, BLOCK_V_DIM)
    of_group = tl.load(
        queries + (head * group + g[:, None]) * D + d[None, :],
        mask=(g[:, None] < group) & (d[None, :] < D),
        other=0.0,
    )
    if not IS_ONE_DTYPE:
        of_group = of_group.to(tl.float32)
    top = tl.full((BLOCK_GROUP,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_GROUP,), tl.float32)
    weighted = tl.zeros((BLOCK_GROUP, BLOCK_V_DIM), tl.float32)
    for start in range(0, SPLIT, BLOCK):
        n = run * SPLIT + start + tl.arange(0, BLOCK)
        token = tl.load(ids + head * K + n, mask=n < K, other=-1)
        is_one = token >= 0
        of_keys = tl.load(
            keys + head * key_head_step + token[None, :] * key_step + d[:, None],
            mask=is_one[None, :] & (d[:, None] < D),
            other=0.0,
        )
        if not IS_ONE_DTYPE:
            of_keys = of_keys.to(tl.float32)
        scores = tl.dot(of_group, of_keys, input_precision="ieee") * scale
        scores = tl.where(is_one[None, :], scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        # where nothing was scored yet, any finite number keeps the weights at 0
        base = tl.where(new_top == -float("inf"), 0.0, new_top)
        weights, kept = tl.exp(scores - base[:, None]), tl.exp(top - base)
        of_values = tl.load(
            values + head * value_head_step + token[:, None] * value_step + v[None, :],
            mask=is_one[:, None] & (v[None, :] < v_dim),
            other=0.0,
        )
        if not IS_ONE_DTYPE:
            of_values = of_values.to(tl.float32)
        total = total * kept + tl.sum(weights, 1)
        weighted = tl.dot(weights.to(of_values.dtype), of_values, weighted * kept[:, None], input_precision="ieee")
        top = new_top
    at = run * query_heads + head * group + g
    weighted = weighted / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out + at[:, None] * v_dim + v[None, :], weighted, mask=(g[:, None] < group) & (v[None, :] < v_dim))
    tl.store(
        lse + at, tl.where(total > 0, top + tl.log(tl.where(total > 0, total, 1.0)), -float("inf")), mask=g < group
    )
