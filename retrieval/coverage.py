"""A budget in attention mass: of the tokens that were chosen, the fewest that hold a share of the softmax."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .selector import Selection

_NONE = torch.iinfo(torch.int64).max


def covering(
    selection: Selection, keys: Tensor, queries: Tensor, near: Tensor, *, coverage: float, scale: float
) -> Selection:
    """The fewest of the chosen tokens that, with the near ones, hold the share `coverage` of the attention.

    Twilight (arXiv 2502.02770): any selector chooses within a budget that is large enough, exact scores prune what it
    chose to the nucleus. Heads that attend to few tokens keep few. Every query head of a group gets its share: tokens
    are taken in the order of their largest weight for a head of the group.

    Deviation: scores are of the exact keys, which attention reads anyway, where Twilight reads them in 4 bits first;
    what is saved is the values, and all that is done with them. What was not chosen counts as nothing.

    Parameters
    ----------
    keys : `[H, K, D]`, of `selection.ids`; those of -1 are not looked at.
    queries : `[Hq, D]`.
    near : `[Hq]`, log-sum-exp of the scores of what is attended to anyway; -inf for nothing.
    coverage : above 0, at most 1; at 1 all are kept.
    scale : factor on the scores.

    Returns
    -------
    Selection : ids ascending, -1 behind them; as many columns as the head that keeps most has tokens.
    """
    heads, count = selection.ids.shape
    if not count or coverage >= 1.0:
        return selection
    is_token = (selection.ids >= 0).to(keys.device)
    scores = (queries.float().view(heads, -1, queries.shape[-1]) @ keys.float().mT) * scale
    scores = scores.masked_fill(~is_token[:, None], -torch.inf)
    of_near = near.float().view(heads, -1, 1)
    total = torch.logaddexp(scores.logsumexp(-1, keepdim=True), of_near).clamp(min=torch.finfo(torch.float32).min)
    weights = (scores - total).exp()
    importance, order = weights.amax(1).sort(dim=1, descending=True, stable=True)
    ordered = weights.gather(2, order[:, None].expand_as(weights))
    before = (of_near - total).exp() + ordered.cumsum(-1) - ordered  # held without this one and those behind it
    needed = (before < coverage).any(1) & (importance > 0)
    kept = needed.sum(1)
    ids = selection.ids.to(order.device).gather(1, order)
    ids = ids.masked_fill(torch.arange(count, device=ids.device) >= kept[:, None], _NONE)[:, : int(kept.max())]
    ids = ids.sort(1).values
    return replace(selection, ids=ids.masked_fill(ids == _NONE, -1).to(selection.ids.device))
