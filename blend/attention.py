"""Causal attention of scattered queries over one contiguous context."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import LayerAttention

# Queries attended at once on a CPU. A block sees the keys up to its own last position only, so that no more than half a
# block's mask is wasted work; 128 measured best among 32 to 4,096.
_BLOCK_TOKENS = 128
_DEVICE_BLOCK_TOKENS = 2048  # elsewhere: launching a kernel costs more than masked keys
_KEPT_MASK_BYTES = 64 << 20
_BLOCK_WEIGHTS = 1 << 26  # attention weights in memory at once, where no kernel hides them


class ScatteredAttention:
    """Attention in which the query at position p sees exactly the keys at positions <= p, for one row of positions.

    The mask goes by position, not by the place of a query among the queries: aligning a triangle to the last query, as
    the code released with CacheBlend does, lets scattered queries see the future. Made once for all layers that attend
    from the same positions, so that masks are made once.

    Parameters
    ----------
    positions : `[N]` int64, ascending.
    window_tokens : keys further back than this, the query's own included, are not seen; None for no limit.
    """

    def __init__(self, positions: Tensor, *, window_tokens: int | None = None) -> None:
        self._positions, self._window_tokens = positions, window_tokens
        self._on_cpu = positions.device.type == "cpu"
        self._bounds: list[int] = positions.tolist()
        count, bounds = len(self._bounds), self._bounds
        self._is_run = bool(count) and bounds[-1] - bounds[0] + 1 == count > bounds[0] and window_tokens is None
        self._block_tokens = _BLOCK_TOKENS if self._on_cpu else _DEVICE_BLOCK_TOKENS
        self._masks: dict[int, Tensor] = {}
        self._mask_bytes = 0

    def __call__(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        scale: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attention of queries `[Hq, N, D]` to keys `[H, S, D]` and values `[H, S, Dv]`, all after rotary embedding:
        `[Hq, N, Dv]`. The key at index j stands at position j, and every query's position is below S.

        `softcap` and `sinks` : see `LayerAttention`.
        """
        is_plain = softcap is None and sinks is None
        if self._is_run and is_plain:
            return _dense_attention(queries, keys, values, self._bounds[0], scale)
        query_heads, count, dim = queries.shape
        kv_heads, group = keys.shape[0], query_heads // keys.shape[0]
        out = queries.new_empty(kv_heads, group, count, values.shape[-1])
        grouped = queries.reshape(kv_heads, group, count, dim)
        for start in range(0, count, self._block_tokens):
            stop = min(start + self._block_tokens, count)
            first, last = self._seen(start, stop)
            visible, block = self._mask(start, stop), grouped[:, :, start:stop]
            k, v = keys[:, first:last], values[:, first:last]
            if not is_plain:  # no kernel of torch knows them
                step = max(1, _BLOCK_WEIGHTS // (query_heads * (last - first)))
                for a in range(0, stop - start, step):
                    rows = slice(a, min(a + step, stop - start))
                    scores = (block[:, :, rows] @ k[:, None].mT).float() * scale
                    weights = attention_weights(scores, visible[rows], softcap=softcap, sinks=sinks)
                    out[:, :, start + rows.start : start + rows.stop] = weights.to(v.dtype) @ v[:, None]
                continue
            if self._on_cpu:  # a mask that all heads share, and keys that are expanded without a copy
                k, v = (t[:, None].expand(kv_heads, group, *t.shape[1:]) for t in (k, v))
                out[:, :, start:stop] = F.scaled_dot_product_attention(block, k, v, attn_mask=visible, scale=scale)
                continue
            # The query heads of a group share their keys, so they are one longer list of queries.
            attended = F.scaled_dot_product_attention(
                block.reshape(1, kv_heads, group * (stop - start), dim),
                k[None],
                v[None],
                attn_mask=visible.repeat(group, 1),
                scale=scale,
            )
            out[:, :, start:stop] = attended.view(kv_heads, group, stop - start, -1)
        return out.flatten(0, 1)

    def _seen(self, start: int, stop: int) -> tuple[int, int]:
        """The keys `[first, last)` that some query of a block sees."""
        window = self._window_tokens
        first = 0 if window is None else max(0, self._bounds[start] - window + 1)
        return first, self._bounds[stop - 1] + 1

    def _mask(self, start: int, stop: int) -> Tensor:
        """Which of the keys of a block each of its queries sees: bool."""
        if start in self._masks:
            return self._masks[start]
        first, last = self._seen(start, stop)
        here, keys = self._positions[start:stop, None], torch.arange(first, last, device=self._positions.device)
        visible = keys <= here
        if self._window_tokens is not None:
            visible &= keys > here - self._window_tokens
        if self._mask_bytes + visible.nbytes <= _KEPT_MASK_BYTES:
            self._masks[start] = visible
            self._mask_bytes += visible.nbytes
        return visible


def causal_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    *,
    scale: float,
    window_tokens: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """`ScatteredAttention` for one layer.

    Parameters
    ----------
    queries : `[Hq, N, D]`, after rotary embedding.
    keys : `[H, S, D]`, after rotary embedding; the key at index j stands at position j.
    values : `[H, S, Dv]`.
    positions : `[N]` int64, ascending, each below S.
    scale : factor on the scores.
    window_tokens : keys further back than this, the query's own included, are not seen; None for no limit.
    softcap, sinks : see `LayerAttention`.

    Returns
    -------
    Tensor : `[Hq, N, Dv]`.
    """
    scattered = ScatteredAttention(positions, window_tokens=window_tokens)
    return scattered(queries, keys, values, scale=scale, softcap=softcap, sinks=sinks)


def layer_attention(layer: LayerAttention, queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """`causal_attention` as a layer of a model has it."""
    return causal_attention(
        queries,
        keys,
        values,
        positions,
        scale=layer.scale,
        window_tokens=layer.window_tokens,
        softcap=layer.softcap,
        sinks=layer.sinks,
    )


def attention_weights(
    scores: Tensor, visible: Tensor, *, softcap: float | None = None, sinks: Tensor | None = None
) -> Tensor:
    """The softmax of scaled scores `[H, G, N, S]` float32 over the visible keys (`[N, S]` bool).

    `softcap` and `sinks` : see `LayerAttention`; a sink's own weight is left out of the result.
    """
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is None:
        return scores.softmax(-1)
    heads = sinks.float().reshape(*scores.shape[:2], 1, 1).expand(*scores.shape[:3], 1)
    return torch.cat((scores, heads), dim=-1).softmax(-1)[..., :-1]


def _dense_attention(queries: Tensor, keys: Tensor, values: Tensor, first: int, scale: float) -> Tensor:
    """The same for queries at `first`, `first + 1`, ...: the causal kernel needs no mask and is faster.

    It aligns its triangle to the first query, so that `first` queries of zeros stand in for the ones not asked for.
    """
    last = first + queries.shape[1]
    if queries.device.type != "cpu":
        # Kernels for float32 on devices know no groups: without this, all scores are written out.
        keys, values = (t.repeat_interleave(len(queries) // len(t), dim=0) for t in (keys[:, :last], values[:, :last]))
    attended = F.scaled_dot_product_attention(
        F.pad(queries, (0, 0, first, 0))[None],
        keys[None, :, :last],
        values[None, :, :last],
        is_causal=True,
        scale=scale,
        enable_gqa=True,
    )
    return attended[0, :, first:]
