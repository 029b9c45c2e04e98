"""`kvloom bench retrieval --model`: its passes are those of the selectors, and its figures what they say."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from kvloom.bench.retrieval import pretrained, pretrained_run
from kvloom.bench.retrieval.pretrained import SINK_TOKENS, Trial, Way, answered, tokens_at_equal_loss, window_of
from kvloom.connectors.hf.retrieval.plan import layer_shape
from kvloom.core import KVChunk
from kvloom.evaluation.answers import Answer
from kvloom.evaluation.environment import BUNDLED_MODEL
from kvloom.evaluation.forcing import ForcedModel
from kvloom.evaluation.questions import Question
from kvloom.retrieval.attention import attend, attend_at, attend_selected
from kvloom.retrieval.exact import ExactSelector
from kvloom.retrieval.kernels import quantized_ops
from kvloom.retrieval.quantized.quantized import QuantizedKeyIndex
from kvloom.retrieval.selector import choose

from ..support.models import make_model

QUESTION = Question(
    "needle", 0, (1,), ((5,) * 40, tuple(range(3, 403))), (7, 8, 9), (10,), (11, 12, 13), ((0, 3),), "g"
)


WINDOW = window_of(441)


@pytest.fixture(scope="module")
def forced() -> ForcedModel:
    return ForcedModel(make_model("llama", max_position_embeddings=1024), model_id="m", keeps_queries=True)


def test_a_share_of_everything_is_dense(forced: ForcedModel) -> None:
    ways = [Way("exact", 1.0), Way("quantized", 1.0), Way("landmarks", 1.0), Way("exact", 1.0, 1.0)]
    dense, *found = answered(forced, [(QUESTION, ways)])
    assert dense.answer.kl == 0.0 and dense.attended == 441
    for trial in found:
        assert trial.answer.kl < 1e-6 and trial.attended == pytest.approx(441)
        assert trial.answer.nll == pytest.approx(dense.answer.nll, abs=1e-4)


def test_few_tokens_cost_and_random_ones_more(forced: ForcedModel) -> None:
    ways = [Way("exact", 0.2), Way("exact", 0.2, 0.6), Way("random", 0.2)]
    _, best, covered, drawn = answered(forced, [(QUESTION, ways)])
    assert best.attended == drawn.attended == int(0.2 * 441)
    assert 0 < best.answer.kl < drawn.answer.kl
    assert SINK_TOKENS + WINDOW < covered.attended < best.attended


def test_questions_about_one_context_are_answered_as_alone(
    forced: ForcedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also as one token after the other does, through a selector and attention of one token."""
    other = replace(QUESTION, question=(9, 8, 7, 6, 5), answer=(20, 21), values=((0, 2),))
    ways, few = [Way("quantized", 0.2), Way("landmarks", 0.2)], [Way("exact", 0.3, 0.7)]
    together = answered(forced, [(QUESTION, ways), (other, few)])
    alone = answered(forced, [(QUESTION, ways)]) + answered(forced, [(other, few)])
    assert [trial.way for trial in together] == [trial.way for trial in alone]
    for a, b in zip(together, alone, strict=True):
        assert a.answer.kl == pytest.approx(b.answer.kl, abs=1e-6)
        assert a.answer.nll == pytest.approx(b.answer.nll, abs=1e-5) and a.attended == pytest.approx(b.attended)
    assert together[1].answer.kl > 1e-4
    with monkeypatch.context() as exactly:  # compiled, queries are rounded to 8 bits where they meet codes
        exactly.setattr(quantized_ops, "compiled_for_cpu", lambda *_: None)
        exactly.setitem(quantized_ops.attend_to_rest.__kwdefaults__, "light", 0.0)
        one_by_one = _token_by_token(forced, QUESTION, 0.2)
    assert together[1].answer.nll == pytest.approx(_token_by_token(forced, QUESTION, 0.2), abs=0.01)
    assert together[1].answer.nll == pytest.approx(one_by_one, abs=1e-4)
    with pytest.raises(ValueError, match="not about one context"):
        answered(forced, [(QUESTION, ways), (replace(QUESTION, lead=(2,)), ways)])


