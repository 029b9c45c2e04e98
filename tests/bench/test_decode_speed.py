"""The bench of decode attention: what it says about quality is checked against plain sums."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from rich.progress import Progress

from kvloom.bench.retrieval.decode_speed import PIECES, DecodeSpeed, Ends, decode_speed
from kvloom.retrieval.attention import attend, attend_at
from kvloom.retrieval.exact import ExactSelector, RandomSelector
from kvloom.retrieval.selector import LayerShape, Selection

SHAPE = LayerShape(2, 2, 16, 0.25)
TOKENS, STEPS = 600, 3
ENDS = Ends(sink_tokens=4, window_tokens=32)


def tensors(tokens: int) -> SimpleNamespace:
    """Queries that attend to some 20 tokens of a topic each."""
    random = torch.Generator().manual_seed(tokens)
    topics = torch.randn(30, 2, 16, generator=random)
    keys = topics[torch.randint(0, 30, (tokens,), generator=random)].transpose(0, 1)
    keys = (keys + 0.3 * torch.randn(keys.shape, generator=random)).bfloat16()
    asked = topics[torch.randint(0, 30, (STEPS + 9,), generator=random)].permute(1, 0, 2).repeat_interleave(2, 0)
    queries = (3 * asked + 0.3 * torch.randn(asked.shape, generator=random)).bfloat16()
    return SimpleNamespace(
        shape=SHAPE,
        keys=keys,
        values=torch.randn(2, tokens, 16, generator=random).bfloat16(),
        queries=queries[:, :STEPS],
        positions=torch.arange(tokens, tokens + STEPS),
        train_queries=queries[:, STEPS:],
        train_positions=torch.arange(tokens - 9, tokens),
    )


def measured(factories, **options) -> list[DecodeSpeed]:
    with Progress(disable=True) as bar:
        return list(decode_speed([TOKENS], factories, tensors, ends=ENDS, bar=bar, **options))


class Recording(ExactSelector):
    """Exact, and says what it was asked and what it chose; it learns from queries."""

    def __init__(self, shape: LayerShape, start: int) -> None:
        super().__init__(shape, start=start)
        self.asked: list[tuple[int, int]] = []
        self.chosen: list[Selection] = []
        self.built_from: torch.Size | None = None

    def observe(self, queries, positions) -> None:
        self.observed = queries.shape

    def build(self) -> None:
        self.built_from = self.observed

    def select(self, queries, position, budget) -> Selection:
        self.asked.append((position, budget))
        self.chosen.append(super().select(queries, position, budget))
        return self.chosen[-1]


@pytest.mark.slow
def test_mass_error_and_bytes_are_those_of_the_chosen() -> None:
    made: list[Recording] = []
    found, random = measured(
        {
            "exact": lambda shape, start: made.append(Recording(shape, start)) or made[-1],
            "random": lambda shape, start: RandomSelector(shape, start=start),
        },
        mass=0.9,
        budgets=(1, 40, 64),
    )
    (selector,) = made
    assert len(selector) == TOKENS - 36
    assert selector.built_from == (4, 9, 16)
    context = tensors(TOKENS)
    masses, errors = [], []
    for n, choice in enumerate(selector.chosen[STEPS : 2 * STEPS]):  # of the second budget, which is enough
        assert selector.asked[STEPS + n] == (TOKENS + n, 40)
        ends = torch.cat((torch.arange(4), torch.arange(TOKENS - 32, TOKENS))).expand(2, -1)
        ids = torch.cat((choice.ids, ends), 1)
        out, lse = attend_at(context.queries[:, n], context.keys, context.values, ids, scale=0.25)
        true, whole = attend(context.queries[:, n], context.keys, context.values, scale=0.25)
        masses.append(float((lse - whole).exp().mean()))
        errors.append(float((out - true).norm() / true.norm()))
    assert found.budget == 40
    assert found.mass == pytest.approx(sum(masses) / STEPS, abs=1e-4)
    assert found.mass >= 0.9
    assert found.error_ratio == pytest.approx(sum(errors) / STEPS, rel=1e-3)
    # keys that were compared, as the selector holds them, then 16 bits of keys and values of what was attended to
    assert found.read_bytes == 2 * (TOKENS - 36) * 16 * 4 + 2 * (40 + 36) * 2 * 16 * 2
    assert random.budget == 64
    assert random.mass < 0.9


def test_times_are_by_piece_and_step() -> None:
    (found,) = measured({"exact": lambda shape, start: ExactSelector(shape, start=start)}, mass=0.0, budgets=(8,))
    assert set(found.seconds) == set(PIECES)
    assert all(len(spent) == STEPS and min(spent) > 0 for spent in found.seconds.values())
    assert found.step_s[0] == pytest.approx(sum(found.seconds[piece][0] for piece in PIECES))
    assert found.speedup.baseline == found.dense
    ratios = sorted(dense / sparse for dense, sparse in zip(found.dense_s, found.step_s, strict=True))
    assert found.speedup.value == pytest.approx(ratios[1])
    assert len(found.dense_ways) == 4
    row = json.loads(json.dumps(found.row()))
    assert row["tokens"] == TOKENS
    assert row["select_s_p10"] <= row["select_s"] <= row["select_s_p90"]
    assert math.isfinite(row["speedup"])


def test_an_estimate_of_the_rest_is_merged_and_recovers_no_mass() -> None:
    class Guessing(ExactSelector):
        def select(self, queries, position, budget) -> Selection:
            chosen = super().select(queries, position, budget)
            return Selection(chosen.ids, 0, 0, lambda _: (torch.full((4, 16), 100.0), torch.full((4,), 50.0)))

    plain, guessing = measured(
        {"plain": lambda s, start: ExactSelector(s, start=start), "guess": lambda s, start: Guessing(s, start=start)},
        mass=0.0,
        budgets=(8,),
    )
    assert guessing.mass == pytest.approx(plain.mass)
    assert guessing.error_ratio > 10 * max(plain.error_ratio, 0.1)


def test_a_context_of_ends_alone_is_refused() -> None:
    with Progress(disable=True) as bar, pytest.raises(ValueError, match="size 36; expected more"):
        list(decode_speed([36], {}, tensors, ends=ENDS, bar=bar))
