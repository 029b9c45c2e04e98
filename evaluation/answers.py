"""Scores of answers: right or not, their loss, how far the distribution is from full attention's; with intervals."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ..connectors.hf.generation import cache_argument
from .intervals import Floats, paired_bootstrap
from .questions import Question, QuestionSampler

KNOWN_RATIO = 0.5  # below it the exact model does not know a kind, and a loss would say nothing
QUESTIONS, LIMIT_S = 6, 60.0
_FIRST = 10**6 + 1  # numbers of questions that are measured nowhere


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer, its tokens given one by one (teacher forcing).

    Attributes
    ----------
    group : of the question, see there.
    right : whether greedy decoding gives the gold answer, word for word: each of its tokens is the most likely one
        behind those before it. None for kinds without right and wrong answers.
    values_right : share of the values that greedy decoding gives behind the gold answer so far; None likewise.
    nll : of the gold answer, nats a token.
    kl : of each of its tokens' distributions to full attention's, nats, mean.
    """

    kind: str
    number: int
    group: str
    right: bool | None
    values_right: float | None
    nll: float
    kl: float


def score_answer(question: Question, logits: Tensor, exact: Tensor) -> Answer:
    """`score_answers` of one."""
    return score_answers(question, [logits], exact)[0]


def score_answers(question: Question, answers: Iterable[Tensor], exact: Tensor) -> list[Answer]:
    """Score distributions `[A, V]` of the gold answer's tokens, beside those of full attention.

    Without a gold answer they are those of the first token, `[1, V]`, and `nll` is NaN.
    """
    p = exact.double().log_softmax(-1)
    weights = p.exp()
    return [_scored(question, logits, p, weights) for logits in answers]


def _scored(question: Question, logits: Tensor, p: Tensor, weights: Tensor) -> Answer:
    """Beside full attention's logarithms of probabilities `p` and these probabilities."""
    gold = torch.tensor(question.answer, dtype=torch.int64, device=logits.device)
    if not logits.shape == p.shape or max(1, len(gold)) != len(logits):
        raise ValueError(
            f"logits have shapes {list(logits.shape)} and {list(p.shape)}; expected [{max(1, len(gold))}, V] twice"
        )
    q = logits.double().log_softmax(-1)
    kl = float((weights * (p - q)).sum(-1).clamp(min=0).mean())
    if not len(gold):
        return Answer(question.kind, question.number, question.group, None, None, math.nan, kl)
    hits = (q.argmax(-1) == gold).tolist()
    rights = [all(hits[first:last]) for first, last in question.values]
    return Answer(
        question.kind,
        question.number,
        question.group,
        all(hits) if rights else None,
        sum(rights) / len(rights) if rights else None,
        float(-q.gather(-1, gold[:, None]).mean()),
        kl,
    )


@torch.no_grad()
def full_logits(model: PreTrainedModel, question: Question) -> Tensor:
    """Distributions `[A, V]` of the answer's tokens under full attention, by the model's own forward pass."""
    ids = torch.tensor([[*question.context, *question.forced]], device=model.device)
    logits: Tensor = model(ids, logits_to_keep=len(question.answer), use_cache=False).logits[0]
    return logits.float()


@torch.no_grad()
def cached_logits(model: PreTrainedModel, keys: Tensor, values: Tensor, questions: Sequence[Question]) -> list[Tensor]:
    """The same for questions about one context, behind its KV: `[A, V]` of each question, in one forward pass.

    Shorter questions are padded behind their end, where none of their tokens sees the padding.

    Parameters
    ----------
    keys, values : `[L, H, S, D]` and `[L, H, S, Dv]`, of the context.
    """
    rows = [question.forced for question in questions]
    wanted = [max(1, len(question.answer)) for question in questions]
    width = max(map(len, rows))
    kept = max(width - len(row) + count for row, count in zip(rows, wanted, strict=True))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.device)
    layers = [(k.expand(len(rows), *k.shape), v.expand(len(rows), *v.shape)) for k, v in zip(keys, values, strict=True)]
    logits: Tensor = model(ids, logits_to_keep=kept, **{cache_argument(): DynamicCache(layers)}).logits
    ends = [len(row) - width + kept for row in rows]
    return [of[end - count : end].float() for of, end, count in zip(logits, ends, wanted, strict=True)]


