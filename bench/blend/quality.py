"""Fusion on questions of several kinds, for any model: methods at equal cost, tuned and checked on different splits."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from transformers import PreTrainedTokenizerBase

from ...blend.blender import CACHEBLEND, Blender
from ...blend.choosers import CHOOSERS
from ...blend.correction import Correction
from ...blend.method import FusionMethod
from ...certify.fusion_method import TUNED_KINDS, WITHOUT_FULL_LAYERS, TriedMethod, best_method
from ...evaluation.answers import Answer, gap_closed, mean_of, ratio_of
from ...evaluation.page import Row, Table
from ...evaluation.passages import CHECK, TUNE
from ...evaluation.placed import FusionBed, MeasuredMethod
from ...evaluation.questions import ANSWERED, MULTIHOP, QuestionSampler
from ...evaluation.report import Metric

KINDS = ("astride", "multihop", "extract", "text")
BUDGETS = (0.15, 0.30)
"""Recompute ratios of CacheBlend; every other method computes as much as CacheBlend does at this ratio."""
NAIVE = "naive reuse"
COST_TOKENS = 4096  # of a context at which costs are made equal, and times are measured
_ASKED_TOKENS, _ANSWERED_TOKENS = 36, 44  # of a question, and with its answer, about: for remaining times alone


@dataclass(frozen=True, slots=True)
class QualitySizes:
    """How much is measured.

    Attributes
    ----------
    check : questions of each kind that figures come from.
    tune : questions of each kind that methods are chosen on; 0 for the default method alone.
    per_context : questions about one context, where a kind has as many.
    has_all_methods : also EPIC, ProphetKV's selection, random tokens, and CacheBlend at every budget.
    """

    check: Mapping[str, int]
    tune: int = 0
    context_tokens: int = 1400
    num_documents: int = 8
    per_context: int = 7
    budgets: Sequence[float] = BUDGETS
    has_all_methods: bool = True

    def num_contexts(self, kind: str) -> int:
        """Contexts of a kind on the split `check`."""
        most = self.per_context if kind == "astride" else 1
        return math.ceil(self.check[kind] / most)


@dataclass(frozen=True, slots=True)
class FusionQuality:
    """What fusion answers: figures, tables, and one row for each method and kind."""

    metrics: dict[str, Metric]
    tables: list[Table]
    rows: list[dict[str, object]]
    notes: list[str]


def default_methods(
    num_layers: int, budgets: Sequence[float] = BUDGETS, *, asked_tokens: int = _ASKED_TOKENS
) -> dict[float, FusionMethod]:
    """Kvloom's default method at what CacheBlend costs, by CacheBlend's recompute ratio; see `cost_of`.

    Raises
    ------
    ValueError : no ratio makes the default cost as little.
    """
    found = {}
    for budget in budgets:
        cost = cost_of(budget, num_layers)
        method = FusionMethod(1.0).at_cost(cost, num_layers, question_ratio=asked_tokens / COST_TOKENS)
        if method is None:
            raise ValueError(f"the default method costs more than CacheBlend at {budget:.0%} of {num_layers} layers")
        found[budget] = method
    return found


def cost_of(budget: float, num_layers: int) -> float:
    """Share of full prefill's tokens times layers that CacheBlend computes at this recompute ratio."""
    return FusionMethod(budget, "deviation", 1).cost_ratio(num_layers)


