"""Tables of `NuqCodec` from samples of one layer: thresholds, scales, level tables, and what an error costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .levels import fit_levels, quantile, tempered
from .outliers import outliers_per_token
from .quantise import by_token, code, code_in_ranges

_LARGEST_TABLE_SAMPLE = 1 << 20  # numbers a level table is fitted to; four times as many move no level by 1 %
_SMALLEST_SPREAD_RATIO = 0.001  # of a channel's scale to the mean one: a dead channel must not divide by zero


@dataclass(frozen=True)
class FitOptions:
    """How tables are fitted. The last three exist for ablations.

    Attributes
    ----------
    samples : tokens used, evenly spaced over those given.
    rounds : of choosing outliers, fitting tables and fitting the scales of keys; 1 keeps the scales of the thresholds.
    nonuniform : fit levels; otherwise they are evenly spaced from -1 to 1.
    fisher : weigh errors by Fisher information; otherwise all the same.
    scale_weights : weigh errors as they are in the tensor (`F s^2`), not as they are after scaling (`F`).
    """

    samples: int = 4096
    rounds: int = 3
    nonuniform: bool = True
    fisher: bool = True
    scale_weights: bool = True


_DEFAULT = FitOptions()


def fit_layer(
    keys: Tensor,
    key_fisher: Tensor,
    values: Tensor,
    value_fisher: Tensor,
    *,
    heads: int = 1,
    bits: Sequence[int] = (2, 3, 4),
    outlier_ratio: float = 0.01,
    options: FitOptions = _DEFAULT,
) -> dict[str, Tensor]:
    """What `NuqCodec` needs of one layer, by name, without the layer dimension; stack over layers for a `Profile`.

    Deterministic. Sinks and other first tokens should be left out of the samples.

    Parameters
    ----------
    keys, values : `[N, M]` before rotation; M is head times dimension. A latent cache has values `[N, 0]`.
    key_fisher, value_fisher : squared gradients of the model's loss, of the same shapes.
    heads : KV heads; each gets a level table of its own. 1 gives one table for the layer.
    bits : widths to fit tables for.
    outlier_ratio : as the codec will have it: so many numbers of a token do not matter to the tables.

    Returns
    -------
    `nuq.keys.low`, `.high` `[M]`: the quantiles that leave `outlier_ratio` outside. For each width b
    `nuq.keys.scale.{b}`, `.zero.{b}` `[M]`; `nuq.values.scale`, `.zero` `[M]`. For both halves `.levels.{b}`
    `[heads, 2 ** b]`, `.weight` `[M]` (mean Fisher information) and `.q_norm.{b}` `[2]` (factor and offset of levels).

    Raises
    ------
    ValueError : shapes disagree, there are no samples, or one is not finite.
    """
    found: dict[str, Tensor] = {}
    for half, samples, fisher in (("keys", keys, key_fisher), ("values", values, value_fisher)):
        if samples.shape != fisher.shape or samples.ndim != 2 or not len(samples) or samples.shape[1] % heads:
            raise ValueError(
                f"{half} are {list(samples.shape)}, their Fisher information {list(fisher.shape)}; expected both "
                f"[N, M] with N > 0 and M a multiple of {heads} heads"
            )
        if not bool(samples.isfinite().all()) or not bool(fisher.isfinite().all()):
            raise ValueError(f"{half} or their Fisher information are not finite")
        if not samples.shape[1]:
            continue
        stride = -(-len(samples) // options.samples)
        rows, weights = samples[::stride].float(), tempered(fisher[::stride].float())
        if not options.fisher:
            weights = torch.ones_like(weights)
        fit = _fit_keys if half == "keys" else _fit_values
        fitted = fit(rows, weights, heads, bits, outlier_ratio, options) | {"weight": weights.mean(0)}
        found |= {f"nuq.{half}.{name}": tensor for name, tensor in fitted.items()}
    return found


def _fit_keys(
    rows: Tensor, weights: Tensor, heads: int, bits: Sequence[int], outlier_ratio: float, options: FitOptions
) -> dict[str, Tensor]:
    tail = outlier_ratio / 2
    low, high = quantile(rows, tail), quantile(rows, 1 - tail)
    cost = weights.mean(0)
    fitted = {"low": low, "high": high}
    for width in bits:
        scale, zero = _above_zero((high - low) / 2), (high + low) / 2
        inlier = (rows >= low) & (rows <= high)
        for left in range(options.rounds - 1, -1, -1):
            numbers, squared = _by_head((rows - zero) / scale, heads), scale**2 if options.scale_weights else 1.0
            levels = _tables(numbers, _by_head(weights * squared * inlier, heads), 2**width, options)
            codes, errors = code(numbers, levels, _by_head(cost * scale**2, heads))
            inlier = _without_largest(errors, outlier_ratio)
            if left:
                scale, zero = _regress(rows, by_token(_looked_up(levels, codes)), weights * inlier, scale, zero)
        inlier_numbers = by_token(numbers)[inlier], by_token(_looked_up(levels, codes))[inlier]
        fitted |= {f"scale.{width}": scale, f"zero.{width}": zero, f"levels.{width}": levels}
        fitted[f"q_norm.{width}"] = _matching(*inlier_numbers)
    return fitted


def _fit_values(
    rows: Tensor, weights: Tensor, heads: int, bits: Sequence[int], outlier_ratio: float, options: FitOptions
) -> dict[str, Tensor]:
    scale, zero = _above_zero(rows.std(0, correction=0)), rows.mean(0)
    numbers, cost = _by_head((rows - zero) / scale, heads), _by_head(weights.mean(0) * scale**2, heads)
    weights = weights * scale**2 if options.scale_weights else weights
    k = outliers_per_token(outlier_ratio, rows.shape[1])
    fitted = {"scale": scale, "zero": zero}
    for width in bits:
        levels = torch.linspace(-1.0, 1.0, 2**width).repeat(heads, 1)
        for _ in range(options.rounds):
            ranges, codes, errors = code_in_ranges(numbers, levels, cost, k)
            inlier = _without_largest(errors, outlier_ratio)
            stretch, offset = ranges.float()[:, :, None].unbind(1)
            squared = stretch**2 if options.scale_weights else 1.0
            stretched = _by_head((by_token(numbers) - offset) / stretch.clamp(min=_SMALLEST_SPREAD_RATIO), heads)
            levels = _tables(stretched, _by_head(weights * squared * inlier, heads), 2**width, options)
        codes, _ = code(stretched, levels, cost)
        inlier_numbers = by_token(stretched)[inlier], by_token(_looked_up(levels, codes))[inlier]
        fitted |= {f"levels.{width}": levels, f"q_norm.{width}": _matching(*inlier_numbers)}
    return fitted


def _tables(numbers: Tensor, weights: Tensor, count: int, options: FitOptions) -> Tensor:
    heads = len(numbers)
    if not options.nonuniform:
        return torch.linspace(-1.0, 1.0, count).repeat(heads, 1)
    stride = -(-numbers[0].numel() // _LARGEST_TABLE_SAMPLE) | 1  # odd: not always the same channels
    pairs = zip(numbers.flatten(1), weights.flatten(1), strict=True)
    return torch.stack([fit_levels(row[::stride], weight[::stride], count) for row, weight in pairs])


def _regress(rows: Tensor, levels: Tensor, weights: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """The scale and zero of each channel that make the weighted squared error of `levels * scale + zero` smallest."""
    total = weights.sum(0).clamp(min=torch.finfo(torch.float32).tiny)
    mean_level, mean_row = (weights * levels).sum(0) / total, (weights * rows).sum(0) / total
    variance = (weights * (levels - mean_level) ** 2).sum(0)
    slope = (weights * (levels - mean_level) * (rows - mean_row)).sum(0) / variance
    usable = slope.isfinite() & (slope > 0)
    slope = _above_zero(torch.where(usable, slope, scale))
    return slope, torch.where(usable, mean_row - slope * mean_level, zero)


def _matching(numbers: Tensor, decoded: Tensor) -> Tensor:
    """Factor and offset that give decoded inliers the mean and the deviation of the true ones (Q-Norm)."""
    if not len(numbers):
        return torch.tensor([1.0, 0.0])
    deviation = decoded.std(correction=0)
    factor = numbers.std(correction=0) / deviation if float(deviation) > 0.0 else torch.ones(())
    return torch.stack([factor, numbers.mean() - decoded.mean() * factor])


def _without_largest(errors: Tensor, outlier_ratio: float) -> Tensor:
    errors = by_token(errors)
    largest = errors.topk(outliers_per_token(outlier_ratio, errors.shape[1]), -1).indices
    return torch.ones_like(errors, dtype=torch.bool).scatter_(1, largest, False)


def _by_head(rows: Tensor, heads: int) -> Tensor:
    """`[..., M]` to `[heads, ..., M / heads]`, with one row if there is none."""
    rows = rows if rows.ndim > 1 else rows[None]
    by_head: Tensor = rows.unflatten(-1, (heads, -1)).movedim(-2, 0)
    return by_head


def _looked_up(levels: Tensor, codes: Tensor) -> Tensor:
    return levels.gather(1, codes.flatten(1).long()).view(codes.shape)


def _above_zero(scale: Tensor) -> Tensor:
    floor = _SMALLEST_SPREAD_RATIO * float(scale.mean())
    return scale.clamp(min=floor if floor > 0.0 else 1.0)
