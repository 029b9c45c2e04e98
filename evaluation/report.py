"""Results of benchmarks: figures with intervals, tables and plots; as JSON, on a terminal, as a page."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.markup import escape

from ..calibration.output_file import write_output
from .environment import commit, environment
from .intervals import share_interval, spread
from .page import Plot, Section, Table, html_report
from .screen import output, print_table


@dataclass(frozen=True, slots=True)
class Metric:
    """One figure.

    Attributes
    ----------
    value : the figure, in `unit`; NaN if it could not be measured (null in JSON).
    low, high : ends of its interval: 95 % of a share or a bootstrap, 10th and 90th percentile of a time.
    unit : "s", "GB/s", "tokens", "share", "times", ...
    baseline : what the alternative reached in the same run, in the same unit, or its name if `value` is relative to it.
    """

    value: float
    low: float | None = None
    high: float | None = None
    unit: str = ""
    baseline: float | str | None = None

    @classmethod
    def of_samples(cls, samples: Sequence[float], *, unit: str, baseline: float | str | None = None) -> Metric:
        """Median of repeated measurements, between their 10th and 90th percentile."""
        median, low, high = spread(samples)
        return cls(median, low, high, unit, baseline)

    @classmethod
    def of_share(cls, successes: int, trials: int, *, baseline: float | str | None = None) -> Metric:
        """Share of successes, with its 95 % interval."""
        low, high = share_interval(successes, trials)
        return cls(successes / trials, low, high, "share", baseline)


@dataclass(frozen=True, slots=True)
class Target:
    """A bound that a figure should reach: at least (`>=`), at most (`<=`) or less than (`<`) `bound`."""

    metric: str
    sign: str
    bound: float

    def reached(self, value: float) -> bool:
        """Whether `value`, in the unit of the metric, reaches it."""
        if self.sign == "<=":
            return value <= self.bound
        return value >= self.bound if self.sign == ">=" else value < self.bound


@dataclass(frozen=True, slots=True)
class BenchResult:
    """Everything that one benchmark run found.

    Attributes
    ----------
    bench : name of the benchmark, as given to `kvloom bench`.
    metrics : the figures that are tracked, by name.
    rows : the raw data behind them; plain JSON values by column name.
    tables, plots : for people.
    targets : what the figures should reach.
    notes : how to read them, and what was left out.
    title : the question that the benchmark answers.
    """

    bench: str
    metrics: Mapping[str, Metric]
    rows: Sequence[Mapping[str, object]] = ()
    tables: Sequence[Table] = ()
    plots: Sequence[Plot] = ()
    targets: Sequence[Target] = ()
    notes: Sequence[str] = ()
    title: str = ""

    def to_json(self) -> str:
        """One object with the attributes' names, `commit` and `env`; no plots. What is not finite becomes null."""
        whole = {
            "bench": self.bench,
            "title": self.title,
            "commit": commit(),
            "env": environment(),
            "metrics": {name: asdict(metric) for name, metric in self.metrics.items()},
            "targets": [asdict(target) for target in self.targets],
            "tables": [asdict(table) for table in self.tables],
            "notes": list(self.notes),
            "rows": [dict(row) for row in self.rows],
        }
        return json.dumps(_finite(whole), indent=1, allow_nan=False)

    def write(self, path: Path) -> None:
        """Write `to_json` to `path`, see `write_output`."""
        write_text(path, self.to_json() + "\n")

    def write_page(self, path: Path) -> None:
        """Write a page of plots and tables, or the first plot alone where the name ends in `.svg`.

        Raises
        ------
        ModuleNotFoundError : there are plots and matplotlib is not installed.
        """
        if path.suffix == ".svg":
            write_text(path, self.plots[0].to_svg())
            return
        sections = [Section("Plots", "\n".join(self.notes), self.plots), Section("Tables", parts=self.all_tables())]
        write_text(path, html_report(self.title or f"kvloom {self.bench}", sections))

    def show(self) -> None:
        """Print tables and notes."""
        console = output()
        for table in self.all_tables():
            print_table(console, table)
        for note in self.notes:
            console.print(escape(note), style="dim")

    def all_tables(self) -> list[Table]:
        """Its tables, and one of the figures that have targets; of all figures if there is no other table."""
        figures = [figures_table(self.metrics, self.targets)] if self.targets or not self.tables else []
        return [*self.tables, *figures]


def figures_table(metrics: Mapping[str, Metric], targets: Sequence[Target] = ()) -> Table:
    """Figures beside their targets, where there are some; otherwise all of them beside their alternatives."""
    if not targets:
        heads = ["figure", "value", "interval", "unit", "beside"]
        rows = [[name, *_value_cells(m), m.unit, _beside(m)] for name, m in metrics.items()]
        return Table(heads, rows, "figures", left=(0, 3))
    rows = []
    for target in targets:
        metric, bound = metrics.get(target.metric), f"{target.sign} {target.bound:g}"
        if metric is None or not math.isfinite(metric.value):
            rows.append([target.metric, "-", "", bound, "not measured"])
        else:
            verdict = "reached" if target.reached(metric.value) else "not reached"
            rows.append([target.metric, *_value_cells(metric), bound, verdict])
    return Table(["figure", "value", "interval", "target", "verdict"], rows, "figures and targets", left=(0, 4))


def _value_cells(metric: Metric) -> list[str]:
    interval = "" if metric.low is None or metric.high is None else f"{metric.low:.3g} to {metric.high:.3g}"
    return [f"{metric.value:.4g}", interval]


def _beside(metric: Metric) -> str:
    return f"{metric.baseline:.4g}" if isinstance(metric.baseline, int | float) else metric.baseline or ""


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, see `write_output`."""
    write_output(path, text.encode("utf-8"))


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
