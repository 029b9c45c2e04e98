"""`kvloom bench retrieval --model`: its passes are those of the selectors, and its figures what they say."""

import math
from dataclasses import replace

import pytest
import torch

from kvloom.bench.retrieval import pretrained, pretrained_run
from kvloom.bench.retrieval.pretrained import SINK_TOKENS, WINDOW_TOKENS, Way, answered, tokens_at_equal_loss
from kvloom.connectors.hf.retrieval.plan import layer_shape
from kvloom.evaluation.environment import BUNDLED_MODEL
from kvloom.evaluation.forcing import ForcedModel
from kvloom.evaluation.questions import Question
from kvloom.retrieval.exact import ExactSelector
from kvloom.retrieval.quantized.quantized import QuantizedKeyIndex

from ..support.models import make_model

QUESTION = Question(
    "needle", 0, (1,), ((5,) * 40, tuple(range(3, 403))), (7, 8, 9), (10,), (11, 12, 13), ((0, 3),), "g"
)


@pytest.fixture(scope="module")
def forced() -> ForcedModel:
    return ForcedModel(make_model("llama", max_position_embeddings=1024), model_id="m", keeps_queries=True)


def test_a_share_of_everything_is_dense(forced: ForcedModel) -> None:
    ways = [Way("exact", 1.0), Way("quantized", 1.0), Way("landmarks", 1.0), Way("exact", 1.0, 1.0)]
    dense, *found = answered(forced, QUESTION, ways)
    assert dense.answer.kl == 0.0 and dense.attended == 441
    for trial in found:
        assert trial.answer.kl < 1e-6 and trial.attended == pytest.approx(441)
        assert trial.answer.nll == pytest.approx(dense.answer.nll, abs=1e-4)


def test_few_tokens_cost_and_random_ones_more(forced: ForcedModel) -> None:
    ways = [Way("exact", 0.2), Way("exact", 0.2, 0.6)]
    _, best, covered, drawn = answered(forced, QUESTION, ways, [Way("random", 0.2)])
    assert best.attended == drawn.attended == int(0.2 * 441)
    assert 0 < best.answer.kl < drawn.answer.kl
    assert SINK_TOKENS + WINDOW_TOKENS < covered.attended < best.attended


def test_choices_for_all_tokens_at_once_are_those_of_the_selectors(forced: ForcedModel) -> None:
    """Exact search and the keys of two bits: token by token through the selector gives the same ids."""
    context, _ = forced.run(torch.tensor(QUESTION.context))
    shape = layer_shape(forced.layers)
    queries = torch.randn(shape.query_heads, 3, shape.head_dim, generator=torch.Generator().manual_seed(0))
    covered = slice(SINK_TOKENS, len(context) - WINDOW_TOKENS)
    for method, make in (("exact", ExactSelector), ("quantized", QuantizedKeyIndex)):
        selector = make(shape, start=SINK_TOKENS)
        selector.add(context.keys[1, :, covered], context.values[1, :, covered])
        at_once = pretrained._choice(method, shape, context, 1)(queries, len(context), 20)
        one_by_one = pretrained._by_selector(selector)(queries, len(context), 20)
        rows = zip(at_once.flatten(0, 1).tolist(), one_by_one.flatten(0, 1).tolist(), strict=True)
        shared = [len(set(a) & set(b)) for a, b in rows]
        assert min(shared) >= 19, method  # products in another order may swap the last of nearly equal ones


def test_tokens_at_equal_loss() -> None:
    fixed = {100.0: 0.4, 200.0: 0.1, 400.0: 0.025}
    assert tokens_at_equal_loss(fixed, 0.1) == pytest.approx(200)
    assert tokens_at_equal_loss(fixed, 0.2) == pytest.approx(100 * 2**0.5)
    assert tokens_at_equal_loss(fixed, 0.05) == pytest.approx(200 * 2**0.5)
    assert tokens_at_equal_loss(fixed, 0.9) == 100
    assert math.isnan(tokens_at_equal_loss(fixed, 0.01))
    assert math.isnan(tokens_at_equal_loss(fixed, 0.0))


@pytest.mark.slow
def test_it_runs_at_its_smallest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained_run, "QUICK", replace(pretrained_run.QUICK, questions=1, context_tokens=320))
    monkeypatch.setattr(pretrained_run, "OTHERS", ("random", "landmarks"))
    result = pretrained_run.run(BUNDLED_MODEL, quick=True)
    assert set(result.metrics) == {target.metric for target in pretrained_run.TARGETS}
    assert {row["method"] for row in result.rows} == {"dense", "quantized", "exact", "random", "landmarks"}
    assert len(result.tables) == 2


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="context_tokens is 100"):
        pretrained_run.run(BUNDLED_MODEL, context_tokens=100)
