"""How far a model with approximate keys and values is from the exact one: losses, distributions, tasks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..calibration.certificate import Figure
from .answers import KNOWN_RATIO
from .forcing import Approximation, ForcedModel, split
from .intervals import Floats, paired_bootstrap, paired_share_difference
from .questions import ANSWERED, QuestionSampler

KINDS = ("needle", "record", "alias")
AUTO_KINDS = (*KINDS, "extract")
AUTO, NONE = "auto", "none"
_FIRST_TRIALS = 20  # after which that is asked


@dataclass(frozen=True, slots=True)
class Limits:
    """Largest permitted losses, each at the bad end of its 95 % interval; None: no limit.

    One set for all codecs: 5 % of perplexity is about what 3 bits cost a small model and 2 bits a large one (KVQuant,
    table 1), and 5 points of exact match are what 200 trials can tell from none.

    Attributes
    ----------
    perplexity_increase : relative.
    kl : nats a token.
    task_loss : points of exact match, as a share.
    """

    perplexity_increase: float | None = 0.05
    kl: float | None = 0.1
    task_loss: float | None = 0.05

    def __post_init__(self) -> None:
        for limit in (self.perplexity_increase, self.kl, self.task_loss):
            Figure(0.0, 0.0, 0.0, limit=limit)  # refused here, and not after the measurement


@dataclass(frozen=True, slots=True, eq=False)
class Trial:
    """A task in tokens: context `[C]`, the question behind it, the answer that must follow.

    Attributes
    ----------
    values : spans of the answer that count each; none: it is right or wrong as a whole.
    """

    context: Tensor
    question: Tensor
    answer: Tensor
    values: tuple[tuple[int, int], ...] = ()


@dataclass(slots=True, eq=False)
class Measurement:
    """One approximation beside the exact model, on the same windows and trials, in their order.

    Attributes
    ----------
    forced, prefix : mean losses of a window, exact and approximate, and its mean KL, in nats a token: with every key
        and value approximate (`ForcedModel.forced`; empty if `approximation` is not layerwise), and of the second half
        of a window over an approximate first half.
    right : by kind of task, whether the exact and the approximate model answered, trial by trial; of tasks with several
        values the share of them.
    skipped : kinds that the exact model does not know, and how often it answered.
    """

    approximation: Approximation
    forced: list[tuple[float, float, float]] = field(default_factory=list)
    prefix: list[tuple[float, float, float]] = field(default_factory=list)
    right: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    skipped: dict[str, float] = field(default_factory=dict)

    def figures(self, limits: Limits = Limits()) -> dict[str, Figure]:
        """Each loss with its interval: windows drawn anew for language, Agresti & Min for tasks, trials drawn anew for
        tasks with several values.
        """
        found: dict[str, Figure] = {}
        for prefix, rows in (("", self.forced), ("prefix_", self.prefix)):
            if rows:
                exact, other, kl = np.array(rows).T
                increase = paired_bootstrap(other, exact, statistic=_perplexity_increase)
                found[f"{prefix}perplexity_increase"] = Figure(*increase, "share", limits.perplexity_increase)
                found[f"{prefix}kl"] = Figure(*paired_bootstrap(kl, statistic=_mean), "nats/token", limits.kl)
        for kind, pairs in self.right.items():
            found[f"{kind}_loss"] = Figure(*_loss(pairs), "share", limits.task_loss)
        return found


def _loss(pairs: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    exact, other = zip(*pairs, strict=True)
    if all(share in (0, 1) for share in (*exact, *other)) or exact == other:
        return paired_share_difference([share == 1 for share in exact], [share == 1 for share in other])
    return paired_bootstrap(exact, other)


def measure(
    model: ForcedModel,
    approximations: Sequence[Approximation],
    *,
    windows: Sequence[Sequence[int]] = (),
    trials: Mapping[str, Sequence[Trial]] | None = None,
    skip_unknown: bool = False,
    advance: Callable[[str], object] = lambda _: None,
) -> list[Measurement]:
    """Every approximation on every window and trial, beside the exact model.

    Parameters
    ----------
    windows : token sequences, see `token_windows`; at least 4 tokens each.
    trials : by kind of task, see `task_trials`.
    skip_unknown : leave out tasks of which the exact model answers fewer than `KNOWN_RATIO`; noticed early.
    advance : called with `windows` or the kind after each.
    """
    found = [Measurement(approximation) for approximation in approximations]
    for window in windows:
        _language(model, torch.tensor(list(window)), found)
        advance("windows")
    for kind, of_kind in (trials or {}).items():
        known: list[float] = []
        for number, trial in enumerate(of_kind, start=1):
            known.append(_answer(model, kind, trial, found))
            advance(kind)
            is_to_be_asked = number in (min(_FIRST_TRIALS, len(of_kind)), len(of_kind))
            if skip_unknown and is_to_be_asked and sum(known) < KNOWN_RATIO * number:
                for one in found:
                    del one.right[kind]
                    one.skipped[kind] = sum(known) / number
                break
    return found


def task_kinds(names: Sequence[str]) -> Sequence[str]:
    """Kinds of task by name: `auto` is `AUTO_KINDS`, of which a model's unknown ones are left out; `none` is none.

    Raises
    ------
    ValueError : a kind is unknown.
    """
    if list(names) == [NONE]:
        return ()
    if list(names) == [AUTO]:
        return AUTO_KINDS
    if unknown := [kind for kind in names if kind not in ANSWERED]:
        known = ", ".join((AUTO, NONE, *ANSWERED))
        raise ValueError(f"tasks are {', '.join(unknown)}; expected some of {known}")
    return names


def task_trials(
    tokenizer: PreTrainedTokenizerBase, kind: str, *, count: int, context_tokens: int, seed: int = 0
) -> list[Trial]:
    """Tasks with known answers, hidden in the bundled text, for any model: see `QuestionSampler`, split `check`."""
    sampler = QuestionSampler(tokenizer, context_tokens=context_tokens, seed=seed)
    return [
        Trial(
            torch.tensor(question.context),
            torch.tensor(question.asked),
            torch.tensor(question.answer),
            question.values if len(question.values) > 1 else (),
        )
        for question in sampler.samples(kind, range(count))
    ]


def _language(model: ForcedModel, ids: Tensor, found: Sequence[Measurement]) -> None:
    inputs, targets, half = ids[:-1], ids[1:], len(ids) // 2
    whole, exact = model.prefill(inputs)
    first = replace(split(whole, half)[0], extras=whole.extras)
    behind = model.continued(first, inputs[half:])  # the same operations as below, not those of the whole window
    for one in found:
        if one.approximation.is_layerwise:
            one.forced.append(_means(model, exact, model.forced(inputs, one.approximation), targets))
        over = model.continued(one.approximation.approximate(first), inputs[half:], one.approximation.attend)
        one.prefix.append(_means(model, behind, over, targets[half:]))


def _means(model: ForcedModel, exact: Tensor, other: Tensor, targets: Tensor) -> tuple[float, float, float]:
    exact_loss, other_loss, kl = (each.mean().item() for each in model.compare(exact, other, targets))
    return exact_loss, other_loss, kl


def _answer(model: ForcedModel, kind: str, trial: Trial, found: Sequence[Measurement]) -> float:
    """Record which models answered; returns whether the exact one did, or its share of the values.

    The answer's own tokens are given: greedy decoding gives the answer if and only if each of its tokens is the most
    likely one behind those before it.
    """
    context, _ = model.prefill(trial.context)
    rest = torch.cat((trial.question, trial.answer[:-1]))
    exact = _share(model, model.continued(context, rest), trial)
    for one in found:
        over = model.continued(one.approximation.approximate(context), rest, one.approximation.attend)
        one.right.setdefault(kind, []).append((exact, _share(model, over, trial)))
    return exact


def _share(model: ForcedModel, outputs: Tensor, trial: Trial) -> float:
    hits = model.hits(outputs[-len(trial.answer) :], trial.answer)
    if not trial.values:
        return bool(hits.all())
    return sum(bool(hits[first:last].all()) for first, last in trial.values) / len(trial.values)


def _perplexity_increase(other: Floats, exact: Floats) -> float:
    return math.expm1(float(other.mean() - exact.mean()))


def _mean(values: Floats) -> float:
    return float(values.mean())
