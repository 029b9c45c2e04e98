"""The tables and plots of `kvloom bench vllm`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...connectors.break_even import NEVER
from ...evaluation.page import Plot, Point, Row, Table
from ...evaluation.report import Metric
from .exact import FusedAnswers, Identity
from .retrieval import RetrievalRow
from .times import Timed


def times_table(timed: Timed) -> Table:
    rows: list[Row] = []
    for way in timed.seconds:
        time, speedup = timed.time(way), timed.speedup(way)
        rows.append([way, *(_milliseconds(s) for s in (time.value, time.low, time.high)), f"{speedup.value:.2f}x"])
    caption = f"{timed.what}, {timed.model}, {timed.tokens:,} tokens"
    return Table(["way", "TTFT ms", "p10", "p90", "speed-up"], rows, caption)


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:,.1f}"


def decode_table(decoding: Sequence[Timed]) -> Table:
    rows: list[Row] = []
    for timed in decoding:
        for way in timed.seconds:
            share = timed.speedup(way)
            speed = timed.tokens / timed.time(way).value
            rows.append([way, timed.model, f"{speed:,.1f}", f"{share.value:.3f}", _interval(share)])
    return Table(
        ["way", "model", "tokens/s", "of vLLM's", "p10 to p90"], rows, "decoding a batch of short prompts", left=(0, 1)
    )


def _interval(metric: Metric) -> str:
    return "" if metric.low is None or metric.high is None else f"{metric.low:.3f} to {metric.high:.3f}"


def same_table(identity: Identity) -> Table:
    rows: list[Row] = [[way, len(same), identity.loaded, sum(same)] for way, same in identity.same.items()]
    return Table(["KV", "prompts", "long enough to be stored", "same tokens"], rows, "greedy tokens as plain vLLM's")


def records_table(answers: FusedAnswers, model: str) -> Table:
    rows: list[Row] = []
    for way, right in answers.right.items():
        exact = answers.exact_match(way)
        rows.append([way, len(right), f"{exact.value:.3f}", _interval(exact)])
    gap = answers.gap_closed()
    rows.append(["gap closed at 15 %", None, f"{gap.value:.2f}", _interval(gap)])
    return Table(["way", "records", "exact match", "95 %"], rows, f"cross-document records, {model}")


def retrieval_table(rows: Sequence[RetrievalRow], models: str) -> Table:
    """`models`: what the contexts are of."""
    cells: list[Row] = []
    for row in rows:
        speedup = row.speedup
        right = [answer for answers in row.right.values() for answer in answers]
        cells.append([
            row.way, row.tokens, f"{1 / Metric.of_samples(row.token_s, unit='s').value:,.1f}",
            f"{speedup.value:.2f}x", _interval(speedup), f"{sum(right)} of {len(right)}",
            f"{sum(row.same)} of {len(row.same)}" if row.same else "", f"{row.chosen_tokens:,.0f}",
            f"{row.touched_tokens:,.0f}", f"{row.index_bytes / 2**20:,.1f}", f"{row.first_s * 1e3:,.0f}",
            "" if not row.break_even_tokens else "never" if row.break_even_tokens >= NEVER else row.break_even_tokens,
        ])  # fmt: skip
    heads = ["attention", "context", "tokens/s", "x dense", "p10 to p90", "right", "same answer as dense"]
    heads += ["chosen", "in blocks touched", "index MiB", "first token ms", "break-even, tokens"]
    return Table(heads, cells, f"decoding behind a long context: {models}")


def rounds_plot(timed: Timed) -> Plot:
    series: Mapping[str, Sequence[Point]] = {
        way: [Point(number, second * 1e3) for number, second in enumerate(seconds, start=1)]
        for way, seconds in timed.seconds.items()
    }
    title = f"{timed.model}, {timed.tokens:,} tokens, round by round"
    return Plot("round", "time to the first token, ms", series, title, log_y=True)
