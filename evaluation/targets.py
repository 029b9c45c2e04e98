"""What the figures of a benchmark should reach, and whether they do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .page import Table
from .report import Metric


@dataclass(frozen=True, slots=True)
class Target:
    """What a figure should reach: more or equal, or less."""

    metric: str
    sign: str
    bound: float

    def reached(self, value: float) -> bool:
        if self.sign == "<=":
            return value <= self.bound
        return value >= self.bound if self.sign == ">=" else value < self.bound


def target_table(metrics: Mapping[str, Metric], targets: Sequence[Target]) -> Table:
    """Every target beside its figure; what was not measured is said to be so."""
    rows: list[list[str | float | None]] = []
    for target in targets:
        wanted = f"{target.sign} {target.bound:g}"
        metric = metrics.get(target.metric)
        if metric is None or not math.isfinite(metric.value):
            rows.append([target.metric, "-", "", wanted, "not measured"])
            continue
        interval = "" if metric.low is None or metric.high is None else f"{metric.low:.3g} to {metric.high:.3g}"
        verdict = "reached" if target.reached(metric.value) else "not reached"
        rows.append([target.metric, f"{metric.value:.4g}", interval, wanted, verdict])
    return Table(["figure", "value", "interval", "wanted", "reached"], rows, "targets")
