"""Kernels of retrieval on the cpu, compiled and in torch, against plain sums in float64."""

import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvloom.compress.kernels.ops import pack_bits
from kvloom.core import RopeSpec
from kvloom.retrieval import paged_kv
from kvloom.retrieval.attention import attend_at
from kvloom.retrieval.kernels import ops
from kvloom.retrieval.paged_kv import PagedKV
from kvloom.retrieval.selector import LayerShape, pooled

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
heads = st.tuples(st.integers(1, 3), st.integers(1, 4))


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def path(request: pytest.FixtureRequest) -> str:
    """Each test runs with numba's kernels and without."""
    patch = request.getfixturevalue("monkeypatch")
    if request.param == "torch":
        for module in (ops, paged_kv):
            patch.setattr(module, "compiled_for_cpu", lambda *_: None)
    elif ops.compiled_for_cpu() is None:
        pytest.skip("numba is not installed: pip install 'kvloom[retrieval]'")
    return request.param


def numbers(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def some_ids(kv_heads: int, tokens: int, count: int, seed: int, pads: bool = True) -> Tensor:
    """`[H, K]`, no token twice in a row, in any order, some of them -1."""
    random = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(tokens, generator=random)[:count] for _ in range(kv_heads)]
    ids = torch.stack(rows)
    return ids.masked_fill(torch.rand(ids.shape, generator=random) < 0.2, -1) if pads else ids


def apart(rows: Tensor) -> Tensor:
    """The same numbers with others between the tokens."""
    wide = torch.full((rows.shape[1], rows.shape[0], rows.shape[2] + 5), torch.nan, dtype=rows.dtype)
    wide[..., : rows.shape[2]] = rows.transpose(0, 1)
    return wide[..., : rows.shape[2]].transpose(0, 1)


