"""What choosing tokens costs a pretrained model: needles, many values at once, by method, share and coverage.

A context is computed densely, and so are the questions behind it but for their last tokens. That token and those of the
gold answer then attend, in every layer, to sinks, window, what follows the context, and what a method chooses. The
answers to all questions about a context go through a layer at once, in all ways: each token is a KV head of its own to
the functions that choose and prune.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice, pairwise
from typing import TypeAlias

import torch
from torch import Tensor

from ...blend.attention import layer_attention
from ...connectors.hf.retrieval.plan import layer_shape
from ...core import KVChunk
from ...evaluation.answers import Answer, score_answers
from ...evaluation.forcing import QUERIES, ForcedModel
from ...evaluation.questions import Question
from ...retrieval.coverage import covering
from ...retrieval.quantized.quantized import QuantizedKeyIndex
from ...retrieval.registry import selector_by_name
from ...retrieval.selector import LayerShape, LearnsFromQueries, Selection, Selector, pooled

SINK_TOKENS = 4  # attended to exactly, and counted, as the window is
DENSE = "dense"
ALONE = "quantized, chosen alone"  # without an estimate of the rest
_LEAST_WINDOW_TOKENS = 16
_OBSERVED = 1024  # queries that are handed to a selector at once
_GAP = 1e-3  # of a share, beyond the last one that is measured

Choose: TypeAlias = Callable[[Tensor, int, int, Tensor], "_Choice"]
"""What is chosen for queries `[Hq, T, D]` of tokens from a position on, within a budget, beside what is attended to
anyway (log-sum-exp of its scores `[H, T, G]`)."""


def window_of(context_tokens: int) -> int:
    """Tokens at the end of a context that are attended to exactly: 32 of 4,096, in proportion, but at least 16."""
    return max(_LEAST_WINDOW_TOKENS, round(context_tokens / 128))


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


@dataclass(frozen=True, slots=True, eq=False)
class _Choice:
    """Tokens chosen, and what is known of the others.

    Attributes
    ----------
    ids : `[H, T, K]`, -1 for none.
    scores : `[H, T, G, N]`, of all tokens that are chosen from, as far as the method knows; None if it estimates
        nothing.
    values : `[H, N, Dv]`, what stands for theirs then.
    """

    ids: Tensor
    scores: Tensor | None = None
    values: Tensor | None = None


class _Context:
    """A context whose keys and values every question about it is asked of, and what methods have made of them."""

    def __init__(self, model: ForcedModel, ids: Tensor) -> None:
        self.chunk, _ = model.run(ids)
        self.shape, self.window_tokens = layer_shape(model.layers), window_of(len(ids))
        self._made: dict[str, list[Choose]] = {}

    def __len__(self) -> int:
        return len(self.chunk)

    def pinned(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of sinks and window."""
        both = (self.chunk.keys[layer], self.chunk.values[layer])
        keys, values = (torch.cat((each[:, :SINK_TOKENS], each[:, -self.window_tokens :]), 1) for each in both)
        return keys, values

    def covered(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of what is chosen from."""
        here = slice(SINK_TOKENS, len(self) - self.window_tokens)
        return self.chunk.keys[layer, :, here], self.chunk.values[layer, :, here]

    def choose(self, method: str, layer: int) -> Choose:
        """How a method chooses in a layer, built when it is first asked for."""
        if method not in self._made:
            layers = range(self.chunk.spec.num_layers)
            self._made[method] = [_choice(method, self.shape, self.chunk, each, self.window_tokens) for each in layers]
        return self._made[method][layer]


@dataclass(frozen=True, slots=True, eq=False)
class _Asked:
    """A question behind a context.

    Attributes
    ----------
    rows : keys and values `[H, T, D]` of its tokens but the last, by layer.
    exact : distributions `[A, V]` of the answer's tokens under full attention.
    """

    question: Question
    rows: Sequence[tuple[Tensor, Tensor]]
    exact: Tensor

    @property
    def tail(self) -> list[int]:
        """The tokens whose outputs predict the answer."""
        return [self.question.asked[-1], *self.question.answer[:-1]]


@dataclass(slots=True, eq=False)
class _Attention:
    """Attention of a question's last tokens behind a context, to what a way chooses."""

    context: _Context
    asked: _Asked
    way: Way
    chosen: list[Tensor] = field(default_factory=list)  # tokens, a mean over KV heads and tokens for each layer

    @property
    def first(self) -> int:
        """Position of the first of these tokens."""
        return len(self.context) + len(self.asked.question.asked) - 1

    def __call__(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """The outputs `[Hq, T, Dv]` of the queries `[Hq, T, D]` of a layer, given what these tokens compute."""
        context, shape = self.context, self.context.shape
        heads, group, (count, dim) = shape.kv_heads, shape.group, queries.shape[1:]
        pinned_keys, pinned_values = (
            torch.cat(parts, 1).float()
            for parts in zip(context.pinned(layer), self.asked.rows[layer], (keys, values), strict=True)
        )
        rows = (queries.float() * shape.scale).view(heads, group, count, dim).transpose(1, 2).flatten(1, 2)  # T, then G
        later = torch.ones(count, count, dtype=torch.bool, device=queries.device).triu(1)
        near = (rows @ pinned_keys.mT).view(heads, count, group, -1)
        near[..., -count:].masked_fill_(later[:, None], -torch.inf)
        covered_keys, covered_values = (each.float() for each in context.covered(layer))
        far = (rows @ covered_keys.mT).view(heads, count, group, -1)
        budget = max(1, int(self.way.ratio * len(context)) - SINK_TOKENS - context.window_tokens)
        of_near = near.logsumexp(-1)
        choice = context.choose(self.way.method, layer)(queries, self.first, budget, of_near)
        ids = choice.ids.to(queries.device)
        if self.way.coverage is not None:
            ids = self._pruned(ids, queries, covered_keys, of_near)
        missing, at = ids < 0, (ids - SINK_TOKENS).clamp(min=0)[:, :, None].expand(-1, -1, group, -1)
        self.chosen.append((~missing).sum(-1).float().mean())
        of_chosen = far.gather(3, at).masked_fill_(missing[:, :, None], -torch.inf)
        known = near.shape[-1] + ids.shape[-1]
        parts, shares = [near, of_chosen], None
        if choice.scores is not None:
            shares, lse = _rest(choice.scores, at, missing[:, :, None])
            parts.append(lse)
        weights = torch.cat(parts, -1).softmax(-1)
        spread = far.zero_().scatter_add_(3, at, weights[..., near.shape[-1] : known])  # zeros where nothing is chosen
        out = weights[..., : near.shape[-1]].flatten(1, 2) @ pinned_values + spread.flatten(1, 2) @ covered_values
        if shares is not None and choice.values is not None:
            out += shares.mul_(weights[..., known:]).flatten(1, 2) @ choice.values
        return out.view(heads, count, group, -1).transpose(1, 2).flatten(0, 1).to(values.dtype)

    def _pruned(self, ids: Tensor, queries: Tensor, keys: Tensor, near: Tensor) -> Tensor:
        """`covering`, for each KV head and token; `near` `[H, T, G]`."""
        heads, count, size = ids.shape
        of_ids = keys[torch.arange(heads, device=keys.device)[:, None, None], (ids - SINK_TOKENS).clamp(min=0)]
        shape = self.context.shape
        asked = queries.view(heads, shape.group, count, -1).transpose(1, 2).reshape(-1, queries.shape[-1])
        limits = {"coverage": float(self.way.coverage or 1.0), "scale": shape.scale}
        chosen = Selection(ids.reshape(heads * count, size), 0)
        return covering(chosen, of_ids.flatten(0, 1), asked, near.reshape(-1), **limits).ids.view(heads, count, -1)


def answered(
    model: ForcedModel, asked: Sequence[tuple[Question, Sequence[Way]]], *, dtype: torch.dtype = torch.int64
) -> list[Trial]:
    """Questions about one context, each densely and in its ways: trials in their order, question by question.

    Parameters
    ----------
    model : keeps its queries.

    Raises
    ------
    ValueError : the questions are about different contexts.
    """
    questions = [question for question, _ in asked]
    if len({tuple(question.context) for question in questions}) != 1:
        raise ValueError(f"{len(questions)} questions are not about one context; expected the same one in each")
    context = _Context(model, torch.tensor(questions[0].context, dtype=dtype))
    known = _asked(model, context, questions, dtype)
    attentions = [_Attention(context, one, way) for one, (_, ways) in zip(known, asked, strict=True) for way in ways]
    parts = [(torch.tensor(each.asked.tail, dtype=dtype), each.first) for each in attentions]
    outputs = model.side_by_side(parts, lambda layer, part, *row: attentions[part](layer, *row)) if parts else []
    through = iter(zip(attentions, outputs, strict=True))
    trials = []
    for one, (question, ways) in zip(known, asked, strict=True):
        of_question = list(islice(through, len(ways)))
        logits = chain([one.exact], (model.logits(hidden) for _, hidden in of_question))
        dense, *answers = score_answers(question, logits, one.exact)
        trials.append(Trial(Way(DENSE), dense, float(len(context))))
        for (attention, _), answer in zip(of_question, answers, strict=True):
            attended = float(torch.stack(attention.chosen).mean()) + SINK_TOKENS + context.window_tokens
            trials.append(Trial(attention.way, answer, attended))
    return trials


def _asked(model: ForcedModel, context: _Context, questions: Sequence[Question], dtype: torch.dtype) -> list[_Asked]:
    """All questions in one dense pass."""
    chunk, size, layers = context.chunk, len(context), model.layers
    sizes = [len(question.asked) - 1 for question in questions]
    rows: list[list[tuple[Tensor, Tensor]]] = [[] for _ in questions]

    def attend(layer: int, part: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        rows[part].append((keys[:, : sizes[part]], values[:, : sizes[part]]))
        keys, values = (torch.cat((of[layer], own), 1) for of, own in ((chunk.keys, keys), (chunk.values, values)))
        placed = torch.arange(size, keys.shape[1], device=keys.device)
        return layer_attention(layers.attention[layer], queries, keys, values, placed)

    outputs = model.side_by_side([(torch.tensor(each.forced, dtype=dtype), size) for each in questions], attend)
    return [
        _Asked(question, of_question, model.logits(hidden[-len(question.answer) :]))
        for question, of_question, hidden in zip(questions, rows, outputs, strict=True)
    ]


def _rest(scores: Tensor, at: Tensor, missing: Tensor) -> tuple[Tensor, Tensor]:
    """Of the tokens that were not chosen: their softmax `[H, T, G, N]`, and the log-sum-exp of their scores.

    That is `[H, T, G, 1]`. Overwrites `scores`; `at` from 0 on.
    """
    peak = scores.amax(-1, keepdim=True)
    weights = scores.sub_(peak).exp_()
    weights.scatter_add_(3, at, -weights.gather(3, at).masked_fill_(missing, 0.0))  # those chosen become 0
    total = weights.sum(-1, keepdim=True)
    return weights.div_(total.clamp(min=torch.finfo(torch.float32).tiny)), peak + total.log()


def _choice(method: str, shape: LayerShape, context: KVChunk, layer: int, window_tokens: int) -> Choose:
    """How a method chooses in one layer; exact search and the keys of two bits choose for all tokens at once."""
    covered = slice(SINK_TOKENS, len(context) - window_tokens)
    keys, values = context.keys[layer, :, covered], context.values[layer, :, covered]
    if method == "exact":
        return _by_keys(shape, keys.float())
    if method in ("quantized", ALONE):
        index = QuantizedKeyIndex(shape, start=SINK_TOKENS, value_bits=int(method != ALONE), device=keys.device)
        index.add(keys, values)
        values_read = None if method == ALONE else index.approximate_values
        return _by_keys(shape, index.approximate_keys, values_read, sees_near=True)
    selector = selector_by_name(method, shape, layer, start=SINK_TOKENS)
    selector.add(keys.cpu(), values.cpu())
    if isinstance(selector, LearnsFromQueries):
        for start in range(0, len(context), _OBSERVED):
            here = slice(start, min(start + _OBSERVED, len(context)))
            selector.observe(context.extras[QUERIES][layer, :, here], torch.arange(here.start, here.stop))
        selector.build()
    return _by_selector(selector)


def _by_keys(shape: LayerShape, keys: Tensor, values: Tensor | None = None, *, sees_near: bool = False) -> Choose:
    """The best by the scores of these keys `[H, N, D]`, see `SeesNear`; `values` `[H, N, Dv]` stand for those of the
    rest.
    """

    def choose(queries: Tensor, _: int, budget: int, near: Tensor) -> _Choice:
        (_, count, dim), heads = queries.shape, shape.kv_heads
        asked = queries.float().view(heads, shape.group, count, dim).transpose(1, 2).flatten(1, 2)
        scores = (asked @ keys.mT * shape.scale).reshape(heads * count * shape.group, -1)
        each = LayerShape(heads * count, shape.group, dim, shape.scale)
        importance = pooled(scores, each, near=near.flatten() if sees_near else None)
        best = importance.topk(min(budget, keys.shape[1]), dim=1, sorted=False).indices
        ids = (best + SINK_TOKENS).view(heads, count, -1)
        return _Choice(ids, scores.view(heads, count, shape.group, -1) if values is not None else None, values)

    return choose


def _by_selector(selector: Selector) -> Choose:
    """What a selector chooses for one token after the other."""

    def choose(queries: Tensor, first: int, budget: int, _: Tensor) -> _Choice:
        wide = queries.float().cpu()
        rows = [selector.select(wide[:, t], first + t, budget).ids for t in range(queries.shape[1])]
        width = max(row.shape[1] for row in rows)
        padded = [torch.nn.functional.pad(row, (0, width - row.shape[1]), value=-1) for row in rows]
        return _Choice(torch.stack(padded, 1))

    return choose


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
