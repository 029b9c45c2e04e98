"""`kvloom bench retrieval`, at its smallest, and what its figures are made of: sparse passes, attention, intervals."""

import json
import math
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvloom.bench.retrieval import run as retrieval
from kvloom.bench.retrieval.attention_quality import AttentionProbe, AttentionQuality
from kvloom.bench.retrieval.contexts import SINK_TOKENS, WINDOW_TOKENS, Context, ContextModel, Reads, fill
from kvloom.bench.retrieval.methods import EXACT, METHODS, ONLY, RANDOM, TEXT, VQ, learn, selectors
from kvloom.bench.retrieval.quality import ANSWER, QUESTION, Found, Outcome, Scope, TaskTokens, measure
from kvloom.bench.retrieval.summary import pooled_loss, summaries
from kvloom.evaluation.models import load_model
from kvloom.evaluation.passages import load_heldout, load_questions, sentences
from kvloom.retrieval.attention import PartialAttention, attend
from kvloom.retrieval.exact import ExactSelector, RandomSelector
from kvloom.retrieval.selector import LayerShape, Selection, Selector

from ..support.models import make_model

IDS = torch.arange(150) * 7 % 500
SPLIT, ASKED = 130, 137  # the context, then what is computed densely behind it, then what goes through selectors
FIGURES = {target.metric for target in retrieval.TARGETS}


@pytest.fixture(scope="module")
def model() -> ContextModel:
    return ContextModel(make_model("llama"))


@pytest.fixture(scope="module")
def parts(model: ContextModel) -> tuple[Context, Context, Context]:
    context = model.dense(IDS[:SPLIT])
    behind = model.dense(IDS[SPLIT:ASKED], context)
    return context, behind, model.dense(IDS[ASKED:], context, behind)


def made(model: ContextModel, context: Context, name: str = EXACT) -> list[Selector]:
    make = selectors(names=[name])[name]
    return [fill(make(layer, model.shape, SINK_TOKENS), context, layer) for layer in range(len(context.keys))]


