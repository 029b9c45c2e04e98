"""`kvloom bench codecs --model DIR`: sizes and losses of every codec on a pretrained model, and calibration's time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.progress import Progress
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...calibration.model_profile import Profile
from ...certify.calibrate_model import calibrate, stage_units
from ...certify.method_fits import LAYER_FITS
from ...compress.nuq.nuq import NuqCodec
from ...compress.registry import codec_by_name
from ...compress.transform.transform import TransformCodec
from ...core import Codec, KVChunk
from ...evaluation.forcing import CHUNK_TOKENS, Approximation, ForcedModel, split, through_codec
from ...evaluation.models import load_model
from ...evaluation.page import Plot, Point, Row, Table
from ...evaluation.passages import CHECK, TUNE, load_heldout, load_questions
from ...evaluation.quality import Limits, Measurement, measure
from ...evaluation.report import BenchResult, Metric, Target
from ...evaluation.screen import progress
from ...evaluation.windows import GRADIENT_SEQUENCES, SEQUENCE_TOKENS, SEQUENCES, token_windows
from .quality import WIDTHS, half, kivi, stored_bytes

NAMED = (*(f"nuq{bits}" for bits in WIDTHS), "int8", "int4", "fp8", "lowrank4+nuq4", "transform")
STEPS = (0.01, 0.03)  # of `transform`, beside its own
PIECES_BITS = 3
PROTOCOLS = {"": "all coded", "prefix_": "coded half"}

TARGETS = (
    Target("real_ppl_increase_nuq4", "<=", 0.004),
    Target("real_ppl_increase_nuq3", "<=", 0.02),
    Target("real_ppl_increase_nuq2", "<=", 0.1),
    Target("real_bytes_ratio_transform", ">=", 12.0),
    Target("real_ppl_increase_transform", "<=", 0.02),
)
TITLE = "How small do codecs make a pretrained model's chunks, and what do they cost it?"
MEANING = (
    "Everything coded: each layer's keys and values are replaced before they are attended to, so that losses add up "
    "(KVQuant's protocol); a codec that codes all layers of a chunk at once has no such figure. Behind a coded half: "
    "half of a window in chunks of 256 tokens through the codec, as a store gives it back, the loss of the other half. "
    "Times smaller than float16, and bits of a number: containers of those chunks, all that is stored counted, tokens "
    "kept exact too; a profile is the model's, shared by all chunks. KL to the exact model, nats a token. Intervals of "
    "95 %, windows drawn anew. Profiles learn from one half of the text, this is the other."
)


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is learned from and measured."""

    sequences: int = SEQUENCES
    window_tokens: int = SEQUENCE_TOKENS
    windows: int = 8

    @property
    def coded(self) -> int:
        """Windows that are measured with everything coded, too, which takes long."""
        return max(1, self.windows // 2)

    @property
    def parted(self) -> int:
        """Windows for `nuq` in pieces."""
        return max(1, self.windows // 4)


FULL, QUICK = Sizes(), Sizes(2, 192, 2)


def run(folder: Path, *, device: str | None = None, quick: bool = False, windows: int | None = None) -> BenchResult:
    """Calibrate a model of a local folder, and measure it.

    Parameters
    ----------
    device : `cpu` or `cuda`; None for a GPU if there is one.
    windows : of 2,048 tokens, to measure on; None for 8.

    Raises
    ------
    ValueError : there is no such model or device.
    """
    sizes = QUICK if quick else FULL
    if windows is not None:
        sizes = replace(sizes, windows=windows)
    # float32 on a GPU, too: rounding to 16 bits costs as much as 8-bit codes
    model, tokenizer = load_model(folder, device=device, dtype="float32")
    sizes = replace(sizes, window_tokens=min(sizes.window_tokens, model.config.max_position_embeddings))
    with progress() as bar:
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        profile = learn(model, tokenizer, sizes, bar)
        took_s, took_cpu_s = time.perf_counter() - began_s, time.process_time() - began_cpu_s
        forced = ForcedModel(model, model_id=profile.spec.model_id)
        text = token_windows(
            tokenizer,
            ["\n".join(load_heldout(CHECK))],
            sequences=sizes.windows,
            tokens=sizes.window_tokens,
            least_tokens=64,
        )
        codecs = all_codecs(profile)
        found = _measured(forced, [_approximation(c) for c in codecs.values()], text, sizes, bar, "codecs")
        parts = pieces(profile)
        parted = _measured(
            forced, list(parts.values()), text[: sizes.parted], sizes, bar, f"nuq{PIECES_BITS} in pieces"
        )
        context, _ = forced.prefill(torch.tensor(text[0][: len(text[0]) // 2]))
    bits = {name: stored_bits(codec, context) for name, codec in codecs.items()}
    metrics = _metrics(dict(zip(codecs, found, strict=True)), bits)
    metrics["calibrate_cpu_s"] = Metric(took_cpu_s, unit="s")
    metrics["calibrate_s"] = Metric(took_s, unit="s")
    sized = {method: _profile_bytes(profile, method) for method in ("nuq", "lowrank", "transform", "vq")}
    notes = [
        MEANING,
        _what_was_measured(folder, text, sizes, profile, model.device.type),
        "bytes in the profile: " + ", ".join(f"{method} {nbytes:,}" for method, nbytes in sized.items()),
    ]
    rows = [_row("codec", name, one, bits[name]) for name, one in zip(codecs, found, strict=True)]
    rows += [_row("piece", name, one, None) for name, one in zip(parts, parted, strict=True)]
    tables = [
        _table(codecs, found, bits, f"{folder.name}: codecs"),
        _table(parts, parted, {}, f"{folder.name}: nuq{PIECES_BITS} in pieces"),
    ]
    return BenchResult("codecs", metrics, rows, tables, [_plot(codecs, found, bits)], TARGETS, notes, title=TITLE)


def _what_was_measured(
    folder: Path, windows: Sequence[Sequence[int]], sizes: Sizes, profile: Profile, device: str
) -> str:
    coded = min(sizes.coded, len(windows))
    return (
        f"{folder.name}: {len(windows)} windows of {len(windows[0]):,} tokens, {coded} of them with everything coded; "
        f"profile of {profile.meta['tokens']} tokens; {device}, float32."
    )


def learn(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sizes: Sizes, bar: Progress) -> Profile:
    """What `kvloom calibrate` learns for codecs, of one half of the bundled text."""
    passages = " ".join(text for question in load_questions(TUNE) for text in question.passages)
    windows = [
        window
        for text in (passages, "\n".join(load_heldout(TUNE)))
        for window in token_windows(
            tokenizer, [text], sequences=-(-sizes.sequences // 2), tokens=sizes.window_tokens, least_tokens=64
        )
    ]
    fits = {method: fit for method, fit in LAYER_FITS.items() if method != "vq"}  # codebooks are for retrieval
    total = sum(stage_units(model.config.num_hidden_layers, windows, gradient_windows=GRADIENT_SEQUENCES).values())
    task = bar.add_task("calibrating", total=total)
    return calibrate(
        model,
        windows,
        layer_fits=fits,
        gradient_windows=GRADIENT_SEQUENCES,
        advance=lambda _, done: bar.advance(task, done),
    )


def all_codecs(profile: Profile) -> dict[str, Codec]:
    """The codecs that are compared, by the name to show."""
    found = {name: codec_by_name(name, profile) for name in NAMED}
    found |= {f"transform, step {step:g}": TransformCodec(profile, step=step) for step in STEPS}
    return found | {f"KIVI {bits} bits": kivi(bits) for bits in WIDTHS}


def pieces(profile: Profile) -> dict[str, Approximation]:
    """`nuq` of `PIECES_BITS` bits on keys or values alone, and with one setting changed."""
    whole = NuqCodec(profile, bits=PIECES_BITS)
    coded = _approximation(whole)

    def one(which: str) -> Callable[[KVChunk], KVChunk]:
        return lambda chunk: replace(chunk, **{which: getattr(coded.approximate(chunk), which)})

    return {
        "keys alone": replace(coded, approximate=one("keys")),
        "values alone": replace(coded, approximate=one("values")),
        "no outliers": _approximation(replace(whole, outlier_ratio=0.0)),
        "4 % outliers": _approximation(replace(whole, outlier_ratio=0.04)),
        "no sinks": _approximation(replace(whole, sink_tokens=0)),
    }


def stored_bits(codec: Codec, context: KVChunk) -> float:
    """Bits for each number of a float16 context in chunks of 256 tokens, everything that is stored counted."""
    chunks = [half(chunk) for chunk in split(context, CHUNK_TOKENS)]
    numbers = sum(chunk.keys.numel() + chunk.values.numel() for chunk in chunks)
    return 8 * sum(stored_bytes(codec, chunk) for chunk in chunks) / numbers


def _approximation(codec: Codec) -> Approximation:
    return through_codec(codec, chunk_tokens=CHUNK_TOKENS)


def _measured(
    forced: ForcedModel,
    approximations: Sequence[Approximation],
    windows: Sequence[Sequence[int]],
    sizes: Sizes,
    bar: Progress,
    title: str,
) -> list[Measurement]:
    """All windows behind a coded half, the first ones with everything coded, too."""
    task = bar.add_task(title, total=len(windows))

    def advance(_: str) -> None:
        bar.advance(task)

    found = measure(forced, approximations, windows=windows[: sizes.coded], advance=advance)
    behind = [replace(one, is_layerwise=False) for one in approximations]
    more = measure(forced, behind, windows=windows[sizes.coded :], advance=advance)
    for one, rest in zip(found, more, strict=True):
        one.prefix.extend(rest.prefix)
    return found


def _metrics(found: Mapping[str, Measurement], bits: Mapping[str, float]) -> dict[str, Metric]:
    metrics = {}
    for name, one in found.items():
        if name not in NAMED:
            continue
        figures = one.figures(Limits())
        which = "" if one.forced else "prefix_"
        for short, long in (("ppl_increase", "perplexity_increase"), ("kl", "kl")):
            for prefix in dict.fromkeys((which, "prefix_")):
                figure = figures[f"{prefix}{long}"]
                metric = Metric(figure.value, figure.low, figure.high, figure.unit)
                infix = prefix if prefix != which else ""
                metrics[f"real_{infix}{short}_{name}"] = metric
        metrics[f"real_bytes_ratio_{name}"] = Metric(16 / bits[name], unit="times")
    return metrics


def _row(what: str, name: str, one: Measurement, bits: float | None) -> dict[str, object]:
    row: dict[str, object] = {"what": what, "name": name, "bits": bits}
    for figure_name, figure in one.figures(Limits()).items():
        row |= {figure_name: figure.value, f"{figure_name}_low": figure.low, f"{figure_name}_high": figure.high}
    return row


def _table(names: Mapping[str, object], found: Sequence[Measurement], bits: Mapping[str, float], title: str) -> Table:
    heads = ["codec", *(["times smaller", "bits"] if bits else [])]
    heads += [f"{what}, {how}" for how in PROTOCOLS.values() for what in ("perplexity %", "KL")]
    rows: list[Row] = []
    for name, one in zip(names, found, strict=True):
        figures = one.figures(Limits())
        row: list[str] = [name, *([f"{16 / bits[name]:.1f}", f"{bits[name]:.2f}"] if bits else [])]
        for prefix in PROTOCOLS:
            increase, kl = (figures.get(f"{prefix}{figure}") for figure in ("perplexity_increase", "kl"))
            if increase is None or kl is None:
                row += ["", ""]
                continue
            row += [f"{100 * increase.value:+.2f} ± {50 * (increase.high - increase.low):.2f}", f"{kl.value:.4f}"]
        rows.append([*row])
    return Table(heads, rows, title)


def _plot(names: Mapping[str, object], found: Sequence[Measurement], bits: Mapping[str, float]) -> Plot:
    series: dict[str, list[Point]] = {}
    for name, one in zip(names, found, strict=True):
        family = next((f for f in ("nuq", "KIVI", "transform", "int") if name.startswith(f)), name)
        kl = one.figures(Limits())["prefix_kl"]
        series.setdefault(family, []).append(Point(bits[name], *(max(v, 1e-6) for v in (kl.value, kl.low, kl.high))))
    lines = {name: sorted(points) for name, points in series.items()}
    return Plot(
        "bits a number, everything counted", "KL behind a coded half, nats a token", lines, "codecs", log_y=True
    )


def _profile_bytes(profile: Profile, method: str) -> int:
    return sum(math.prod(t.shape) * t.itemsize for name, t in profile.tensors.items() if name.startswith(f"{method}."))
