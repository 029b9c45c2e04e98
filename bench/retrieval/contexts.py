"""A model's forward pass behind a context that was prefilled once: dense, or through selectors, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...blend.attention import causal_attention
from ...connectors.hf.model import TransformersModel
from ...retrieval.attention import attend, attend_at, attend_selected
from ...retrieval.selector import LayerShape, LearnsFromQueries, Selection, Selector

SINK_TOKENS, WINDOW_TOKENS = 4, 32  # attended to exactly, and charged; scaled to contexts of some thousand tokens
_KV_BYTES = 2  # a number of keys and values, as models keep them
_OBSERVED = 1024  # queries that are handed to a selector at once


@dataclass(frozen=True, slots=True, eq=False)
class Context:
    """What all layers know of some tokens: `[L, heads, T, D]` each, after rotary embedding.

    Attributes
    ----------
    first : position of its first token.
    hidden : `[T, E]`, the output of the last layer.
    """

    first: int
    queries: Tensor
    keys: Tensor
    values: Tensor
    hidden: Tensor

    def __len__(self) -> int:
        return self.keys.shape[2]

    def attend(
        self,
        query: Tensor,
        layer: int,
        pinned: tuple[Tensor, Tensor],
        visible: int,
        selection: Selection,
        scale: float,
    ) -> Tensor:
        """Attention's output for one token `[Hq, D]` over the first `visible` pinned rows, what was chosen, and the
        estimate of the rest if there is one.
        """
        near = attend(query, pinned[0][:, :visible], pinned[1][:, :visible], scale=scale)
        attend_ids = partial(attend_at, query, self.keys[layer], self.values[layer], scale=scale)
        return attend_selected(near, selection, attend_ids)[0]


@dataclass(frozen=True, slots=True)
class Reads:
    """Bytes of one step over all layers: `select` to choose, `attend` keys and values of what is attended to."""

    select_bytes: int = 0
    attend_bytes: int = 0

    def __add__(self, other: Reads) -> Reads:
        return Reads(self.select_bytes + other.select_bytes, self.attend_bytes + other.attend_bytes)


class ContextModel:
    """A transformers model that continues prefilled contexts.

    Dense and sparse passes go through the same operations, so that two differ by the attention alone.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.layers = TransformersModel(model, model_id="measured")
        self._model = model
        spec = self.layers.spec
        group = model.config.num_attention_heads // spec.num_kv_heads
        self.shape = LayerShape(spec.num_kv_heads, group, spec.head_dim, self.layers.scale, spec.rope)

    @torch.no_grad()
    def dense(self, ids: Tensor, context: Context | None = None, behind: Context | None = None) -> Context:
        """Exact attention of tokens `[T]` over `context`, then `behind` it, then themselves."""
        before = [part for part in (context, behind) if part is not None]
        first = sum(map(len, before))
        positions = torch.arange(first, first + len(ids))
        hidden = self.layers.embed(ids)
        kept: list[tuple[Tensor, Tensor, Tensor]] = []
        for layer in range(self.layers.spec.num_layers):
            queries, keys, values = self.layers.qkv(layer, hidden, positions)
            kept.append((queries, keys, values))
            attended = causal_attention(
                queries,
                torch.cat([*(part.keys[layer] for part in before), keys], dim=1),
                torch.cat([*(part.values[layer] for part in before), values], dim=1),
                positions,
                scale=self.layers.scale,
            )
            hidden = self.layers.finish(layer, hidden, attended)
        queries, keys, values = (torch.stack(parts) for parts in zip(*kept, strict=True))
        return Context(first, queries, keys, values, hidden)

    @torch.no_grad()
    def sparse(
        self, ids: Tensor, context: Context, behind: Context | None, selectors: Sequence[Selector], budget: int
    ) -> tuple[Tensor, list[Reads]]:
        """The output `[T, E]` of the last layer if each token, in each layer, attends only to what is pinned and to
        what the layer's selector chooses for it; and what each step read.

        The tokens are given, as under teacher forcing: computing them layer by layer is decoding them one by one.
        """
        tail = len(behind) if behind is not None else 0
        first = len(context) + tail
        positions = torch.arange(first, first + len(ids))
        hidden = self.layers.embed(ids)
        reads = [Reads() for _ in ids]
        for layer, selector in enumerate(selectors):
            queries, keys, values = self.layers.qkv(layer, hidden, positions)
            pinned = pinned_rows(context, behind, layer, keys, values)
            outs = []
            for t, position in enumerate(positions.tolist()):
                visible = pinned[0].shape[1] - len(ids) + t + 1
                selection = selector.select(queries[:, t], position, budget)
                outs.append(context.attend(queries[:, t], layer, pinned, visible, selection, self.shape.scale))
                reads[t] += self.reads(selection, visible, values.shape[-1])
            hidden = self.layers.finish(layer, hidden, torch.stack(outs, dim=1).to(hidden.dtype))
        return hidden, reads

    def reads(self, selection: Selection, pinned_tokens: int, v_dim: int) -> Reads:
        """Of one token in one layer."""
        rows = int((selection.ids >= 0).sum()) + pinned_tokens * self.shape.kv_heads
        return Reads(selection.read_bytes, rows * (self.shape.head_dim + v_dim) * _KV_BYTES)

    def dense_bytes(self, tokens: int) -> int:
        """What dense attention of one step reads in all layers, over so many tokens."""
        spec = self.layers.spec
        return spec.num_layers * spec.num_kv_heads * tokens * 2 * spec.head_dim * _KV_BYTES

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """`[T, E]` -> `[T, V]` float32."""
        logits: Tensor = self._model.lm_head(self._model.model.norm(hidden)).float()
        return logits


def pinned_rows(
    context: Context, behind: Context | None, layer: int, keys: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """Keys and values of one layer that every step attends to: sinks, the context's end, and all that follows it."""
    both = []
    for whole, tail, own in (
        (context.keys, None if behind is None else behind.keys, keys),
        (context.values, None if behind is None else behind.values, values),
    ):
        ends = [whole[layer, :, :SINK_TOKENS], whole[layer, :, len(context) - WINDOW_TOKENS :]]
        both.append(torch.cat([*ends, *([] if tail is None else [tail[layer]]), own], dim=1))
    return both[0], both[1]


def fill(selector: Selector, context: Context, layer: int) -> Selector:
    """Gives a selector of one layer what it covers, the prompt's queries if it learns from them, and a first question:
    some indexes are made when they are asked.
    """
    covered = slice(SINK_TOKENS, len(context) - WINDOW_TOKENS)
    selector.add(context.keys[layer, :, covered], context.values[layer, :, covered])
    if isinstance(selector, LearnsFromQueries):
        for start in range(0, len(context), _OBSERVED):
            here = slice(start, min(start + _OBSERVED, len(context)))
            selector.observe(context.queries[layer, :, here], torch.arange(here.start, here.stop))
        selector.build()
    selector.select(context.queries[layer, :, -1], len(context) - 1, 1)
    return selector
