"""Measures what a codec or retrieval costs a model, judges it by limits, writes the certificate: `kvloom certify`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from .. import __version__
from ..calibration.certificate import Certificate, Figure
from ..calibration.model_profile import Profile
from ..compress.registry import codec_by_name
from ..connectors.break_even import break_even
from ..connectors.hf.retrieval.decoding import layer_shape
from ..core import Codec
from ..evaluation.forcing import CHUNK_TOKENS, ForcedModel, Way, through_codec
from ..evaluation.models import load_model
from ..evaluation.passages import load_heldout
from ..evaluation.quality import KINDS, KNOWN_RATIO, Limits, Measurement, measure, task_trials
from ..evaluation.report import output, write_text
from ..evaluation.screen import screen_table
from ..evaluation.sparse import through_retrieval
from ..evaluation.texts import read_texts
from ..retrieval.settings import Retrieval
from .windows import token_windows

QUESTION_TOKENS = 128  # kept free of documents in the model's context
UNPROVEN = "unproven"


@dataclass(frozen=True, slots=True)
class CertifyOptions:
    """What is measured, and how much of it.

    Attributes
    ----------
    model : a Hugging Face folder; None for the bundled reference model.
    codec : a name of `compress.catalog`; or else
    retrieval : how decoding attends; without its profile, which is loaded from the file.
    profile : file made by `kvloom calibrate`, if one is needed.
    texts : files and folders of held-out text, which the profile has not seen; none: the bundled one.
    tasks : kinds of task; `auto` for those of `KINDS` that the exact model knows.
    windows, window_tokens : of held-out text.
    trials, context_tokens : of each kind of task; None for 1,024 tokens, and 2,048 behind retrieval.
    out : where the certificate goes; None for nowhere.
    model_id : names weights revision and adapter, as the server will; None hashes the weights as they are loaded.
    dtype : of the weights, as for `load_model`.
    """

    codec: str | None = None
    retrieval: Retrieval | None = None
    model: Path | None = None
    profile: Path | None = None
    texts: Sequence[Path] = ()
    tasks: Sequence[str] = ("auto",)
    windows: int = 16
    window_tokens: int = 1024
    trials: int = 200
    context_tokens: int | None = None
    limits: Limits = field(default_factory=Limits)
    out: Path | None = None
    model_id: str | None = None
    dtype: str | None = None


def certify(options: CertifyOptions) -> Certificate:
    """Measure, print the table, write the certificate if it is wanted, and return it.

    Raises
    ------
    ValueError : not one of codec and retrieval, no such codec or task, no usable model or text, or a profile is needed.
    SpecMismatchError : the profile was made for another model.
    """
    kinds = _kinds(options.tasks)
    if (options.codec is None) == (options.retrieval is None):
        raise ValueError("expected either a codec or a retrieval method to be measured")
    profile = None if options.profile is None else Profile.load(options.profile)
    codec = None if options.codec is None else codec_by_name(options.codec, profile)
    model, tokenizer = load_model(options.model, dtype=options.dtype)
    forced = ForcedModel(model, model_id=options.model_id, keeps_queries=options.retrieval is not None)
    way, conditions = _way(codec, options.retrieval, profile, forced)
    longest = forced.layers.max_tokens
    texts = read_texts(options.texts) if options.texts else ["\n".join(load_heldout())]
    windows = token_windows(
        tokenizer, texts, sequences=options.windows, tokens=min(options.window_tokens, longest), least_tokens=64
    )
    wanted = options.context_tokens or (1024 if options.retrieval is None else 2048)
    context_tokens = min(wanted, longest - QUESTION_TOKENS)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        bars = {"windows": bar.add_task("held-out text", total=len(windows))}
        trials = {}
        for kind in kinds:
            trials[kind] = task_trials(tokenizer, kind, count=options.trials, context_tokens=context_tokens)
            bars[kind] = bar.add_task(f"{kind} tasks", total=options.trials)
        (found,) = measure(
            forced,
            [way],
            windows=windows,
            trials=trials,
            skip_unknown="auto" in options.tasks,
            advance=lambda what: bar.advance(bars[what]),
        )
    certificate = Certificate(
        forced.spec,
        found.way.name,
        found.way.parameters,
        found.figures(options.limits),
        {
            "windows": len(windows),
            "window_tokens": len(windows[0]),
            "text": [str(path) for path in options.texts] or "bundled",
            "trials": {kind: len(pairs) for kind, pairs in found.right.items()},
            "context_tokens": context_tokens,
            "chunk_tokens": CHUNK_TOKENS,
            **conditions,
            "exact_match": {kind: sum(a for a, _ in pairs) / len(pairs) for kind, pairs in found.right.items()},
            "skipped": found.skipped,
            "limits": asdict(options.limits),
        },
        datetime.now(UTC).isoformat(timespec="seconds"),
        __version__,
    )
    _show(way.name, certificate, found)
    if options.out is not None:
        write_text(options.out, certificate.to_json())
    return certificate


def _way(
    codec: Codec | None, retrieval: Retrieval | None, profile: Profile | None, forced: ForcedModel
) -> tuple[Way, dict[str, object]]:
    """What is measured, and what the certificate says of this machine."""
    if codec is not None:
        return through_codec(codec), {}
    if retrieval is None:
        raise ValueError("there is neither a codec nor a retrieval")
    if profile is not None:
        profile.check_serves(forced.spec)
    retrieval = replace(retrieval, profile=profile)
    shape, spec = layer_shape(forced.layers), forced.spec
    known = retrieval.break_even_tokens
    tokens = break_even(retrieval, shape, spec.value_dim, spec.dtype) if known is None else known
    return through_retrieval(retrieval, forced.layers), {"break_even_tokens": tokens}


def _kinds(tasks: Sequence[str]) -> Sequence[str]:
    if list(tasks) == ["auto"]:
        return KINDS
    if list(tasks) == ["none"]:
        return ()
    if unknown := [kind for kind in tasks if kind not in (*KINDS, "needle8")]:
        raise ValueError(f"tasks are {', '.join(unknown)}; expected auto, none, or some of {', '.join(KINDS)}, needle8")
    return tasks


def _show(name: str, certificate: Certificate, found: Measurement) -> None:
    console = output()
    title = f"{name} on {certificate.model_id[:24]}"
    table = screen_table(title, ("loss", "value", "95 % interval", "limit", ""), left=(0, 4))
    for what, figure in certificate.figures.items():
        table.add_row(what.replace("_", " "), *_cells(figure))
    console.print(table)
    for kind, share in found.skipped.items():
        console.print(
            f"{kind} tasks are left out: the exact model answers {share:.0%} of them, {KNOWN_RATIO:.0%} are needed"
        )
    if certificate.passed:
        console.print(f"passed: {name} may be used for this model")
    else:
        console.print(f"not passed: {name} stays refused for this model")
    if any(_verdict(figure) == UNPROVEN for figure in certificate.figures.values()):
        console.print("unproven: the interval is too wide to tell; give more --trials, or more --windows and --text")


def _cells(figure: Figure) -> tuple[str, str, str, str]:
    def text(value: float) -> str:
        return f"{value:+.2%}" if figure.unit == "share" else f"{value:.5f}"

    limit = "" if figure.limit is None else text(figure.limit)
    return text(figure.value), f"{text(figure.low)} to {text(figure.high)}", limit, _verdict(figure)


def _verdict(figure: Figure) -> str:
    if figure.limit is None:
        return ""
    if figure.passed:
        return "ok"
    return UNPROVEN if figure.value <= figure.limit else "too much"
