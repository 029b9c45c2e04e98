"""The functions of quantized_ops.py as Triton kernels, for tensors on a CUDA device; they give the reference's values.

quantized_ops.py has checked what it dispatches here. With `TRITON_INTERPRET=1`, set before Triton is imported, the
kernels run on the cpu.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError as exc:
    raise ImportError("kernels need Triton: pip install 'kvloom[triton]'") from exc

from .ops_triton import power


def quantized_scores(
    queries: Tensor, words: Tensor, scales: Tensor, means: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """See quantized_ops.py; also the largest score of each group of tokens, and the sum of exponentials less it: `[2,
    Hq, n]` float32, from which `top_pooled` of top_triton.py makes a log-sum-exp.
    """
    (Hq, D), (H, n, W, size) = queries.shape, words.shape
    scores = torch.empty(Hq, n * size, device=queries.device)
    parts = torch.empty(2, Hq, n, device=queries.device)
    _quantized_scores[(H, n)](
        queries.contiguous(), words, scales, means, scores, parts, words.stride(0), scales.stride(0), means.stride(0),
        n, D, Hq // H, Hq, scale, W=W, SIZE=size, BLOCK_GROUP=power(Hq // H),
    )  # fmt: skip
    return scores, parts


def quantized_sums(weights: Tensor, words: Tensor, scales: Tensor, means: Tensor) -> Tensor:
    """See quantized_ops.py."""
    (H, n, rows, D), Hq = words.shape, len(weights)
    sums = torch.empty(Hq, n, D, device=weights.device)
    _quantized_sums[(H, n)](
        weights.contiguous(), words, scales, means, sums, words.stride(0), scales.stride(0), means.stride(0),
        n, D, Hq // H, ROWS=rows, BLOCK_GROUP=power(Hq // H), BLOCK_DIM=power(D),
    )  # fmt: skip
    return sums.sum(1)


@triton.jit
def _quantized_sums(
    weights,
    words,
    scales,
    means,
    sums,
    words_step,
    scales_step,
    means_step,
    groups,
    D,
    group,
    ROWS: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """For each group of 32 ROWS tokens of a KV head: over words, unpack the signs of 32 tokens, `weights * scales @
    signs` of the query heads, plus the weights' sum times the group's mean.

    Grid: (H, n). Query heads and channels past the end are masked. Signs are exact in half precision, to which products
    of weight and scale are rounded after division by the largest of 32; sums are float32. A token reads D / 8 + 2
    bytes, once for its group, and 4 bytes for each query head.
    """
    head, block = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    t, g, d = tl.arange(0, 32), tl.arange(0, BLOCK_GROUP), tl.arange(0, BLOCK_DIM)
    at = head * group + g
    total = tl.zeros((BLOCK_GROUP,), dtype=tl.float32)
    found = tl.zeros((BLOCK_GROUP, BLOCK_DIM), dtype=tl.float32)
    for r in range(ROWS):
        token = (block * ROWS + r) * 32 + t
        row = tl.load(weights + at[:, None] * (groups * ROWS * 32) + token[None, :], mask=g[:, None] < group, other=0.0)
        own = tl.load(scales + head * scales_step + token).to(tl.float32)
        shares = row * own[None, :]
        unit = tl.maximum(tl.max(shares, 1), 1e-30)
        word = tl.load(words + head * words_step + (block * ROWS + r) * D + d, mask=d < D, other=0)
        signs = (2 * ((word[None, :] >> t[:, None]) & 1) - 1).to(tl.float16)
        found += tl.dot((shares / unit[:, None]).to(tl.float16), signs) * unit[:, None]
        total += tl.sum(row, 1)
    mean = tl.load(means + head * means_step + block * D + d, mask=d < D, other=0.0).to(tl.float32)
    found += total[:, None] * mean[None, :]
    tl.store(
        sums + at[:, None] * (groups * D) + block * D + d[None, :], found, mask=(g[:, None] < group) & (d[None, :] < D)
    )


@triton.jit
def _quantized_scores(
    queries,
    words,
    scales,
    means,
    scores,
    parts,
    words_step,
    scales_step,
    means_step,
    groups,
    D,
    group,
    query_heads,
    scale,
    W: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
):
    """For each group of SIZE tokens of a KV head: over words, unpack 16 codes of each token, add `codes @ queries` of
    the query heads; times the tokens' scales, plus the products with the group's mean; scale.

    Grid: (H, n). Query heads and channels past the end are masked to 0. Codes less 1.5 are exact in half precision, to
    which the queries are rounded; sums are float32. A token reads D / 4 + 2 bytes, once for its group, and gives 4
    bytes for each query head.
    """
    head, block = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    t, g, c = tl.arange(0, SIZE), tl.arange(0, BLOCK_GROUP), tl.arange(0, 16)
    total = tl.zeros((SIZE, BLOCK_GROUP), dtype=tl.float32)
    shared = tl.zeros((BLOCK_GROUP,), dtype=tl.float32)
    for w in range(W):
        channel = w * 16 + c
        word = tl.load(words + head * words_step + (block * W + w) * SIZE + t)
        codes = ((word[:, None] >> (2 * c)[None, :]) & 3).to(tl.float16) - 1.5
        of_group = tl.load(
            queries + (head * group + g[None, :]) * D + channel[:, None],
            mask=(g[None, :] < group) & (channel[:, None] < D),
            other=0.0,
        ).to(tl.float32)
        mean = tl.load(means + head * means_step + block * D + channel, mask=channel < D, other=0.0).to(tl.float32)
        shared += tl.sum(of_group * mean[:, None], 0)
        total = tl.dot(codes.to(tl.float16), of_group.to(tl.float16), total)
    own = tl.load(scales + head * scales_step + block * SIZE + t).to(tl.float32)
    total = (total * own[:, None] + shared[None, :]) * scale
    at = head * group + g
    tl.store(scores + at[None, :] * (groups * SIZE) + block * SIZE + t[:, None], total, mask=g[None, :] < group)
    top = tl.max(total, 0)
    tl.store(parts + at * groups + block, top, mask=g < group)
    tl.store(parts + (query_heads + at) * groups + block, tl.sum(tl.exp(total - top[None, :]), 0), mask=g < group)
