"""Codes of non-uniform levels, and the range that the levels are stretched to for each token."""

from __future__ import annotations

import torch
from torch import Tensor

from .levels import nearest

_SMALLEST_SCALE = 1e-30  # of a token whose numbers are all the same: they are its zero, whatever the code


def by_token(rows: Tensor) -> Tensor:
    """`[H, T, D]` to `[T, H * D]`: the channels of a token side by side."""
    return rows.transpose(0, 1).flatten(1)


def code(numbers: Tensor, levels: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of the nearest levels, `[H, T, D]` uint8, and weighted errors `weight * (number - level)^2`.

    Parameters
    ----------
    numbers : `[H, T, D]` float32.
    levels : `[H, n]` float32, ascending.
    weight : of a squared error, broadcast to `numbers`.
    """
    codes = nearest(numbers.flatten(1), levels)
    error = numbers - levels.gather(1, codes.long()).view_as(numbers)
    return codes.view(numbers.shape), weight * error * error


def code_in_ranges(numbers: Tensor, levels: Tensor, weight: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `code`, with levels stretched to each token's range, that of all its numbers but the k largest.

    Returns
    -------
    `(ranges, codes, errors)`; `ranges` `[T, 2]` are float16, scale and zero, infinite where the numbers are too large.
    """
    tokens = by_token(numbers)
    largest = tokens.abs().topk(min(k, tokens.shape[1] - 1), -1).indices
    low, high = tokens.scatter(1, largest, torch.inf).amin(1), tokens.scatter(1, largest, -torch.inf).amax(1)
    zero = ((low + high) / 2).half()
    reach = torch.maximum(high - zero.float(), zero.float() - low)  # the rounded zero is not quite in the middle
    ranges = torch.stack([reach.half(), zero], 1)
    scale, offset = ranges.float()[None, :, :, None].unbind(2)
    codes, errors = code((numbers - offset) / scale.clamp(min=_SMALLEST_SCALE), levels, weight)
    return ranges, codes, errors * scale * scale
