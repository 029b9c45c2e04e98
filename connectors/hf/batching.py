"""Several fused contexts with their questions in one batch of the stock `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache

if TYPE_CHECKING:
    from .connector import FusedContext


def padded_batch(
    rows: Sequence[tuple[FusedContext, Sequence[int]]], *, pad_id: int
) -> tuple[dict[str, Tensor], DynamicCache]:
    """Inputs and cache for rows of different lengths, each at the positions that it would have alone.

    A row is padding, its context, padding, its question: so that all contexts end, and all questions end, in the same
    columns. The attention mask hides the padding, and `generate` counts positions by the mask.

    Parameters
    ----------
    rows : fused context and question (token ids, at least one) of each.
    pad_id : any token id.

    Returns
    -------
    tuple : `{"input_ids": [B, S + Q], "attention_mask": [B, S + Q]}`, S and Q the longest, and the cache of S tokens.
    """
    first = rows[0][0].blended
    device, layers = first.keys.device, len(first.keys)
    context_tokens = max(len(context.token_ids) for context, _ in rows)
    question_tokens = max(len(question) for _, question in rows)
    shape = (len(rows), context_tokens + question_tokens)
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    mask = torch.zeros(shape, dtype=torch.int64)
    keys, values = (
        [each.new_zeros(len(rows), each.shape[1], context_tokens, each.shape[3]) for _ in range(layers)]
        for each in (first.keys, first.values)
    )
    for i, (context, question) in enumerate(rows):
        start = context_tokens - len(context.token_ids)
        input_ids[i, start:context_tokens] = context.token_ids
        mask[i, start:context_tokens] = 1
        input_ids[i, shape[1] - len(question) :] = torch.tensor(list(question))
        mask[i, shape[1] - len(question) :] = 1
        for layer in range(layers):
            keys[layer][i, :, start:] = context.blended.keys[layer]
            values[layer][i, :, start:] = context.blended.values[layer]
    cache = DynamicCache(list(zip(keys, values, strict=True)))
    return {"input_ids": input_ids.to(device), "attention_mask": mask.to(device)}, cache