def measure_quality(
    bed: FusionBed,
    tokenizer: PreTrainedTokenizerBase,
    sizes: QualitySizes,
    *,
    prefix: str,
    seed: int,
    correction: Correction | None = None,
    stop_s: float = math.inf,
    advance: Callable[[str, float], object],
) -> FusionQuality:
    """Measure methods at equal cost on the split `check`; with `sizes.tune`, choose one more on the split `tune`.

    Parameters
    ----------
    prefix : of the metrics' names.
    seed : of the questions; nothing was tuned on those of `check`, whatever it is.
    correction : with which the default method is measured once more, see `corrected`; None for not.
    stop_s : by `time.monotonic`; later no context begins, but one of each kind. What is left is shared among kinds.
    advance : called after each context with what it belongs to and its work, see `quality_work`.
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
    layers = bed.layers.spec.num_layers
    asked = len(check.sample("astride", 0).asked)
    methods = default_methods(layers, sizes.budgets, asked_tokens=asked)
    blenders = _blenders(methods, layers, asked, correction, has_all=sizes.has_all_methods)
    tables, notes = [], []
    if sizes.tune:
        tuned = {kind: tune.contexts(kind, sizes.tune) for kind in TUNED_KINDS}
        tried = {}
        for budget in sizes.budgets:
            step = partial(advance, "tuning", _tune_work(sizes))
            tried[budget] = best_method(bed, tuned, cost_of(budget, layers), advance=step)
            if tried[budget] and tried[budget][0].method.select != methods[budget].select:
                blenders[f"tuned at {budget:.0%}"] = tried[budget][0].method.blender
        tables.append(_tuning_table(tried))
    metrics: dict[str, Metric] = {}
    rows: list[dict[str, object]] = []
    work = {kind: _context_work(sizes, kind) for kind in sizes.check}
    left = sum(work[kind] * sizes.num_contexts(kind) for kind in sizes.check)
    for kind, count in sizes.check.items():
        share = work[kind] * sizes.num_contexts(kind)
        now = time.monotonic()
        contexts = check.contexts(kind, count, most=sizes.per_context)
        step = partial(advance, kind, work[kind])
        full, (naive, *others) = bed.measure(
            contexts, blenders, stop_s=now + (stop_s - now) * share / left, advance=step
        )
        left -= share
        if len(full) < count:
            notes.append(f"Time was up after {len(full)} of {count} questions of {kind}.")
        title = _title(kind, full, sizes)
        tables.append(_kind_table(title, kind, full, [naive, *others]))
        named = {one.name: one for one in others}
        rows += [
            {"kind": kind, "method": one.name, "questions": len(full), **_figures(kind, full, naive, one)}
            for one in others
        ]
        metrics |= _metrics(prefix, kind, full, naive, named, sizes.budgets)
    return FusionQuality(metrics, tables, rows, notes)


def quality_work(sizes: QualitySizes) -> float:
    """What `measure_quality` advances by altogether: thousand tokens that run through the model, about."""
    tuning = _tune_work(sizes) * sizes.tune * len(TUNED_KINDS) * len(sizes.budgets) if sizes.tune else 0.0
    return tuning + sum(_context_work(sizes, kind) * sizes.num_contexts(kind) for kind in sizes.check)


def _context_work(sizes: QualitySizes, kind: str) -> float:
    """Thousand tokens of one context: twice itself, one fusion for each method or question, every answer."""
    questions = min(sizes.per_context, sizes.check[kind]) if kind == "astride" else 1
    own, asked = sum(sizes.budgets), 2 * questions * sum(sizes.budgets)
    shared, methods = (own + 0.4, 6 + 4) if sizes.has_all_methods else (0.15, 4 + 2)
    fused = sizes.context_tokens * (2 + shared + asked)
    return (fused + questions * (_ANSWERED_TOKENS * (methods + 1) + 2 * _ASKED_TOKENS)) / 1000


def _tune_work(sizes: QualitySizes) -> float:
    return sizes.context_tokens * (2 + 15 * 0.25) / 1000


def corrected(budget: float) -> str:
    """Name of the default method at this budget over corrected documents."""
    return f"kvloom, corrected, at {budget:.0%}"


def _blenders(
    methods: dict[float, FusionMethod], layers: int, asked: int, correction: Correction | None, *, has_all: bool
) -> dict[str, Blender]:
    """What is measured, by name: naive reuse first; then for each budget methods at equal cost."""
    found = {NAIVE: FusionMethod(0.0, "none").blender}
    for budget, method in methods.items():
        found[f"kvloom at {budget:.0%}"] = method.blender
        if correction is not None:
            found[corrected(budget)] = replace(method.blender, correction=correction)
        if has_all or budget == min(methods):
            found[f"CacheBlend {budget:.0%}"] = Blender(
                budget, CACHEBLEND.chooser, spread_ratio=CACHEBLEND.spread_ratio, check_layer=CACHEBLEND.check_layer
            )
        if has_all and budget == min(methods):
            for name, select in (("EPIC", "first"), ("ProphetKV", "mean attention"), ("random", "random")):
                # `random` chooses where CacheBlend does, so that the two differ in the choice alone.
                other = FusionMethod(1.0, select, 1).at_cost(
                    cost_of(budget, layers), layers, question_ratio=asked / COST_TOKENS
                )
                ratio = budget if select == "random" or other is None else other.ratio
                found[f"{name} at {budget:.0%}"] = Blender(ratio, CHOOSERS[select], spread_ratio=0.0, check_layer=1)
    return found


def _title(kind: str, full: Sequence[Answer], sizes: QualitySizes) -> str:
    asked = len({answer.number for answer in full})
    texts = len({answer.group for answer in full})
    about = f" about {texts} texts" if texts < asked else ""
    return f"{kind}: {len(full)} questions over {asked} contexts of {sizes.context_tokens:,} tokens{about}"


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
        own, published = f"kvloom at {budget:.0%}", f"CacheBlend {budget:.0%}"
        for label, name in (("", own), ("corrected_", corrected(budget)), ("cacheblend_", published)):
            if name in named:
                closed = gap_closed(naive.answers, full, named[name].answers, _gap_name(kind))
                meaning = "full prefill is 1, naive reuse is 0"
                found[f"{prefix}{middle}{label}gap_closed_at_{budget:.2f}"] = Metric(*closed, "share", meaning)
        for label, name in (("", own), ("corrected_", corrected(budget))):
            if kind == MULTIHOP and published in named and name in named:
                ratio = ratio_of(named[name].answers, named[published].answers, "kl")
                found[f"{prefix}{label}musique_kl_at_{budget:.2f}_vs_cacheblend"] = Metric(*ratio, "times", published)
    return found
