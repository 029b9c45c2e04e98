"""How many tokens of cached documents must be recomputed so that answers stay right: `kvloom certify --fusion`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rich.progress import Progress

from ..blend.correction import Correction
from ..blend.method import ENGINE_CHOICES, FUSION, FusionMethod
from ..calibration.certificate import Certificate, Figure
from ..calibration.model_profile import Profile
from ..evaluation.answers import KNOWN_RATIO, Answer
from ..evaluation.intervals import paired_share_difference
from ..evaluation.models import load_model
from ..evaluation.page import Table
from ..evaluation.passages import CHECK, TUNE
from ..evaluation.placed import FusionBed
from ..evaluation.quality import AUTO, KINDS, task_kinds
from ..evaluation.questions import QuestionSampler
from ..evaluation.screen import progress
from .fusion_method import TriedMethod, best_method
from .outcome import HEADS, QUESTION_TOKENS, certificate, finish, loss_rows

TUNED_RATIO = 0.15  # of CacheBlend: methods are compared at what it costs then
TUNED_KINDS = ("record", "alias", "astride", "multihop")
RATIOS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5)


@dataclass(frozen=True, slots=True)
class FusionOptions:
    """Options of the certification of fusion.

    Attributes
    ----------
    model : a Hugging Face folder; None for the bundled reference model.
    ratios : shares of the tokens of the documents that are recomputed, above 0 and below 1.
    tasks : kinds of task, see `task_kinds`; those that the model does not know with full prefill are left out.
    trials, context_tokens, num_documents : of each kind of task.
    select, check_layer : how tokens are chosen, see `FusionMethod`; None for what does best at CacheBlend's cost on
        questions that nothing is judged by, which may take longer than the rest. The certificate holds the choice.
    tuned : such questions, of each kind.
    profile : file made by `kvloom calibrate`, whose correction documents get; None for none.
    task_loss : limit, points of exact match as a share, at the bad end of the 95 % interval.
    out : where the certificate goes; None for nowhere.
    model_id : names the weights, as the server will; None for the name of the folder, which servers have by default.
    dtype, device : as for `load_model`.
    """

    model: Path | None = None
    ratios: Sequence[float] = RATIOS
    tasks: Sequence[str] = (AUTO,)
    trials: int = 200
    context_tokens: int = 1024
    num_documents: int = 8
    select: str | None = None
    check_layer: int | None = None
    tuned: int = 8
    profile: Path | None = None
    task_loss: float = 0.05
    out: Path | None = None
    model_id: str | None = None
    dtype: str | None = None
    device: str | None = None


def certify_fusion(options: FusionOptions) -> Certificate:
    """Measure every ratio, print the table, write the certificate of the smallest that passes, and return it.

    Each task's documents are computed alone, and fused (`FusionMethod`); the answer must be right word for word,
    beside full prefill on the same task. Ratios are judged from the largest down, to the first that does not pass: what
    is certified are those before it, of which each had to pass for the next one to be asked, so that asking several
    does not make it more likely that one passes by chance. If even the largest does not, the certificate is of that
    one, and permits nothing.

    Raises
    ------
    ValueError : nothing is chosen like that, ratios are not between 0 and 1, a kind of task is unknown, or the model is
        not usable.
    EngineError : the model is of a kind that cannot be fused.
    """
    ratios = sorted(set(options.ratios))
    if not ratios or not 0.0 < ratios[0] <= ratios[-1] < 1.0:
        raise ValueError(f"ratios are {list(options.ratios)}; expected shares above 0 and below 1")
    if options.select not in (None, *ENGINE_CHOICES):
        raise ValueError(f"select is {options.select!r}; expected one of {', '.join(ENGINE_CHOICES)}")
    kinds = KINDS if AUTO in options.tasks else task_kinds(options.tasks)
    if not kinds:
        raise ValueError("tasks are none; fusion is certified by the answers to tasks")
    profile = None if options.profile is None else Profile.load(options.profile)
    with progress() as bar:
        loading = bar.add_task("loading the model", total=1, logged=False)
        model, tokenizer = load_model(options.model, dtype=options.dtype, device=options.device)
        bar.advance(loading)
        bed = FusionBed(model, model_id=options.model_id)
        correction = None if profile is None else Correction.from_profile(profile, bed.layers.spec)
        if profile is not None and correction is None:
            raise ValueError(f"{options.profile} holds no correction; make it anew with `kvloom calibrate`")
        longest = min(options.context_tokens, bed.layers.max_tokens - QUESTION_TOKENS)
        tune, check = (
            QuestionSampler(tokenizer, split=split, context_tokens=longest, num_documents=options.num_documents)
            for split in (TUNE, CHECK)
        )
        method, tried = _method(options, bed, tune, correction, bar)
        blenders = {f"{ratio:g}": replace(method, ratio=ratio).blender_with(correction) for ratio in ratios}
        found: dict[str, tuple[Sequence[Answer], list[Sequence[Answer]]]] = {}
        for kind in kinds:
            task = bar.add_task(f"{kind} tasks", total=options.trials)
            full, fused = bed.measure(
                check.contexts(kind, options.trials), blenders, advance=partial(bar.advance, task)
            )
            found[kind] = full, [one.answers for one in fused]
    exact = {kind: sum(_right(full)) / len(full) for kind, (full, _) in found.items()}
    known = {kind: found[kind] for kind in found if exact[kind] >= KNOWN_RATIO}
    figures = {ratio: _figures(known, number, options.task_loss) for number, ratio in enumerate(ratios)}
    spec = bed.layers.spec
    conditions = {
        "trials": options.trials,
        "context_tokens": longest,
        "documents": options.num_documents,
        "exact_match": {kind: exact[kind] for kind in known},
        "skipped": {kind: exact[kind] for kind in found if kind not in known},
        "losses": {
            f"{ratio:g}": {kind: figure.value for kind, figure in of_ratio.items()}
            for ratio, of_ratio in figures.items()
        },
        "tried": [{**one.method.parameters, "gap_closed": dict(one.closed)} for one in tried],
        "limits": {"task_loss": options.task_loss},
    }
    made = [
        certificate(spec, (FUSION, replace(method, ratio=ratio).parameters), figures[ratio], conditions)
        for ratio in ratios
    ]
    chosen = smallest_passing([one.passed for one in made])
    rows = [[f"{ratio:.0%}", *row] for ratio, one in zip(ratios, made, strict=True) for row in loss_rows(one.figures)]
    table = Table(["computed", *HEADS], rows, f"fusion by {method.select} on {spec.model_id[:24]}", left=(1, 5))
    verdict = "no share is certified; fusions compute everything"
    if made[chosen].passed:
        verdict = f"{ratios[chosen]:.0%} of the tokens of documents have to be computed"
    return finish(made[chosen], table, verdict, options.out)


def smallest_passing(passed: Sequence[bool]) -> int:
    """Index of the first of the ratios, in ascending order, from which on all pass; the last one if none does."""
    index = len(passed) - 1
    while index and passed[index] and passed[index - 1]:
        index -= 1
    return index


def _method(
    options: FusionOptions, bed: FusionBed, tune: QuestionSampler, correction: Correction | None, bar: Progress
) -> tuple[FusionMethod, list[TriedMethod]]:
    """How tokens are chosen, and what was tried to find that out. The ratio has no meaning yet."""
    default = FusionMethod(TUNED_RATIO, correction="" if correction is None else correction.fingerprint)
    if options.select is not None or options.check_layer is not None:
        select, layer = options.select or default.select, options.check_layer or default.check_layer
        return replace(default, select=select, check_layer=layer), []
    task = bar.add_task("choosing a method", total=options.tuned * len(TUNED_KINDS))
    cost = FusionMethod(TUNED_RATIO, "deviation", 1).cost_ratio(bed.layers.spec.num_layers)
    questions = {kind: tune.contexts(kind, options.tuned) for kind in TUNED_KINDS}
    tried = best_method(bed, questions, cost, correction=correction, advance=partial(bar.advance, task))
    return (tried[0].method if tried else default), tried


def _right(answers: Sequence[Answer]) -> list[bool]:
    return [bool(answer.right) for answer in answers]


def _figures(
    known: dict[str, tuple[Sequence[Answer], list[Sequence[Answer]]]], number: int, limit: float
) -> dict[str, Figure]:
    """Loss of one ratio on each task, with its interval (Agresti & Min)."""
    return {
        f"{kind}_loss": Figure(*paired_share_difference(_right(full), _right(fused[number])), "share", limit)
        for kind, (full, fused) in known.items()
    }
