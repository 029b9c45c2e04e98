"""Which fusion suits a model: choosers and check layers tried at equal cost, on questions that nothing is judged by."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..blend.correction import Correction
from ..blend.method import ENGINE_CHOICES, NEEDS_QUESTION, WITHOUT_DEVIATION, FusionMethod
from ..evaluation.answers import gap_closed, mean_of
from ..evaluation.placed import FusionBed
from ..evaluation.questions import Question

CHECK_LAYERS = (1, 2, 3)
WITHOUT_FULL_LAYERS = tuple(select for select in ENGINE_CHOICES if select in WITHOUT_DEVIATION)
SELECTS = tuple(select for select in ENGINE_CHOICES if select not in WITHOUT_DEVIATION)
TUNED_KINDS = ("astride", "multihop")
"""What documents bind to one another, and what one question needs of them: methods that win one fail the other."""

_LEAST_GAP = 0.02  # nats, between naive reuse and full prefill; of less, no share can be told


@dataclass(frozen=True, slots=True)
class TriedMethod:
    """A method on the questions of a split.

    Attributes
    ----------
    closed : by kind of question, share of the gap between naive reuse and full prefill that it closes: of the answer's
        NLL, and for `multihop`, whose answers a small model may not know, of the KL to full prefill.
    """

    method: FusionMethod
    closed: Mapping[str, float]

    @property
    def mean_closed(self) -> float:
        return sum(self.closed.values()) / len(self.closed)


def methods_at_cost(cost_ratio: float, num_layers: int, *, question_ratio: float) -> list[FusionMethod]:
    """Every method of the menu, with the ratio at which it computes as much as `cost_ratio` of full prefill."""
    menu = [FusionMethod(1.0, select, 1) for select in WITHOUT_FULL_LAYERS]
    menu += [FusionMethod(1.0, select, layer) for select in SELECTS for layer in CHECK_LAYERS if layer < num_layers - 1]
    found = (method.at_cost(cost_ratio, num_layers, question_ratio=question_ratio) for method in menu)
    return [method for method in found if method is not None and method.ratio < 1.0]


def question_ratio_of(contexts: Sequence[Sequence[Question]]) -> float:
    """Tokens of the questions over those of their contexts, mean."""
    questions = [question for of_context in contexts for question in of_context]
    return sum(len(each.asked) / len(each.context) for each in questions) / len(questions)


def try_methods(
    bed: FusionBed,
    questions: Mapping[str, Sequence[Sequence[Question]]],
    methods: Sequence[FusionMethod],
    *,
    correction: Correction | None = None,
    advance: Callable[[], object] = lambda: None,
) -> list[TriedMethod]:
    """Measure methods on questions, by kind and context; the best mean share of the gap first.

    A kind without a gap, where naive reuse is as good as full prefill, says nothing and is left out.
    """
    closed: list[dict[str, float]] = [{} for _ in methods]
    blenders = {"naive": FusionMethod(0.0, "none").blender}
    blenders |= {str(number): method.blender_with(correction) for number, method in enumerate(methods)}
    for kind, of_kind in questions.items():
        full, (naive, *others) = bed.measure(of_kind, blenders, advance=advance)
        loss = "kl" if kind == "multihop" else "nll"
        if mean_of(naive.answers, loss)[0] - mean_of(full, loss)[0] < _LEAST_GAP:
            continue
        for number, other in enumerate(others):
            value = gap_closed(naive.answers, full, other.answers, loss)[0]
            if math.isfinite(value):
                closed[number][kind] = value
    tried = [TriedMethod(method, shares) for method, shares in zip(methods, closed, strict=True) if shares]
    return sorted(tried, key=lambda one: one.mean_closed, reverse=True)


def best_method(
    bed: FusionBed,
    questions: Mapping[str, Sequence[Sequence[Question]]],
    cost_ratio: float,
    *,
    correction: Correction | None = None,
    advance: Callable[[], object] = lambda: None,
    shared: bool = False,
) -> list[TriedMethod]:
    """All methods of the menu at this cost, the best one first; see `try_methods`.

    Parameters
    ----------
    questions : of the split `tune`, by kind and context; at least one of each.
    cost_ratio : share of full prefill's tokens that run through a layer, mean over layers.
    correction : that all of them have; None for none.
    shared : leave out methods whose fusions belong to one question.
    """
    ratio = max(question_ratio_of(of_kind) for of_kind in questions.values())
    methods = methods_at_cost(cost_ratio, bed.layers.spec.num_layers, question_ratio=ratio)
    known = "" if correction is None else correction.fingerprint
    wanted = [
        replace(method, correction=known) for method in methods if not (shared and method.select in NEEDS_QUESTION)
    ]
    return try_methods(bed, questions, wanted, correction=correction, advance=advance)
