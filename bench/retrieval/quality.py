"""Measures what choosing tokens costs a model: attention, distributions, answers; beside the bytes of a step."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import nll_loss
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...connectors.identity.requests import lead_of
from ...evaluation.answers import KNOWN_RATIO
from ...evaluation.models import token_counter
from ...evaluation.passages import load_heldout, load_questions, sentences
from ...retrieval.selector import Selector
from .attention_quality import AttentionProbe, AttentionQuality
from .contexts import SINK_TOKENS, WINDOW_TOKENS, Context, ContextModel, fill
from .methods import EXACT, ONLY, TEXT, Factory
from .ruler import KINDS, ONE_QUESTION, RulerSampler, Task

CONTINUED_TOKENS = 8
ANSWER, QUESTION = "answer", "question"
"""From where on tokens go through selectors: from the question's last token, whose output is the answer's first one, as
where a prompt is prefilled densely; or from the question's first token, as where a context is cached and asked about
later."""
_WORD_TOKENS = 2  # of a word in a list, at most
_FIRST_CONTEXTS = 4  # after which a kind that the dense model does not know is given up


@dataclass(frozen=True, slots=True)
class Scope:
    """How much is measured.

    Attributes
    ----------
    contexts : by length in tokens, contexts of each kind; twice as many of kinds that ask one question of each.
    ratios : tokens attended to for each KV head at the last step, everything pinned counted, over those of the context.
    question_ratios : those of `ratios` at which questions go through selectors, too.
    """

    contexts: Mapping[int, int]
    ratios: Sequence[float] = (0.015, 0.03, 0.06, 0.12)
    question_ratios: Sequence[float] = (0.03, 0.06)
    kinds: Sequence[str] = (TEXT, *KINDS)

    def count(self, tokens: int, kind: str) -> int:
        """Contexts of this kind and length."""
        return self.contexts[tokens] * (2 if kind in ONE_QUESTION else 1)

    @property
    def total(self) -> int:
        """All contexts."""
        return sum(self.count(tokens, kind) for tokens in self.contexts for kind in self.kinds)


@dataclass(frozen=True, slots=True)
class Outcome:
    """One trial through one kind of selector within one budget.

    Attributes
    ----------
    tokens, kind, number : of the context.
    since : `ANSWER` or `QUESTION`.
    right, dense_right : whether greedy decoding answers; None where there is no answer to give.
    kl : of the next token's distribution to dense attention's, nats, mean over steps.
    loss, dense_loss : of the targets, nats a token.
    select_bytes, attend_bytes, dense_bytes : read by a step in all layers, means over steps.
    quality : of attention along the dense pass; not looked at in every trial.
    """

    tokens: int
    kind: str
    number: int
    method: str
    ratio: float
    since: str
    right: bool | None
    dense_right: bool | None
    kl: float
    loss: float
    dense_loss: float
    select_bytes: float
    attend_bytes: float
    dense_bytes: float
    quality: AttentionQuality | None

    @property
    def read_ratio(self) -> float:
        """Bytes read, over those that dense attention reads."""
        return (self.select_bytes + self.attend_bytes) / self.dense_bytes


@dataclass(frozen=True, slots=True)
class Build:
    """The indexes of all layers of one context: seconds until they have answered once, those of its prefill, bytes."""

    tokens: int
    kind: str
    method: str
    build_s: float
    prefill_s: float
    held_bytes: int

    def row(self) -> dict[str, object]:
        """Plain values by name."""
        return {"what": "build", **asdict(self)}


@dataclass(frozen=True, slots=True)
class Found:
    """Everything measured; `floors`: share of answers of dense attention by (tokens, kind) where it is too low to
    compare with.
    """

    outcomes: Sequence[Outcome]
    builds: Sequence[Build]
    floors: Mapping[tuple[int, str], float]

    def __add__(self, other: Found) -> Found:
        floors = {**self.floors, **other.floors}
        return Found([*self.outcomes, *other.outcomes], [*self.builds, *other.builds], floors)


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    factories: Mapping[str, Factory],
    scope: Scope,
    *,
    seed: int = 0,
    advance: Callable[[str], object] = lambda _: None,
) -> Found:
    """Every selector within every budget behind the same densely prefilled contexts.

    Parameters
    ----------
    factories : by the name to show; holds the exact one.
    advance : called with the kind after each context.
    """
    layers, tasks = ContextModel(model), TaskTokens(tokenizer)
    if EXACT not in factories:
        raise ValueError(f"no selector is named {EXACT!r}; what the others should have found cannot be said")
    outcomes: list[Outcome] = []
    builds: list[Build] = []
    floors: dict[tuple[int, str], float] = {}
    for tokens in scope.contexts:
        for kind in scope.kinds:
            count = scope.count(tokens, kind)
            of_kind = {name: make for name, make in factories.items() if kind in ONLY.get(name, (kind,))}
            dense_right: list[bool] = []
            for number in range(count):
                if (tokens, kind) not in floors:
                    ids, asked = tasks.sample(kind, tokens, random.Random(f"{seed} {kind} {tokens} {number}"))
                    about = _Case(tokens, kind, number, ids, asked)
                    found, built = _measure_context(layers, about, of_kind, scope)
                    outcomes += found
                    builds += built
                    dense_right += [o.dense_right for o in found if o.dense_right is not None and o.since == ANSWER]
                    is_to_be_judged = number + 1 in (min(_FIRST_CONTEXTS, count), count)
                    if is_to_be_judged and dense_right and sum(dense_right) < KNOWN_RATIO * len(dense_right):
                        floors[tokens, kind] = sum(dense_right) / len(dense_right)
                advance(kind)
    return Found(outcomes, builds, floors)


@dataclass(frozen=True, slots=True, eq=False)
class _Case:
    """A context in tokens, and (question, answer) pairs behind it; a continuation is an answer to an empty question."""

    tokens: int
    kind: str
    number: int
    ids: Tensor
    asked: Sequence[tuple[Tensor, Tensor]]


def _measure_context(
    model: ContextModel, case: _Case, factories: Mapping[str, Factory], scope: Scope
) -> tuple[list[Outcome], list[Build]]:
    began_s = time.perf_counter()
    context = model.dense(case.ids)
    prefill_s = time.perf_counter() - began_s
    built: dict[str, list[Selector]] = {}
    builds = []
    for name, make in factories.items():
        began_s = time.perf_counter()
        built[name] = [
            fill(make(layer, model.shape, SINK_TOKENS), context, layer) for layer in range(context.keys.shape[0])
        ]
        build_s = time.perf_counter() - began_s
        held_bytes = sum(selector.held_bytes for selector in built[name])
        builds.append(Build(case.tokens, case.kind, name, build_s, prefill_s, held_bytes))
    outcomes: list[Outcome] = []
    for place, (question, answer) in enumerate(case.asked):
        # whole questions are ten times as many tokens: the first of a context stands for all
        for since in (ANSWER, QUESTION) if len(question) and not place else (ANSWER,):
            trial = _Trial(model, case, context, question, answer, since)
            outcomes += trial.outcomes(built, scope, with_quality=place == 0 and since == ANSWER)
    return outcomes, builds


class _Trial:
    """A question and its answer behind a context: some of it computed densely, the rest by every selector."""

    def __init__(
        self, model: ContextModel, case: _Case, context: Context, question: Tensor, answer: Tensor, since: str
    ) -> None:
        self._model, self._case, self._context, self._since = model, case, context, since
        self._is_answer = len(question) > 0
        split = len(question) - 1 if self._is_answer and since == ANSWER else 0
        asked, rest = question[:split], question[split:]
        self._behind = model.dense(asked, context) if len(asked) else None
        self._forced = torch.cat((rest, answer[:-1]))
        self._targets = answer if self._is_answer else answer[1:]
        self._own = model.dense(self._forced, context, self._behind)
        self._dense = model.logits(self._own.hidden[-len(self._targets) :]).double().log_softmax(-1)

    def outcomes(self, built: Mapping[str, Sequence[Selector]], scope: Scope, *, with_quality: bool) -> list[Outcome]:
        probe = None
        if with_quality:
            probe = AttentionProbe(self._model, self._context, self._behind, self._own, built[EXACT])
        ratios = scope.ratios if self._since == ANSWER else scope.question_ratios
        return [self._outcome(name, of_layers, ratio, probe) for name, of_layers in built.items() for ratio in ratios]

    def _outcome(self, name: str, of_layers: Sequence[Selector], ratio: float, probe: AttentionProbe | None) -> Outcome:
        model, context, tail = self._model, self._context, self._own.first + len(self._own) - len(self._context)
        budget = max(0, int(ratio * len(context)) - SINK_TOKENS - WINDOW_TOKENS - tail)
        hidden, reads = model.sparse(self._forced, context, self._behind, of_layers, budget)
        logits = model.logits(hidden[-len(self._targets) :]).double().log_softmax(-1)
        kl = (self._dense.exp() * (self._dense - logits)).sum(-1).clamp(min=0).mean()
        right, dense_right = (bool(torch.equal(p.argmax(-1), self._targets)) for p in (logits, self._dense))
        loss, dense_loss = (float(nll_loss(p, self._targets)) for p in (logits, self._dense))
        steps, last = len(reads), self._own.first + len(self._own)
        return Outcome(
            self._case.tokens,
            self._case.kind,
            self._case.number,
            name,
            ratio,
            self._since,
            right if self._is_answer else None,
            dense_right if self._is_answer else None,
            float(kl),
            loss,
            dense_loss,
            sum(read.select_bytes for read in reads) / steps,
            sum(read.attend_bytes for read in reads) / steps,
            sum(model.dense_bytes(n) for n in range(last - steps + 1, last + 1)) / steps,
            None if probe is None else probe.measure(of_layers, budget),
        )


class TaskTokens:
    """Tasks in the tokens of a model, with natural text from the package around them: the second halves of what there
    is, since selectors may have learned from the first.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer, self._lead = tokenizer, list(lead_of(tokenizer))
        count = cache(token_counter(tokenizer))
        passages, prose = load_questions(), load_heldout()
        first, found = (
            sentences(passage for asked in half for passage in asked.passages)
            for half in (passages[: len(passages) // 2], passages[len(passages) // 2 :])
        )
        known = set(first)
        found = [sentence for sentence in found if sentence not in known]  # questions share passages
        words = sorted({word for sentence in found for word in re.findall(r"\b[a-z]{4,9}\b", sentence)})
        self._sampler = RulerSampler(found, [word for word in words if count(f" {word}") <= _WORD_TOKENS], count)
        self._prose = self._encode("\n".join(prose[len(prose) // 2 :])).tolist()

    def sample(self, kind: str, tokens: int, rng: random.Random) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """A context of at most `tokens` tokens, and questions with answers behind it; an empty question is followed by
        more of the same.
        """
        if kind == TEXT:
            return self._text(tokens, rng)
        task: Task = self._sampler.sample(rng, kind, context_tokens=tokens - len(self._lead))
        ids = torch.cat((torch.tensor(self._lead, dtype=torch.int64), self._encode(task.context)))
        pairs = [(self._encode(question), self._encode(answer)) for question, answer in task.asked]
        if task.continuation:
            pairs.append((self._encode(""), self._encode(task.continuation)))
        return ids, pairs

    def _text(self, tokens: int, rng: random.Random) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        width = tokens - len(self._lead)
        start = rng.randrange(len(self._prose) - width - CONTINUED_TOKENS)
        ids = torch.tensor([*self._lead, *self._prose[start : start + width + CONTINUED_TOKENS]])
        return ids[:tokens], [(self._encode(""), ids[tokens:])]

    def _encode(self, text: str) -> Tensor:
        ids = self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return torch.tensor(ids, dtype=torch.int64)
