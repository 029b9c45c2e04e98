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
    dequantize_values,
    parts_of,
    quantize_keys,
    quantize_values,
    quantized_scores,
    quantized_sums,
    scores_and_parts,
)
from kvloom.retrieval.quantized.quantized import QuantizedKeyIndex
from kvloom.retrieval.selector import LayerShape, Pooling, Selector, choose, pooled, top_ids
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


@pytest.mark.parametrize(("count", "k"), [(256, 1), (256, 16), (768, 20), (768, 47), (768, 200), (4096, 250)])
@pytest.mark.parametrize("pooling", ["max", "sum"])
def test_the_best_by_parts_are_the_best(count: int, k: int, pooling: Pooling) -> None:
    scores = 3 * torch.randn(6, count, generator=torch.Generator().manual_seed(k))
    scores[:, :16] = -math.inf
    scores[:, 40:44] = scores[:, 50:51]  # equals
    for near in (None, torch.tensor([-math.inf, 0.0, 5.0, 9.0, 20.0, 2.0])):
        ids = top_pooled(scores, 2, k, pooling=pooling, near=near, parts=parts_of(scores))
        assert torch.equal(ids, top_pooled(scores, 2, k, pooling=pooling, near=near))


def made_values(heads: int, groups: int, dim: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Words, logarithms of scales and means of random values, some of them far larger, one of them its mean."""
    random = torch.Generator().manual_seed(seed)
    values = torch.randn(heads, groups, 256, dim, generator=random) * 3 + 1
    values[:, :, 7] *= 100.0
    means = values.mean(2).half()
    values[0, 0, 5] = means[0, 0].float()
    return *quantize_values(values, means.float()), means


def test_values_lose_a_third_of_what_they_have_beside_the_mean() -> None:
    random = torch.Generator().manual_seed(0)
    values = torch.randn(2, 3, 256, 64, generator=random) * torch.rand(2, 3, 256, 1, generator=random).add(0.1)
    means = values.mean(2)
    words, scales = quantize_values(values, means)
    rest, lost = values - means[:, :, None], dequantize_values(words, scales, means) - values
    share = float(lost.square().sum() / rest.square().sum())
    assert share == pytest.approx(1 - 2 / math.pi, abs=0.02)
    for factor in (0.9, 1.1):  # no other scale loses less
        other = dequantize_values(words, (scales * factor).half(), means) - values
        assert float(other.square().sum()) > float(lost.square().sum())


def test_signs_are_bits_in_the_order_of_tokens() -> None:
    values = torch.full((1, 1, 256, 5), -1.0)
    values[0, 0, 33, 2], values[0, 0, 63, 4] = 1.0, 1.0
    words, _ = quantize_values(values, torch.zeros(1, 1, 5))
    assert words.shape == (1, 1, 8, 5)
    assert words[0, 0, 1].tolist() == [0, 0, 2, 0, -(1 << 31)] and int(words.count_nonzero()) == 2


@pytest.mark.parametrize("light", [0.0, 2.0**-13, 0.01])
@pytest.mark.parametrize("spread", [0.1, 3.0, 60.0])
@pytest.mark.parametrize("groups", [0, 2])
def test_the_rest_of_every_kernel(groups: int, spread: float, light: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where what is taken was nearly all of a part, or all of it; and where nothing is left at all."""
    random = torch.Generator().manual_seed(groups)
    words, scales, means = made_values(2, groups + 1, 5, 0)
    coded = [part[:, :groups] for part in (words, scales, means)]  # codes lie in a larger memory
    scores, begin = spread * torch.randn(6, 768, generator=random), 512
    scores[:, 700:] = -math.inf
    if not groups:
        scores, begin = scores[:, 512:].clone(), 20
        scores[:, :20] = -math.inf
    tokens = 700 - 768 + scores.shape[1]
    behind = torch.randn(2, tokens - begin, 5, generator=random)
    few = torch.full((2, 40), -1)
    few[0, :30] = torch.randperm(tokens - 20, generator=random)[:30].sort().values + 20
    few[1, :17] = torch.arange(32, 49)
    best = scores.view(2, 3, -1).amax(1).topk(40).indices.sort(1).values
    for ids in (few, best, torch.arange(tokens).expand(2, -1), torch.full((2, 0), -1)):
        asked = (scores.clone(), parts_of(scores), ids, *coded, behind)
        found = attend_to_rest(*asked, begin=begin, light=light)
        with monkeypatch.context() as without:
            without.setattr(quantized_ops, "compiled_for_cpu", lambda _: None)
            out, lse = attend_to_rest(*asked, begin=begin, light=light)
        if ids.shape[1] == tokens:
            assert found[1].tolist() == [-math.inf] * 6 == lse.tolist() and not found[0].any() and not out.any()
            continue
        torch.testing.assert_close(found[1], lse, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[0], out, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("light", [2.0**-13, 2.0**-8])
def test_light_tokens_by_their_mean_change_little(light: float) -> None:
    """In deviations of values: at most the root of the least weight that counts by its signs."""
    random = torch.Generator().manual_seed(0)
    values = torch.randn(1, 16, 256, 64, generator=random)
    means = values.mean(2).half()
    coded = (*quantize_values(values, means.float()), means)
    changes = []
    for spread in (0.0, 0.5, 1.0, 2.0):
        scores = spread * torch.randn(4, 4096, generator=random)
        asked = (scores, parts_of(scores), torch.full((1, 0), -1), *coded, torch.zeros(1, 0, 64))
        out, lse = attend_to_rest(*asked, begin=4096, light=light)
        exact, same = attend_to_rest(*asked, begin=4096, light=0.0)
        assert torch.allclose(lse, same, atol=1e-5)
        changes.append(float((out - exact).square().mean().sqrt()))
    assert 0.0 < max(changes) < light**0.5


@settings(max_examples=25, deadline=None)
@given(
    heads=st.tuples(st.integers(1, 2), st.sampled_from([1, 2, 3, 7])),
    dim=st.sampled_from([5, 16, 24, 64, 128]),
    groups=st.sampled_from([1, 2, 17]),
    seed=st.integers(0, 9),
)
def test_the_rest_of_many_shapes(heads: tuple[int, int], dim: int, groups: int, seed: int) -> None:
    """Sums of signs against torch over the values that the codes stand for; codes lie in a larger memory."""
    H, G = heads
    words, scales, means = made_values(H, groups, dim, seed)
    room = [torch.cat((part, part), 1)[:, :groups] for part in (words, scales, means)]
    weights = torch.rand(H * G, groups * 256, generator=torch.Generator().manual_seed(seed)) ** 4
    values = dequantize_values(words, scales, means).flatten(1, 2)
    true = (weights.view(H, G, -1).double() @ values.double()).flatten(0, 1).float()
    torch.testing.assert_close(quantized_sums(weights, *room), true, rtol=1e-4, atol=1e-3)
    asked = (weights.log(), parts_of(weights.log()), torch.full((H, 0), -1), *room, torch.zeros(H, 0, dim))
    out, lse = attend_to_rest(*asked, begin=groups * 256, light=0.0)
    torch.testing.assert_close(lse, weights.sum(1).log(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out, true / weights.sum(1, keepdim=True), rtol=1e-3, atol=1e-3)


def test_wrong_codes_of_values_are_refused() -> None:
    words, scales, means = made_values(2, 1, 32, 0)
    weights = torch.zeros(4, 256)
    with pytest.raises(ValueError, match="words are"):
        quantized_sums(weights, words[:, :, :4], scales, means)
    with pytest.raises(ValueError, match="weights are"):
        quantized_sums(torch.zeros(3, 256), words, scales, means)
    with pytest.raises(ValueError, match="weights are"):
        quantized_sums(weights[:, :100], words, scales, means)
    with pytest.raises(ValueError, match="scales are"):
        quantized_sums(weights, words, scales.float(), means)
    with pytest.raises(ValueError, match="means are"):
        quantized_sums(weights, words, scales, means[:1])
    assert quantized_sums(weights[:, :0], words[:, :0], scales[:, :0], means[:, :0]).equal(torch.zeros(4, 32))


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
    index, with_values = QuantizedKeyIndex(shape, value_bits=0), QuantizedKeyIndex(shape)
    keys = torch.randn(2, 1024, 128, generator=torch.Generator().manual_seed(0))
    index.add(keys, keys)
    assert index.held_bytes <= 1.15 * keys.numel() * 2 / 8
    with_values.add(keys, keys)
    # a bit a channel, 16 a token, and the means of 256
    assert with_values.held_bytes == index.held_bytes + keys.numel() * 2 // 16 + 2 * 1024 * 2 + 2 * 4 * 128 * 2


def approximate_by_hand(values: torch.Tensor, start: int) -> torch.Tensor:
    """Of every group of 256 positions, what signs, one scale each and their mean leave of values `[H, S, Dv]`."""
    mix, found = channel_mixing(values.shape[-1]), torch.zeros_like(values)
    for first in range(start // 256 * 256, values.shape[1], 256):
        here = slice(max(first, start), min(first + 256, values.shape[1]))
        mixed = values[:, here] @ mix.T
        rest = mixed - mixed.mean(1, keepdim=True).half().float()
        signs = torch.where(rest > 0, 1.0, -1.0)
        found[:, here] = (mixed - rest + rest.abs().mean(-1, keepdim=True) * signs) @ mix
    return found


def rest_by_hand(
    index: QuantizedKeyIndex, values: torch.Tensor, queries: torch.Tensor, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of each query head over the tokens but `ids`, each with what stands for its value."""
    scores, first = index.scores(queries)
    approximate = approximate_by_hand(values, index.start)
    outs, lses = [], []
    for q in range(len(queries)):
        head = q // 2
        left = [t for t in range(index.start, index.start + len(index)) if t not in set(ids[head].tolist())]
        weights = torch.tensor([float(scores[q, t - first]) for t in left]).double()
        outs.append((weights.softmax(0) @ approximate[head, left].double()).float())
        lses.append(weights.logsumexp(0).float())
    return torch.stack(outs), torch.stack(lses)


@pytest.mark.parametrize(("start", "tokens"), [(0, 100), (16, 200), (16, 600), (300, 512), (255, 300)])
def test_the_rest_is_all_that_is_not_chosen(start: int, tokens: int) -> None:
    keys, values, queries = make_context(start + tokens, seed=start)
    index = QuantizedKeyIndex(SHAPE, start=start)
    for here in range(start, start + tokens, 90):  # in pieces that end nowhere near a group
        stop = min(here + 90, start + tokens)
        index.add(keys[:, here:stop], values[:, here:stop])
    torch.testing.assert_close(
        index.approximate_values, approximate_by_hand(values, start)[:, start:], rtol=4e-3, atol=4e-3
    )
    found = index.select(queries, start + tokens, 20)
    assert found.rest is not None
    fewer = found.ids.clone()
    fewer[0, 3:], fewer[1, :] = -1, -1  # as a coverage prunes
    for ids in (found.ids, fewer, found.ids):
        expected = rest_by_hand(index, values, queries, ids)
        torch.testing.assert_close(found.rest(ids), expected, rtol=4e-3, atol=4e-3)


def test_a_head_that_looks_at_what_is_near_has_no_say() -> None:
    """Two heads of a group point at tokens of their own; one of them gives nearly all of its attention to the sinks."""
    keys, values, queries = make_context(600, seed=1)
    index = QuantizedKeyIndex(SHAPE)
    index.add(keys, values)
    scores = (queries.view(2, 2, -1) @ keys.mT).flatten(0, 1) * SHAPE.scale
    far = scores.logsumexp(1)
    own = [set(row) for row in scores.topk(8, dim=1).indices.tolist()]
    for busy in (0, 1):
        near = far - 9.0
        near[busy::2] = far[busy::2] + 9.0
        ids = index.select_beside(queries, 600, 8, near).ids.tolist()
        for head in (0, 1):
            assert len(own[2 * head + 1 - busy] & set(ids[head])) >= 6
    assert torch.equal(choose(index, queries, 600, 8, near).ids, index.select_beside(queries, 600, 8, near).ids)
    assert not torch.equal(choose(index, queries, 600, 8, near).ids, choose(index, queries, 600, 8).ids)


def test_the_rest_brings_a_diffuse_head_nearer() -> None:
    """A head that attends to all alike loses what few tokens do not stand for."""
    lost: dict[int, float] = {}
    keys, values, queries = make_context(1024)
    values = values + torch.linspace(0, 3, 1024)[:, None]
    exact = attend(0.2 * queries, keys, values, scale=SHAPE.scale)[0]
    for bits in (0, 1):
        index = QuantizedKeyIndex(SHAPE, value_bits=bits)
        index.add(keys, values)
        selection = index.select(0.2 * queries, 1024, 30)
        nothing = empty_attention(4, values.shape[-1])
        attend_ids = partial(attend_at, 0.2 * queries, keys, values, scale=SHAPE.scale)
        lost[bits] = float((attend_selected(nothing, selection, attend_ids)[0] - exact).norm() / exact.norm())
    assert lost[1] < 0.2 * lost[0] and lost[0] > 0.05


def test_without_an_estimate_values_are_not_looked_at() -> None:
    keys, values, queries = make_context(400)
    index = QuantizedKeyIndex(SHAPE, value_bits=0)
    index.add(keys, values * math.nan)
    assert index.select(queries, 400, 9).rest is None
    with pytest.raises(ValueError, match="nothing stands for"):
        _ = index.approximate_values
    for wrong in (values * math.nan, values * 1e6):
        fails = QuantizedKeyIndex(SHAPE)
        with pytest.raises(ValueError, match="mean values leave the range"):
            fails.add(keys, wrong)
        assert len(fails) == 0
    for wrong_bits in (-1, 2, 16):
        with pytest.raises(ValueError, match=f"value_bits is {wrong_bits}"):
            QuantizedKeyIndex(SHAPE, value_bits=wrong_bits)


def test_means_beyond_half_precision_are_refused() -> None:
    index = QuantizedKeyIndex(SHAPE)
    with pytest.raises(ValueError, match="range of float16"):
        index.add(torch.full((2, 256, 32), 1e6), torch.zeros(2, 256, 32))
    assert len(index) == 0
