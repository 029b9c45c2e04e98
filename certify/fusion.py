"""How many tokens of cached documents must be recomputed so that answers stay right: `kvloom certify --fusion`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from .. import __version__
from ..blend.certified_ratio import FUSION, choosing_once, parameters_of_fusion
from ..calibration.certificate import Certificate, Figure
from ..connectors.hf.connector import TransformersConnector
from ..evaluation.fused_answers import FULL, HOST_BYTES, Method, Score, score
from ..evaluation.models import load_model, token_counter
from ..evaluation.quality import KINDS, KNOWN_RATIO
from ..evaluation.report import output, paired_share_difference, write_text
from ..evaluation.workload import task_cases
from ..kvstore.store import KVStore
from ..kvstore.tiers.host import HostTier

RATIOS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5)
_QUESTION_TOKENS = 128  # kept free of documents in the model's context


@dataclass(frozen=True, slots=True)
class FusionOptions:
    """What is measured, and how much of it.

    Attributes
    ----------
    model : a Hugging Face folder; None for the bundled reference model.
    ratios : shares of the tokens of the documents that are recomputed, above 0 and below 1.
    kinds : of tasks; those that the model does not know with full prefill are left out.
    trials, context_tokens, num_documents : of each kind of task.
    task_loss : limit, points of exact match as a share, at the bad end of the 95 % interval.
    out : where the certificate goes; None for nowhere.
    model_id : names weights revision and adapter, as the server will; None hashes the weights as they are loaded.
    dtype : of the weights, as for `load_model`.
    """

    model: Path | None = None
    ratios: Sequence[float] = RATIOS
    kinds: Sequence[str] = KINDS
    trials: int = 200
    context_tokens: int = 1024
    num_documents: int = 8
    task_loss: float = 0.05
    out: Path | None = None
    model_id: str | None = None
    dtype: str | None = None


def certify_fusion(options: FusionOptions) -> Certificate:
    """Measure every ratio, print the table, write the certificate of the smallest that passes, and return it.

    Each task's documents are computed alone, and fused (`choosing_once`); the answer must be right word for word,
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
    if unknown := sorted(set(options.kinds) - set(KINDS)) or not options.kinds:
        raise ValueError(f"tasks are {unknown or 'none'}; expected some of {', '.join(KINDS)}")
    methods = [FULL, *(Method(f"{ratio:.0%}", blender=choosing_once(ratio)) for ratio in ratios)]
    model, tokenizer = load_model(options.model, dtype=options.dtype)
    longest = min(options.context_tokens, model.config.max_position_embeddings - _QUESTION_TOKENS)
    found: dict[str, list[Score]] = {}
    with (
        KVStore([HostTier(HOST_BYTES)]) as store,
        Progress(console=Console(stderr=True), transient=True) as bar,
    ):
        connector = TransformersConnector(model, tokenizer, store, model_id=options.model_id)
        for kind in options.kinds:
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
    certificates = {
        ratio: Certificate(
            connector.spec,
            FUSION,
            parameters_of_fusion(ratio),
            figures[ratio],
            {
                "trials": options.trials,
                "context_tokens": longest,
                "documents": options.num_documents,
                "exact_match": {kind: scores[0].exact_match[kind] for kind, scores in known.items()},
                "skipped": {kind: found[kind][0].exact_match[kind] for kind in found if kind not in known},
                "losses": {
                    f"{other:g}": {kind: figure.value for kind, figure in of_ratio.items()}
                    for other, of_ratio in figures.items()
                },
                "limits": {"task_loss": options.task_loss},
            },
            datetime.now(UTC).isoformat(timespec="seconds"),
            __version__,
        )
        for ratio in ratios
    }
    certificate = certificates[ratios[smallest_passing([certificates[ratio].passed for ratio in ratios])]]
    _show(certificates, certificate, skipped=certificate.conditions["skipped"])
    if options.out is not None:
        write_text(options.out, certificate.to_json())
    return certificate


def smallest_passing(passed: Sequence[bool]) -> int:
    """Index of the first of the ratios, in ascending order, from which on all pass; the last one if none does."""
    index = len(passed) - 1
    while index and passed[index] and passed[index - 1]:
        index -= 1
    return index


def _figures(known: dict[str, list[Score]], number: int, limit: float) -> dict[str, Figure]:
    """Of one method, each task's loss with its interval (Agresti & Min)."""
    return {
        f"{kind}_loss": Figure(*paired_share_difference(scores[0].known, scores[number].known), "share", limit)
        for kind, scores in known.items()
    }


def _show(certificates: dict[float, Certificate], chosen: Certificate, skipped: dict[str, float]) -> None:
    console = output()
    title = f"fusion on {chosen.model_id[:24]}"
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, column in enumerate(("computed", "loss", "value", "95 % interval", "limit", "")):
        table.add_column(column, justify="left" if i in (1, 5) else "right", no_wrap=True)
    for ratio, certificate in certificates.items():
        for what, figure in certificate.figures.items():
            interval = f"{figure.low:+.2%} to {figure.high:+.2%}"
            verdict = "ok" if figure.passed else "too much" if figure.value > (figure.limit or 0.0) else "unproven"
            name = what.replace("_", " ")
            table.add_row(f"{ratio:.0%}", name, f"{figure.value:+.2%}", interval, f"{figure.limit:+.2%}", verdict)
    console.print(table)
    for kind, share in skipped.items():
        console.print(
            f"{kind} tasks are left out: full prefill answers {share:.0%} of them, {KNOWN_RATIO:.0%} are needed"
        )
    if chosen.passed:
        console.print(f"passed: {chosen.parameters['ratio']:.0%} of the tokens of documents have to be computed")
    else:
        console.print("not passed: no share is certified; fusions compute everything")