def test_dense_in_parts_is_dense_at_once(model: ContextModel, parts: tuple[Context, Context, Context]) -> None:
    whole = model.dense(IDS)
    for a, part in zip((0, SPLIT, ASKED), parts, strict=True):
        here = slice(a, a + len(part))
        assert part.first == a
        torch.testing.assert_close(part.hidden, whole.hidden[here], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(part.keys, whole.keys[:, :, here], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(part.queries, whole.queries[:, :, here], rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        expected = make_model("llama")(IDS[None]).logits[0]
    torch.testing.assert_close(model.logits(whole.hidden), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [EXACT, RANDOM])
def test_a_budget_of_everything_is_dense(
    model: ContextModel, parts: tuple[Context, Context, Context], name: str
) -> None:
    context, behind, own = parts
    hidden, _ = model.sparse(IDS[ASKED:], context, behind, made(model, context, name), SPLIT)
    torch.testing.assert_close(hidden, own.hidden, rtol=1e-3, atol=1e-4)


def test_a_budget_of_nothing_is_sinks_and_window(model: ContextModel, parts: tuple[Context, Context, Context]) -> None:
    """Against the model's own forward under a mask."""
    context, behind, own = parts
    visible = torch.ones(len(IDS), len(IDS), dtype=torch.bool).tril()
    visible[ASKED:, SINK_TOKENS : SPLIT - WINDOW_TOKENS] = False
    with torch.no_grad():
        expected = make_model("llama")(IDS[None], attention_mask=visible[None, None]).logits[0, ASKED:]
    hidden, _ = model.sparse(IDS[ASKED:], context, behind, made(model, context), 0)
    torch.testing.assert_close(model.logits(hidden), expected, rtol=1e-4, atol=1e-4)
    assert float((hidden - own.hidden).abs().max()) > 1e-3


def test_reads_count_everything(model: ContextModel, parts: tuple[Context, Context, Context]) -> None:
    context, behind, _ = parts
    _, reads = model.sparse(IDS[ASKED:], context, behind, made(model, context), 20)
    layers, heads, dim = context.keys.shape[0], 2, 8
    covered = SPLIT - SINK_TOKENS - WINDOW_TOKENS
    for t, read in enumerate(reads):
        attended = 20 + SINK_TOKENS + WINDOW_TOKENS + ASKED - SPLIT + t + 1
        assert read.select_bytes == layers * heads * covered * dim * 4
        assert read.attend_bytes == layers * heads * attended * 2 * dim * 2
    assert model.dense_bytes(140) == layers * heads * 140 * 2 * dim * 2
    assert Reads(1, 2) + Reads(3, 4) == Reads(4, 6)


class EstimatesRest(ExactSelector):
    """Says what attention over all that it did not choose would have been: a perfect estimate."""

    def __init__(self, shape: LayerShape, *, start: int) -> None:
        super().__init__(shape, start=start)
        self.kept: tuple[Tensor, Tensor] | None = None

    def add(self, keys: Tensor, values: Tensor) -> None:
        super().add(keys, values)
        self.kept = keys, values

    def select(self, queries: Tensor, position: int, budget: int) -> Selection:
        found = super().select(queries, position, budget)
        assert self.kept is not None
        keys, values = self.kept

        def rest(ids: Tensor) -> PartialAttention:
            left = torch.ones(keys.shape[:2], dtype=torch.bool).scatter_(1, ids - self.start, False)
            return attend(queries, keys, values, scale=self.shape.scale, visible=left)

        return replace(found, rest=rest)


def test_attention_along_the_dense_pass(model: ContextModel, parts: tuple[Context, Context, Context]) -> None:
    context, behind, own = parts
    exact = made(model, context)
    probe = AttentionProbe(model, context, behind, own, exact)
    whole, half, nothing = (probe.measure(exact, budget) for budget in (SPLIT, 40, 0))
    assert whole.mass == pytest.approx(1.0, abs=1e-5) and whole.error == pytest.approx(0.0, abs=1e-4)
    assert nothing.mass == pytest.approx(_mass_of_pinned(model, context, behind, own), rel=1e-4)
    assert math.isnan(nothing.recall)
    assert nothing.mass < half.mass < 1 and 0 < half.error < nothing.error
    assert half.recall == 1.0 and half.compared_ratio == 1.0
    chance = probe.measure(made(model, context, RANDOM), 40)
    assert chance.mass < half.mass and 0.2 < chance.recall < 0.65
    estimated = probe.measure(
        [fill(EstimatesRest(model.shape, start=SINK_TOKENS), context, layer) for layer in range(4)], 40
    )
    assert estimated.error == pytest.approx(0.0, abs=1e-4) and estimated.mass == pytest.approx(half.mass)


def _mass_of_pinned(model: ContextModel, context: Context, behind: Context, own: Context) -> float:
    found = []
    for layer in range(4):
        keys = torch.cat((context.keys[layer], behind.keys[layer], own.keys[layer]), dim=1)
        for t in range(len(own)):
            visible = keys[:, : ASKED + t + 1]
            scores = own.queries[layer, :, t].view(2, 2, 8) @ visible.mT * model.shape.scale
            weights = scores.softmax(-1)
            weights[..., SINK_TOKENS : SPLIT - WINDOW_TOKENS] = 0
            found.append(weights.sum(-1).mean())
    return float(torch.stack(found).mean())


def test_selectors_begin_with_exact_search() -> None:
    assert list(selectors(names=[RANDOM])) == [EXACT, RANDOM]
    assert isinstance(selectors()[RANDOM](0, LayerShape(1, 1, 8, 1.0), 3), RandomSelector)
    with pytest.raises(ValueError, match="selectors are oracle; expected some of exact"):
        selectors(names=["oracle"])


@pytest.mark.slow
def test_every_method_is_made() -> None:
    model, tokenizer = load_model(None)
    assert VQ not in selectors() and ONLY.keys() < METHODS.keys()
    profile = learn(model, tokenizer, sequences=2, tokens=64)
    layers = ContextModel(model)
    context = layers.dense(TaskTokens(tokenizer).sample(TEXT, 200, random.Random(0))[0])
    made = {name: fill(make(1, layers.shape, SINK_TOKENS), context, 1) for name, make in selectors(profile).items()}
    assert made.keys() == METHODS.keys()
    assert {len(selector) for selector in made.values()} == {200 - SINK_TOKENS - WINDOW_TOKENS}


def test_what_is_measured_is_not_what_was_learned_from() -> None:
    _, tokenizer = load_model(None)
    tasks, questions, prose = TaskTokens(tokenizer), load_questions(), load_heldout()
    learned = sentences(text for asked in questions[: len(questions) // 2] for text in asked.passages)
    for number in range(4):
        text = tokenizer.decode(tasks.sample("single_text", 4000, random.Random(number))[0])
        assert not [sentence for sentence in learned if sentence in text]
        text = tokenizer.decode(tasks.sample(TEXT, 4000, random.Random(number))[0])
        assert not [line for line in prose[: len(prose) // 2] if len(line) > 100 and line in text]


@pytest.fixture(scope="module")
def found() -> Found:
    model, tokenizer = load_model(None)
    scope = Scope({512: 1}, ratios=(0.2, 1.0), question_ratios=(0.2,), kinds=(TEXT, "multi_query", "single_filler"))
    return measure(model, tokenizer, selectors(names=[RANDOM]), scope)


def test_everything_attended_to_loses_nothing(found: Found) -> None:
    rows = [o for o in found.outcomes if o.ratio == 1.0 and o.method == EXACT]
    assert {o.kind for o in rows} == {TEXT, "multi_query", "single_filler"}
    for row in rows:
        # what comes behind the context counts, so that a few tokens of it are not attended to
        assert row.kl < 1e-3 and row.right == row.dense_right and row.loss == pytest.approx(row.dense_loss, abs=0.02)


def test_choosing_well_is_worth_more_than_chance(found: Found) -> None:
    rows = {
        m: [o for o in found.outcomes if (o.ratio, o.method, o.kind) == (0.2, m, "multi_query")]
        for m in (EXACT, RANDOM)
    }
    exact, chance = rows[EXACT], rows[RANDOM]
    assert sum(bool(o.right) for o in exact) > sum(bool(o.right) for o in chance)
    assert sum(o.kl for o in exact) < sum(o.kl for o in chance)
    assert {o.since for o in exact} == {ANSWER, QUESTION}
    assert [o.quality is not None for o in exact] == [True, False, False, False, False]
    assert [o.since for o in exact].count(QUESTION) == 1
    assert all(o.attend_bytes <= 0.21 * o.dense_bytes for o in exact)
    assert all(0.8 < o.select_bytes / o.dense_bytes < 1.0 for o in exact) and all(o.select_bytes == 0 for o in chance)


def test_builds_are_timed(found: Found) -> None:
    assert {b.method for b in found.builds} == {EXACT, RANDOM} and len(found.builds) == 8
    assert all(b.build_s > 0 and b.prefill_s > 0 and b.held_bytes == 0 for b in found.builds)


@pytest.mark.slow
def test_what_dense_attention_does_not_know_is_given_up() -> None:
    """A hundred needles are more than the bundled model tells apart: that is noticed, and pooled with nothing."""
    model, tokenizer = load_model(None)
    scope = Scope({1024: 3}, ratios=(0.2,), question_ratios=(), kinds=("only_needles",))
    told: list[str] = []
    floors = measure(model, tokenizer, selectors(names=[]), scope, advance=told.append)
    assert floors.floors.keys() == {(1024, "only_needles")} and floors.floors[1024, "only_needles"] < 0.5
    assert len(told) == 6 and {o.number for o in floors.outcomes} == {0, 1, 2, 3}
    assert pooled_loss(floors, EXACT, 0.2, ANSWER) is None


@pytest.mark.slow
def test_a_trial_is_judged_once_however_often_it_is_asked() -> None:
    """Three of four answers known is no floor, though the question that is asked twice is the one not known."""
    model, tokenizer = load_model(None)
    scope = Scope({1024: 1}, ratios=(0.2,), question_ratios=(0.2, 0.3, 0.4, 0.5), kinds=("alias_chain",))
    seeds = {}
    for seed in (0, 1, 3):
        found = measure(model, tokenizer, selectors(names=[]), scope, seed=seed)
        once = [o.dense_right for o in found.outcomes if o.since == ANSWER]
        seeds[seed] = sum(map(bool, once)) / len(once), once[0], bool(found.floors)
    assert all(is_floor == (share < 0.5) for share, _, is_floor in seeds.values()), seeds
    assert any(share >= 0.5 and not first for share, first, _ in seeds.values()), seeds


def test_text_continues_what_the_context_ends_with() -> None:
    _, tokenizer = load_model(None)
    tasks = TaskTokens(tokenizer)
    ids, ((question, answer),) = tasks.sample(TEXT, 300, random.Random(1))
    whole = load_heldout()
    prose = tokenizer("\n".join(whole[len(whole) // 2 :]), add_special_tokens=False, verbose=False).input_ids
    start = next(i for i in range(len(prose)) if prose[i : i + 299] == ids[1:].tolist())
    assert ids[0] == 1 and len(question) == 0 and prose[start + 299 : start + 299 + len(answer)] == answer.tolist()


def outcome(**changes: object) -> Outcome:
    plain = Outcome(
        100,
        "multi_key",
        0,
        "m",
        0.06,
        ANSWER,
        True,
        True,
        0.5,
        2.0,
        1.5,
        10,
        20,
        300,
        AttentionQuality(0.5, 0.4, 0.3, 0.2),
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def test_summaries_count_trials_and_draw_contexts() -> None:
    rows = [outcome(number=i, right=i != 0, kl=float(i), quality=None) for i in range(10)] + [
        outcome(number=0, kl=10.0)
    ]
    rows += [outcome(kind="single_filler", right=False), outcome(kind=TEXT, right=None, dense_right=None)]
    lines = {s.kind: s for s in summaries(Found(rows, [], {(100, "single_filler"): 0.2}))}
    assert lines.keys() == {"multi_key", "single_filler", TEXT, "all tasks", "retrieval"}
    of_task = lines["multi_key"]
    assert (
        of_task.lost is not None and of_task.lost[0] == pytest.approx(1 / 11) and of_task.lost[1] < 0 < of_task.lost[2]
    )
    assert (
        of_task.kl[0] == pytest.approx((5.0 + sum(range(1, 10))) / 10) and of_task.kl[1] < of_task.kl[0] < of_task.kl[2]
    )
    assert of_task.read_ratio == pytest.approx(0.1) and of_task.select_ratio == pytest.approx(1 / 30)
    assert of_task.quality["mass"][0] == 0.5 and math.isnan(of_task.quality["mass"][1])
    assert lines["all tasks"].trials == 11 and lines["all tasks"].lost == of_task.lost
    assert lines[TEXT].lost is None and lines[TEXT].dense_score is None
    assert lines[TEXT].loss_increase[0] == pytest.approx(0.5)
    row: Mapping[str, object] = of_task.row()
    assert row["lost"] == pytest.approx(1 / 11) and row["mass_low"] is not None and row["what"] == "quality"


def test_losses_are_pooled_over_what_is_known() -> None:
    rows = [outcome(right=i > 1, number=i) for i in range(8)] + [outcome(kind="records", tokens=200)]
    rows += [outcome(kind="only_needles", right=False), outcome(ratio=0.03, right=False), outcome(kind=TEXT)]
    pooled = pooled_loss(Found(rows, [], {(100, "only_needles"): 0.0}), "m", 0.06, ANSWER)
    assert pooled is not None and pooled[0][0] == pytest.approx(2 / 9) and pooled[1] == 9


@pytest.mark.slow
def test_quick_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "retrieval.html"
    result = retrieval.run(quick=True)
    result.write_page(page)
    result.show()
    written = json.loads(result.to_json())
    assert set(written["metrics"]) >= FIGURES
    assert all(written["metrics"][name]["value"] is not None for name in FIGURES)
    assert {"quality", "build", "search", "decode", "key bytes"} <= {row["what"] for row in written["rows"]}
    measured = {row["method"] for row in written["rows"] if row["what"] == "quality"}
    assert measured == {*METHODS}
    assert page.read_text().count("<svg") >= 6
    shown = capsys.readouterr().out
    assert "answers lost" in shown and "targets" in shown and "SYNTHETIC" in shown


def test_refuses_sizes_out_of_range() -> None:
    with pytest.raises(ValueError, match="sizes are 64, 100000; expected 256 to"):
        retrieval.run(sizes=[64, 4096, 100_000])
