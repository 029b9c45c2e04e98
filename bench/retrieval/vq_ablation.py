"""What A2ATS's two choices are worth: codebooks of keys before rotation or after it, fitted for scores or for keys."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...evaluation.page import Table
from ...evaluation.windows import string_windows, token_windows
from ...retrieval.exact import ExactSelector
from ...retrieval.vq.codebook import Codebook
from ...retrieval.vq.vq import VqIndex
from ...retrieval.vq.vq_fit import banded_moment, distance_bands, fit_codebook
from .attention_quality import AttentionProbe, AttentionQuality
from .contexts import SINK_TOKENS, WINDOW_TOKENS, Context, ContextModel, fill
from .methods import CENTROIDS, TEXT, learning_texts
from .quality import TaskTokens

BUDGET_RATIO = 0.03
STRINGS = "random strings"
_ASKED = 8  # tokens whose queries are looked at, at the end of a context
_UNSEEN = 1  # seed of the strings; those that codebooks learn from come from seed 0


@dataclass(frozen=True, slots=True)
class VqQuality:
    """One way of making codebooks on one kind of text: means over contexts."""

    rotation: str
    metric: str
    text: str
    tokens: int
    recall: float
    mass: float
    exact_mass: float

    def row(self) -> dict[str, object]:
        """Plain values by name."""
        names = ("rotation", "metric", "text", "tokens", "recall", "mass", "exact_mass")
        return {"what": "vq ablation", **{name: getattr(self, name) for name in names}}


def vq_ablation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int,
    contexts: int,
    sequences: int,
    learned_tokens: int,
) -> list[VqQuality]:
    """Codebooks of text, on held-out text and on text of another kind.

    Parameters
    ----------
    tokens, contexts : length of what is measured, and how many of a kind.
    sequences, learned_tokens : what the codebooks learn from: first halves of the bundled texts, no strings.
    """
    layers = ContextModel(model)
    windows = token_windows(
        tokenizer, learning_texts(), sequences=sequences, tokens=learned_tokens, least_tokens=min(64, learned_tokens)
    )
    learned = _Learned([layers.dense(torch.tensor(window)) for window in windows], layers)
    asked = list(_contexts(layers, tokenizer, tokens, contexts))
    budget = max(1, int(BUDGET_RATIO * tokens) - SINK_TOKENS - WINDOW_TOKENS)
    found = []
    probes = [(kind, context, AttentionProbe(layers, context, None, own, exact)) for kind, context, own, exact in asked]
    best = {id(probe): probe.measure(exact, budget) for (_, _, probe), (*_, exact) in zip(probes, asked, strict=True)}
    for rotation in ("before", "after"):
        for metric in ("scores", "keys"):
            books = learned.codebooks(is_before=rotation == "before", for_scores=metric == "scores")
            of_kind: dict[str, list[tuple[AttentionQuality, AttentionQuality]]] = {}
            for kind, context, probe in probes:
                indexes = [
                    fill(VqIndex(layers.shape, book, start=SINK_TOKENS), context, layer)
                    for layer, book in enumerate(books)
                ]
                of_kind.setdefault(kind, []).append((probe.measure(indexes, budget), best[id(probe)]))
            for kind, pairs in of_kind.items():
                recall, mass = (sum(getattr(q, name) for q, _ in pairs) / len(pairs) for name in ("recall", "mass"))
                exact_mass = sum(exact.mass for _, exact in pairs) / len(pairs)
                found.append(VqQuality(rotation, metric, kind, tokens, recall, mass, exact_mass))
    return found


def vq_table(found: Sequence[VqQuality]) -> Table:
    """One line for each way and kind of text."""
    heads = ["text", "keys, rotation", "fitted for", "recall", "mass", "exact search's mass"]
    rows: list[list[str | float | None]] = [
        [q.text, q.rotation, q.metric, f"{q.recall:.3f}", f"{q.mass:.3f}", f"{q.exact_mass:.3f}"]
        for q in sorted(found, key=lambda q: q.text != TEXT)
    ]
    tokens = found[0].tokens
    caption = (
        f"vq, {CENTROIDS} centroids learned from text, the {BUDGET_RATIO:.0%} of {tokens:,} tokens that it chooses"
    )
    return Table(heads, rows, caption, left=(0, 1, 2))


class _Learned:
    """Keys and second moments of queries, of every layer and KV head, before and after rotation."""

    def __init__(self, contexts: Sequence[Context], model: ContextModel) -> None:
        self._shape, self._rope = model.shape, model.shape.rope
        self._contexts = contexts

    def codebooks(self, *, is_before: bool, for_scores: bool) -> list[Codebook]:
        """One for each layer."""
        return [self._codebook(layer, is_before, for_scores) for layer in range(self._contexts[0].keys.shape[0])]

    def _codebook(self, layer: int, is_before: bool, for_scores: bool) -> Codebook:
        keys = torch.cat([self._turned(c.keys[layer], is_before) for c in self._contexts], dim=1)
        queries = torch.cat([self._turned(c.queries[layer], is_before) for c in self._contexts], dim=1)
        bands = tuple(distance_bands()) if is_before and self._rope is not None else None
        centroids, factors = [], []
        for of_head, asked in zip(keys, queries.view(len(keys), -1, keys.shape[-1]), strict=True):
            moment = (asked.double().mT @ asked.double() / len(asked)).float() if for_scores else None
            if moment is not None and bands is not None and self._rope is not None:
                moment = banded_moment(moment, self._rope, bands)
            book, factor = fit_codebook(of_head, moment, centroids=min(CENTROIDS, max(1, len(of_head) // 8)))
            centroids.append(book)
            factors.append(factor)
        return Codebook(torch.stack(centroids), torch.stack(factors), bands)

    def _turned(self, rows: Tensor, is_before: bool) -> Tensor:
        if self._rope is None or not is_before:
            return rows
        return self._rope.shift(rows, -torch.arange(rows.shape[1]))


def _contexts(
    model: ContextModel, tokenizer: PreTrainedTokenizerBase, tokens: int, count: int
) -> Iterator[tuple[str, Context, Context, list[ExactSelector]]]:
    """Kind, context, the tokens behind it, and exact selectors of its layers."""
    tasks = TaskTokens(tokenizer)
    strings = string_windows(tokenizer, sequences=count, tokens=tokens + _ASKED, seed=_UNSEEN)
    for number in range(count):
        text, pairs = tasks.sample(TEXT, tokens, random.Random(f"vq {number}"))
        whole = torch.tensor(strings[number])
        for kind, ids, behind in ((TEXT, text, pairs[0][1][:_ASKED]), (STRINGS, whole[:tokens], whole[tokens:])):
            context = model.dense(ids)
            exact = [ExactSelector(model.shape, start=SINK_TOKENS) for _ in range(context.keys.shape[0])]
            for layer, selector in enumerate(exact):
                fill(selector, context, layer)
            yield kind, context, model.dense(behind, context), exact
