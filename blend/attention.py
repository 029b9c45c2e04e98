"""Causal attention of scattered queries over one contiguous context."""

import torch
import torch.nn.functional as F
from torch import Tensor

# Queries attended at once. A block sees the keys up to its own last position only, so that no more than half a block's
# mask is wasted work; 256 measured best on a CPU among 64 to 4,096.
_BLOCK_TOKENS = 256


def causal_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    *,
    scale: float,
    window_tokens: int | None = None,
) -> Tensor:
    """Attention in which the query at position p sees exactly the keys at positions <= p.

    The mask goes by position, not by the place of a query among the queries: aligning a triangle to the last query, as
    the code released with CacheBlend does, lets scattered queries see the future.

    Parameters
    ----------
    queries : `[Hq, N, D]`, after rotary embedding.
    keys : `[H, S, D]`, after rotary embedding; the key at index j stands at position j.
    values : `[H, S, Dv]`.
    positions : `[N]` int64, ascending, each below S.
    scale : factor on the scores.
    window_tokens : keys further back than this, the query's own included, are not seen; None for no limit.

    Returns
    -------
    Tensor : `[Hq, N, Dv]`.
    """
    query_heads, count, dim = queries.shape
    kv_heads, group = keys.shape[0], query_heads // keys.shape[0]
    out = queries.new_empty(kv_heads, group, count, values.shape[-1])
    grouped = queries.view(kv_heads, group, count, dim)
    key_positions = torch.arange(keys.shape[1], device=keys.device)
    bounds = positions.cpu()
    if window_tokens is None and count and int(bounds[-1] - bounds[0]) + 1 == count > int(bounds[0]):
        return _dense_attention(queries, keys, values, int(bounds[0]), scale)
    for start in range(0, count, _BLOCK_TOKENS):
        stop = min(start + _BLOCK_TOKENS, count)
        last = int(bounds[stop - 1]) + 1
        first = 0 if window_tokens is None else max(0, int(bounds[start]) - window_tokens + 1)
        here = positions[start:stop, None]
        visible = key_positions[first:last] <= here
        if window_tokens is not None:
            visible &= key_positions[first:last] > here - window_tokens
        # The query heads of a group share their keys, so they are one longer list of queries: no copy of keys a head.
        attended = F.scaled_dot_product_attention(
            grouped[:, :, start:stop].reshape(1, kv_heads, group * (stop - start), dim),
            keys[None, :, first:last],
            values[None, :, first:last],
            attn_mask=visible.repeat(group, 1),
            scale=scale,
        )
        out[:, :, start:stop] = attended.view(kv_heads, group, stop - start, -1)
    return out.flatten(0, 1)


def _dense_attention(queries: Tensor, keys: Tensor, values: Tensor, first: int, scale: float) -> Tensor:
    """The same for queries at `first`, `first + 1`, ...: the causal kernel needs no mask and is faster.

    It aligns its triangle to the first query, so that `first` queries of zeros stand in for the ones not asked for.
    """
    last = first + queries.shape[1]
    attended = F.scaled_dot_product_attention(
        F.pad(queries, (0, 0, first, 0))[None],
        keys[None, :, :last],
        values[None, :, :last],
        is_causal=True,
        scale=scale,
        enable_gqa=True,
    )
    return attended[0, :, first:]
