"""How much a question attends to the tokens of a fused context: what a chooser that knows the question goes by."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..core import LayerwiseModel
from .attention import attention_weights

QUESTION_TOKENS = 256
"""Last tokens of a question that are asked with: a longer one is mostly more context."""

_BLOCK_WEIGHTS = 1 << 26  # attention weights in memory at once


def question_attention(
    model: LayerwiseModel, question_ids: Tensor, keys: Tensor, values: Tensor, ready: Callable[[int], object]
) -> Tensor:
    """Attention of a question to every token of a context: `[2, S]` float32.

    The question runs through all layers behind the context. Weights are summed over layers and heads; the first row is
    their mean over the question's tokens, the second those of its last token.

    Parameters
    ----------
    question_ids : `[Q]` int64, at least one; only the last `QUESTION_TOKENS` are used.
    keys, values : `[L, H, S, D]` and `[L, H, S, Dv]`, rotated to positions 0 to S - 1. Read only.
    ready : called before a layer of them is read.
    """
    device, total = keys.device, keys.shape[2]
    ids = question_ids[-QUESTION_TOKENS:].to(device)
    positions = torch.arange(total, total + len(ids), device=device)
    hidden = model.embed(ids)
    score = torch.zeros(2, total, device=device)
    for layer in range(model.spec.num_layers):
        q, k, v = model.qkv(layer, hidden, positions)
        ready(layer)
        context = torch.cat((keys[layer], k), dim=1), torch.cat((values[layer], v), dim=1)
        here = model.attention[layer]
        out, weights = attention_with_weights(
            q, *context, scale=here.scale, window_tokens=here.window_tokens, softcap=here.softcap, sinks=here.sinks
        )
        score += weights[:, :total]
        if layer + 1 < model.spec.num_layers:
            hidden = model.finish(layer, hidden, out)
    return score


def attention_with_weights(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    window_tokens: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention of the last Q of S tokens, and what it attends to.

    Parameters
    ----------
    queries : `[Hq, Q, D]`, of the last tokens.
    keys, values : `[H, S, D]` and `[H, S, Dv]`.
    scale, window_tokens, softcap, sinks : as for `causal_attention`.

    Returns
    -------
    tuple : outputs `[Hq, Q, Dv]`, and weights `[2, S]` float32, summed over heads: mean of the queries, the last one.
    """
    query_heads, count, _ = queries.shape
    kv_heads, total, _ = keys.shape
    grouped = queries.reshape(kv_heads, query_heads // kv_heads, count, -1)
    out = queries.new_empty(*grouped.shape[:3], values.shape[-1])
    seen = torch.arange(total, device=keys.device)
    attended = torch.zeros(2, total, device=keys.device)
    step = max(1, _BLOCK_WEIGHTS // (query_heads * total))
    for start in range(0, count, step):
        stop = min(start + step, count)
        here = torch.arange(total - count + start, total - count + stop, device=keys.device)[:, None]
        visible = seen <= here
        if window_tokens is not None:
            visible &= seen > here - window_tokens
        block = grouped[:, :, start:stop].flatten(1, 2)
        scores = (block @ keys.mT).float().view(kv_heads, -1, stop - start, total) * scale
        weights = attention_weights(scores, visible, softcap=softcap, sinks=sinks)
        out[:, :, start:stop] = (weights.flatten(1, 2).to(values.dtype) @ values).view(*scores.shape[:3], -1)
        by_query = weights.sum(dim=(0, 1))
        attended[0] += by_query.sum(0) / count
        attended[1] = by_query[-1]
    return out.flatten(0, 1), attended
