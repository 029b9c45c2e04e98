"""How many tokens of cached documents must be recomputed so that answers stay right: `kvloom certify --fusion`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..blend.method import FUSION, FusionMethod
from ..calibration.certificate import Certificate, Figure
from ..connectors.hf.connector import TransformersConnector
from ..evaluation.answers import KNOWN_RATIO
from ..evaluation.fused_answers import FULL, HOST_BYTES, Method, Score, score
from ..evaluation.intervals import paired_share_difference
from ..evaluation.models import load_model, token_counter
from ..evaluation.page import Table
from ..evaluation.quality import AUTO, KINDS, task_kinds
from ..evaluation.screen import progress
from ..evaluation.workload import task_cases
from ..kvstore.store import KVStore
from ..kvstore.tiers.host import HostTier
from .outcome import HEADS, QUESTION_TOKENS, certificate, finish, loss_rows

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
    ValueError : ratios are not between 0 and 1, a kind of task is unknown, or the model is not usable.
    EngineError : the model is of a kind that cannot be fused.
    """
    ratios = sorted(set(options.ratios))
    if not ratios or not 0.0 < ratios[0] <= ratios[-1] < 1.0:
        raise ValueError(f"ratios are {list(options.ratios)}; expected shares above 0 and below 1")
    kinds = KINDS if AUTO in options.tasks else task_kinds(options.tasks)
    if not kinds:
        raise ValueError("tasks are none; fusion is certified by the answers to tasks")
    methods = [FULL, *(Method(f"{ratio:.0%}", blender=FusionMethod(ratio).blender) for ratio in ratios)]
    found: dict[str, list[Score]] = {}
    with KVStore([HostTier(HOST_BYTES)]) as store, progress() as bar:
        loading = bar.add_task("loading the model", total=1, logged=False)
        model, tokenizer = load_model(options.model, dtype=options.dtype, device=options.device)
        bar.advance(loading)
        longest = min(options.context_tokens, model.config.max_position_embeddings - QUESTION_TOKENS)
        connector = TransformersConnector(model, tokenizer, store, model_id=options.model_id)
        for kind in kinds:
            cases = task_cases(
                None,
                token_counter(tokenizer),
                kind=kind,
                count=options.trials,
                context_tokens=longest,
                num_documents=options.num_documents,
            )
            task = bar.add_task(f"{kind} tasks", total=len(cases))
            for case in cases:
                connector.precompute(list(case.documents))
            found[kind] = score(connector, cases, methods, advance=partial(bar.advance, task))
    known = {kind: scores for kind, scores in found.items() if scores[0].exact_match[kind] >= KNOWN_RATIO}
    figures = {ratio: _figures(known, number, options.task_loss) for number, ratio in enumerate(ratios, start=1)}
    conditions = {
        "trials": options.trials,
        "context_tokens": longest,
        "documents": options.num_documents,
        "exact_match": {kind: scores[0].exact_match[kind] for kind, scores in known.items()},
        "skipped": {kind: found[kind][0].exact_match[kind] for kind in found if kind not in known},
        "losses": {
            f"{ratio:g}": {kind: figure.value for kind, figure in of_ratio.items()}
            for ratio, of_ratio in figures.items()
        },
        "limits": {"task_loss": options.task_loss},
    }
    made = [
        certificate(connector.spec, (FUSION, FusionMethod(ratio).parameters), figures[ratio], conditions)
        for ratio in ratios
    ]
    chosen = smallest_passing([one.passed for one in made])
    rows = [[f"{ratio:.0%}", *row] for ratio, one in zip(ratios, made, strict=True) for row in loss_rows(one.figures)]
    table = Table(["computed", *HEADS], rows, f"fusion on {connector.spec.model_id[:24]}", left=(1, 5))
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


def _figures(known: dict[str, list[Score]], number: int, limit: float) -> dict[str, Figure]:
    """Loss of one method on each task, with its interval (Agresti & Min)."""
    return {
        f"{kind}_loss": Figure(*paired_share_difference(scores[0].known, scores[number].known), "share", limit)
        for kind, scores in known.items()
    }
