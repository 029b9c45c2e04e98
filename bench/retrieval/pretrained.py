"""What choosing tokens costs a pretrained model: needles, many values at once, by method, share and coverage.

A context is computed densely, and so is the question behind it but for its last token. That token and those of the gold
answer then attend, in every layer, to sinks, window, what follows the context, and what a method chooses. All tokens of
an answer go through a layer at once: each is a KV head of its own to the functions that choose and prune.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor

from ...connectors.hf.retrieval.plan import layer_shape
from ...core import KVChunk
from ...evaluation.answers import Answer, score_answer
from ...evaluation.forcing import QUERIES, ForcedModel
from ...evaluation.questions import Question
from ...retrieval.coverage import covering
from ...retrieval.quantized.quantized import QuantizedKeyIndex
from ...retrieval.registry import selector_by_name
from ...retrieval.selector import LayerShape, LearnsFromQueries, Selection, Selector, pooled, top_ids

SINK_TOKENS, WINDOW_TOKENS = 4, 32  # attended to exactly, and counted; scaled to contexts of some thousand tokens
DENSE = "dense"
_OBSERVED = 1024  # queries that are handed to a selector at once
_GAP = 1e-3  # of a share, beyond the last one that is measured

Choose: TypeAlias = Callable[[Tensor, int, int], Tensor]
"""Queries `[Hq, T, D]` of tokens from a position on, and a budget: ids `[H, T, K]`, -1 for none."""


@dataclass(frozen=True, slots=True)
class Way:
    """A method within a share of the context, pinned tokens counted, and perhaps a coverage within that."""

    method: str
    ratio: float = 1.0
    coverage: float | None = None

    @property
    def name(self) -> str:
        return self.method if self.coverage is None else f"{self.method}, coverage {self.coverage:g}"


@dataclass(frozen=True, slots=True)
class Trial:
    """A question answered in one way; `attended`: tokens of the context, a mean over layers, heads and tokens."""

    way: Way
    answer: Answer
    attended: float


@dataclass(slots=True, eq=False)
class _Attention:
    """Attention of the last tokens behind a context through what is chosen, see `evaluation.forcing.Attend`."""

    shape: LayerShape
    context_tokens: int
    choices: Sequence[Choose]
    way: Way
    chosen: list[Tensor] = field(default_factory=list)  # tokens, a mean over KV heads and tokens for each layer

    def __call__(
        self, layer: int, _: KVChunk, queries: Tensor, keys: Tensor, values: Tensor, first: int
    ) -> Tensor | None:
        heads, group, scale = self.shape.kv_heads, self.shape.group, self.shape.scale
        count, dim = queries.shape[1:]
        end, device = self.context_tokens - WINDOW_TOKENS, queries.device
        at = torch.arange(keys.shape[1], device=device)
        last = torch.arange(first, first + count, device=device)[:, None]
        near = ((at < SINK_TOKENS) | (at >= end)) & (at <= last)  # [T, S]
        scores = queries.float().view(heads, group, count, dim) @ keys.float().mT[:, None] * scale
        budget = max(1, int(self.way.ratio * self.context_tokens) - SINK_TOKENS - WINDOW_TOKENS)
        ids = self.choices[layer](queries, first, budget).to(device)
        if self.way.coverage is not None:
            ids = self._pruned(ids, queries, keys, scores.masked_fill(~near, -torch.inf).logsumexp(-1))
        chosen = torch.zeros(heads, count, len(at) + 1, dtype=torch.bool, device=device)
        chosen.scatter_(2, torch.where(ids < 0, len(at), ids), True)
        self.chosen.append(chosen[..., :-1].sum(-1).float().mean())
        visible = chosen[..., :-1] | near
        weights = scores.masked_fill(~visible[:, None], -torch.inf).softmax(-1)
        return (weights @ values.float()[:, None]).flatten(0, 1).to(values.dtype)

    def _pruned(self, ids: Tensor, queries: Tensor, keys: Tensor, near: Tensor) -> Tensor:
        """`covering`, for each KV head and token; `near` `[H, G, T]`."""
        heads, count, size = ids.shape
        of_ids = keys[torch.arange(heads, device=keys.device)[:, None, None], ids.clamp(min=0)]
        asked = queries.view(heads, self.shape.group, count, -1).transpose(1, 2).reshape(-1, queries.shape[-1])
        limits = {"coverage": float(self.way.coverage or 1.0), "scale": self.shape.scale}
        chosen = Selection(ids.reshape(heads * count, size), 0)
        kept = covering(chosen, of_ids.flatten(0, 1), asked, near.transpose(1, 2).reshape(-1), **limits)
        return kept.ids.view(heads, count, -1)


def answered(
    model: ForcedModel,
    question: Question,
    ways: Sequence[Way],
    others: Sequence[Way] = (),
    *,
    dtype: torch.dtype = torch.int64,
) -> list[Trial]:
    """One question, densely and in every way, `others` included, behind the same context.

    Parameters
    ----------
    model : keeps its queries.
    """
    context, _ = model.run(torch.tensor(question.context, dtype=dtype))
    asked, tail = question.asked[:-1], torch.tensor([question.asked[-1], *question.answer[:-1]], dtype=dtype)
    prefix = context
    if asked:
        behind, _ = model.run(torch.tensor(asked, dtype=dtype), context)
        prefix = _joined(context, behind)
    exact = model.logits(model.run(tail, prefix)[1][-len(question.answer) :])
    dense = Trial(Way(DENSE), score_answer(question, exact, exact), float(len(context)))
    trials, shape = [dense], layer_shape(model.layers)
    built: dict[str, list[Choose]] = {}
    for way in (*ways, *others):
        if way.method not in built:
            built[way.method] = [_choice(way.method, shape, context, layer) for layer in range(model.spec.num_layers)]
        attention = _Attention(shape, len(context), built[way.method], way)
        logits = model.logits(model.run(tail, prefix, attend=attention)[1][-len(question.answer) :])
        attended = float(torch.stack(attention.chosen).mean()) + SINK_TOKENS + WINDOW_TOKENS
        trials.append(Trial(way, score_answer(question, logits, exact), attended))
    return trials


def _choice(method: str, shape: LayerShape, context: KVChunk, layer: int) -> Choose:
    """How a method chooses in one layer; exact search and the keys of two bits choose for all tokens at once."""
    covered = slice(SINK_TOKENS, len(context) - WINDOW_TOKENS)
    keys, values = context.keys[layer, :, covered], context.values[layer, :, covered]
    if method == "exact":
        return _by_keys(shape, keys.float())
    if method == "quantized":
        index = QuantizedKeyIndex(shape, start=SINK_TOKENS, device=keys.device)
        index.add(keys, values)
        return _by_keys(shape, index.approximate_keys)
    selector = selector_by_name(method, shape, layer, start=SINK_TOKENS)
    selector.add(keys.cpu(), values.cpu())
    if isinstance(selector, LearnsFromQueries):
        for start in range(0, len(context), _OBSERVED):
            here = slice(start, min(start + _OBSERVED, len(context)))
            selector.observe(context.extras[QUERIES][layer, :, here], torch.arange(here.start, here.stop))
        selector.build()
    return _by_selector(selector)


def _by_keys(shape: LayerShape, keys: Tensor) -> Choose:
    """The best by the scores of these keys `[H, N, D]`."""

    def choose(queries: Tensor, _: int, budget: int) -> Tensor:
        (_, count, dim), heads = queries.shape, shape.kv_heads
        asked = queries.float().view(heads, shape.group, count, dim).transpose(1, 2).flatten(1, 2)
        scores = (asked @ keys.mT * shape.scale).reshape(heads * count * shape.group, -1)
        each = LayerShape(heads * count, shape.group, dim, shape.scale)
        return top_ids(pooled(scores, each), budget, SINK_TOKENS).view(heads, count, -1)

    return choose


def _by_selector(selector: Selector) -> Choose:
    """What a selector chooses for one token after the other."""

    def choose(queries: Tensor, first: int, budget: int) -> Tensor:
        wide = queries.float().cpu()
        rows = [selector.select(wide[:, t], first + t, budget).ids for t in range(queries.shape[1])]
        width = max(row.shape[1] for row in rows)
        return torch.stack([torch.nn.functional.pad(row, (0, width - row.shape[1]), value=-1) for row in rows], 1)

    return choose


def _joined(context: KVChunk, behind: KVChunk) -> KVChunk:
    parts = (context, behind)
    ids, positions = (torch.cat([getattr(part, name) for part in parts]) for name in ("token_ids", "positions"))
    keys, values = (torch.cat([getattr(part, name) for part in parts], dim=2) for name in ("keys", "values"))
    return KVChunk(context.spec, ids, positions, keys, values)


def tokens_at_equal_loss(fixed: Mapping[float, float], loss: float) -> float:
    """Tokens that a fixed share needs for a loss, between those measured: `fixed` has losses by number of tokens.

    Both are taken as logarithms; NaN for a loss below the least that was measured.
    """
    points = sorted(fixed.items())
    if not loss > 0 or loss < points[-1][1] * (1 - _GAP):
        return math.nan
    for (few, more_loss), (many, less_loss) in pairwise(points):
        if less_loss <= loss <= more_loss and less_loss > 0:
            if more_loss == less_loss:
                return few
            part = math.log(more_loss / loss) / math.log(more_loss / less_loss)
            return math.exp(math.log(few) + part * math.log(many / few))
    return points[0][0] if loss > points[0][1] else points[-1][0]
