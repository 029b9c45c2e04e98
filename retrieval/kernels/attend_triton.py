"""Attention over chosen tokens as Triton kernels, for tensors on a CUDA device; it gives the reference's values.

ops.py has checked what it dispatches here. Nothing here waits for the device, so that a decode step can be captured as
a graph. With `TRITON_INTERPRET=1`, set before Triton is imported, the kernels run on the cpu.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError as exc:
    raise ImportError("kernels need Triton: pip install 'kvloom[triton]'") from exc

from ..attention import PartialAttention
from .ops_triton import power

_BLOCK_TOKENS = 32
_SPLIT_TOKENS, _LONG_SPLIT_TOKENS = 64, 256  # of one program: few, so that a budget of 2,000 tokens fills a device
_LONG_TOKENS = 8192


def gather_attend(
    queries: Tensor, keys: Tensor, values: Tensor, ids: Tensor, scale: float, *, sinks: int = 0, window: int = 0
) -> PartialAttention:
    """See ops.py; runs of tokens are attended to apart, and merged.

    Parameters
    ----------
    sinks, window : so many first and last tokens of the context are attended to as well; they are not among `ids`.
    """
    (Hq, D), (H, K), v_dim = queries.shape, ids.shape, values.shape[2]
    count = sinks + window + K
    split = _SPLIT_TOKENS if count <= _LONG_TOKENS else _LONG_SPLIT_TOKENS
    splits = triton.cdiv(count, split)
    out = torch.empty(splits, Hq, v_dim, device=queries.device)
    lse = torch.empty(splits, Hq, device=queries.device)
    _gather_attend[(H, splits)](
        queries.contiguous(), keys, values, ids.contiguous(), out, lse,
        *keys.stride()[:2], *values.stride()[:2], K, sinks, window, keys.shape[1], D, v_dim, Hq // H, Hq, scale,
        IS_ONE_DTYPE=queries.dtype == keys.dtype == values.dtype, SPLIT=split, BLOCK=_BLOCK_TOKENS,
        BLOCK_GROUP=power(Hq // H), BLOCK_DIM=power(D), BLOCK_V_DIM=power(v_dim),
    )  # fmt: skip
    if splits == 1:
        return out[0], lse[0]
    merged, whole = torch.empty(Hq, v_dim, device=queries.device), torch.empty(Hq, device=queries.device)
    _merge[(Hq,)](out, lse, merged, whole, splits, Hq, v_dim, SPLITS=power(splits), BLOCK=16, BLOCK_V_DIM=power(v_dim))
    return merged, whole


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
    sinks,
    window,
    tokens,
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
    """For each run of SPLIT tokens of a KV head, the sinks, then the window, then the chosen: over blocks, gather keys,
    score them with the group's queries, rescale what was summed to the new maximum, gather values, add them weighted.

    Grid: (H, splits). Ids of -1 or past K score -inf and are not read; query heads and channels past the end are masked
    to 0. Scores and sums are float32. Where queries, keys and values are of one dtype, weights are rounded
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
        near = sinks + window
        token = tl.load(ids + head * K + n - near, mask=(n >= near) & (n < near + K), other=-1)
        token = tl.where(n < near, tl.where(n < sinks, n, tokens - near + n), token)
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


@triton.jit
def _merge(
    outs,
    lses,
    out,
    lse,
    splits,
    query_heads,
    v_dim,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_V_DIM: tl.constexpr,
):
    """For each query head: the log-sum-exp of all runs, then their outputs, weighted; zeros and -inf of nothing.

    Grid: (Hq,). A program reads and adds the outputs of its head in blocks of runs.
    """
    head = tl.program_id(0).to(tl.int64)
    s, v = tl.arange(0, SPLITS), tl.arange(0, BLOCK_V_DIM)
    own = tl.load(lses + s * query_heads + head, mask=s < splits, other=-float("inf"))
    top = tl.max(own, 0)
    base = tl.where(top == -float("inf"), 0.0, top)
    total = tl.sum(tl.exp(own - base), 0)
    whole = tl.where(total > 0, base + tl.log(tl.where(total > 0, total, 1.0)), -float("inf"))
    weighted = tl.zeros((BLOCK_V_DIM,), tl.float32)
    for start in range(0, SPLITS, BLOCK):
        b = start + tl.arange(0, BLOCK)
        weight = tl.exp(tl.load(lses + b * query_heads + head, mask=b < splits, other=-float("inf")) - base)
        rows = tl.load(
            outs + (b[:, None] * query_heads + head) * v_dim + v[None, :],
            mask=(b[:, None] < splits) & (v[None, :] < v_dim),
            other=0.0,
        )
        weighted += tl.sum(rows * weight[:, None], 0)
    tl.store(out + head * v_dim + v, weighted / tl.where(total > 0, total, 1.0), mask=v < v_dim)
    tl.store(lse + head, whole)