def _token_by_token(forced: ForcedModel, question: Question, ratio: float) -> float:
    """NLL of the gold answer if each of its tokens attends through a `QuantizedKeyIndex`, without a batch."""
    size = len(question.context)
    prefix, _ = forced.run(torch.tensor([*question.context, *question.asked[:-1]]))
    shape, covered = layer_shape(forced.layers), slice(SINK_TOKENS, size - WINDOW)
    budget = int(ratio * size) - SINK_TOKENS - WINDOW

    def attend_layer(layer: int, _: KVChunk, queries: Tensor, keys: Tensor, values: Tensor, first: int) -> Tensor:
        selector = QuantizedKeyIndex(shape, start=SINK_TOKENS)
        selector.add(keys[:, covered], values[:, covered])
        rows = []
        for place in range(queries.shape[1]):
            seen = torch.cat((torch.arange(SINK_TOKENS), torch.arange(covered.stop, first + place + 1)))
            query = queries[:, place]
            near = attend(query, keys[:, seen], values[:, seen], scale=shape.scale)
            ids = partial(attend_at, query, keys, values, scale=shape.scale)
            rows.append(attend_selected(near, choose(selector, query, first + place, budget, near[1]), ids)[0])
        return torch.stack(rows, 1)

    outputs = forced.continued(prefix, torch.tensor([question.asked[-1], *question.answer[:-1]]), attend_layer)
    return float(torch.nn.functional.cross_entropy(forced.logits(outputs), torch.tensor(question.answer)))


def test_choices_for_all_tokens_at_once_are_those_of_the_selectors(forced: ForcedModel) -> None:
    """Exact search and the keys of two bits: token by token through the selector gives the same ids."""
    context, _ = forced.run(torch.tensor(QUESTION.context))
    shape = layer_shape(forced.layers)
    queries = torch.randn(shape.query_heads, 3, shape.head_dim, generator=torch.Generator().manual_seed(0))
    covered = slice(SINK_TOKENS, len(context) - WINDOW)
    for method, make in (("exact", ExactSelector), ("quantized", QuantizedKeyIndex)):
        selector = make(shape, start=SINK_TOKENS)
        selector.add(context.keys[1, :, covered], context.values[1, :, covered])
        nothing = torch.full((shape.kv_heads, 3, shape.group), -math.inf)
        at_once = pretrained._choice(method, shape, context, 1, WINDOW)(queries, len(context), 20, nothing).ids
        one_by_one = pretrained._by_selector(selector)(queries, len(context), 20, nothing).ids
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
    monkeypatch.setattr(pretrained_run, "QUICK", replace(pretrained_run.QUICK, contexts=1, context_tokens=448))
    monkeypatch.setattr(pretrained_run, "OTHERS", ("random", "landmarks"))
    result = pretrained_run.run(BUNDLED_MODEL, quick=True)
    assert set(result.metrics) == {target.metric for target in pretrained_run.TARGETS}
    methods = {"dense", "quantized", "exact", "random", "landmarks", pretrained.ALONE}
    assert {row["method"] for row in result.rows} == methods
    assert len(result.tables) == 2
    dense = [row["kind"] for row in result.rows if row["method"] == "dense"]
    assert dense == ["extract", "needle12", "needle12"]  # of one context
    assert {row["kind"] for row in result.rows if row["method"] == "random"} == {"needle12"}


def test_the_saving_counts_contexts_and_kinds_alike() -> None:
    """Four needles and one extraction of a context: half of the loss is the extraction's."""

    def trial(way: Way, kind: str, group: str, kl: float, attended: float) -> Trial:
        return Trial(way, Answer(kind, 0, group, True, 1.0, 0.1, kl), attended)

    trials = []
    for ratio, loss in ((0.03, 0.4), (0.06, 0.2), (0.12, 0.1)):
        for group in "ab":
            trials += [trial(Way("quantized", ratio), "needle12", group, 0.0, 4000 * ratio)] * 4
            trials.append(trial(Way("quantized", ratio), "extract", group, 2 * loss, 4000 * ratio))
    for group in "ab":
        covered = Way("quantized", 0.12, pretrained_run.SAVING_COVERAGE)
        trials += [trial(covered, "needle12", group, 0.0, 90.0)] * 4
        trials.append(trial(covered, "extract", group, 0.4, 70.0))
    saving = pretrained_run._saving(trials)
    assert saving.value == pytest.approx(240 / 80)  # 0.2, as 6 %, at 80 tokens in the mean of both kinds


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="context_tokens is 100"):
        pretrained_run.run(BUNDLED_MODEL, context_tokens=100)
