"""Sums up trials: shares of answers lost, divergences and masses with their intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ...evaluation.intervals import Floats, paired_bootstrap, paired_share_difference
from .methods import ONLY
from .quality import Found, Outcome
from .ruler import RETRIEVAL, TRACKING

TASKS = (*RETRIEVAL, *TRACKING)
GROUPS: Mapping[str, Sequence[str]] = {"all tasks": TASKS, "retrieval": RETRIEVAL, "tracking": TRACKING}

Interval = tuple[float, float, float]
"""A value and the ends of its 95 % interval."""


@dataclass(frozen=True, slots=True)
class Summary:
    """One kind of task, or several together, by one selector within one budget.

    Attributes
    ----------
    lost : share of answers that dense attention gives, less those given (Agresti & Min); None without answers.
    kl, loss_increase : nats a token, contexts drawn anew.
    read_ratio : bytes of a step over those of dense attention; `select_ratio` of them to choose.
    quality : mass, recall, error, compared_ratio, where attention was looked at.
    """

    tokens: int
    kind: str
    method: str
    ratio: float
    since: str
    trials: int
    dense_score: float | None
    lost: Interval | None
    kl: Interval
    loss_increase: Interval
    read_ratio: float
    select_ratio: float
    quality: Mapping[str, Interval] = field(default_factory=dict)

    def row(self) -> dict[str, object]:
        """Plain values by name."""
        row: dict[str, object] = {
            "what": "quality",
            **{name: getattr(self, name) for name in ("tokens", "kind", "method", "ratio", "since", "trials")},
            "dense_score": self.dense_score,
            "read_ratio": self.read_ratio,
            "select_ratio": self.select_ratio,
        }
        intervals = {"lost": self.lost, "kl": self.kl, "loss_increase": self.loss_increase, **self.quality}
        for name, interval in intervals.items():
            if interval is not None:
                row |= dict(zip((name, f"{name}_low", f"{name}_high"), interval, strict=True))
        return row


def summaries(found: Found) -> list[Summary]:
    """Summaries of every kind of task by itself, then of `GROUPS`.

    Groups leave out kinds that dense attention does not know, and selectors that were measured on some kinds only.
    """
    kinds = dict.fromkeys(o.kind for o in found.outcomes)
    lines = [line for kind in kinds for line in _of(found.outcomes, kind, (kind,))]
    for group, members in GROUPS.items():
        known = [o for o in found.outcomes if (o.tokens, o.kind) not in found.floors and o.method not in ONLY]
        lines += _of(known, group, members)
    return lines


def pooled_loss(found: Found, method: str, ratio: float, since: str) -> tuple[Interval, int] | None:
    """Share of answers lost over all tasks and lengths that dense attention knows, and of how many."""
    rows = [
        o
        for o in found.outcomes
        if (o.method, o.ratio, o.since) == (method, ratio, since)
        and o.kind in TASKS
        and (o.tokens, o.kind) not in found.floors
    ]
    lost = _lost(rows)
    return None if lost is None else (lost, len(rows))


def _of(outcomes: Iterable[Outcome], name: str, kinds: Sequence[str]) -> list[Summary]:
    cells: dict[tuple[int, str, float, str], list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.kind in kinds:
            key = (outcome.tokens, outcome.method, outcome.ratio, outcome.since)
            cells.setdefault(key, []).append(outcome)
    return [_summary(name, rows) for rows in cells.values()]


def _summary(name: str, rows: Sequence[Outcome]) -> Summary:
    first = rows[0]
    answered = [row.dense_right for row in rows if row.dense_right is not None]
    dense_bytes = sum(row.dense_bytes for row in rows)
    looked_at = [row for row in rows if row.quality is not None]
    return Summary(
        first.tokens,
        name,
        first.method,
        first.ratio,
        first.since,
        len(rows),
        sum(answered) / len(answered) if answered else None,
        _lost(rows),
        _by_context(rows, lambda row: row.kl),
        _by_context(rows, lambda row: row.loss - row.dense_loss),
        sum(row.select_bytes + row.attend_bytes for row in rows) / dense_bytes,
        sum(row.select_bytes for row in rows) / dense_bytes,
        {
            what: _by_context(looked_at, lambda row, what=what: getattr(row.quality, what))  # type: ignore[misc]
            for what in ("mass", "recall", "error", "compared_ratio")
            if looked_at
        },
    )


def _lost(rows: Sequence[Outcome]) -> Interval | None:
    pairs = [(row.dense_right, row.right) for row in rows if row.right is not None and row.dense_right is not None]
    return paired_share_difference([a for a, _ in pairs], [b for _, b in pairs]) if pairs else None


def _by_context(rows: Sequence[Outcome], value: Callable[[Outcome], float]) -> Interval:
    """Mean over contexts, which are drawn anew: trials behind one context are not independent. One context has no
    interval.
    """
    contexts: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        contexts.setdefault((row.kind, row.number), []).append(value(row))
    means = [float(np.mean(values)) for values in contexts.values()]
    if len(means) < 2:
        return means[0], math.nan, math.nan
    return paired_bootstrap(means, statistic=_mean, resamples=1000)


def _mean(values: Floats) -> float:
    return float(values.mean())