def true_attention(queries: Tensor, keys: Tensor, values: Tensor, ids: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Head by head, token by token, in float64."""
    group = len(queries) // len(keys)
    out, lse = torch.zeros(len(queries), values.shape[2]), torch.full((len(queries),), -math.inf)
    for head, query in enumerate(queries.double()):
        kept = [i for i in ids[head // group].tolist() if i >= 0]
        if kept:
            scores = (keys[head // group, kept].double() @ query) * scale
            lse[head] = scores.logsumexp(0)
            out[head] = scores.softmax(0) @ values[head // group, kept].double()
    return out, lse


@settings(max_examples=60)
@given(
    heads=heads,
    dims=st.sampled_from([(1, 1), (8, 8), (16, 48), (40, 24), (128, 128), (33, 7)]),
    tokens=st.integers(1, 70),
    count=st.integers(0, 70),
    dtype=st.sampled_from(FLOATS),
    value_dtype=st.sampled_from(FLOATS),
    strides=st.booleans(),
    seed=st.integers(0, 999),
)
def test_gather_attend(heads, dims, tokens, count, dtype, value_dtype, strides, seed) -> None:
    (H, G), (D, v_dim) = heads, dims
    queries, keys = 3 * numbers(H * G, D, seed=seed), numbers(H, tokens, D, seed=seed + 1, dtype=dtype)
    values = numbers(H, tokens, v_dim, seed=seed + 2, dtype=value_dtype)
    ids = some_ids(H, tokens, count, seed)
    if strides:
        keys, values, ids = apart(keys), apart(values), ids.T.contiguous().T
    found = ops.gather_attend(queries, keys, values, ids, scale=D**-0.5)
    torch.testing.assert_close(found, true_attention(queries, keys, values, ids, D**-0.5), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", FLOATS)
def test_attention_at_extremes(dtype: torch.dtype) -> None:
    """Scores that only their differences keep from overflow, and one that drowns all others."""
    keys = torch.tensor([[[300.0], [280.0], [-300.0], [0.0]]]).to(dtype)
    values = torch.tensor([[[1.0], [2.0], [4.0], [8.0]]]).to(dtype)
    queries, ids = torch.tensor([[100.0], [-100.0], [0.0]]), torch.tensor([[0, 1, 2, 3]])
    found = ops.gather_attend(queries, keys, values, ids, scale=0.01)
    torch.testing.assert_close(found, true_attention(queries, keys, values, ids, 0.01))
    assert ops.gather_attend(queries, keys, values, ids, scale=1.0)[0][:2, 0].tolist() == [float(values[0, 0, 0]), 4.0]


def test_attention_to_nothing() -> None:
    for ids in (torch.empty(2, 0, dtype=torch.int64), torch.full((2, 3), -1)):
        out, lse = ops.gather_attend(torch.ones(4, 8), torch.ones(2, 5, 8), torch.ones(2, 5, 3), ids, scale=1.0)
        assert out.tolist() == [[0.0] * 3] * 4
        assert lse.tolist() == [-math.inf] * 4


@settings(max_examples=40)
@given(
    heads=heads,
    dims=st.sampled_from([(8, 8), (16, 48), (33, 7)]),
    page_tokens=st.sampled_from([1, 4, 16]),
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    rest=st.integers(1, 15),
    count=st.integers(0, 30),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 999),
)
def test_pages_are_the_whole(heads, dims, page_tokens, sizes, rest, count, dtype, seed) -> None:
    (H, G), (D, v_dim) = heads, dims
    pieces = [size * page_tokens for size in sizes] + [min(rest, page_tokens)]
    keys, values = numbers(H, sum(pieces), D, seed=seed, dtype=dtype), numbers(H, sum(pieces), v_dim, seed=seed + 1)
    pages, queries = PagedKV(page_tokens), numbers(H * G, D, seed=seed + 2)
    ids = some_ids(H, sum(pieces), count, seed)
    for n, (of_keys, of_values) in enumerate(zip(keys.split(pieces, 1), values.split(pieces, 1), strict=True)):
        pages.append(apart(of_keys) if n % 2 else of_keys.clone(), of_values)
        if n == 1 and len(pages):
            few = some_ids(H, len(pages), 3, seed)
            torch.testing.assert_close(
                pages.attend(queries, few, scale=0.3), attend_at(queries, keys, values, few, scale=0.3)
            )
    assert len(pages) == sum(pieces)
    torch.testing.assert_close(pages.attend(queries, ids, scale=0.3), attend_at(queries, keys, values, ids, scale=0.3))
    rows = ids.clamp(min=0)[..., None]
    for found, whole in zip(pages.gather(ids), (keys, values), strict=True):
        expected = whole.gather(1, rows.expand(-1, -1, whole.shape[2])).masked_fill((ids < 0)[..., None], 0)
        assert found.dtype == whole.dtype
        assert torch.equal(found, expected)


def test_pages_are_not_copied() -> None:
    keys, values, pages = torch.zeros(1, 4, 2), torch.ones(1, 4, 2), PagedKV(4)
    pages.append(keys, values)
    ids, query = torch.tensor([[0, 1]]), torch.tensor([[1.0, 0.0]])
    assert pages.attend(query, ids, scale=1.0)[1].item() == pytest.approx(math.log(2))
    keys[0, 0, 0] = 5.0
    assert pages.attend(query, ids, scale=1.0)[1].item() == pytest.approx(math.log(1 + math.exp(5)))


def test_pages_refuse_what_does_not_fit() -> None:
    pages, ids = PagedKV(4), torch.zeros(2, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="there are no pages"):
        pages.gather(ids)
    with pytest.raises(ValueError, match="page_tokens is 0"):
        PagedKV(0)
    with pytest.raises(ValueError, match="contiguous rows"):
        pages.append(torch.zeros(2, 8, 4).mT, torch.zeros(2, 4, 8))
    with pytest.raises(ValueError, match="16 or 32 bits"):
        pages.append(torch.zeros(2, 4, 8).double(), torch.zeros(2, 4, 8))
    with pytest.raises(ValueError, match="values are"):
        pages.append(torch.zeros(2, 4, 8), torch.zeros(2, 3, 8))
    pages.append(torch.zeros(2, 4, 8), torch.zeros(2, 4, 6))
    with pytest.raises(ValueError, match=r"keys are torch\.float16"):
        pages.append(torch.zeros(2, 4, 8).half(), torch.zeros(2, 4, 6))
    with pytest.raises(ValueError, match="keys are"):
        pages.append(torch.zeros(3, 4, 8), torch.zeros(3, 4, 6))
    with pytest.raises(ValueError, match="values are"):
        pages.append(torch.zeros(2, 4, 8), torch.zeros(2, 4, 8))
    with pytest.raises(ValueError, match="ids reach from 0 to 4"):
        pages.attend(torch.zeros(2, 8), torch.tensor([[0], [4]]), scale=1.0)
    with pytest.raises(ValueError, match="queries are"):
        pages.attend(torch.zeros(3, 8), ids, scale=1.0)
    pages.append(torch.zeros(2, 3, 8), torch.zeros(2, 3, 6))
    with pytest.raises(ValueError, match="the last page has 3 tokens"):
        pages.append(torch.zeros(2, 4, 8), torch.zeros(2, 4, 6))
    assert len(pages) == 7


@settings(max_examples=40)
@given(
    heads=heads,
    dim=st.sampled_from([1, 8, 40, 128]),
    count=st.integers(0, 40),
    dtype=st.sampled_from(FLOATS),
    strides=st.booleans(),
    seed=st.integers(0, 999),
)
def test_landmark_scores(heads, dim, count, dtype, strides, seed) -> None:
    H, G = heads
    queries, landmarks = numbers(H * G, dim, seed=seed), numbers(H, count, dim, seed=seed + 1, dtype=dtype)
    found = ops.landmark_scores(queries, apart(landmarks) if strides else landmarks, scale=0.25)
    true = torch.einsum("hgd,hcd->hgc", queries.double().view(H, G, dim), landmarks.double()).flatten(0, 1) * 0.25
    torch.testing.assert_close(found, true.float(), rtol=1e-5, atol=1e-5)


def scores_at(queries: Tensor, rows: Tensor, ids: Tensor, scale: float) -> Tensor:
    """Scores of the rows `ids` `[H, K]`, summed in float64."""
    grouped = queries.double().view(len(rows), -1, queries.shape[1])
    whole = torch.einsum("hgd,hcd->hgc", grouped, rows.double()).flatten(0, 1) * scale
    return whole.gather(1, ids.repeat_interleave(len(queries) // len(rows), 0)).float()


@settings(max_examples=40)
@given(
    heads=heads,
    dim=st.sampled_from([1, 16, 40]),
    count=st.sampled_from([0, 1, 5, 31]),
    runs=st.integers(1, 9),
    seed=st.integers(0, 999),
)
def test_tile_scores(heads, dim, count, runs, seed) -> None:
    H, G = heads
    queries, rows = numbers(H * G, dim, seed=seed), numbers(H, 45, dim, seed=seed + 1, dtype=torch.float16)
    random = torch.Generator().manual_seed(seed)
    cuts = torch.randint(count + 1, (H, runs - 1), generator=random).sort(1).values
    counts = torch.diff(cuts, prepend=torch.zeros(H, 1, dtype=torch.int64), append=torch.full((H, 1), count))
    firsts = (torch.rand(H, runs, generator=random) * (46 - counts)).long()
    assert torch.equal(ops.untiled(ops.tiled(rows), 45), rows)
    found = ops.tile_scores(queries, ops.tiled(rows), firsts, counts, scale=0.25)
    ids = (
        torch.tensor(
            [
                [first + i for first, n in zip(*of_head, strict=True) for i in range(n)]
                for of_head in zip(firsts.tolist(), counts.tolist(), strict=True)
            ]
        )
        .long()
        .view(H, count)
    )
    torch.testing.assert_close(found, scores_at(queries, rows, ids, 0.25), rtol=1e-5, atol=1e-5)


def test_tile_scores_of_many() -> None:
    """More rows than a thread takes at a time, and runs of all lengths, some empty."""
    queries, rows = numbers(8, 32, seed=1), numbers(2, 20_000, 32, seed=2, dtype=torch.float16)
    counts = torch.arange(150).expand(2, -1)
    firsts = torch.stack((torch.arange(150) * 100, torch.arange(150).flip(0) * 100))
    found = ops.tile_scores(queries, ops.tiled(rows), firsts, counts, scale=1.0)
    ids = torch.stack([torch.cat([f + torch.arange(n) for f, n in zip(of, range(150), strict=True)]) for of in firsts])
    torch.testing.assert_close(found, scores_at(queries, rows, ids, 1.0), rtol=1e-4, atol=1e-4)


def test_landmark_scores_of_many() -> None:
    queries, landmarks = numbers(4, 16, seed=1), numbers(2, 3001, 16, seed=2, dtype=torch.float16)
    true = (queries.view(2, 2, 16) @ landmarks.float().mT).flatten(0, 1)
    torch.testing.assert_close(ops.landmark_scores(queries, landmarks, scale=1.0), true, rtol=1e-5, atol=1e-5)


@settings(max_examples=60)
@given(
    heads=heads,
    count=st.sampled_from([1, 2, 30, 2049, 5000]),
    k=st.integers(0, 40),
    spread=st.sampled_from([0.1, 5.0]),
    pooling=st.sampled_from(["max", "sum"]),
    seed=st.integers(0, 999),
)
def test_top_pooled(heads, count, k, spread, pooling, seed) -> None:
    """Ids are ascending and different, and no other weighs more than one that was chosen."""
    H, G = heads
    scores = spread * numbers(H * G, count, seed=seed)
    ids = ops.top_pooled(scores, H, k, pooling=pooling)
    assert ids.shape == (H, min(k, count))
    assert bool((ids.diff(dim=1) > 0).all())
    weights = pooled(scores.double(), LayerShape(H, G, 1, 1.0), pooling)
    best = weights.topk(min(k, count), dim=1).values.sum(1)
    torch.testing.assert_close(weights.gather(1, ids).sum(1), best, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("pooling", ["max", "sum"])
def test_top_pooled_weighs_beside_what_is_near(pooling, compiled, monkeypatch) -> None:
    if not compiled:
        monkeypatch.setattr(ops, "compiled_for_cpu", lambda: None)
    scores, near = 3 * numbers(6, 500, seed=1), torch.tensor([-math.inf, 9.0, 0.0, 20.0, 12.0, 11.0])
    whole = torch.cat((scores, near[:, None]), 1).double().softmax(1)[:, :-1].view(2, 3, -1)
    weights = whole.amax(1) if pooling == "max" else whole.sum(1)
    torch.testing.assert_close(pooled(scores, LayerShape(2, 3, 1, 1.0), pooling, near).double(), weights)
    ids = ops.top_pooled(scores, 2, 20, pooling=pooling, near=near)
    torch.testing.assert_close(weights.gather(1, ids).sum(1), weights.topk(20, dim=1).values.sum(1))
    assert not torch.equal(ids, ops.top_pooled(scores, 2, 20, pooling=pooling))


@pytest.mark.parametrize("pooling", ["max", "sum"])
def test_top_pooled_prefers_the_last_of_equals(pooling) -> None:
    scores = torch.tensor([[2.0, 0.0, 2.0, 2.0, -math.inf], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert ops.top_pooled(scores, 1, 2, pooling=pooling).tolist() == [[2, 3]]
    assert ops.top_pooled(scores[:1], 1, 4, pooling=pooling).tolist() == [[0, 1, 2, 3]]


def test_top_pooled_weighs_by_softmax() -> None:
    """A head of large scores must not drown another."""
    assert ops.top_pooled(torch.tensor([[0.0, 100.0, 90.0], [3.0, 0.0, 0.0]]), 1, 2).tolist() == [[0, 1]]


@settings(max_examples=40)
@given(
    heads=st.integers(1, 3),
    rank=st.sampled_from([1, 8, 21]),
    dim=st.sampled_from([2, 8, 24]),
    kind=st.sampled_from(["float32", "float16", "int8", "int4"]),
    turns=st.booleans(),
    interleaved=st.booleans(),
    scaled=st.booleans(),
    count=st.integers(0, 12),
    seed=st.integers(0, 999),
)
def test_rebuild_keys(heads, rank, dim, kind, turns, interleaved, scaled, count, seed) -> None:
    factor, whole = factor_of(40, rank, kind, seed)
    basis, ids = numbers(heads, rank, dim, seed=seed + 1), some_ids(heads, 40, count, seed)
    scale = torch.rand(rank, generator=torch.Generator().manual_seed(seed)) + 0.5 if scaled else None
    bias = numbers(heads, dim, seed=seed + 2) if scaled else None
    rope = RopeSpec(tuple(100.0 ** -(i / dim) for i in range(dim // 2)), interleaved=interleaved)
    cos, sin = rope.cos_sin(torch.arange(7, 47)) if turns else (None, None)
    found = ops.rebuild_keys(factor, basis, ids, scale=scale, bias=bias, cos=cos, sin=sin, interleaved=interleaved)
    keys = (whole * (1.0 if scale is None else scale)) @ basis
    if bias is not None:
        keys = keys + bias[:, None]
    if turns:
        keys = rope.shift(keys, torch.arange(7, 47))
    expected = keys.gather(1, ids.clamp(min=0)[..., None].expand(-1, -1, dim)).masked_fill((ids < 0)[..., None], 0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def factor_of(tokens: int, rank: int, kind: str, seed: int) -> tuple[Tensor, Tensor]:
    """Rows as they are stored, and what they stand for."""
    if kind.startswith("float"):
        rows = numbers(tokens, rank, seed=seed, dtype=getattr(torch, kind))
        return rows, rows.float()
    bits = int(kind[3:])
    codes = torch.randint(
        -(1 << bits - 1), 1 << bits - 1, (tokens, rank), generator=torch.Generator().manual_seed(seed)
    )
    return (codes.to(torch.int8) if bits == 8 else pack_bits((codes + 8).to(torch.uint8), 4)), codes.float()


def runs(firsts: list[list[int]], counts: list[list[int]]) -> Tensor:
    tiles = ops.tiled(torch.ones(len(firsts), 5, 8).half())
    return ops.tile_scores(torch.ones(2, 8), tiles, torch.tensor(firsts), torch.tensor(counts), scale=1)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("keys are", lambda: attend_with(keys=torch.ones(2, 5, 7))),
        ("keys are", lambda: attend_with(keys=torch.ones(3, 5, 8))),
        ("16 or 32 bits", lambda: attend_with(keys=torch.ones(2, 5, 8).double())),
        ("in rows", lambda: attend_with(values=torch.ones(2, 8, 5).mT)),
        ("equal heads and tokens", lambda: attend_with(values=torch.ones(2, 6, 8))),
        ("reach from 0 to 5", lambda: attend_with(ids=torch.tensor([[0], [5]]))),
        ("reach from -2 to 0", lambda: attend_with(ids=torch.tensor([[0], [-2]]))),
        ("ids are", lambda: attend_with(ids=torch.zeros(2, 1, dtype=torch.int32))),
        ("queries are", lambda: attend_with(queries=torch.ones(8))),
        ("ranges are", lambda: runs([[0]], [[1, 1]])),
        ("ranges reach", lambda: runs([[14]], [[3]])),
        ("ranges reach", lambda: runs([[-1]], [[1]])),
        ("ranges sum to", lambda: runs([[0], [0]], [[1], [2]])),
        ("k is -1", lambda: ops.top_pooled(torch.zeros(2, 3), 1, -1)),
        ("scores are", lambda: ops.top_pooled(torch.zeros(3, 3), 2, 1)),
        ("near is", lambda: ops.top_pooled(torch.zeros(4, 3), 2, 1, near=torch.zeros(2))),
        ("'mean'", lambda: ops.top_pooled(torch.zeros(2, 3), 1, 1, pooling="mean")),
        ("factor is", lambda: rebuild_with(factor=torch.zeros(5, 4))),
        ("factor is", lambda: rebuild_with(factor=torch.zeros(5, 3, dtype=torch.uint8))),
        ("ids reach", lambda: rebuild_with(ids=torch.tensor([[5], [0]]))),
        ("scale is", lambda: rebuild_with(scale=torch.zeros(4))),
        ("bias is", lambda: rebuild_with(bias=torch.zeros(4))),
        ("cos is", lambda: rebuild_with(cos=torch.zeros(4, 2), sin=torch.zeros(5, 2))),
        ("sin is None", lambda: rebuild_with(cos=torch.zeros(5, 2))),
        ("basis is", lambda: rebuild_with(basis=torch.zeros(3, 4))),
    ],
)
def test_what_does_not_fit_is_refused(message, call) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def attend_with(**changes: Tensor) -> object:
    arguments = {"queries": torch.ones(4, 8), "keys": torch.ones(2, 5, 8), "values": torch.ones(2, 5, 8)}
    arguments["ids"] = torch.zeros(2, 1, dtype=torch.int64)
    return ops.gather_attend(**arguments | changes, scale=1.0)


def rebuild_with(**changes: Tensor) -> object:
    arguments = {
        "factor": torch.zeros(5, 3),
        "basis": torch.zeros(2, 3, 4),
        "ids": torch.zeros(2, 1, dtype=torch.int64),
    }
    return ops.rebuild_keys(**arguments | changes)


@pytest.mark.slow
@pytest.mark.parametrize("path", ["compiled"], indirect=True)  # in a process of its own, so once
def test_kernels_leave_the_number_of_threads_alone() -> None:
    """numba tells OpenMP how many threads it has when it first starts them, and engines count on their own number."""
    code = (
        "import torch, numba.np.ufunc.omppool; torch.set_num_threads(1); torch.get_num_threads(); "
        "from kvloom.retrieval.kernels import ops; "
        "ops.landmark_scores(torch.ones(2, 16), torch.ones(1, 40, 16), scale=1.0); print(torch.get_num_threads())"
    )
    pytest.importorskip("numba.np.ufunc.omppool", reason="numba has no threads of OpenMP here")
    environment = {**os.environ, "NUMBA_NUM_THREADS": "2", "OMP_NUM_THREADS": "1"}
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["1"]


@pytest.mark.parametrize(("count", "k"), [(8192, 1), (8192, 300), (20000, 150), (20000, 9000)])
@pytest.mark.parametrize("kind", ["normal", "ties", "sample misleads"])
def test_the_largest_of_many_are_those_of_a_sort(count: int, k: int, kind: str) -> None:
    """Of many candidates a sample says which to look at; wherever it misleads, all are looked at."""
    scores = 3 * numbers(4, count, seed=k)
    if kind == "ties":
        scores = scores.round()
    if kind == "sample misleads":
        scores[:, ::16] += 20.0
    importance = scores.view(2, 2, count).log_softmax(-1).amax(1)
    backwards = importance.flip(1).argsort(dim=1, descending=True, stable=True)[:, :k]
    expected = (count - 1 - backwards).sort(dim=1).values
    found = ops.top_pooled(scores, 2, k)
    assert bool((found.diff(dim=1) > 0).all())
    # float32 logarithms in another order may swap tokens that are equal to the last digit
    torch.testing.assert_close(importance.gather(1, found).sum(1), importance.gather(1, expected).sum(1))
    assert float((found == expected).float().mean()) > (0.9 if kind != "ties" else 0.0)
