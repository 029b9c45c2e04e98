"""Fusion on questions of several kinds, for any model: methods at equal cost, tuned and checked on different splits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ...blend.blender import CACHEBLEND, Blender
from ...blend.choosers import CHOOSERS
from ...blend.method import FusionMethod
from ...certify.fusion_method import TUNED_KINDS, WITHOUT_FULL_LAYERS, TriedMethod, best_method, question_ratio_of
from ...evaluation.answers import Answer, gap_closed, mean_of, ratio_of
from ...evaluation.page import Row, Table
from ...evaluation.passages import CHECK, TUNE
from ...evaluation.placed import FusionBed, MeasuredMethod
from ...evaluation.questions import ANSWERED, MULTIHOP, QuestionSampler
from ...evaluation.report import Metric

KINDS = ("astride", "multihop", "extract", "text")
BUDGETS = (0.15, 0.30)
"""Recompute ratios of CacheBlend; every other method computes as much as CacheBlend does at this ratio."""


@dataclass(frozen=True, slots=True)
class QualitySizes:
    """How much is measured: questions to tune on and to check with, of each kind, over contexts of so many tokens."""

    tune: int
    check: int
    context_tokens: int = 1400
    num_documents: int = 8
    kinds: Sequence[str] = KINDS
    budgets: Sequence[float] = BUDGETS


@dataclass(frozen=True, slots=True)
class FusionQuality:
    """What fusion answers.

    Attributes
    ----------
    methods : by budget, the method chosen for the model on the split `tune`.
    """

    metrics: dict[str, Metric]
    tables: list[Table]
    rows: list[dict[str, object]]
    methods: dict[float, FusionMethod]


def measure_quality(
    bed: FusionBed,
    tokenizer: PreTrainedTokenizerBase,
    sizes: QualitySizes,
    *,
    prefix: str,
    seed: int,
    advance: Callable[[], object] = lambda: None,
) -> FusionQuality:
    """Choose a method for each budget on the split `tune`, and measure it beside others on the split `check`.

    Parameters
    ----------
    prefix : of the metrics' names.
    seed : of the questions; nothing was tuned on those of `check`, whatever it is.
    advance : called after each question, `quality_units` times.
    """
    tune, check = (
        QuestionSampler(
            tokenizer,
            split=split,
            context_tokens=sizes.context_tokens,
            num_documents=sizes.num_documents,
            seed=seed,
        )
        for split in (TUNE, CHECK)
    )
    tuned = {kind: tune.samples(kind, range(sizes.tune)) for kind in TUNED_KINDS}
    layers = bed.layers.spec.num_layers
    costs = {budget: FusionMethod(budget, "deviation", 1).cost_ratio(layers) for budget in sizes.budgets}
    tried = {budget: best_method(bed, tuned, cost, advance=advance) for budget, cost in costs.items()}
    methods = {budget: found[0].method for budget, found in tried.items()}
    tables = [_tuning_table(tried)]
    metrics: dict[str, Metric] = {}
    rows: list[dict[str, object]] = []
    asked = question_ratio_of([each for of_kind in tuned.values() for each in of_kind])
    blenders = _blenders(methods, costs, layers, asked)
    for kind in sizes.kinds:
        questions = check.samples(kind, range(sizes.check))
        full, (naive, *others) = bed.measure(questions, blenders, advance=advance)
        title = f"{kind}: {len(questions)} questions over {sizes.context_tokens:,} tokens"
        tables.append(_kind_table(title, kind, full, [naive, *others]))
        named = {one.name: one for one in others}
        rows += [{"kind": kind, "method": one.name, **_figures(kind, full, naive, one)} for one in others]
        metrics |= _metrics(prefix, kind, full, naive, named, sizes.budgets)
    return FusionQuality(metrics, tables, rows, methods)


def quality_units(sizes: QualitySizes) -> int:
    """How often `measure_quality` advances."""
    return sizes.tune * len(TUNED_KINDS) * len(sizes.budgets) + sizes.check * len(sizes.kinds)


def _blenders(
    methods: dict[float, FusionMethod], costs: dict[float, float], layers: int, asked: float
) -> dict[str, Blender]:
    """What is measured, by name: naive reuse first; then for each budget all methods at equal cost."""
    found = {"naive reuse": FusionMethod(0.0, "none").blender}
    for budget, method in methods.items():
        found[f"kvloom at {budget:.0%}"] = method.blender
        found[f"CacheBlend {budget:.0%}"] = Blender(
            budget, CACHEBLEND.chooser, spread_ratio=CACHEBLEND.spread_ratio, check_layer=CACHEBLEND.check_layer
        )
        if budget == 0.15:
            for name, select in (("EPIC", "first"), ("ProphetKV", "mean attention"), ("random", "random")):
                # `random` chooses where CacheBlend does, so that the two differ in the choice alone.
                other = FusionMethod(1.0, select, 1).at_cost(costs[budget], layers, question_ratio=asked)
                ratio = budget if select == "random" or other is None else other.ratio
                found[f"{name} at {budget:.0%}"] = Blender(ratio, CHOOSERS[select], spread_ratio=0.0, check_layer=1)
    return found


def _gap_name(kind: str) -> str:
    """Which loss tells: that of the answer, or the KL where the model may not know it."""
    return "nll" if kind in ANSWERED else "kl"


def _figures(kind: str, full: Sequence[Answer], naive: MeasuredMethod, one: MeasuredMethod) -> dict[str, object]:
    return {
        "computed_ratio": one.computed_ratio,
        "gap_closed": gap_closed(naive.answers, full, one.answers, _gap_name(kind)),
        "nll": mean_of(one.answers, "nll"),
        "kl": mean_of(one.answers, "kl"),
        "right": mean_of(one.answers, "right") if kind in ANSWERED else None,
        "values_right": mean_of(one.answers, "values_right") if kind in ANSWERED else None,
    }


def _kind_table(title: str, kind: str, full: Sequence[Answer], found: Sequence[MeasuredMethod]) -> Table:
    answered = kind in ANSWERED
    cells: list[Row] = []
    for name, answers, computed in [
        ("full prefill", full, 1.0),
        *((one.name, one.answers, one.computed_ratio) for one in found),
    ]:
        closed, low, high = gap_closed(found[0].answers, full, answers, _gap_name(kind))
        right = [f"{mean_of(answers, 'values_right')[0]:.0%}"] if answered else []
        losses = [f"{mean_of(answers, loss)[0]:.3f}" for loss in ("nll", "kl")]
        cells.append([name, f"{computed:.0%}", *right, *losses, f"{closed:.2f} [{low:.2f}, {high:.2f}]"])
    heads = ["method", "computed", *(["right"] if answered else []), "NLL", "KL", f"{_gap_name(kind).upper()} closed"]
    return Table(heads, cells, title)


def _tuning_table(tried: dict[float, list[TriedMethod]]) -> Table:
    cells: list[Row] = [
        [
            f"CacheBlend {budget:.0%}",
            one.method.select,
            "" if one.method.select in WITHOUT_FULL_LAYERS else str(one.method.check_layer),
            f"{one.method.ratio:.1%}",
            *(f"{one.closed[kind]:.2f}" if kind in one.closed else "" for kind in TUNED_KINDS),
            f"{one.mean_closed:.2f}",
        ]
        for budget, found in tried.items()
        for one in found
    ]
    heads = ["cost as", "choice by", "check layer", "share", *(f"{kind} closed" for kind in TUNED_KINDS), "mean"]
    return Table(heads, cells, "methods tried on the split to tune on, best first", left=(0, 1))


def _metrics(
    prefix: str,
    kind: str,
    full: Sequence[Answer],
    naive: MeasuredMethod,
    named: dict[str, MeasuredMethod],
    budgets: Sequence[float],
) -> dict[str, Metric]:
    """Figures of one kind: for `astride` without its name."""
    middle = "" if kind == "astride" else f"{kind}_"
    found: dict[str, Metric] = {}
    for budget in budgets:
        for label, name in (("", f"kvloom at {budget:.0%}"), ("cacheblend_", f"CacheBlend {budget:.0%}")):
            closed = gap_closed(naive.answers, full, named[name].answers, _gap_name(kind))
            meaning = "full prefill is 1, naive reuse is 0"
            found[f"{prefix}{middle}{label}gap_closed_at_{budget:.2f}"] = Metric(*closed, "share", meaning)
        if kind == MULTIHOP:
            ratio = ratio_of(named[f"kvloom at {budget:.0%}"].answers, named[f"CacheBlend {budget:.0%}"].answers, "kl")
            key = f"{prefix}musique_kl_at_{budget:.2f}_vs_cacheblend"
            found[key] = Metric(*ratio, "times", f"CacheBlend {budget:.0%}")
    return found
