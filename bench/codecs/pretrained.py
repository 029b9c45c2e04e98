"""`kvloom bench codecs --model DIR`: what codecs cost any model.

Held-out text with every key and value through the codec, and questions behind a context that came through it.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch

from ...calibration.model_profile import Profile
from ...certify.calibrate_model import calibrate
from ...compress.registry import CODECS, codec_by_name
from ...core import Codec
from ...evaluation.answers import Answer, answers_from, difference_of, mean_of, score_answer
from ...evaluation.forcing import Approximation, ForcedModel, as_it_is, through_codec
from ...evaluation.page import Row, Table
from ...evaluation.passages import CHECK, TUNE, load_heldout, load_questions
from ...evaluation.quality import Limits, Measurement
from ...evaluation.quality import measure as measure_language
from ...evaluation.questions import ANSWERED, QuestionSampler
from ...evaluation.report import BenchResult, Metric, Target
from ...evaluation.screen import progress
from ...evaluation.windows import SEQUENCES, token_windows
from ..harness.pool import LoadedModel, ModelPool
from .quality import WIDTHS, bits_of, kivi

EXACT, WINDOW = "exact", "window"
KINDS = ("needle8", "extract", "multihop")
SEED = 1  # of the questions
TITLE = "How small do codecs make chunks, and what do they cost a pretrained model?"
TARGETS = (
    Target("real_ppl_increase_nuq4", "<=", 0.004),
    Target("real_ppl_increase_nuq3", "<=", 0.02),
    Target("real_ppl_increase_nuq2", "<=", 0.1),
    Target("real_bytes_ratio_transform", ">=", 12.0),
    Target("real_ppl_increase_transform", "<=", 0.02),
)
MEANING = (
    "Bits count everything that is stored for a number of keys and values. Perplexity: every key and value replaced "
    "before it is attended to, layer by layer (KVQuant's protocol); behind: only those of the first half of a window, "
    "as a store is used, and the one figure of codecs that span layers. Questions: behind a context in chunks of 256 "
    "tokens through the codec. Lost: values that full attention gives, less those given. Intervals of 95 %."
)

Rows: TypeAlias = Sequence[dict[str, Any]]
Item: TypeAlias = tuple[str, int]
"""A kind and a number: of a question, or of a window."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured: windows of held-out text, questions of each kind; sequences that a profile learns from."""

    windows: int = 16
    window_tokens: int = 2048
    questions: int = 64
    context_tokens: int = 1536
    sequences: int = SEQUENCES


CPU = Sizes(windows=4, window_tokens=1024, questions=6, context_tokens=768, sequences=4)
QUICK = Sizes(windows=2, window_tokens=192, questions=2, context_tokens=320, sequences=2)


