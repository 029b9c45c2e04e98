"""`kvloom bench codecs`: bytes, quality and speed of every codec in one run.

Bytes: containers as they lie on disk, in the shape of an 8B model. Quality: the bundled model, and a copy of it with
outlier channels, with every key and value through the codec, on text and tasks that no profile has seen. Speed: a hit
from a cold disk beside that of the raw chunk, coding in memory beside a plain copy, ShadowKV's factorisation beside
attention over the same keys.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.progress import Progress, TaskID

from ...calibration.model_profile import Profile
from ...compress.lowrank import LowRankCodec
from ...compress.raw import RawCodec
from ...compress.registry import codec_by_name
from ...core import Codec, KVChunk
from ...evaluation.models import load_model
from ...evaluation.page import Plot, Point, Row, Table
from ...evaluation.quality import KINDS
from ...evaluation.report import BenchResult, Metric, Target
from ...evaluation.screen import progress
from ..harness.rounds import Comparison
from .outliers import inject_outliers
from .quality import (
    LOW_RANK,
    ROTATED_LOW_RANK,
    WIDTHS,
    Loss,
    Scope,
    ablations,
    all_codecs,
    heldout_windows,
    key_energy,
    learn,
    losses,
    stored_bytes,
)
from .samples import CHUNK_TOKENS, SPEC_8B, chunk_8b, profile_8b
from .speed import COLD_HIT, COPY, DECODE, cold_hits, factor_time, in_memory

ABLATED_BITS = 3
RAW, BEHIND = "raw", "prefix_perplexity_increase"
FAMILIES = ("nuq", "KIVI", "uniform", "low rank after rotation", "low rank")  # one line of a plot each


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured; `factor_tokens`: keys that are factorised and attended over."""

    scope: Scope
    ablated: Scope
    cold_chunks: int
    tokens: int
    rounds: int
    factor_tokens: int


FULL = Sizes(Scope(16, 16, 1024, 200, 1024), Scope(16, 16, 1024, 0, 1024), 8, CHUNK_TOKENS, 9, 32_768)
QUICK = Sizes(Scope(2, 2, 192, 2, 256), Scope(2, 2, 192, 0, 256), 1, 32, 1, 512)
TARGETS = (
    Target("bytes_ratio_nuq4_8b", ">=", 3.7),
    Target("bytes_ratio_nuq3_8b", ">=", 4.8),
    Target("bytes_ratio_nuq2_8b", ">=", 6.9),
    Target("bytes_ratio_lowrank4_keys_8b", ">=", 20.0),
    Target("ppl_increase_nuq4", "<=", 0.005),
    Target("ppl_increase_nuq3", "<=", 0.025),
    Target("ppl_increase_nuq2", "<=", 0.15),
    *(Target(f"{kind}_delta_nuq{bits}", "<=", bound) for kind in ("needle", "record")
      for bits, bound in ((4, 0.01), (3, 0.02), (2, 0.06))),
    Target("cold_hit_time_nuq4_vs_raw", "<=", 0.45),
    Target("cold_hit_time_nuq3_vs_raw", "<=", 0.40),
    Target("factor_time_vs_attention", "<", 0.15),
)  # fmt: skip
TITLE = "How small do codecs make chunks, what do they cost a model, and how fast are they?"
MEANING = (
    "Bits and bytes count everything that is stored: headers, checksums, token ids, scales, outliers; level tables and "
    "bases are the model's, shared by all chunks. Perplexity: every key and value replaced before it is attended to, "
    "layer by layer (KVQuant's protocol). Tasks: a context in chunks of 256 tokens through the codec, the question "
    "exact. A delta is the share of answers lost. Intervals are 95 %. Keys and values of the 8B shape are synthetic."
)


