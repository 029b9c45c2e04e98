"""What a benchmark hands over: figures with intervals as one JSON object, and a page that a person reads."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from ..calibration.output_file import write_output
from .environment import commit, environment

Floats = NDArray[np.float64]


FILE_WIDTH = 120  # columns of text where output goes into a file or a pipe


def output() -> Console:
    """Standard output, wide enough for our tables where no terminal says how wide it is."""
    console = Console()
    return console if console.is_terminal else Console(width=max(FILE_WIDTH, console.width))


def share_of_gap(low: float, high: float, value: float) -> float:
    """How far `value` is on the way from `low` (0) to `high` (1); NaN if there is no way to go."""
    return (value - low) / (high - low) if high > low else math.nan


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
class BenchResult:
    """Everything that one benchmark run found.

    Attributes
    ----------
    bench : name of the benchmark, as given to `kvloom bench`.
    metrics : the figures that are tracked, by name.
    rows : the table behind them; plain JSON values by column name.
    """

    bench: str
    metrics: Mapping[str, Metric]
    rows: Sequence[Mapping[str, object]] = field(default=())

    def to_json(self) -> str:
        """One object `{"bench", "commit", "env", "metrics", "rows"}`; figures that are not finite become null."""
        whole = {
            "bench": self.bench,
            "commit": commit(),
            "env": environment(),
            "metrics": {name: asdict(metric) for name, metric in self.metrics.items()},
            "rows": [dict(row) for row in self.rows],
        }
        return json.dumps(_finite(whole), indent=1, allow_nan=False)

    def write(self, path: Path) -> None:
        """Write `to_json` to `path`: complete or not at all."""
        write_text(path, self.to_json() + "\n")


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


def spread(samples: Sequence[float]) -> tuple[float, float, float]:
    """Median, 10th and 90th percentile (linear between neighbours)."""
    if not len(samples):
        raise ValueError("no samples to summarise; expected at least one")
    median, low, high = np.quantile(np.asarray(samples, dtype=np.float64), [0.5, 0.1, 0.9])
    return float(median), float(low), float(high)


def share_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % interval of a share, within 0 to 1 and sensible at both ends (Wilson 1927)."""
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"{successes} successes in {trials} trials; expected 0 <= successes <= trials and trials > 0")
    z = 1.959964
    share = successes / trials
    centre = share + z * z / (2 * trials)
    reach = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - reach) / scale), min(1.0, (centre + reach) / scale)


def paired_share_difference(a: Sequence[bool], b: Sequence[bool]) -> tuple[float, float, float]:
    """Share of `a` less that of `b`, on the same trials, with its 95 % interval (Agresti & Min 2005).

    Unlike a bootstrap it does not claim certainty where no trial differs: three equal trials give 0 within 0.39.
    """
    if len(a) != len(b) or not len(a):
        raise ValueError(f"{len(a)} and {len(b)} trials; expected the same number, at least 1")
    only_a = sum(x and not y for x, y in zip(a, b, strict=True))
    only_b = sum(y and not x for x, y in zip(a, b, strict=True))
    trials = len(a) + 2
    centre = (only_a - only_b) / trials
    reach = 1.959964 * math.sqrt(only_a + only_b + 1 - (only_a - only_b) ** 2 / trials) / trials
    return (only_a - only_b) / len(a), max(-1.0, centre - reach), min(1.0, centre + reach)


def mean_difference(a: Floats, b: Floats) -> float:
    """`mean(a) - mean(b)`."""
    return float(a.mean() - b.mean())


def paired_bootstrap(
    *samples: Sequence[float],
    statistic: Callable[..., float] = mean_difference,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Value and 95 % interval of a statistic of paired samples: whole trials are drawn again, with replacement.

    Parameters
    ----------
    samples : one sequence per method, all of the same trials in the same order.
    statistic : takes one float64 array per method; by default the difference of two means. Resamples for which it is
        not finite (a ratio without a denominator) do not count.
    resamples : how often to draw.
    seed : equal seeds give equal intervals.

    Returns
    -------
    The statistic of the samples as they are, then its 2.5th and 97.5th percentile over the resamples (NaN if none
    counts).

    Notes
    -----
    Efron & Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3 (percentile interval).
    """
    columns = [np.asarray(sample, dtype=np.float64) for sample in samples]
    lengths = [len(column) for column in columns]
    if not lengths or lengths[0] == 0 or len(set(lengths)) != 1:
        raise ValueError(f"samples have lengths {lengths}; expected equal lengths of at least 1")
    draws = np.random.default_rng(seed).integers(lengths[0], size=(resamples, lengths[0]))
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(statistic(*columns))
        found = np.array([statistic(*(column[draw] for column in columns)) for draw in draws])
    found = found[np.isfinite(found)]
    if not len(found):
        return value, math.nan, math.nan
    low, high = np.quantile(found, [0.025, 0.975])
    return value, float(low), float(high)