def run(
    folder: Path,
    *,
    device: str | None = None,
    quick: bool = False,
    questions: int | None = None,
    profile: Path | None = None,
    processes: int = 1,
    minutes: float | None = None,
) -> BenchResult:
    """Measure every codec on a model of a local folder.

    Parameters
    ----------
    device : as for `load_model`.
    questions : of each kind; None for 64 on a GPU, 6 elsewhere.
    profile : file of `kvloom calibrate`, learned from other text than the second half of the bundled book; None to
        calibrate here.
    processes : that share windows and questions.
    minutes : after which none begins.

    Raises
    ------
    ValueError : there is no such model, device or profile.
    """
    stop_s = math.inf if minutes is None else time.monotonic() + 60 * minutes
    with ExitStack() as stack:
        pool = stack.enter_context(ModelPool(folder, device=device, processes=processes))
        bar = stack.enter_context(progress())
        model, tokenizer = pool.here.model, pool.here.tokenizer
        sizes = QUICK if quick else Sizes() if model.device.type == "cuda" else CPU
        longest = int(model.config.max_position_embeddings)
        width = min(sizes.window_tokens, longest)
        metrics: dict[str, Metric] = {}
        if profile is None:
            task = bar.add_task("calibrating", total=None)
            began_s = time.process_time()
            texts = [*(p for q in load_questions(TUNE) for p in q.passages), *load_heldout(TUNE)]
            learning = token_windows(tokenizer, ["\n".join(texts)], sequences=sizes.sequences, tokens=width)
            profile = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvloom-bench-"))) / "profile"
            calibrate(model, learning, model_id="measured").save(profile)
            spent_s = time.process_time() - began_s
            metrics["calibrate_cpu_s"] = Metric(spent_s, unit="s", baseline=f"{sizes.sequences} x {width:,} tokens")
            bar.remove_task(task)
        codecs, left_out = _codecs(Profile.load(profile))
        windows = token_windows(
            tokenizer, ["\n".join(load_heldout(CHECK))], sequences=sizes.windows, tokens=width, least_tokens=64
        )
        count = sizes.questions if questions is None else questions
        items = [(WINDOW, number) for number in range(len(windows))]
        items += [(kind, number) for number in range(count) for kind in KINDS]
        task = bar.add_task("windows and questions", total=len(items))
        measured = partial(
            _measure, profile=profile, windows=windows, context_tokens=min(sizes.context_tokens, longest - 256)
        )
        found = pool.map(measured, items, stop_s=stop_s, advance=lambda: bar.advance(task))
        chunk, _ = _forced(pool.here, profile).prefill(torch.tensor(windows[0][: min(512, width)]))
        bits = {name: bits_of(codec, chunk) for name, codec in codecs.items()}
    rows = [row for of_item in found for row in of_item]
    asked = {kind: len({row["number"] for row in rows if row["kind"] == kind}) for kind in (WINDOW, *KINDS)}
    notes = [MEANING, f"{folder.name}: " + ", ".join(f"{n} of {kind}" for kind, n in asked.items()) + "."]
    notes += [f"{name} is left out: {why}" for name, why in left_out.items()]
    metrics |= _metrics(rows, bits)
    table = quality_table(rows, bits, f"{folder.name}, windows of {width:,} tokens")
    return BenchResult("codecs", metrics, rows, [table], (), TARGETS, notes, title=TITLE)


def _codecs(profile: Profile) -> tuple[dict[str, Codec], dict[str, str]]:
    """Every lossy codec of the registry by name, and KIVI; and why others are missing."""
    found: dict[str, Codec] = {}
    left_out = {}
    for name in CODECS:
        try:
            codec = codec_by_name(name, profile)
        except (ValueError, ImportError, LookupError) as error:
            left_out[name] = str(error)
        else:
            if not codec.is_lossless and (name.count("+") == 0 or name == "lowrank4+nuq4"):
                found[name] = codec
    return found | {f"KIVI {bits} bits": kivi(bits) for bits in WIDTHS}, left_out


def _forced(loaded: LoadedModel, profile: Path) -> ForcedModel:
    """The model under the name in its profile: whoever gives one says that it is this model's."""
    return loaded.once("forced", lambda: ForcedModel(loaded.model, model_id=Profile.load(profile).spec.model_id))