def run(*, quick: bool = False, folder: Path = Path()) -> BenchResult:
    """Measure every codec.

    Parameters
    ----------
    quick : smallest sizes, to see that it runs.
    folder : whose disk is measured.
    """
    sizes = QUICK if quick else FULL
    with progress() as bar:
        whole = bar.add_task("kvloom bench codecs", total=4)
        synthetic = profile_8b()
        ratios = _bytes_8b(synthetic, sizes.tokens)
        speeds, factor_s, attention_s = _speeds(synthetic, folder, sizes, bar)
        bar.advance(whole)
        model, tokenizer = load_model(None)
        learned = learn(model, tokenizer, sizes.scope)
        quality = losses(model, tokenizer, all_codecs(learned), sizes.scope, _steps(bar, "codecs", sizes.scope))
        bar.advance(whole)
        pieces = losses(
            model,
            tokenizer,
            ablations(learned, ABLATED_BITS),
            sizes.ablated,
            _steps(bar, f"ablation, {ABLATED_BITS} bits", sizes.ablated),
        )
        windows = heldout_windows(tokenizer, sizes.scope)
        energy = key_energy(model, windows)
        bar.advance(whole)
        stressed_model = inject_outliers(copy.deepcopy(model))  # type: ignore[arg-type]  # the bundled model is a Llama
        stressed = losses(
            stressed_model,
            tokenizer,
            all_codecs(learn(stressed_model, tokenizer, sizes.ablated, variants={})),
            sizes.ablated,
            _steps(bar, "model with outlier channels", sizes.ablated),
        )
    metrics = _metrics(ratios, quality, stressed, speeds) | {
        "factor_time_vs_attention": Metric(factor_s / attention_s, unit="share", baseline=attention_s)
    }
    tables = [
        _bytes_table(ratios),
        _loss_table(quality, "the bundled model"),
        _loss_table(pieces, f"ablation, {ABLATED_BITS} bits"),
        _loss_table(stressed, "the bundled model with outlier channels (stress)"),
        _rank_table(energy, quality),
        *map(_speed_table, speeds),
    ]
    plots = [_plot(quality, "the bundled model"), _plot(stressed, "the same with outlier channels (stress)")]
    rows = [{"what": "bytes", "codec": name, "ratio": ratio} for name, ratio in ratios.items()]
    for what, found in (("quality", quality), ("ablation", pieces), ("stress", stressed)):
        rows += [_loss_row(what, loss) for loss in found]
    rows += [{"what": "key energy", "rank_ratio": r, "before_rotation": b, "after": a} for r, b, a in energy]
    rows += [row for comparison in speeds for row in comparison.rows()]
    return BenchResult("codecs", metrics, rows, tables, plots, TARGETS, [MEANING], title=TITLE)


def _bytes_8b(profile: Profile, tokens: int) -> dict[str, float]:
    """Bytes of float16 over bytes on disk, in the shape of an 8B model; of low rank the keys alone."""
    chunk = chunk_8b(0, tokens=tokens)
    halves = [tensor.nbytes for tensor in (chunk.keys, chunk.values)]
    found = {f"nuq{bits}": sum(halves) / stored_bytes(codec_by_name(f"nuq{bits}", profile), chunk) for bits in WIDTHS}
    keys_alone = replace(SPEC_8B, v_head_dim=0)
    without_values = KVChunk(keys_alone, chunk.token_ids, chunk.positions, chunk.keys, chunk.values[..., :0])
    low_rank = LowRankCodec(factor_bits=4, profile=Profile(keys_alone, profile.tensors))
    found["lowrank4, keys"] = halves[0] / stored_bytes(low_rank, without_values)
    for name in ("int8", "int4", "fp8"):
        found[name] = sum(halves) / stored_bytes(codec_by_name(name), chunk)
    return found


def _speeds(profile: Profile, folder: Path, sizes: Sizes, bar: Progress) -> tuple[list[Comparison], float, float]:
    """Cold hits and coding in memory, and the seconds of factorisation and of attention."""
    codecs: dict[str, Codec] = {RAW: RawCodec()}
    codecs |= {name: codec_by_name(name, profile) for name in (f"nuq{bits}" for bits in WIDTHS)}
    cold = cold_hits(folder, codecs, tokens=sizes.tokens, chunks=sizes.cold_chunks, rounds=sizes.rounds, bar=bar)
    codecs |= {name: codec_by_name(name) for name in ("int8", "int4", "fp8", "lossless")}
    codecs["lowrank4"] = LowRankCodec(factor_bits=4, profile=profile)
    memory = in_memory(codecs, tokens=sizes.tokens, rounds=sizes.rounds, bar=bar)
    return [cold, *memory], *factor_time(tokens=sizes.factor_tokens)


def _steps(bar: Progress, title: str, scope: Scope) -> Callable[[str], None]:
    tasks: dict[str, TaskID] = {}

    def advance(what: str) -> None:
        if what not in tasks:
            tasks[what] = bar.add_task(f"{title}: {what}", total=scope.windows if what == "windows" else scope.trials)
        bar.advance(tasks[what])

    return advance


