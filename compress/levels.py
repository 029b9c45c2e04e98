"""Level tables of non-uniform quantisers: weighted k-means in one dimension."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_SMALLEST_STEP = 1e-7  # of the range of the values: a smaller one changes no code


def fit_levels(values: Tensor, weights: Tensor, count: int, *, iterations: int = 100) -> Tensor:
    """The `count` levels that make `sum w (x - nearest level)^2` small: Lloyd's iteration on sorted values.

    It starts from quantiles of the density `w^(1/3)`, which are the optimum of many levels (Panter and Dite, 1951), and
    ends when no level moves. No random numbers: equal arguments give equal levels.

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
    values, order = values.reshape(-1).double().sort()
    weights = weights.reshape(-1)[order].double()
    if not bool(values.isfinite().all()) or not bool((weights.isfinite() & (weights >= 0)).all()):
        raise ValueError("values or weights to fit levels to are not finite, or weights are negative")
    if not bool(weights.any()):
        weights = torch.ones_like(weights)
    mass, moment = F.pad(weights.cumsum(0), (1, 0)), F.pad((weights * values).cumsum(0), (1, 0))
    levels = _quantiles(values, weights.pow(1 / 3), count)
    for _ in range(iterations):
        inner = torch.searchsorted(values, midpoints(levels))
        edges = F.pad(F.pad(inner, (1, 0)), (0, 1), value=len(values))
        cell_mass, cell_moment = mass[edges].diff(), moment[edges].diff()
        moved = torch.where(cell_mass > 0, cell_moment / cell_mass, levels).cummax(0).values
        step, levels = (moved - levels).abs().max(), moved
        if float(step) <= _SMALLEST_STEP * float(values[-1] - values[0]):
            break
    return levels.float()


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
    return (1 - uniform_ratio) * clipped + uniform_ratio * clipped.mean()


def quantile(values: Tensor, share: float) -> Tensor:
    """The value below which `share` of the values along the first dimension lie, without interpolation.

    `torch.quantile` refuses more than 16 million values.
    """
    rank = round(share * (len(values) - 1))
    return values.kthvalue(rank + 1, dim=0).values


def _quantiles(values: Tensor, density: Tensor, count: int) -> Tensor:
    share = density.cumsum(0)
    wanted = (torch.arange(count, dtype=torch.float64) + 0.5) / count * share[-1]
    return values[torch.searchsorted(share, wanted).clamp(max=len(values) - 1)]
