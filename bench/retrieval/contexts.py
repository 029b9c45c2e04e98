"""A model's forward pass behind a context that was prefilled once: dense, or through selectors, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...connectors.hf.retrieval.plan import layer_shape
from ...core import KVChunk
from ...evaluation.forcing import QUERIES, ForcedModel
from ...retrieval.attention import attend, attend_at, attend_selected
from ...retrieval.selector import LearnsFromQueries, Selection, Selector

SINK_TOKENS, WINDOW_TOKENS = 4, 32  # attended to exactly, and charged; scaled to contexts of some thousand tokens
_KV_BYTES = 2  # a number of keys and values, as models keep them
_OBSERVED = 1024  # queries that are handed to a selector at once


@dataclass(frozen=True, slots=True, eq=False)
class Context:
    """Keys, values, queries and last hidden states of some tokens.

    Attributes
    ----------
    chunk : their keys and values.
    hidden : `[T, E]`, the output of the last layer.
    """

    chunk: KVChunk
    hidden: Tensor

    def __len__(self) -> int:
        return len(self.chunk)

    @property
    def first(self) -> int:
        """Position of the first token."""
        return int(self.chunk.positions[0])

    @property
    def queries(self) -> Tensor:
        """`[L, Hq, T, D]` after rotary embedding."""
        return self.chunk.extras[QUERIES]

    @property
    def keys(self) -> Tensor:
        """`[L, H, T, D]` after rotary embedding."""
        return self.chunk.keys

    @property
    def values(self) -> Tensor:
        """`[L, H, T, Dv]`."""
        return self.chunk.values


@dataclass(frozen=True, slots=True)
class Reads:
    """Bytes of one step over all layers: `select` to choose, `attend` keys and values of what is attended to."""

    select_bytes: int = 0
    attend_bytes: int = 0

    def __add__(self, other: Reads) -> Reads:
        return Reads(self.select_bytes + other.select_bytes, self.attend_bytes + other.attend_bytes)


class ContextModel:
    """A transformers model that continues prefilled contexts; dense and sparse passes differ by the attention alone."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._forced = ForcedModel(model, model_id="measured", keeps_queries=True)
        self.layers, self.logits = self._forced.layers, self._forced.logits
        self.shape = layer_shape(self.layers)

    def dense(self, ids: Tensor, context: Context | None = None, behind: Context | None = None) -> Context:
        """Exact attention of tokens `[T]` over `context`, then `behind` it, then themselves."""
        return Context(*self._forced.run(ids, _joined(context, behind)))

    def sparse(
        self, ids: Tensor, context: Context, behind: Context | None, selectors: Sequence[Selector], budget: int
    ) -> tuple[Tensor, list[Reads]]:
        """The output `[T, E]` of the last layer if each token, in each layer, attends only to what is pinned and to
        what the layer's selector chooses for it; and what each step read.

        The tokens are given, as under teacher forcing: computing them layer by layer is decoding them one by one.
        """
        reads = [Reads() for _ in ids]

        def attend_chosen(layer: int, _: KVChunk, queries: Tensor, keys: Tensor, values: Tensor, first: int) -> Tensor:
            pinned = pinned_rows(keys, values, len(context))
            outs = []
            for t in range(len(ids)):
                visible = pinned[0].shape[1] - len(ids) + t + 1
                selection = selectors[layer].select(queries[:, t], first + t, budget)
                near = [rows[:, :visible] for rows in pinned]
                outs.append(attend_pinned(queries[:, t], near, keys, values, selection, self.shape.scale))
                reads[t] += self.reads(selection, visible, values.shape[-1])
            return torch.stack(outs, dim=1).to(queries.dtype)

        return self._forced.run(ids, _joined(context, behind), attend=attend_chosen)[1], reads

    def reads(self, selection: Selection, pinned_tokens: int, v_dim: int) -> Reads:
        """Bytes that one token reads in one layer."""
        rows = int((selection.ids >= 0).sum()) + pinned_tokens * self.shape.kv_heads
        return Reads(selection.read_bytes, rows * (self.shape.head_dim + v_dim) * _KV_BYTES)

    def dense_bytes(self, tokens: int) -> int:
        """Bytes that one step of dense attention over so many tokens reads in all layers."""
        spec = self.layers.spec
        return spec.num_layers * spec.num_kv_heads * tokens * 2 * spec.head_dim * _KV_BYTES


def attend_pinned(
    query: Tensor, pinned: Sequence[Tensor], keys: Tensor, values: Tensor, selection: Selection, scale: float
) -> Tensor:
    """Attention's output for one token `[Hq, D]` over pinned keys and values, what was chosen among `keys` and
    `values`, and the estimate of the rest if there is one.
    """
    near = attend(query, *pinned, scale=scale)
    return attend_selected(near, selection, partial(attend_at, query, keys, values, scale=scale))[0]


def pinned_rows(keys: Tensor, values: Tensor, context_tokens: int) -> tuple[Tensor, Tensor]:
    """Keys and values of one layer, `[H, S, D]`, that every step attends to: sinks, the end of the first
    `context_tokens`, and all that follows them.
    """
    end = context_tokens - WINDOW_TOKENS
    both = (torch.cat((rows[:, :SINK_TOKENS], rows[:, end:]), dim=1) for rows in (keys, values))
    return next(both), next(both)


def _joined(context: Context | None, behind: Context | None) -> KVChunk | None:
    parts = [part.chunk for part in (context, behind) if part is not None]
    if len(parts) < 2:
        return parts[0] if parts else None
    ids, positions = (torch.cat([getattr(part, name) for part in parts]) for name in ("token_ids", "positions"))
    keys, values = (torch.cat([getattr(part, name) for part in parts], dim=2) for name in ("keys", "values"))
    return KVChunk(parts[0].spec, ids, positions, keys, values)


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
