"""Figures out of samples: medians, shares and differences with their intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def share_of_gap(low: float, high: float, value: float) -> float:
    """How far `value` is on the way from `low` (0) to `high` (1); NaN if there is no way to go."""
    return (value - low) / (high - low) if high > low else math.nan


def spread(samples: Sequence[float]) -> tuple[float, float, float]:
    """Median, 10th and 90th percentile (linear between neighbours)."""
    if not len(samples):
        raise ValueError("no samples to summarise; expected at least one")
    median, low, high = np.quantile(np.asarray(samples, dtype=np.float64), [0.5, 0.1, 0.9])
    return float(median), float(low), float(high)


def quantiles(samples: Sequence[float], shares: Sequence[float]) -> tuple[float, ...]:
    """The values below which these shares of the samples lie (linear between neighbours)."""
    if not len(samples):
        raise ValueError("no samples to summarise; expected at least one")
    return tuple(map(float, np.quantile(np.asarray(samples, dtype=np.float64), shares)))


def share_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % interval of a share, within 0 to 1 and sensible at both ends (Wilson 1927)."""
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"{successes} successes in {trials} trials; expected 0 <= successes <= trials and trials > 0")
    z = 1.959964
    share = successes / trials
    centre = share + z * z / (2 * trials)
    reach = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    low, high = (centre - reach) / scale, (centre + reach) / scale
    return max(0.0, min(low, share)), min(1.0, max(high, share))  # all of 10 would miss 1 by a rounding


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