def _metrics(
    ratios: Mapping[str, float],
    quality: Sequence[Loss],
    stressed: Sequence[Loss],
    speeds: Sequence[Comparison],
) -> dict[str, Metric]:
    metrics = {f"bytes_ratio_nuq{bits}_8b": Metric(ratios[f"nuq{bits}"], unit="times") for bits in WIDTHS}
    metrics["bytes_ratio_lowrank4_keys_8b"] = Metric(ratios["lowrank4, keys"], unit="times")
    for suffix, losses_found in (("", quality), ("_stressed", stressed)):
        by_name = {loss.name: loss.figures for loss in losses_found}
        for bits in WIDTHS:
            others = [by_name[name]["perplexity_increase"][0] for name in (f"KIVI {bits} bits", f"uniform {bits} bits")]
            own = by_name[f"nuq{bits}"]
            name = f"ppl_increase_nuq{bits}{suffix}"
            metrics[name] = Metric(*own["perplexity_increase"], unit="share", baseline=min(others))
            for kind in KINDS:
                if f"{kind}_loss" in own:
                    metrics[f"{kind}_delta_nuq{bits}{suffix}"] = Metric(*own[f"{kind}_loss"], unit="share")
    cold = next(c for c in speeds if c.what == COLD_HIT)
    for bits in WIDTHS:
        share = cold.share(RAW, f"nuq{bits}")
        metrics[f"cold_hit_time_nuq{bits}_vs_raw"] = Metric(share.value, share.low, share.high, "share", RAW)
    decode = next(c for c in speeds if c.what == DECODE)
    for bits in WIDTHS:
        metrics[f"decode_nuq{bits}_gb_s"] = replace(decode.speed(f"nuq{bits}"), baseline=decode.speed(COPY).value)
    return metrics


def _loss_row(what: str, loss: Loss) -> dict[str, object]:
    row: dict[str, object] = {"what": what, "codec": loss.name, "bits": loss.bits}
    for name, (value, low, high) in loss.figures.items():
        row |= {name: value, f"{name}_low": low, f"{name}_high": high}
    return row


def _loss_table(found: Sequence[Loss], title: str) -> Table:
    rows: list[Row] = [[loss.name, f"{loss.bits:.2f}", *_loss_cells(loss, _shown(found[0]))] for loss in found]
    return Table(["codec", "bits", *_loss_heads(found[0])], rows, title)


def _shown(loss: Loss) -> list[str]:
    return [name for name in loss.figures if name == BEHIND or not name.startswith("prefix_")]


def _loss_heads(loss: Loss) -> list[str]:
    words = {"kl": "KL, nats", "perplexity_increase": "perplexity, %", BEHIND: "behind a coded half, %"}
    return [words.get(name, name.replace("_loss", " lost, %")) for name in _shown(loss)]


def _loss_cells(loss: Loss, names: Sequence[str]) -> list[str]:
    """One cell for each figure; empty where there is none: a layer alone cannot go through `transform`."""
    figures = loss.figures
    return ["" if n not in figures else f"{figures[n][0]:.4f}" if n == "kl" else _percent(*figures[n]) for n in names]


def _percent(value: float, low: float, high: float) -> str:
    digits = 1 if abs(value) < 10 else 0
    return f"{100 * value:+.{digits + 1}f} ({100 * low:+.{digits}f} {100 * high:+.{digits}f})"


def _bytes_table(ratios: Mapping[str, float]) -> Table:
    return Table(["codec", "times smaller than float16"], [[n, f"{r:.2f}"] for n, r in ratios.items()], "8B shape")


def _rank_table(energy: Sequence[tuple[float, float, float]], quality: Sequence[Loss]) -> Table:
    """Energy that low rank keeps of the keys, mean over layers, and its losses, before and after rotation."""
    losses_by_name = {loss.name: loss for loss in quality}
    rows: list[Row] = []
    for ratio, *shares in energy:
        for when, name, share in zip(("before", "after"), (LOW_RANK, ROTATED_LOW_RANK), shares, strict=True):
            rows.append(
                [
                    f"{ratio:.1%}",
                    when,
                    f"{share:.2%}",
                    *_loss_cells(losses_by_name[name.format(ratio)], _shown(quality[0])),
                ]
            )
    heads = ["rank / width", "rotation", "energy of keys", *_loss_heads(quality[0])]
    return Table(heads, rows, "low-rank keys before and after rotation")


def _speed_table(comparison: Comparison) -> Table:
    rows: list[Row] = []
    for way in comparison.seconds:
        speed, share = comparison.speed(way), comparison.share(way)
        rows.append(
            [way, f"{comparison.size_bytes / speed.value / 1e6:.1f}", f"{speed.value:.2f}", f"{share.value:.2f}"]
        )
    heads = ["codec", "ms a chunk", "GB/s of float16", f"x {comparison.baseline}"]
    return Table(heads, rows, f"{comparison.what}, chunks of {comparison.size_bytes >> 20} MiB in float16")


def _plot(found: Sequence[Loss], title: str) -> Plot:
    series: dict[str, list[Point]] = {}
    for loss in found:
        if "perplexity_increase" not in loss.figures:
            continue
        value, low, high = loss.figures["perplexity_increase"]
        family = next((family for family in FAMILIES if loss.name.startswith(family)), loss.name)
        floor = 1e-5  # a logarithmic axis has no place for what is not worse at all
        series.setdefault(family, []).append(Point(loss.bits, *(100 * max(v, floor) for v in (value, low, high))))
    lines = {name: sorted(points) for name, points in series.items()}
    return Plot("bits a number, everything counted", "perplexity increase, %", lines, title, log_y=True)