@torch.no_grad()
def context_kv(model: PreTrainedModel, context: Sequence[int]) -> tuple[Tensor, Tensor]:
    """KV of a context under full attention, by the model's own forward pass: `[L, H, S, D]` and `[L, H, S, Dv]`."""
    cache = DynamicCache()
    model(torch.tensor([list(context)], device=model.device), logits_to_keep=1, **{cache_argument(): cache})
    layers: list[Any] = list(cache.layers)  # dynamic ones, whose tensors are there now
    return torch.cat([layer.keys for layer in layers]), torch.cat([layer.values for layer in layers])


def shares_right(
    model: PreTrainedModel,
    sampler: QuestionSampler,
    kinds: Iterable[str],
    *,
    questions: int = QUESTIONS,
    limit_s: float = LIMIT_S,
    advance: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """Share of values that the model gives right under full attention, by kind, from a few questions.

    A kind is decided as soon as the questions that are left cannot change whether it is known. Time is shared among
    the kinds; whoever has none left is judged by what was asked, at least one question.

    Parameters
    ----------
    questions : of each kind, at most.
    limit_s : for all kinds together, exceeded by at most a question of each.
    advance : called after each kind.
    """
    wanted = list(kinds)
    end_s, found = time.monotonic() + limit_s, {}
    for place, kind in enumerate(wanted):
        now = time.monotonic()
        stop_s = now + max(0.0, end_s - now) / (len(wanted) - place)
        rights: list[float] = []
        for number in range(questions):
            question = sampler.sample(kind, _FIRST + number)
            logits = full_logits(model, question)
            rights.append(score_answer(question, logits, logits).values_right or 0.0)
            least = sum(rights) / questions  # if all others were wrong
            most = least + (questions - len(rights)) / questions
            if least >= KNOWN_RATIO or most < KNOWN_RATIO or time.monotonic() >= stop_s:
                break
        found[kind] = sum(rights) / len(rights)
        advance()
    return found


def known_kinds(shares: dict[str, float]) -> tuple[str, ...]:
    """Kinds of which a model answers at least `KNOWN_RATIO`."""
    return tuple(kind for kind, share in shares.items() if share >= KNOWN_RATIO)


def by_group(answers: Sequence[Answer], name: str) -> list[float]:
    """Means of `right`, `values_right`, `nll` or `kl` over the questions of each group, in the order of the groups."""
    groups: dict[str, list[float]] = {}
    for answer in answers:
        value = getattr(answer, name)
        groups.setdefault(answer.group, []).append(math.nan if value is None else float(value))
    return [sum(values) / len(values) for values in groups.values()]


def mean_of(answers: Sequence[Answer], name: str) -> tuple[float, float, float]:
    """Mean with its 95 % interval, groups drawn anew."""
    return paired_bootstrap(by_group(answers, name), statistic=_mean)


def gap_closed(
    naive: Sequence[Answer], full: Sequence[Answer], other: Sequence[Answer], name: str = "nll"
) -> tuple[float, float, float]:
    """Share of the gap between naive reuse (0) and full prefill (1) that another method closes, on the same questions.

    With a paired bootstrap interval; NaN where there is no gap. `name` as for `by_group`.
    """
    return paired_bootstrap(*(by_group(answers, name) for answers in (naive, full, other)), statistic=_share_closed)


def ratio_of(a: Sequence[Answer], b: Sequence[Answer], name: str = "kl") -> tuple[float, float, float]:
    """Mean of `a` over that of `b`, on the same questions, with a paired bootstrap interval."""
    return paired_bootstrap(by_group(a, name), by_group(b, name), statistic=_ratio)


def difference_of(a: Sequence[Answer], b: Sequence[Answer], name: str = "nll") -> tuple[float, float, float]:
    """Mean of `a` less that of `b`, on the same questions, with a paired bootstrap interval."""
    return paired_bootstrap(by_group(a, name), by_group(b, name))


def _mean(values: Floats) -> float:
    return float(values.mean())


def _share_closed(naive: Floats, full: Floats, other: Floats) -> float:
    gap = float(naive.mean() - full.mean())
    return float(naive.mean() - other.mean()) / gap if gap else math.nan


def _ratio(a: Floats, b: Floats) -> float:
    return float(np.divide(a.mean(), b.mean()))
