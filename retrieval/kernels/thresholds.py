"""How important a code must be for its tokens to be chosen."""

from __future__ import annotations

from torch import Tensor


def thresholds(importance: Tensor, counts: Tensor, budget: int) -> tuple[Tensor, Tensor]:
    """The least importance that is taken, `[H]`, and how many of the tokens with it are not taken."""
    ordered, order = importance.sort(dim=1, descending=True)
    reached = counts.gather(1, order).cumsum(1)
    threshold = ordered.gather(1, (reached < budget).sum(1, keepdim=True))
    return threshold[:, 0], (counts * (importance >= threshold)).sum(1) - budget
