"""Level tables of non-uniform quantisers: weighted k-means in one dimension."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

_BINS = 1 << 15  # of equal width
_SMALLEST_STEP = 1e-7  # of the range of the values: a smaller one changes no code
_MOST_RUNS = 512
_NOTHING = 1e-300  # less than any cell with values in it weighs, the heaviest value being 1


def fit_levels(values: Tensor, weights: Tensor, count: int, *, iterations: int = 100) -> Tensor:
    """The `count` levels that make `sum w (x - nearest level)^2` small: k-means of numbers, which can be sorted.

    The best partition of up to 512 runs of sorted values is found by dynamic programming (Wang and Song, Ckmeans.1d.dp,
    The R Journal 2011), then Lloyd's iteration moves its borders between single values: the optimum itself for up to
    512 values, close to it for more. More than 131,072 values are put into bins first, each of which then counts as one
    value, its mean: sorting them would take most of the time. No random numbers: equal arguments give equal levels.

    Parameters
    ----------
    values, weights : of equal shape; weights are not negative. If all are zero, every value weighs the same.

    Returns
    -------
    `[count]` float32, ascending; equal levels only where there are fewer distinct values than levels.

    Raises
    ------
    ValueError : no values, shapes differ, a value or weight is not finite, or a weight is negative.
    """
    if values.shape != weights.shape or values.numel() == 0:
        raise ValueError(f"values {list(values.shape)}, weights {list(weights.shape)}; expected some, of equal shape")
    values, weights = values.reshape(-1), weights.reshape(-1)
    least, greatest = values.aminmax()
    lightest, heaviest = weights.aminmax()
    if not all(map(math.isfinite, (least, greatest, heaviest))) or not float(lightest) >= 0.0:
        raise ValueError("values or weights to fit levels to are not finite, or weights are negative")
    if float(heaviest) == 0.0:
        weights = torch.ones_like(weights)
    if len(values) > 4 * _BINS and float(greatest) > float(least):
        values, weights = _binned(values, weights)
    else:
        values, order = values.double().sort()
        weights = weights[order].double()
    values, weights = values[weights > 0], weights[weights > 0] / weights.max()
    centre = values.mean()
    values = values - centre  # or the sums of squares would cancel
    mass, moment = F.pad(weights.cumsum(0), (1, 0)), F.pad((weights * values).cumsum(0), (1, 0))
    square = F.pad((weights * values * values).cumsum(0), (1, 0))
    edges = _best_runs(_run_edges(weights), mass, moment, square, count)
    levels = values[edges[:-1].clamp(max=len(values) - 1)]
    for _ in range(iterations):
        cell_mass, cell_moment = mass[edges].diff(), moment[edges].diff()
        moved = torch.where(cell_mass > 0, cell_moment / cell_mass, levels).cummax(0).values
        step, levels = (moved - levels).abs().max(), moved
        if float(step) <= _SMALLEST_STEP * float(values[-1] - values[0]):
            break
        inner = torch.searchsorted(values, midpoints(levels))
        edges = F.pad(F.pad(inner, (1, 0)), (0, 1), value=len(values))
    return (levels + centre).float()


def midpoints(levels: Tensor) -> Tensor:
    """Where the nearest level changes: `[..., n]` ascending to `[..., n - 1]`."""
    return (levels[..., 1:] + levels[..., :-1]) / 2


def nearest(values: Tensor, levels: Tensor) -> Tensor:
    """Codes of the nearest level, the lower one if two are as near; NaN gives the last.

    Parameters
    ----------
    values : `[G, N]` float32.
    levels : `[G, n]` float32, ascending; n is at most 256.

    Returns
    -------
    `[G, N]` uint8.
    """
    return torch.searchsorted(midpoints(levels), values.contiguous()).to(torch.uint8)


def tempered(fisher: Tensor, *, clip_quantile: float = 0.999, uniform_ratio: float = 0.25) -> Tensor:
    """Fisher information as weights that no few tokens rule.

    Squared gradients of true labels over few tokens have a heavy tail, and levels would chase it. They are clipped at a
    quantile and mixed with their mean.

    Parameters
    ----------
    fisher : any shape, not negative.
    uniform_ratio : share of the total weight that is spread evenly; 1 leaves no Fisher information.
    """
    clipped = fisher.clamp(max=quantile(fisher.reshape(-1), clip_quantile))
    mixed: Tensor = (1 - uniform_ratio) * clipped + uniform_ratio * clipped.mean()
    return mixed


def quantile(values: Tensor, share: float) -> Tensor:
    """The value below which `share` of the values along the first dimension lie, without interpolation.

    `torch.quantile` refuses more than 16 million values.
    """
    rank = round(share * (len(values) - 1))
    found: Tensor = values.kthvalue(rank + 1, dim=0).values
    return found


def _binned(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Means and total weights of the values in each of `_BINS` bins, ascending; those of no weight are 0."""
    least, greatest = (float(edge) for edge in values.aminmax())
    places = ((values - least) * ((_BINS - 1) / (greatest - least))).long().clamp_(0, _BINS - 1)
    wide = weights.double()
    mass = torch.bincount(places, wide, minlength=_BINS)
    moment = torch.bincount(places, wide * values.double(), minlength=_BINS)
    return torch.where(mass > 0, moment / mass, 0.0), mass


def _run_edges(weights: Tensor) -> Tensor:
    """Borders of up to `_MOST_RUNS` runs of sorted values: equal shares of `w^(1/3)`, the density of good levels."""
    if len(weights) <= _MOST_RUNS:
        return torch.arange(len(weights) + 1)
    share = weights.pow(1 / 3).cumsum(0)
    wanted = torch.arange(1, _MOST_RUNS, dtype=torch.float64) / _MOST_RUNS * share[-1]
    inner = torch.searchsorted(share, wanted)
    edges: Tensor = torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), len(weights))]).unique()
    return edges


def _best_runs(edges: Tensor, mass: Tensor, moment: Tensor, square: Tensor, count: int) -> Tensor:
    """Which `count + 1` of the edges bound the cells of least squared deviation, from sums up to each value."""
    mass, moment, square = mass[edges], moment[edges], square[edges]
    cell_mass = mass - mass[:, None]  # of the cell from edge a to edge b, at [a, b]
    deviation = square - square[:, None] - (moment - moment[:, None]) ** 2 / cell_mass.clamp(min=_NOTHING)
    deviation = deviation.clamp(min=0.0).masked_fill(torch.ones_like(deviation, dtype=torch.bool).tril(-1), torch.inf)
    least, starts = deviation[0], []
    for _ in range(count - 1):
        least, start = (least[:, None] + deviation).min(0)
        starts.append(start)
    chosen = [len(edges) - 1]
    for start in reversed(starts):
        chosen.append(int(start[chosen[-1]]))
    return edges[torch.tensor([0, *chosen[::-1]])]
