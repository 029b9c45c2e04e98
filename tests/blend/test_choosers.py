"""Choosers of tokens to recompute, and the deviation that one of them goes by."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvloom.blend.choosers import (
    CHOOSERS,
    CandidateTokens,
    by_borders_and_question,
    by_deviation,
    by_deviation_and_question,
    by_first_and_question,
    by_first_and_values,
    by_mean_attention,
    by_question,
    by_values,
    by_values_and_question,
    deviation_and_first,
    deviation_of,
    first_tokens,
    kv_deviation,
    no_tokens,
    places_in_chunks,
    random_tokens,
    squares,
    value_deviation_of,
)

CHUNK_TOKENS = 10


WAITING = (
    by_deviation,
    by_deviation_and_question,
    by_values,
    by_values_and_question,
    random_tokens,
    deviation_and_first,
)


def make_tokens(count: int, *, chunk_tokens: int = CHUNK_TOKENS, seed: int = 0) -> CandidateTokens:
    """Tokens of chunks of `chunk_tokens` behind 7 others, with distinct random deviations."""
    generator = torch.Generator().manual_seed(seed)
    deviation, values, *rows = (torch.randperm(count, generator=generator) + 1.0 for _ in range(4))
    attention = torch.stack(rows)
    positions, starts = torch.arange(7, 7 + count), torch.arange(7, 7 + count, chunk_tokens)
    offsets, to_next = places_in_chunks(positions, starts)
    return CandidateTokens(positions, offsets, deviation, lambda: attention, values, to_next)


def pick(tokens: CandidateTokens, chosen: Tensor) -> CandidateTokens:
    rows = tokens.positions, tokens.offsets, tokens.deviation, tokens.value_deviation, tokens.to_next
    positions, offsets, deviation, values, to_next = (t[chosen] for t in rows)
    attention = tokens.attention()[:, chosen]
    return CandidateTokens(positions, offsets, deviation, lambda: attention, values, to_next)


def test_table_names_all() -> None:
    assert set(CHOOSERS.values()) == {
        by_deviation,
        by_question,
        by_first_and_question,
        by_borders_and_question,
        by_first_and_values,
        by_mean_attention,
        by_values,
        by_values_and_question,
        by_deviation_and_question,
        first_tokens,
        random_tokens,
        no_tokens,
        deviation_and_first,
    }


@pytest.mark.parametrize("name", [name for name in CHOOSERS if name != "none"])
@given(count=st.integers(1, 60), seed=st.integers(0, 1000), data=st.data())
def test_right_size_sorted_distinct_and_nested(name: str, count: int, seed: int, data: st.DataObject) -> None:
    """As a blender calls them: each call chooses among what the call before has left."""
    tokens = make_tokens(count, seed=seed)
    while len(tokens) > 1:
        keep = data.draw(st.integers(1, len(tokens)))
        chosen = CHOOSERS[name](tokens, keep)
        assert chosen.dtype == torch.int64 and len(chosen) == keep
        assert bool((chosen.diff() > 0).all()) and int(chosen[0]) >= 0 and int(chosen[-1]) < len(tokens)
        tokens = pick(tokens, chosen[: max(1, keep - 1)])


@pytest.mark.parametrize(
    "chooser",
    WAITING,
)
def test_waits_for_deviations(chooser: object) -> None:
    tokens = make_tokens(20)
    assert chooser(CandidateTokens(tokens.positions, tokens.offsets, None), 5) is None


def test_by_deviation_finds_the_planted() -> None:
    tokens = make_tokens(40)
    planted = torch.tensor([0, 3, 17, 38, 39])
    tokens.deviation[planted] += 100.0
    assert torch.equal(by_deviation(tokens, 5), planted)
    order = tokens.deviation.argsort(descending=True)
    assert set(by_deviation(tokens, 12).tolist()) == set(order[:12].tolist())


@given(count=st.integers(1, 40), seed=st.integers(0, 99))
def test_question_and_deviation_share_the_budget(count: int, seed: int) -> None:
    tokens = make_tokens(40, seed=seed)
    both = tokens.attention().sum(0)
    attention = torch.stack([both[max(0, i - 1) : i + 2].max() for i in range(40)])
    assert attention[by_question(tokens, count)].sum() == attention.sort(descending=True).values[:count].sum()
    most = tokens.deviation.argsort(descending=True)[: count - count // 4].tolist()
    chosen = by_deviation_and_question(tokens, count).tolist()
    assert set(most) <= set(chosen) and len(chosen) == count
    left = [index for index in range(40) if index not in most]
    asked = sorted(attention[index].item() for index in chosen if index not in most)
    assert asked == sorted(attention[left].tolist())[len(left) - count // 4 :]
    assert torch.equal(both, tokens.attention().sum(0))  # read, not written
    mean = tokens.attention()[0]
    assert set(by_mean_attention(tokens, count).tolist()) == set(mean.argsort(descending=True)[:count].tolist())


def test_first_tokens_and_others() -> None:
    """Two chunks of ten: the first tokens of both, then what the question or the values find among the rest."""
    tokens = make_tokens(20)
    attention = torch.zeros(2, 20)
    attention[0, [0, 7, 15]] = torch.tensor([9.0, 3.0, 2.0])
    values = torch.zeros(20)
    values[[10, 4, 18]] = torch.tensor([9.0, 3.0, 2.0])
    positions = torch.arange(0, 40, 2)  # nobody has neighbours
    tokens = CandidateTokens(positions, tokens.offsets, None, lambda: attention, values)
    assert by_first_and_question(tokens, 4).tolist() == [0, 7, 10, 15]
    assert by_first_and_values(tokens, 4).tolist() == [0, 4, 10, 18]
    blind = CandidateTokens(positions, tokens.offsets, None, None, values)
    assert by_first_and_question(blind, 2).tolist() == by_values(blind, 2).tolist() == [4, 10]


def _two_chunks(tokens: int, attention: torch.Tensor) -> CandidateTokens:
    positions, starts = torch.arange(5, 5 + 2 * tokens), torch.tensor([5, 5 + tokens])
    offsets, to_next = places_in_chunks(positions, starts)
    assert offsets.tolist() == [*range(tokens)] * 2
    assert to_next[:tokens].tolist() == list(range(tokens, 0, -1)) and int(to_next[tokens:].min()) > 1000
    return CandidateTokens(positions, offsets, None, lambda: attention.clone(), None, to_next)


def test_both_sides_of_a_border() -> None:
    """Three quarters are the first tokens of both chunks and, from the fifth on, the last ones of the first."""
    attention = torch.zeros(2, 60)
    attention[1, 24:29] = torch.arange(5.0)
    tokens = _two_chunks(30, attention)
    assert by_borders_and_question(tokens, 1).tolist() == [0]
    at_borders = {*range(9), *range(26, 30), *range(30, 38)}
    chosen = by_borders_and_question(tokens, 28).tolist()
    assert len(chosen) == 28 and at_borders <= set(chosen)
    assert {24, 25} <= set(chosen), "what the question attends to, and its neighbour"
    without = CandidateTokens(tokens.positions, tokens.offsets, None, lambda: attention.clone())
    firsts = {*range(11), *range(30, 40)}
    assert firsts <= set(by_borders_and_question(without, 28).tolist()), "the next chunks are not known"
    blind = CandidateTokens(tokens.positions, tokens.offsets, None, None, attention[1])
    assert by_borders_and_question(blind, 4).tolist() == by_values(blind, 4).tolist()


def test_long_chunks_leave_more_to_the_question() -> None:
    attention = torch.zeros(2, 200)
    attention[1, 40:60] = 1.0
    attention[1, 130:200] = 1.0
    chosen = set(by_borders_and_question(_two_chunks(100, attention), 128).tolist())
    at_borders = {*range(18), *range(87, 100), *range(100, 117)}
    assert len(at_borders) == 48 and at_borders <= chosen, "24 at each border, and no more"
    assert chosen - at_borders <= {*range(39, 61), *range(129, 200)} and len(chosen) == 128


def test_values_alone() -> None:
    """Keys that deviate everywhere hide nothing from it; without a question it is all of the choice."""
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 2, 30, 8, generator=generator)
    other_keys, other_values = keys + torch.randn(2, 30, 8, generator=generator), values.clone()
    other_values[:, [4, 9, 21]] += 0.1
    rows = squares(keys, other_keys, values, other_values)
    tokens = CandidateTokens(torch.arange(30), torch.arange(30), deviation_of(rows), None, value_deviation_of(rows))
    assert by_values(tokens, 3).tolist() == by_values_and_question(tokens, 3).tolist() == [4, 9, 21]
    assert by_deviation(tokens, 3).tolist() != [4, 9, 21]


def test_scores_go_to_neighbours_only() -> None:
    positions = torch.tensor([3, 4, 7, 8, 9])
    attention = torch.tensor([[0.0, 9.0, 1.0, 2.0, 3.0], [0.0] * 5])
    tokens = CandidateTokens(positions, torch.zeros(5, dtype=torch.int64), None, lambda: attention)
    assert by_question(tokens, 2).tolist() == [0, 1]
    assert by_question(tokens, 4).tolist() == [0, 1, 3, 4], "7 is no neighbour of 4"


@given(chunks=st.integers(1, 6), count=st.integers(1, 50))
def test_first_tokens_takes_equally_from_each_chunk(chunks: int, count: int) -> None:
    tokens = make_tokens(chunks * CHUNK_TOKENS)
    count = min(count, len(tokens))
    chosen = first_tokens(CandidateTokens(tokens.positions, tokens.offsets, None), count)
    taken = torch.bincount(chosen // CHUNK_TOKENS, minlength=chunks)
    assert int(taken.max()) - int(taken.min()) <= 1
    for chunk in range(chunks):
        mine = chosen[chosen // CHUNK_TOKENS == chunk] % CHUNK_TOKENS
        assert mine.tolist() == list(range(len(mine)))


def test_first_tokens_takes_more_from_long_chunks_when_short_ones_are_used_up() -> None:
    offsets = torch.tensor([0, 1, 0, 1, 2, 3, 4, 5])
    chosen = first_tokens(CandidateTokens(torch.arange(8), offsets, None), 6)
    assert chosen.tolist() == [0, 1, 2, 3, 4, 5]


def test_random_is_deterministic_and_blind() -> None:
    tokens, other = make_tokens(60, seed=1), make_tokens(60, seed=2)
    assert torch.equal(random_tokens(tokens, 20), random_tokens(other, 20))
    assert not torch.equal(random_tokens(tokens, 20), random_tokens(tokens, 20, seed=1))
    assert not torch.equal(random_tokens(tokens, 20), by_deviation(tokens, 20))
    often = torch.stack([torch.bincount(random_tokens(tokens, 20, seed=s), minlength=60) for s in range(300)]).sum(0)
    assert int(often.min()) > 60 and int(often.max()) < 140  # each is expected 100 times


def test_none_takes_none() -> None:
    assert no_tokens(make_tokens(20), 5).tolist() == []


def test_union_holds_both() -> None:
    tokens = make_tokens(30)
    tokens.deviation[[5, 25]] += 100.0
    firsts = [0, 1, 10, 11, 20, 21]
    assert deviation_and_first(tokens, 8).tolist() == sorted([*firsts, 5, 25])
    assert partial(deviation_and_first, first=1)(tokens, 5).tolist() == [0, 5, 10, 20, 25]
    assert set(deviation_and_first(tokens, 4).tolist()) < set(firsts)


def make_kv(seed: int) -> Tensor:
    return torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(seed))


def test_deviation_is_relative_distance() -> None:
    fresh_k, cached_k, fresh_v, cached_v = map(make_kv, range(4))
    expected = [
        (
            (fresh_k[:, t] - cached_k[:, t]).norm() ** 2 / (fresh_k.norm() ** 2 / 12)
            + (fresh_v[:, t] - cached_v[:, t]).norm() ** 2 / (fresh_v.norm() ** 2 / 12)
        ).sqrt()
        for t in range(12)
    ]
    assert torch.allclose(kv_deviation(fresh_k, cached_k, fresh_v, cached_v), torch.stack(expected), rtol=1e-5)


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_deviation_knows_no_scale(key_scale: float, value_scale: float) -> None:
    fresh_k, cached_k, fresh_v, cached_v = map(make_kv, range(4))
    scaled = kv_deviation(key_scale * fresh_k, key_scale * cached_k, value_scale * fresh_v, value_scale * cached_v)
    assert torch.allclose(scaled, kv_deviation(fresh_k, cached_k, fresh_v, cached_v), rtol=1e-4)


def test_deviation_sees_keys_and_values_alike() -> None:
    fresh_k, fresh_v = make_kv(0), make_kv(1)
    equal = kv_deviation(fresh_k, fresh_k.clone(), fresh_v, fresh_v.clone())
    assert torch.equal(equal, torch.zeros(12))
    moved_k, moved_v = fresh_k.clone(), fresh_v.clone()
    moved_k[1, 4] += 1.0
    moved_v[0, 9] += 1.0
    deviation = kv_deviation(fresh_k, moved_k, fresh_v, moved_v)
    assert deviation.nonzero().flatten().tolist() == [4, 9]
    assert 0.5 < float(deviation[4] / deviation[9]) < 2.0


def test_deviation_of_odd_tensors() -> None:
    """Latent caches have no values, all-zero ones no size, and narrow ones overflow only if squared as they are."""
    keys, other, nothing = make_kv(0), make_kv(1), torch.empty(2, 12, 0)
    zeros = torch.zeros_like(keys)
    latent = kv_deviation(keys, other, nothing, nothing)
    assert torch.allclose(latent, kv_deviation(keys, other, keys, keys)) and bool((latent > 0).all())
    assert torch.equal(kv_deviation(zeros, zeros, zeros, zeros), torch.zeros(12))
    narrow = kv_deviation((300 * keys).half(), (300 * other).half(), zeros.half(), zeros.half())
    assert narrow.dtype == torch.float32 and torch.allclose(narrow, latent, rtol=1e-2)