def _measure(
    loaded: LoadedModel, item: Item, *, profile: Path, windows: Sequence[Sequence[int]], context_tokens: int
) -> list[dict[str, Any]]:
    """Rows of a window, of kind `WINDOW`: losses and KL, see `Measurement`; or of a question, with the fields of
    `Answer`, those of full attention first.
    """
    kind, number = item
    model = _forced(loaded, profile)
    codecs = loaded.once("codecs", lambda: _codecs(Profile.load(profile))[0])
    approximations = [through_codec(codec) for codec in codecs.values()]
    if kind == WINDOW:
        found = measure_language(model, approximations, windows=[windows[number]])
        return [
            {"kind": WINDOW, "number": number, "method": name, "forced": list(one.forced), "prefix": list(one.prefix)}
            for name, one in zip(codecs, found, strict=True)
        ]
    sampler = loaded.once(
        "sampler", lambda: QuestionSampler(loaded.tokenizer, context_tokens=context_tokens, seed=SEED)
    )
    question = sampler.sample(kind, number)
    context, _ = model.prefill(torch.tensor(question.context))
    forced, tokens = torch.tensor(question.forced), len(question.answer)
    exact = model.logits(model.continued(context, forced)[-tokens:])
    rows: list[dict[str, Any]] = [{"method": EXACT, **asdict(score_answer(question, exact, exact))}]
    for name, one in zip(codecs, approximations, strict=True):
        hidden = model.continued(one.approximate(context), forced, one.attend)
        rows.append({"method": name, **asdict(score_answer(question, model.logits(hidden[-tokens:]), exact))})
    return rows


def _measurements(rows: Rows) -> dict[str, Measurement]:
    """Rows of windows as measurements, by codec."""
    of_windows = sorted((row for row in rows if row["kind"] == WINDOW), key=lambda row: int(row["number"]))
    found: dict[str, Measurement] = {}
    for row in of_windows:
        name = str(row["method"])
        one = found.setdefault(name, Measurement(Approximation(name, {}, as_it_is)))
        one.forced += [(each[0], each[1], each[2]) for each in row["forced"]]
        one.prefix += [(each[0], each[1], each[2]) for each in row["prefix"]]
    return found


def _metrics(rows: Rows, bits: Mapping[str, float]) -> dict[str, Metric]:
    """For each codec: perplexity in KVQuant's protocol, behind a prefix for codecs that span layers; and size."""
    metrics = {}
    for name, one in _measurements(rows).items():
        figures, short = one.figures(Limits()), name.replace(" ", "_")
        increase = figures.get("perplexity_increase", figures["prefix_perplexity_increase"])
        metrics[f"real_ppl_increase_{short}"] = Metric(increase.value, increase.low, increase.high, "share", 0.0)
        metrics[f"real_bytes_ratio_{short}"] = Metric(16 / bits[name], unit="times", baseline="float16")
    return metrics


def quality_table(rows: Rows, bits: Mapping[str, float], title: str) -> Table:
    """A line for each codec: bits a number, perplexity and KL on text, values lost and KL on questions."""
    kinds = list(dict.fromkeys(str(row["kind"]) for row in rows if row["kind"] != WINDOW))
    lines: list[Row] = []
    for name, one in _measurements(rows).items():
        figures = one.figures(Limits())
        cells: list[str] = []
        for part in ("", "prefix_"):
            increase = figures.get(f"{part}perplexity_increase")
            cells.append("-" if increase is None else _percent(increase.value, increase.low, increase.high))
        cells.append(f"{figures.get('kl', figures['prefix_kl']).value:.4f}")
        for kind in kinds:
            exact, other = (_answers(rows, kind, method) for method in (EXACT, name))
            if kind in ANSWERED:
                cells.append(f"{difference_of(exact, other, 'values_right')[0]:+.1%}")
            cells.append(f"{mean_of(other, 'kl')[0]:.4f}")
        lines.append([name, f"{bits[name]:.2f}", *cells])
    heads = [head for kind in kinds for head in ([f"{kind} lost", "KL"] if kind in ANSWERED else [f"{kind} KL"])]
    return Table(["codec", "bits", "perplexity", "behind", "KL", *heads], lines, title)


def _percent(value: float, low: float, high: float) -> str:
    digits = 2 if abs(value) < 0.1 else 1
    return f"{value:+.{digits}%} [{low:+.{digits}%}, {high:+.{digits}%}]"


def _answers(rows: Rows, kind: str, method: str) -> list[Answer]:
    found = [row for row in rows if (row["kind"], row["method"]) == (kind, method)]
    return answers_from(sorted(found, key=lambda row: int(row["number"])))
