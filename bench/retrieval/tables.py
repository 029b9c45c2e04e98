"""The tables and plots of `kvloom bench retrieval`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ...evaluation.page import Plot, Point, Row, Table
from .methods import EXACT, TEXT
from .quality import ANSWER, QUESTION, Build, Found
from .ruler import AGGREGATION, KINDS, RULER_NAMES
from .summary import GROUPS, TASKS, Interval, Summary


def known_table(found: Found) -> Table:
    """What dense attention answers, task by task: where it cannot, a loss says nothing."""
    rows: list[Row] = []
    for tokens in dict.fromkeys(o.tokens for o in found.outcomes):
        for kind in KINDS:
            trials = [o for o in found.outcomes if (o.tokens, o.kind, o.since) == (tokens, kind, ANSWER)]
            once = [o for o in trials if (o.method, o.ratio) == (trials[0].method, trials[0].ratio)]
            right = [o.dense_right for o in once if o.dense_right is not None]
            if not once:
                continue
            score = f"{sum(right) / len(right):.2f}" if right else "-"
            judged = "floor: not compared" if (tokens, kind) in found.floors else "compared"
            if not right:
                judged = "by distributions, not answers"
            rows.append([f"{tokens:,}", kind, RULER_NAMES[kind], len(once), score, judged])
    heads = ["tokens", "task", "in RULER", "trials", "dense score", ""]
    return Table(heads, rows, "what the bundled model answers with dense attention", left=(1, 2, 5))


def answers_table(lines: Sequence[Summary], tokens: int) -> Table:
    """Answers lost at one length, in points, by task, selector and budget."""
    columns = list(dict.fromkeys((s.since, s.ratio) for s in lines if s.lost is not None))
    columns.sort(key=lambda column: (column[0] != ANSWER, column[1]))
    rows: list[Row] = []
    for kind in (*TASKS, *GROUPS):
        of_kind = [s for s in lines if s.kind == kind and s.tokens == tokens and s.lost is not None]
        for method in dict.fromkeys(s.method for s in of_kind):
            cells = {(s.since, s.ratio): s for s in of_kind if s.method == method}
            found = [cells.get(column) for column in columns]
            rows.append([kind, method, *("" if s is None or s.lost is None else _points(s.lost) for s in found)])
    heads = [f"{100 * ratio:g} %{' Q' if since == QUESTION else ''}" for since, ratio in columns]
    caption = (
        f"answers lost, points of 100, contexts of {tokens:,} tokens; columns: share of tokens attended to; "
        "Q: the question's tokens go through the selector, too"
    )
    return Table(["task", "selector", *heads], rows, caption, left=(0, 1))


def attention_table(lines: Sequence[Summary], kinds: Sequence[str], tokens: int) -> Table:
    """Attention and distributions at one length."""
    rows: list[Row] = []
    for s in lines:
        if s.kind in kinds and s.tokens == tokens and s.since == ANSWER:
            q = s.quality
            shown = [_number(q[name][0]) for name in ("mass", "recall", "error")] if q else [None] * 3
            rows.append(
                [
                    s.kind,
                    s.method,
                    f"{s.ratio:.1%}",
                    f"{s.read_ratio:.1%}",
                    f"{s.select_ratio:.1%}",
                    *shown,
                    f"{s.kl[0]:.4f}",
                    f"{s.loss_increase[0]:+.4f}",
                ]
            )
    heads = ["text", "selector", "attended", "read", "to choose", "mass", "recall", "error", "KL, nats", "loss"]
    caption = f"attention, contexts of {tokens:,} tokens; bytes read are shares of dense attention's"
    return Table(heads, rows, caption, left=(0, 1))


def builds_table(builds: Sequence[Build], layers: int) -> Table:
    rows: list[Row] = []
    for tokens in dict.fromkeys(b.tokens for b in builds):
        of_length = [b for b in builds if b.tokens == tokens]
        for method in dict.fromkeys(b.method for b in of_length):
            own = [b for b in of_length if b.method == method]
            built, prefilled = (sum(getattr(b, name) for b in own) for name in ("build_s", "prefill_s"))
            held = sum(b.held_bytes for b in own) / len(own) / tokens / layers
            rows.append([f"{tokens:,}", method, f"{built / len(own):.2f}", f"{built / prefilled:.2f}", f"{held:.0f}"])
    heads = ["tokens", "selector", "build, s", "x prefill", "bytes a token and layer"]
    return Table(heads, rows, "indexes of all layers of the bundled model, beside its dense prefill", left=(1,))


BOUND = "exact, search not counted"
_PLOTTED = {
    "mass": "recovered attention mass",
    "error": "relative error of attention's output",
    "kl": "KL to dense, nats a token",
    "lost": "answers lost, points of 100",
}


def plots(lines: Sequence[Summary], tokens: int) -> list[Plot]:
    """Quality against bytes read by a step, one line a selector."""
    wanted = [("mass", TEXT), ("error", TEXT), ("kl", TEXT), ("lost", "all tasks")]
    wanted += [("error", kind) for kind in AGGREGATION]
    found = []
    for measure, kind in wanted:
        series: dict[str, list[Point]] = {}
        for s in lines:
            interval = _value(s, measure)
            if (s.kind, s.tokens, s.since) == (kind, tokens, ANSWER) and interval is not None:
                scale = 100 if measure == "lost" else 1
                y, low, high = (scale * each for each in interval)
                bounds = (low, high) if math.isfinite(low) else (None, None)
                # exact search reads everything; its line is the bound: the best choice, if choosing cost nothing
                name, read = (BOUND, s.read_ratio - s.select_ratio) if s.method == EXACT else (s.method, s.read_ratio)
                series.setdefault(name, []).append(Point(100 * read, y, *bounds))
        if series:
            label = "bytes read by a step, everything counted, % of dense attention's"
            caption = f"{kind}, contexts of {tokens:,} tokens"
            lines_of = {name: sorted(points) for name, points in series.items()}
            found.append(Plot(label, _PLOTTED[measure], lines_of, caption, log_x=True, log_y=measure == "kl"))
    return found


def _value(summary: Summary, measure: str) -> Interval | None:
    if measure in ("kl", "lost"):
        interval: Interval | None = getattr(summary, measure)
        return interval
    return summary.quality.get(measure)


def _number(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "-"


def _points(interval: Interval) -> str:
    value, low, high = (100 * each for each in interval)
    return f"{value:+.{0 if abs(value) >= 10 else 1}f} ({low:+.0f} {high:+.0f})"
