"""The most important candidates of each KV head, without sorting, as Triton kernels for tensors on a CUDA device.

Nothing here waits for the device or has a shape that depends on data, so that a decode step can be captured as a graph.
With `TRITON_INTERPRET=1`, set before Triton is imported, the kernels run on the cpu.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError as exc:
    raise ImportError("kernels need Triton: pip install 'kvloom[triton]'") from exc

BLOCK = 1024
BINS = 256
STEPS_A_NAT, LEAST_NATS = 2048, 32  # together 16 bits


def top_pooled(
    scores: Tensor,
    kv_heads: int,
    k: int,
    pooling: str,
    *,
    near: Tensor | None = None,
    parts: Tensor | None = None,
    start: int = 0,
    block: int = BLOCK,
) -> Tensor:
    """See ops.py; k is above 0 and below N.

    Radix selection over importances in 65,536 steps of 1/2048 nat: the high and then the low byte of the least step
    that is taken are found by counting, then every block writes what it has above it behind what those before have.

    Parameters
    ----------
    near : see ops.py.
    parts : `[2, Hq, P]` float32, largest score and sum of exponentials less it of parts of each row; None to make them.
    start : number of the first candidate.
    """
    (Hq, N), device, group = scores.shape, scores.device, scores.shape[0] // kv_heads
    scores, blocks = scores.contiguous(), triton.cdiv(scores.shape[1], block)
    if parts is None:
        parts = torch.empty(2, Hq, blocks, device=device)
        _parts[(Hq, blocks)](scores, parts, N, Hq, blocks, BLOCK=block)
    steps = torch.empty(kv_heads, N, dtype=torch.int32, device=device)
    held = torch.zeros(2, kv_heads, BINS, dtype=torch.int32, device=device)
    counts = torch.empty(2, kv_heads, blocks, dtype=torch.int32, device=device)
    ids = torch.empty(kv_heads, k, dtype=torch.int64, device=device)
    grid, width = (kv_heads, blocks), parts.shape[2]
    _pool[grid](
        scores, scores if near is None else near.contiguous(), parts, steps, held, N, group, Hq, width, STEPS_A_NAT,
        LEAST_NATS, ADDS=pooling == "sum", HAS_NEAR=near is not None, PARTS=_power(width), BLOCK=block, BINS=BINS,
    )  # fmt: skip
    _count_low[grid](steps, held, N, kv_heads, k, BLOCK=block, BINS=BINS)
    _count_blocks[grid](steps, held, counts, N, kv_heads, k, BLOCK=block, BINS=BINS)
    _write[grid](steps, held, counts, ids, N, kv_heads, k, start, blocks, BLOCKS=_power(blocks), BLOCK=block, BINS=BINS)
    return ids


def _power(count: int) -> int:
    return int(triton.next_power_of_2(count))


@triton.jit
def _parts(scores, parts, N, query_heads, blocks, BLOCK: tl.constexpr):
    """For each block of candidates of a query head: its largest score, and the sum of exponentials less that.

    Grid: (Hq, ceil(N / BLOCK)). Candidates past N are -inf.
    """
    head, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n = block * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(scores + head * N + n, mask=n < N, other=-float("inf"))
    top = tl.max(row, 0)
    base = tl.where(top == -float("inf"), 0.0, top)
    tl.store(parts + head * blocks + block, top)
    tl.store(parts + (query_heads + head) * blocks + block, tl.sum(tl.exp(row - base), 0))


@triton.jit
def _bin_of(held, k, BINS: tl.constexpr):
    """Of counts `held` by bin: the bin of the k-th largest, and how many lie in higher ones."""
    bins = tl.arange(0, BINS)
    at_least = tl.sum(held, 0) - tl.cumsum(held, 0) + held
    found = tl.sum((at_least >= k).to(tl.int32), 0) - 1
    return found, tl.sum(tl.where(bins > found, held, 0), 0)


@triton.jit
def _least(held, head, heads, k, BINS: tl.constexpr):
    """The least step of a head that is taken, and how many of the tokens at it are."""
    bins = tl.arange(0, BINS)
    high, above = _bin_of(tl.load(held + head * BINS + bins), k, BINS)
    low, between = _bin_of(tl.load(held + (heads + head) * BINS + bins), k - above, BINS)
    return high * BINS + low, k - above - between


@triton.jit
def _pool(
    scores,
    near,
    parts,
    steps,
    held,
    N,
    group,
    query_heads,
    width,
    steps_a_nat,
    least_nats,
    ADDS: tl.constexpr,
    HAS_NEAR: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
):
    """For each block of candidates of a KV head: pool the logarithm of the group's softmax, store it in steps, count
    high bytes.

    Grid: (H, ceil(N / BLOCK)). Every program merges the parts of its query heads, and what is near. A candidate reads 4
    bytes for each query head and writes 4; what is past N is not counted. What is below exp(-32) is step 0.
    """
    head, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n = block * BLOCK + tl.arange(0, BLOCK)
    p = tl.arange(0, PARTS)
    pooled = tl.full((BLOCK,), 0.0 if ADDS else -float("inf"), tl.float32)
    for g in range(group):
        at = head * group + g
        top = tl.load(parts + at * width + p, mask=p < width, other=-float("inf"))
        total = tl.load(parts + (query_heads + at) * width + p, mask=p < width, other=0.0)
        best = tl.max(top, 0)
        lse = best + tl.log(tl.sum(total * tl.exp(top - best), 0))
        if HAS_NEAR:
            other = tl.load(near + at)
            most = tl.maximum(lse, other)
            lse = most + tl.log(tl.exp(lse - most) + tl.exp(other - most))
        weight = tl.load(scores + at * N + n, mask=n < N, other=-float("inf")) - lse
        pooled = pooled + tl.exp(weight) if ADDS else tl.maximum(pooled, weight)
    if ADDS:
        pooled = tl.log(pooled)
    scaled = (tl.maximum(pooled, 0.0 - least_nats) + least_nats) * steps_a_nat
    step = tl.minimum(scaled, BINS * BINS - 1.0).to(tl.int32)
    tl.store(steps + head * N + n, step, mask=n < N)
    bins = tl.arange(0, BINS)
    found = tl.histogram(tl.where(n < N, step // BINS, 0), BINS)
    past = BLOCK - tl.sum((n < N).to(tl.int32), 0)
    found = found - tl.where(bins == 0, past, 0)
    tl.atomic_add(held + head * BINS + bins, found, mask=found > 0)


@triton.jit
def _count_low(steps, held, N, heads, k, BLOCK: tl.constexpr, BINS: tl.constexpr):
    """For each block of candidates of a KV head: count low bytes of those in the bin of the k-th.

    Grid: (H, ceil(N / BLOCK)). A candidate reads 4 bytes.
    """
    head, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n = block * BLOCK + tl.arange(0, BLOCK)
    bins = tl.arange(0, BINS)
    high, _ = _bin_of(tl.load(held + head * BINS + bins), k, BINS)
    step = tl.load(steps + head * N + n, mask=n < N, other=-1)
    is_in = (n < N) & (step // BINS == high)
    found = tl.histogram(tl.where(is_in, step % BINS, 0), BINS)
    others = BLOCK - tl.sum(is_in.to(tl.int32), 0)
    found = found - tl.where(bins == 0, others, 0)
    tl.atomic_add(held + (heads + head) * BINS + bins, found, mask=found > 0)


@triton.jit
def _count_blocks(steps, held, counts, N, heads, k, BLOCK: tl.constexpr, BINS: tl.constexpr):
    """For each block of candidates of a KV head: how many stand above the least step that is taken, and how many at it.

    Grid: (H, ceil(N / BLOCK)). A candidate reads 4 bytes, a block writes 8.
    """
    head, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n = block * BLOCK + tl.arange(0, BLOCK)
    least, _ = _least(held, head, heads, k, BINS)
    step = tl.load(steps + head * N + n, mask=n < N, other=-1)
    blocks = tl.num_programs(1)
    tl.store(counts + head * blocks + block, tl.sum((step > least).to(tl.int32), 0))
    tl.store(counts + (heads + head) * blocks + block, tl.sum((step == least).to(tl.int32), 0))


@triton.jit
def _write(
    steps, held, counts, ids, N, heads, k, start, blocks, BLOCKS: tl.constexpr, BLOCK: tl.constexpr, BINS: tl.constexpr
):
    """For each block of candidates of a KV head: those above the least step, and the last ones at it, are written
    behind what the blocks before write.

    Grid: (H, ceil(N / BLOCK)). A candidate reads 4 bytes, a program the counts of all blocks; one that is taken writes
    8 bytes.
    """
    head, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n = block * BLOCK + tl.arange(0, BLOCK)
    b = tl.arange(0, BLOCKS)
    least, taken_at = _least(held, head, heads, k, BINS)
    of_above = tl.load(counts + head * blocks + b, mask=b < blocks, other=0)
    of_at = tl.load(counts + (heads + head) * blocks + b, mask=b < blocks, other=0)
    above_before = tl.sum(tl.where(b < block, of_above, 0), 0)
    at_before = tl.sum(tl.where(b < block, of_at, 0), 0)
    skipped = tl.sum(of_at, 0) - taken_at
    step = tl.load(steps + head * N + n, mask=n < N, other=-1)
    at = (step == least).to(tl.int32)
    taken = (step > least).to(tl.int32) | (at & ((at_before + tl.cumsum(at, 0)) > skipped).to(tl.int32))
    place = above_before + tl.maximum(at_before - skipped, 0) + tl.cumsum(taken, 0) - 1
    tl.store(ids + head * k + place, n.to(tl.int64) + start, mask=taken == 1)
