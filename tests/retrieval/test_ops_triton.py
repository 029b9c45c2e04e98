"""Triton kernels of retrieval against the functions they stand for, on values: without a GPU by the interpreter."""

import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvloom.core import RopeSpec
from kvloom.retrieval.attention import attend_at
from kvloom.retrieval.kernels import code_ops, ops, quantized_ops
from kvloom.retrieval.selector import LayerShape, pooled

from .test_ops import apart, factor_of, numbers, scores_at, some_ids

pytest.importorskip("triton", reason="Triton is not installed: pip install 'kvloom[triton]'")

from kvloom.retrieval.kernels import (
    attend_triton,
    code_ops_triton,
    ops_triton,
    quantized_ops_triton,
    top_triton,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# of queries and what they meet; the interpreter multiplies bfloat16 by its bits, so there one of the two is widened
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float16, torch.float16),
    (torch.float32, torch.float16),
    (torch.float32, torch.bfloat16),
    *([(torch.bfloat16, torch.bfloat16)] if DEVICE == "cuda" else []),
]


def on(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(DEVICE)


@settings(max_examples=25)
@given(
    heads=st.tuples(st.integers(1, 2), st.sampled_from([1, 3, 4, 20])),
    dim=st.sampled_from([5, 32, 40]),
    count=st.sampled_from([1, 64, 100]),
    dtypes=st.sampled_from(DTYPES),
    strides=st.booleans(),
    seed=st.integers(0, 99),
)
def test_landmark_scores(heads, dim, count, dtypes, strides, seed) -> None:
    (H, G), (query_dtype, dtype) = heads, dtypes
    queries, landmarks = numbers(H * G, dim, seed=seed, dtype=query_dtype), numbers(H, count, dim, seed=1, dtype=dtype)
    true = ops.landmark_scores(queries, landmarks, scale=0.3)
    found = ops_triton.landmark_scores(on(queries), on(apart(landmarks) if strides else landmarks), 0.3)
    torch.testing.assert_close(found.cpu(), true, rtol=1e-5, atol=1e-5)


@settings(max_examples=25)
@given(
    heads=st.tuples(st.integers(1, 2), st.sampled_from([1, 3, 4, 20])),
    rank=st.sampled_from([5, 32, 40]),
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=6),
    query_dtype=st.sampled_from([torch.float32, torch.float16]),
    seed=st.integers(0, 99),
)
def test_tile_scores(heads, rank, lengths, query_dtype, seed) -> None:
    """Runs of tokens that begin and end within tiles, some empty, some overlapping."""
    (H, G), tokens = heads, 77
    queries = numbers(H * G, rank, seed=seed, dtype=query_dtype)
    rows = numbers(H, tokens, rank, seed=1, dtype=torch.float16)
    counts = torch.tensor(lengths).expand(H, -1)
    firsts = (torch.rand(counts.shape, generator=torch.Generator().manual_seed(seed)) * (tokens - counts + 1)).long()
    ids = torch.stack([torch.cat([f + torch.arange(n) for f, n in zip(of, lengths, strict=True)]) for of in firsts])
    if not ids.numel():
        return
    tiles, true = ops.tiled(rows), scores_at(queries, rows, ids, 0.3)
    found = ops_triton.tile_scores(on(queries), on(tiles), on(ids), 0.3)
    torch.testing.assert_close(found.cpu(), true, rtol=1e-4, atol=1e-4)
    dispatched = ops.tile_scores(on(queries), on(tiles), on(firsts), on(counts), scale=0.3)
    torch.testing.assert_close(dispatched.cpu(), true, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pooling", ["max", "sum"])
@pytest.mark.parametrize("spread", [0.001, 3.0, 30.0])
@pytest.mark.parametrize(("count", "k"), [(2, 1), (16, 15), (70, 7), (70, 40), (1500, 1), (3000, 700)])
def test_top_pooled(count: int, k: int, spread: float, pooling: str) -> None:
    scores = spread * numbers(6, count, seed=k)
    ids = top_triton.top_pooled(on(scores), 2, k, pooling, block=16 if count < 100 else 1024).cpu()
    assert ids.shape == (2, k)
    assert bool((ids.diff(dim=1) > 0).all()) and int(ids.min()) >= 0 and int(ids.max()) < count
    weights = pooled(scores.double(), LayerShape(2, 3, 1, 1.0), pooling)
    taken = weights.gather(1, ids)
    # steps of 1/2048 nat, and float32 logarithms
    torch.testing.assert_close(taken.sum(1), weights.topk(k, dim=1).values.sum(1), rtol=5e-4, atol=1e-13)
    left = weights.scatter(1, ids, -1.0)
    assert bool((left.amax(1) <= taken.amin(1) * 1.0006 + 2e-14).all())


@pytest.mark.parametrize("pooling", ["max", "sum"])
def test_top_pooled_weighs_beside_what_is_near(pooling: str) -> None:
    scores, near = 3 * numbers(6, 500, seed=1), torch.tensor([-math.inf, 9.0, 0.0, 20.0, 12.0, 11.0])
    weights = pooled(scores.double(), LayerShape(2, 3, 1, 1.0), pooling, near.double())
    ids = top_triton.top_pooled(on(scores), 2, 20, pooling, near=on(near), block=64).cpu()
    # steps of 1/2048 nat
    torch.testing.assert_close(weights.gather(1, ids).sum(1), weights.topk(20, dim=1).values.sum(1), rtol=5e-4, atol=0)


def test_top_pooled_takes_the_parts_of_rows() -> None:
    """What was summed when the scores were made, in other pieces, gives the same choice."""
    scores = 4 * numbers(4, 512, seed=1)
    pieces = scores.view(4, 2, 256)
    parts = torch.stack((pieces.amax(2), (pieces - pieces.amax(2, keepdim=True)).exp().sum(2)))
    found = top_triton.top_pooled(on(scores), 2, 37, "max", parts=on(parts))
    assert torch.equal(found, top_triton.top_pooled(on(scores), 2, 37, "max", block=64))


@pytest.mark.parametrize("pooling", ["max", "sum"])
def test_top_pooled_prefers_the_last_of_equals(pooling: str) -> None:
    scores = torch.tensor([[2.0, 0.0, 2.0, 2.0, -math.inf], [0.0, -0.0, 0.0, 0.0, 0.0]])
    assert top_triton.top_pooled(on(scores), 1, 2, pooling, block=16).tolist() == [[2, 3]]


@settings(max_examples=30)
@given(
    rank=st.sampled_from([1, 33, 40]),
    dim=st.sampled_from([2, 8, 80]),
    kind=st.sampled_from(["float32", "float16", "int8", "int4"]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    turns=st.booleans(),
    interleaved=st.booleans(),
    scaled=st.booleans(),
    count=st.sampled_from([1, 31, 40]),
    seed=st.integers(0, 99),
)
def test_rebuild_keys(rank, dim, kind, dtype, turns, interleaved, scaled, count, seed) -> None:
    factor, _ = factor_of(50, rank, kind, seed)
    basis, ids = (numbers(2, rank, dim, seed=seed + 1) / rank**0.5).to(dtype), some_ids(2, 50, count, seed)
    scale = torch.rand(rank, generator=torch.Generator().manual_seed(seed)) + 0.5 if scaled else None
    bias = numbers(2, dim, seed=seed + 2) if scaled else None
    rope = RopeSpec(tuple(100.0 ** -(i / dim) for i in range(dim // 2)), interleaved=interleaved)
    cos, sin = rope.cos_sin(torch.arange(7, 57)) if turns else (None, None)
    true = ops.rebuild_keys(factor, basis, ids, scale=scale, bias=bias, cos=cos, sin=sin, interleaved=interleaved)
    found = ops_triton.rebuild_keys(on(factor), on(basis), on(ids), on(scale), on(bias), on(cos), on(sin), interleaved)
    assert found.dtype == true.dtype
    torch.testing.assert_close(found.cpu(), true, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.slow
@settings(max_examples=25)
@given(
    heads=st.tuples(st.integers(1, 2), st.sampled_from([1, 3, 4, 20])),
    dims=st.sampled_from([(1, 1), (24, 40), (64, 16)]),
    count=st.sampled_from([1, 30, 260]),
    dtypes=st.sampled_from(DTYPES),
    strides=st.booleans(),
    seed=st.integers(0, 99),
)
def test_gather_attend(heads, dims, count, dtypes, strides, seed) -> None:
    (H, G), (D, v_dim), (query_dtype, dtype) = heads, dims, dtypes
    queries, keys = 2 * numbers(H * G, D, seed=seed, dtype=query_dtype), numbers(H, 300, D, seed=seed + 1, dtype=dtype)
    values, ids = numbers(H, 300, v_dim, seed=seed + 2, dtype=dtype), some_ids(H, 300, count, seed)
    true = attend_at(queries, keys, values, ids, scale=D**-0.5)
    if strides:
        keys, values = apart(keys), apart(values)
    out, lse = attend_triton.gather_attend(on(queries), on(keys), on(values), on(ids), D**-0.5)
    # weights are rounded to the dtype of the values if that is all there is
    torch.testing.assert_close(out.cpu(), true[0], rtol=1e-4, atol=2 * torch.finfo(dtype).eps)
    torch.testing.assert_close(lse.cpu(), true[1], rtol=1e-5, atol=1e-5)


def test_attention_to_nothing() -> None:
    ids = torch.full((2, 300), -1)
    ids[1, 299] = 3
    out, lse = attend_triton.gather_attend(
        on(torch.ones(4, 8)), on(torch.ones(2, 5, 8)), on(torch.ones(2, 5, 3)), on(ids), 1.0
    )
    assert out.tolist() == [[0.0] * 3] * 2 + [[1.0] * 3] * 2
    assert lse.tolist() == [-math.inf] * 2 + [8.0] * 2


@pytest.mark.parametrize(("sinks", "window", "count"), [(0, 0, 5), (4, 0, 1), (1, 1, 70), (16, 33, 0), (3, 40, 130)])
def test_sinks_and_window_are_attended_to_with_what_was_chosen(sinks: int, window: int, count: int) -> None:
    queries, keys, values = numbers(6, 24, seed=0), numbers(2, 300, 24, seed=1), numbers(2, 300, 8, seed=2)
    ids = sinks + some_ids(2, 300 - sinks - window, count, 3) if count else torch.empty(2, 0, dtype=torch.int64)
    ids = torch.where(ids < sinks, -1, ids)
    ends = torch.cat((torch.arange(sinks), torch.arange(300 - window, 300))).expand(2, -1)
    true = attend_at(queries, keys, values, torch.cat((ends, ids), 1), scale=0.2)
    found = attend_triton.gather_attend(on(queries), on(keys), on(values), on(ids), 0.2, sinks=sinks, window=window)
    torch.testing.assert_close([part.cpu() for part in found], list(true), rtol=1e-4, atol=1e-5)


@settings(max_examples=10, deadline=None)
@given(
    heads=st.tuples(st.integers(1, 2), st.sampled_from([1, 3, 4, 20])),
    dim=st.sampled_from([5, 32, 40]),
    groups=st.integers(1, 2),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    seed=st.integers(0, 99),
)
def test_quantized_scores(heads, dim, groups, dtype, seed) -> None:
    (H, G) = heads
    keys = numbers(H, groups, 256, dim, seed=seed) + 1
    means = keys.mean(2).half()
    words, scales = quantized_ops.quantize_keys(keys, means.float())
    queries = numbers(H * G, dim, seed=seed + 1, dtype=dtype)
    stored = quantized_ops.dequantize_keys(words, scales, means).flatten(1, 2)
    true = (queries.float().view(H, -1, dim) @ stored.mT).flatten(0, 1) * 0.3
    room = [torch.cat((part, part), 1)[:, :groups] for part in (words, scales, means)]
    found, parts = quantized_ops_triton.quantized_scores(on(queries), *map(on, room), 0.3)
    torch.testing.assert_close(found.cpu(), true, rtol=2e-3, atol=1e-2)  # queries in half precision
    top, total = parts.cpu()
    torch.testing.assert_close((top + total.log()).logsumexp(1), found.cpu().logsumexp(1), rtol=1e-5, atol=1e-5)


@settings(max_examples=15)
@given(
    heads=st.tuples(st.integers(1, 2), st.sampled_from([1, 3, 20])),
    dim=st.sampled_from([5, 32, 64]),
    groups=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_quantized_sums(heads, dim, groups, seed) -> None:
    (H, G) = heads
    values = numbers(H, groups, 256, dim, seed=seed) + 1
    means = values.mean(2).half()
    words, scales = quantized_ops.quantize_values(values, means.float())
    weights = numbers(H * G, groups * 256, seed=seed + 1).abs() ** 8 * 1e-6  # far apart, as a softmax is
    true = quantized_ops.quantized_sums(weights, words, scales, means)
    room = [torch.cat((part, part), 1)[:, :groups] for part in (words, scales, means)]
    found = quantized_ops_triton.quantized_sums(on(weights), *map(on, room))
    scale = float(weights.sum(1).max())
    torch.testing.assert_close(found.cpu(), true, rtol=2e-3, atol=2e-3 * scale)


@pytest.mark.slow
@settings(max_examples=30)
@given(
    heads=st.integers(1, 2),
    group=st.integers(1, 3),
    codes=st.sampled_from([1, 3, 300]),
    tokens=st.sampled_from([1, 9, 1024, 1501]),
    bits=st.sampled_from([12, 16]),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 99),
)
def test_codes(heads, group, codes, tokens, bits, share, seed) -> None:
    random = torch.Generator().manual_seed(seed)
    packed = code_ops.pack_codes(torch.randint(0, codes, (heads, tokens), generator=random), bits)
    band_starts = sorted(torch.randint(0, tokens + 1, (seed % 3,), generator=random).tolist())
    codes *= len(band_starts) + 1
    table = torch.randn(heads * group, codes, generator=random)
    counts = code_ops.code_counts(packed, tokens, codes, bits=bits, band_starts=band_starts)
    found = code_ops_triton.code_counts(on(packed), bits, tokens, band_starts).cpu().unflatten(1, (-1, 1 << bits))
    assert torch.equal(found[..., : codes // (len(band_starts) + 1)].flatten(1), counts)
    scores = code_ops_triton.vq_scores(on(table), on(packed), bits, tokens, band_starts).cpu()
    assert torch.equal(scores, code_ops.vq_scores(table, packed, tokens, bits=bits, band_starts=band_starts))
    budget = int(share * tokens)
    importance = table[:heads].round() if seed % 2 else table[:heads]
    if budget:
        ids = code_ops_triton.vq_select(on(importance), on(packed), bits, tokens, on(counts), budget, band_starts).cpu()
        assert torch.equal(
            ids, code_ops.vq_select(importance, packed, tokens, counts, budget, bits=bits, band_starts=band_starts)
        )


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kvloom.retrieval.kernels import attend_triton as a, code_ops_triton as c, ops_triton as k
from kvloom.retrieval.kernels import quantized_ops_triton as q, top_triton as t

def build(kernel, types, **constants):
    for name, value in constants.items():
        types[name] = "constexpr"
    names = kernel.arg_names
    types |= {name: "i32" for name in names if name not in types}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, {name: types[name] for name in names}, values)
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]

u8, i8, f16, f32, i32, i64 = "*u8", "*i8", "*fp16", "*fp32", "*i32", "*i64"
for of_queries in (f16, f32):
    one = of_queries == f16
    build(k._landmark_scores, dict(queries=of_queries, rows=f16, scores=f32, scale="fp32"),
          IS_ONE_DTYPE=one, BLOCK=64, BLOCK_GROUP=16, BLOCK_DIM=32)
    build(k._tile_scores, dict(queries=of_queries, tiles=f16, ids=i64, scores=f32, scale="fp32"),
          IS_ONE_DTYPE=one, TILE=16, BLOCK=128, BLOCK_GROUP=16, BLOCK_RANK=32)
    build(q._quantized_scores, dict(queries=of_queries, words=i32, scales=f16, means=f16, scores=f32, parts=f32,
          scale="fp32"), W=8, SIZE=256, BLOCK_GROUP=16)
    build(q._quantized_sums, dict(weights=f32, words=i32, scales=f16, means=f16, sums=f32),
          ROWS=8, BLOCK_GROUP=16, BLOCK_DIM=128)
    for split in (64, 256):
        build(a._gather_attend, dict(queries=of_queries, keys=f16, values=f16, ids=i64, out=f32, lse=f32, scale="fp32"),
              IS_ONE_DTYPE=one, SPLIT=split, BLOCK=32, BLOCK_GROUP=16, BLOCK_DIM=128, BLOCK_V_DIM=128)
build(a._merge, dict(outs=f32, lses=f32, out=f32, lse=f32), SPLITS=64, BLOCK=16, BLOCK_V_DIM=128)
build(t._parts, dict(scores=f32, parts=f32), BLOCK=1024)
for adds in (True, False):
    build(t._pool, dict(scores=f32, near=f32, parts=f32, steps=i32, held=i32), ADDS=adds, HAS_NEAR=True, PARTS=512,
          BLOCK=1024, BINS=256)
build(t._count_low, dict(steps=i32, held=i32), BLOCK=1024, BINS=256)
build(t._count_blocks, dict(steps=i32, held=i32, counts=i32), BLOCK=1024, BINS=256)
build(t._write, dict(steps=i32, held=i32, counts=i32, ids=i64), BLOCKS=128, BLOCK=1024, BINS=256)
for factor, bits, scales in ((f16, 8, False), (i8, 8, True), (u8, 4, True)):
    tables = dict(factor=factor, basis=f16, ids=i64, scale=f32, bias=f32, cos=f32, sin=f32, keys=f16)
    build(k._rebuild_keys, tables, BITS=bits, SCALES=scales, SHIFTS=scales, ROTATES=True, INTERLEAVED=scales,
          IS_ONE_DTYPE=not scales, BLOCK_TOKENS=32, BLOCK_RANK=32, BLOCK_PAIRS=64)
build(c._count, dict(packed=u8, counts="*i32", first=i64), BITS=16, BLOCK=1024)
build(c._look_up, dict(table=f32, packed=u8, scores=f32, first=i64), BITS=12, BLOCK=1024)
chosen = dict(importance=f32, packed=u8, first=i64, threshold=f32)
build(c._count_chosen, chosen | dict(found="*i32"), BITS=12, BLOCK=1024)
build(c._write_chosen, chosen | dict(skipped=i64, before=i64, ids=i64), BITS=12, BLOCK=1024)
print("compiled")
"""


@pytest.mark.slow
def test_kernels_compile_for_a_gpu() -> None:
    """The interpreter takes what the compiler refuses; the compiler needs no GPU to make its assembly."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, check=False, env=environment)
    assert done.stdout.strip() == "compiled", done.stderr[-3000:]
