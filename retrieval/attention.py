"""Partial attention: over some of the tokens, with the log-sum-exp by which the parts make the whole exactly."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from .selector import Selection

PartialAttention: TypeAlias = tuple[Tensor, Tensor]
"""Output `[Hq, Dv]` and log-sum-exp of the scores `[Hq]`, both float32; zeros and -inf over no token."""


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, *, scale: float, visible: Tensor | None = None
) -> PartialAttention:
    """Attention of one query token over the tokens given.

    Parameters
    ----------
    queries : `[Hq, D]`.
    keys, values : `[H, K, D]`, `[H, K, Dv]`; H divides Hq.
    scale : factor on the scores.
    visible : `[H, K]` bool; None for all.
    """
    kv_heads, count, _ = keys.shape
    if queries.shape[0] % kv_heads:
        raise ValueError(f"{queries.shape[0]} query heads cannot share {kv_heads} KV heads evenly")
    if not count:
        return empty_attention(queries.shape[0], values.shape[-1], queries.device)
    scores = (queries.float().view(kv_heads, -1, queries.shape[-1]) @ keys.float().mT) * scale
    if visible is not None:
        scores = scores.masked_fill(~visible[:, None], -math.inf)
    lse = scores.logsumexp(-1)
    out = torch.exp(scores - lse.clamp(min=torch.finfo(torch.float32).min)[..., None]) @ values.float()
    return out.flatten(0, 1), lse.flatten()


def attend_at(queries: Tensor, keys: Tensor, values: Tensor, ids: Tensor, *, scale: float) -> PartialAttention:
    """Attention over the rows `ids` (`[H, K]` int64, -1 for none) of a context's `[H, S, D]` and `[H, S, Dv]`."""
    rows = ids.clamp(min=0)[..., None]
    chosen_keys = keys.gather(1, rows.expand(-1, -1, keys.shape[-1]))
    chosen_values = values.gather(1, rows.expand(-1, -1, values.shape[-1]))
    return attend(queries, chosen_keys, chosen_values, scale=scale, visible=ids >= 0)


def attend_selected(
    near: PartialAttention, selection: Selection, attend_ids: Callable[[Tensor], PartialAttention]
) -> PartialAttention:
    """Attention over sinks and window (`near`), the tokens that a selector chose, and its estimate of the rest, if any.

    The three share no token. The result is on the device of `near`.

    Parameters
    ----------
    attend_ids : attention of the same queries over the tokens `ids` `[H, K]`: `attend_at` or `PagedKV.attend` with
        their other arguments bound.
    """
    parts = [] if not selection.ids.shape[1] else [attend_ids(selection.ids)]
    if selection.rest is not None:
        parts.append(selection.rest(selection.ids))
    device = near[0].device
    return merge([near, *((out.to(device), lse.to(device)) for out, lse in parts)])


def merge(parts: Sequence[PartialAttention]) -> PartialAttention:
    """Attention over all parts together, which share no token: `out = sum of out_i exp(lse_i - lse)`.

    Exact, also where parts are empty. (RetrievalAttention, arXiv 2409.10516, section 3.3.)
    """
    if not parts:
        raise ValueError("parts is empty; expected at least one")
    outs, lses = torch.stack([part[0] for part in parts]), torch.stack([part[1] for part in parts])
    # the function `logsumexp` takes ten times as long for so few numbers
    top = lses.amax(0).clamp(min=torch.finfo(torch.float32).min)
    weights = torch.exp(lses - top)
    total = weights.sum(0)
    shares = weights / total.clamp(min=torch.finfo(torch.float32).tiny)
    return (outs * shares[..., None]).sum(0), top + total.log()


def with_sinks(part: PartialAttention, sinks: Tensor | None) -> PartialAttention:
    """The same with a model's attention sinks (`[Hq]` scores; None for none), which are tokens without a value."""
    return part if sinks is None else merge([part, (torch.zeros_like(part[0]), sinks.to(part[1]))])


def empty_attention(query_heads: int, value_dim: int, device: torch.device | None = None) -> PartialAttention:
    """Attention over no token."""
    return torch.zeros(query_heads, value_dim, device=device), torch.full((query_heads,), -math.inf, device=device)
