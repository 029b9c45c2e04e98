import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom.retrieval.attention import attend, attend_at, attend_selected, empty_attention
from kvloom.retrieval.kernels import quantized_ops
from kvloom.retrieval.kernels.ops import top_pooled
from kvloom.retrieval.kernels.quantized_ops import (
    attend_to_rest,
    channel_mixing,
    dequantize_keys,
    parts_of,
    quantize_keys,
    quantized_scores,
    scores_and_parts,
)
from kvloom.retrieval.quantized.quantized import QuantizedKeyIndex
from kvloom.retrieval.selector import LayerShape, Pooling, Selector, pooled, top_ids
from kvloom.testing import SHAPE, SelectorContract, make_context


class TestQuantizedKeyIndex(SelectorContract):
    mass = 0.8

    def make_selector(self, shape: LayerShape, start: int = 0) -> Selector:
        return QuantizedKeyIndex(shape, start=start)


def made(heads: int, groups: int, dim: int, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Words, scales and means of random keys, and those of them that are all alike have a scale of 0."""
    random = torch.Generator().manual_seed(seed)
    keys = torch.randn(heads, groups, 256, dim, generator=random) * 3 + 1
    keys[0, 0, 5] = keys[0, 0].mean(0).half().float()
    means = keys.mean(2).half()
    keys[0, 0, 5] = means[0, 0].float()
    return *quantize_keys(keys, means.float()), means


@pytest.mark.parametrize("dim", [1, 3, 24, 64, 80, 128])
def test_the_mixing_is_orthonormal_and_spreads_each_channel(dim: int) -> None:
    mix = channel_mixing(dim)
    torch.testing.assert_close(mix @ mix.T, torch.eye(dim))
    assert float(mix.abs().max()) == pytest.approx((dim & -dim) ** -0.5)


def test_the_product_of_a_key_with_its_code_is_exact() -> None:
    random = torch.Generator().manual_seed(0)
    keys = torch.randn(2, 3, 256, 64, generator=random)
    means = keys.mean(2)
    read = dequantize_keys(*quantize_keys(keys, means), means)
    rest = keys - means[:, :, None]
    torch.testing.assert_close((rest * (read - means[:, :, None])).sum(-1), rest.square().sum(-1), rtol=1e-3, atol=0)
    # two bits of a normal distribution lose 12 % of its variance
    share = float((read - keys).square().sum() / rest.square().sum())
    assert 0.10 < share < 0.16


def test_codes_are_two_bits_in_the_order_of_channels() -> None:
    keys = torch.full((1, 1, 256, 16), -10.0)
    keys[0, 0, 3, 15], keys[0, 0, 3, 2] = 10.0, 10.0
    words, _ = quantize_keys(keys, torch.zeros(1, 1, 16))
    codes = [(int(words[0, 0, 0, 3]) >> (2 * i)) & 3 for i in range(16)]
    assert codes[15] > codes[0] and codes[2] == codes[15] and len(set(codes)) == 2


@settings(max_examples=25, deadline=None)
@given(
    heads=st.tuples(st.integers(1, 2), st.sampled_from([1, 2, 3, 4, 5, 7])),
    dim=st.sampled_from([5, 16, 24, 64, 128]),
    groups=st.integers(1, 2),
    seed=st.integers(0, 9),
)
def test_scores_of_every_kernel(heads: tuple[int, int], dim: int, groups: int, seed: int) -> None:
    """The compiled kernel against torch over the keys that the codes stand for; words lie in a larger memory.

    It rounds what a query has in common with codes to 8 bits: its scores are those of the rounded query, and near those
    of the query.
    """
    H, G = heads
    words, scales, means = made(H, groups, dim, seed=seed)
    room = [torch.cat((part, part), 1)[:, :groups] for part in (words, scales, means)]
    queries = torch.randn(H * G, dim, generator=torch.Generator().manual_seed(seed + 1))
    keys = dequantize_keys(words, scales, means).flatten(1, 2)
    shared = means.float()[:, :, None].expand(-1, -1, 256, -1).flatten(1, 2)
    true, of_means = ((queries.view(H, G, dim) @ each.mT).flatten(0, 1) * 0.3 for each in (keys, shared))
    steps = queries.abs().amax(1, keepdim=True) / 127
    rounded = (queries / steps).round() * steps
    near = of_means + (rounded.view(H, G, dim) @ (keys - shared).mT).flatten(0, 1) * 0.3
    found = quantized_scores(queries, *room, scale=0.3)
    torch.testing.assert_close(found, near, rtol=1e-4, atol=1e-4)
    assert float((found - true).square().mean().sqrt()) < 0.01 * float((true - of_means).square().mean().sqrt())


@settings(max_examples=15, deadline=None)
@given(
    G=st.integers(1, 5), skip=st.sampled_from([0, 16, 20, 256]), dim=st.sampled_from([16, 40]), seed=st.integers(0, 9)
)
def test_parts_are_summed_with_the_scores(G: int, skip: int, dim: int, seed: int) -> None:
    words, scales, means = made(2, 2, dim, seed=seed)
    queries = 3 * torch.randn(2 * G, dim, generator=torch.Generator().manual_seed(seed))
    plain = quantized_scores(queries, words, scales, means, scale=0.3)
    scores, parts = scores_and_parts(queries, words, scales, means, scale=0.3, skip=skip, padding=256)
    assert scores.shape == (2 * G, 768) and parts.shape == (2, 2 * G, 48)
    assert torch.equal(scores[:, skip:512], plain[:, skip:]) and bool((scores[:, :skip] == -math.inf).all())
    torch.testing.assert_close(parts[:, :, :32], parts_of(scores[:, :512]), rtol=1e-5, atol=1e-30)


def adding(add: Any) -> Callable[..., None]:
    """Sums codes of three words of each token, all queries at once."""

    def added(weights: Any, words: Any, out: Any) -> None:
        add(weights, np.uint64(0), np.uint64(12), words, np.uint64(3), out, np.uint64(0))

    return added


@pytest.mark.parametrize(("lanes", "heads"), [(4, 1), (4, 2), (2, 4)])
def test_codes_are_summed_alike_without_the_instruction_for_pairs(lanes: int, heads: int) -> None:
    sums = pytest.importorskip("kvloom.retrieval.kernels.quantized_sums_numba")
    numba = pytest.importorskip("numba")
    random = np.random.default_rng(0)
    words = random.integers(-(2**31), 2**31, (3, 256), dtype=np.int32)
    weights = random.integers(-127, 128, (heads, 3, 4, 4)).astype(np.int8)
    codes = words.view(np.uint8).reshape(3, 256, 4)[..., None] >> (2 * np.arange(4)) & 3  # [W, token, byte, turn]
    true = np.einsum("wtbk,qwkb->qt", codes, weights.astype(np.int64))[:, : 8 * lanes]
    for has_pairs in (False, sums._HAS_PAIRS):
        add = sums.code_sums(heads, lanes, has_pairs=has_pairs)

        added = numba.njit(adding(add))
        out = np.ones(256 * heads, np.float32)
        added(weights.reshape(-1).view(np.int32), np.uint64(words.ctypes.data), out)
        assert (out.reshape(heads, 256)[:, : 8 * lanes] == true + 1).all()


def test_without_numba_torch_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    words, scales, means = made(2, 2, 32)
    queries = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    keys = dequantize_keys(words, scales, means).flatten(1, 2)
    monkeypatch.setattr(quantized_ops, "compiled_for_cpu", lambda _: None)
    found, parts = scores_and_parts(queries, words, scales, means, scale=1.0, skip=20)
    true = (queries.view(2, 2, 32) @ keys.mT).flatten(0, 1)
    true[:, :20] = -math.inf
    torch.testing.assert_close(found, true, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close((parts[0] + parts[1].log()).logsumexp(1), true.logsumexp(1))


@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("spread", [0.1, 3.0, 60.0])
def test_the_rest_of_every_kernel(size: int, spread: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where what is taken was nearly all of a part, or all of it; and where nothing is left at all."""
    random = torch.Generator().manual_seed(size)
    scores = spread * torch.randn(6, 768, generator=random)
    scores[:, 700:] = -math.inf
    value_means = torch.randn(2, 512 // size, 5, generator=random).half()
    tail_means = torch.randn(2, -(-188 // size), 5, generator=random)
    few = torch.full((2, 40), -1)
    few[0, :30] = torch.randperm(700, generator=random)[:30].sort().values
    few[1, :17] = torch.arange(32, 49)
    best = scores.view(2, 3, 768).amax(1).topk(40).indices.sort(1).values
    for ids in (few, best, torch.arange(700).expand(2, -1), torch.full((2, 0), -1)):
        asked = (scores.clone(), parts_of(scores), ids, value_means, tail_means)
        found = attend_to_rest(*asked, first_tail=512 // size, size=size)
        with monkeypatch.context() as without:
            without.setattr(quantized_ops, "compiled_for_cpu", lambda _: None)
            out, lse = attend_to_rest(*asked, first_tail=512 // size, size=size)
        if ids.shape[1] == 700:
            assert found[1].tolist() == [-math.inf] * 6 and not found[0].any()
            continue
        torch.testing.assert_close(found[1], lse, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[0], out, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("count", "k"), [(256, 1), (256, 16), (768, 20), (768, 47), (768, 200), (4096, 250)])
@pytest.mark.parametrize("pooling", ["max", "sum"])
def test_the_best_by_parts_are_the_best(count: int, k: int, pooling: Pooling) -> None:
    scores = 3 * torch.randn(6, count, generator=torch.Generator().manual_seed(k))
    scores[:, :16] = -math.inf
    scores[:, 40:44] = scores[:, 50:51]  # equals
    ids = top_pooled(scores, 2, k, pooling=pooling, parts=parts_of(scores))
    assert torch.equal(ids, top_pooled(scores, 2, k, pooling=pooling))


def test_wrong_tensors_are_refused() -> None:
    words, scales, means = made(2, 1, 32)
    queries = torch.zeros(4, 32)
    with pytest.raises(ValueError, match="words are"):
        quantized_scores(queries, words.long(), scales, means, scale=1.0)
    with pytest.raises(ValueError, match="queries are"):
        quantized_scores(torch.zeros(3, 32), words, scales, means, scale=1.0)
    with pytest.raises(ValueError, match="scales are"):
        quantized_scores(queries, words, scales.float(), means, scale=1.0)
    with pytest.raises(ValueError, match="means are"):
        quantized_scores(queries, words, scales, means[:1], scale=1.0)
    assert quantized_scores(queries, words[:, :0], scales[:, :0], means[:, :0], scale=1.0).shape == (4, 0)


@pytest.mark.parametrize("start", [0, 16, 255, 256, 300])
def test_it_chooses_by_roughly_the_scores_of_the_keys(start: int) -> None:
    """Of what exact search chooses, most; the tokens of the last, incomplete group are scored exactly."""
    keys, values, queries = make_context(start + 900, seed=start)
    index = QuantizedKeyIndex(SHAPE, start=start)
    index.add(keys[:, start:], values[:, start:])
    scores = (queries.view(2, 2, -1) @ keys[:, start:].mT).flatten(0, 1) * SHAPE.scale
    found, first = index.scores(queries)
    assert bool((found[:, : start - first] == -math.inf).all())
    found = found[:, start - first :]
    by_keys = (queries.view(2, 2, -1) @ index.approximate_keys.mT).flatten(0, 1) * SHAPE.scale
    assert float((found - by_keys).square().mean() / by_keys.var()) < 1e-4  # queries are rounded to 8 bits
    tail = (start + 900) % 256
    torch.testing.assert_close(found[:, -tail:], scores[:, -tail:], rtol=1e-4, atol=1e-4)
    assert float((found - scores).square().mean() / scores.var()) < 0.2
    true = top_ids(pooled(scores, SHAPE), 60, start)
    ids = index.select(queries, start + 900, 60).ids
    assert all(len(set(a) & set(b)) > 40 for a, b in zip(true.tolist(), ids.tolist(), strict=True))


def test_channels_far_larger_than_the_others_cost_nothing() -> None:
    """Keys of large models have such channels, which are nearly the same for all tokens."""
    keys, values, queries = make_context(512)
    plain, shifted = QuantizedKeyIndex(SHAPE), QuantizedKeyIndex(SHAPE)
    plain.add(keys, values)
    keys = keys.clone()
    keys[..., 3] += 50.0
    shifted.add(keys, values)
    queries[:, 3] = 0.0
    a, b = plain.scores(queries)[0], shifted.scores(queries)[0]
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    assert float((a - b).square().mean() / a.var()) < 0.1


def test_an_eighth_of_the_bytes_of_keys() -> None:
    shape = LayerShape(2, 2, 128, 1.0)
    index, with_means = QuantizedKeyIndex(shape, mean_tokens=0), QuantizedKeyIndex(shape)
    keys = torch.randn(2, 1024, 128, generator=torch.Generator().manual_seed(0))
    index.add(keys, keys)
    assert index.held_bytes <= 1.15 * keys.numel() * 2 / 8
    with_means.add(keys, keys)
    assert with_means.held_bytes == index.held_bytes + keys.numel() * 2 / 16


def rest_by_hand(
    index: QuantizedKeyIndex, values: torch.Tensor, queries: torch.Tensor, ids: torch.Tensor, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of each query head over the tokens but `ids`, each with the mean value of its block of positions."""
    scores, first = index.scores(queries)
    outs, lses = [], []
    for q in range(len(queries)):
        head = q // 2
        left = [t for t in range(index.start, index.start + len(index)) if t not in set(ids[head].tolist())]
        weights = torch.tensor([float(scores[q, t - first]) for t in left]).double()
        rows = []
        for t in left:
            block = [n for n in range(t // size * size, t // size * size + size) if index.start <= n < values.shape[1]]
            rows.append(values[head, block].double().mean(0))
        outs.append((weights.softmax(0) @ torch.stack(rows)).float())
        lses.append(weights.logsumexp(0).float())
    return torch.stack(outs), torch.stack(lses)


@pytest.mark.parametrize(("start", "tokens"), [(0, 100), (16, 200), (16, 600), (300, 512), (255, 300)])
@pytest.mark.parametrize("size", [1, 8, 256])
def test_the_rest_is_all_that_is_not_chosen_by_mean_values(start: int, tokens: int, size: int) -> None:
    keys, values, queries = make_context(start + tokens, seed=start + size)
    index = QuantizedKeyIndex(SHAPE, start=start, mean_tokens=size)
    for here in range(start, start + tokens, 90):  # in pieces that end nowhere near a group
        stop = min(here + 90, start + tokens)
        index.add(keys[:, here:stop], values[:, here:stop])
    found = index.select(queries, start + tokens, 20)
    assert found.rest is not None
    fewer = found.ids.clone()
    fewer[0, 3:], fewer[1, :] = -1, -1  # as a coverage prunes
    for ids in (found.ids, fewer, found.ids):
        expected = rest_by_hand(index, values, queries, ids, size)
        torch.testing.assert_close(found.rest(ids), expected, rtol=2e-3, atol=2e-3)


def test_the_rest_brings_a_diffuse_head_nearer() -> None:
    """A head that attends to all alike loses what few tokens do not stand for."""
    lost: dict[int, float] = {}
    keys, values, queries = make_context(1024)
    values = values + torch.linspace(0, 3, 1024)[:, None]
    exact = attend(0.2 * queries, keys, values, scale=SHAPE.scale)[0]
    for size in (0, 16):
        index = QuantizedKeyIndex(SHAPE, mean_tokens=size)
        index.add(keys, values)
        selection = index.select(0.2 * queries, 1024, 30)
        nothing = empty_attention(4, values.shape[-1])
        attend_ids = partial(attend_at, 0.2 * queries, keys, values, scale=SHAPE.scale)
        lost[size] = float((attend_selected(nothing, selection, attend_ids)[0] - exact).norm() / exact.norm())
    assert lost[16] < 0.3 * lost[0] and lost[0] > 0.05


def test_without_an_estimate_values_are_not_looked_at() -> None:
    keys, values, queries = make_context(400)
    index = QuantizedKeyIndex(SHAPE, mean_tokens=0)
    index.add(keys, values * math.nan)
    assert index.select(queries, 400, 9).rest is None
    with pytest.raises(ValueError, match="mean values leave the range"):
        QuantizedKeyIndex(SHAPE).add(keys, values * math.nan)
    for wrong in (-1, 3, 512):
        with pytest.raises(ValueError, match=f"mean_tokens is {wrong}"):
            QuantizedKeyIndex(SHAPE, mean_tokens=wrong)


def test_means_beyond_half_precision_are_refused() -> None:
    index = QuantizedKeyIndex(SHAPE)
    with pytest.raises(ValueError, match="range of float16"):
        index.add(torch.full((2, 256, 32), 1e6), torch.zeros(2, 256, 32))
    assert len(index) == 0
