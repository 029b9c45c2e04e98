"""Measures what a codec or retrieval costs a model, judges it by limits, writes the certificate: `kvloom certify`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from ..calibration.certificate import Certificate
from ..calibration.model_profile import Profile
from ..compress.registry import codec_by_name
from ..connectors.break_even import break_even
from ..connectors.hf.retrieval.plan import layer_shape
from ..core import Codec
from ..evaluation.answers import known_kinds, shares_right
from ..evaluation.forcing import CHUNK_TOKENS, Approximation, ForcedModel, through_codec
from ..evaluation.models import load_model
from ..evaluation.page import Table
from ..evaluation.passages import load_heldout
from ..evaluation.quality import AUTO, Limits, measure, task_kinds, task_trials
from ..evaluation.questions import QuestionSampler
from ..evaluation.screen import progress
from ..evaluation.sparse import through_retrieval
from ..evaluation.texts import read_texts
from ..evaluation.windows import token_windows
from ..retrieval.settings import Retrieval
from .outcome import HEADS, NO_TASK, QUESTION_TOKENS, certificate, finish, loss_rows


@dataclass(frozen=True, slots=True)
class CertifyOptions:
    """Options of the certification of a codec or of retrieval.

    Attributes
    ----------
    model : a Hugging Face folder; None for the bundled reference model.
    codec : a name of `compress.catalog`; or else
    retrieval : how decoding attends; without its profile, which is loaded from the file.
    profile : file made by `kvloom calibrate`, if one is needed.
    texts : files and folders of held-out text, which the profile has not seen; none: the bundled one.
    tasks : kinds of task; `auto` for those of `AUTO_KINDS` that the exact model knows, which is asked first.
    windows, window_tokens : of held-out text.
    trials, context_tokens : of each kind of task; None for 1,024 tokens, and 2,048 behind retrieval.
    out : where the certificate goes; None for nowhere.
    model_id : names the weights, as the server will; None for the name of the folder, which servers have by default.
    dtype, device : as for `load_model`.
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
    device: str | None = None


def certify(options: CertifyOptions) -> Certificate:
    """Measure, print the table, write the certificate if it is wanted, and return it.

    Raises
    ------
    ValueError : not one of codec and retrieval, no such codec or task, no usable model or text, or a profile is needed.
    SpecMismatchError : the profile was made for another model.
    """
    kinds = task_kinds(options.tasks)
    if (options.codec is None) == (options.retrieval is None):
        raise ValueError("expected either a codec or a retrieval method to be measured")
    texts = read_texts(options.texts) if options.texts else ["\n".join(load_heldout())]
    profile = None if options.profile is None else Profile.load(options.profile)
    codec = None if options.codec is None else codec_by_name(options.codec, profile)
    with progress() as bar:
        loading = bar.add_task("loading the model", total=1, logged=False)
        model, tokenizer = load_model(options.model, dtype=options.dtype, device=options.device)
        forced = ForcedModel(model, model_id=options.model_id, keeps_queries=options.retrieval is not None)
        bar.advance(loading)
        longest = forced.layers.max_tokens
        windows = token_windows(
            tokenizer, texts, sequences=options.windows, tokens=min(options.window_tokens, longest), least_tokens=64
        )
        approximation, conditions = _approximation(codec, options.retrieval, profile, forced)
        context_tokens = min(
            options.context_tokens or (1024 if options.retrieval is None else 2048), longest - QUESTION_TOKENS
        )
        skipped: dict[str, float] = {}
        if AUTO in options.tasks:
            asking = bar.add_task("asking which tasks the model knows", total=len(kinds))
            sampler = QuestionSampler(tokenizer, context_tokens=context_tokens)
            shares = shares_right(model, sampler, kinds, advance=lambda: bar.advance(asking))
            kinds = known_kinds(shares)
            skipped = {kind: share for kind, share in shares.items() if kind not in kinds}
            if not kinds:
                bar.console.print(f"kvloom: {NO_TASK}", markup=False, highlight=False)
        bars = {"windows": bar.add_task("held-out text", total=len(windows))}
        trials = {}
        for kind in kinds:
            trials[kind] = task_trials(tokenizer, kind, count=options.trials, context_tokens=context_tokens)
            bars[kind] = bar.add_task(f"{kind} tasks", total=options.trials)
        (found,) = measure(
            forced,
            [approximation],
            windows=windows,
            trials=trials,
            skip_unknown=AUTO in options.tasks,
            advance=lambda what: bar.advance(bars[what]),
        )
    made = certificate(
        forced.spec,
        (approximation.name, approximation.parameters),
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
            "skipped": skipped | found.skipped,
            "limits": asdict(options.limits),
        },
    )
    table = Table(HEADS, loss_rows(made.figures), made.title, left=(0, 4))
    verdict = f"{approximation.name} {'may be used' if made.passed else 'stays refused'} for this model"
    return finish(made, table, verdict, options.out)


def _approximation(
    codec: Codec | None, retrieval: Retrieval | None, profile: Profile | None, forced: ForcedModel
) -> tuple[Approximation, dict[str, object]]:
    """Returns the approximation, and conditions of the certificate that hold for this machine."""
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
