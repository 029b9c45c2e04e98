"""RULER's tasks in the language of the bundled model: contexts with statements in them, questions with exact answers.

After Hsieh et al., RULER (arXiv 2404.06654), whose definitions say how many keys, values, hops and repetitions there
are and how answers are scored: the share of references that is answered. What differs, and why:

- Statements and questions are those that the model was trained on (`reference/statements.py`), with names that it never
  saw; values have four digits. UUIDs (its third single and third multi-key needle) are not in that language.
- A task with several answers asks for each behind the context by a question of its own: the model answers one at a
  time. Several values of a key are attributes of several sorts.
- Variables are entities: a record (`Now consider X.` ... `Its code is 4821.`) is one hop over text, an alias one hop
  over names. A chain of four hops, RULER's own, is asked about at each of its five names.
- The model cannot name the common words of a list. Aggregation is measured on more words of the same list: to give each
  its probability is to have counted. `Task.continuation` holds them.
- RULER's two question sets need a model that understands English; they are left out.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, cycle, islice, pairwise

from ...evaluation.statements import (
    ATTRIBUTES,
    FOUR_DIGITS,
    alias,
    consider,
    draw_names,
    draw_value,
    fact,
    its,
    question,
)

RETRIEVAL = ("single_filler", "single_text", "multi_key", "only_needles", "multi_value", "multi_query")
TRACKING = ("records", "aliases", "alias_chain")
AGGREGATION = ("common_words", "frequent_words")
ONE_QUESTION = RETRIEVAL[:4]
KINDS = (*RETRIEVAL, *TRACKING, *AGGREGATION)
RULER_NAMES = {
    "single_filler": "niah_single_1",
    "single_text": "niah_single_2",
    "multi_key": "niah_multikey_1",
    "only_needles": "niah_multikey_2",
    "multi_value": "niah_multivalue",
    "multi_query": "niah_multiquery",
    "records": "vt, one hop over text",
    "aliases": "vt, one hop over names",
    "alias_chain": "vt",
    "common_words": "cwe",
    "frequent_words": "fwe",
}
FILLER = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)  # RULER's own
KEYS, VALUES, HOPS, CHAINS = 4, 4, 4, 4
OTHER_ATTRIBUTES = tuple(a for a in ATTRIBUTES if a not in FOUR_DIGITS)
COMMON_WORDS, COMMON_TIMES, OTHER_TIMES = 10, 30, 3
ZIPF_EXPONENT = 2.0
CONTINUED_WORDS = 8
_NAMES_IN_NEEDLES = 1000  # with one attribute; held-out names are not many more


@dataclass(frozen=True, slots=True)
class Task:
    """One context and what is asked behind it.

    Attributes
    ----------
    asked : questions and the exact text that must follow each; the score is the share of them answered.
    continuation : of an aggregation task, what follows in its list.
    """

    kind: str
    context: str
    asked: tuple[tuple[str, str], ...] = ()
    continuation: str = ""


class RulerSampler:
    """Tasks of about a given length, over held-out names.

    Parameters
    ----------
    sentences : natural text to hide statements in, taken in order from a random start.
    words : to make lists of, all different.
    count_tokens : tokens in a text.
    """

    def __init__(self, sentences: Sequence[str], words: Sequence[str], count_tokens: Callable[[str], int]) -> None:
        if not sentences or len(words) < 2 * COMMON_WORDS:
            raise ValueError(
                f"{len(sentences)} sentences and {len(words)} words; expected some and at least {2 * COMMON_WORDS}"
            )
        self._sentences, self._words, self._count_tokens = sentences, words, count_tokens

    def sample(self, rng: random.Random, kind: str, *, context_tokens: int) -> Task:
        """One task whose context takes at most `context_tokens` tokens, and little less.

        Raises
        ------
        ValueError : there is no such kind, or its statements do not fit.
        """
        if kind not in KINDS:
            raise ValueError(f"kind is {kind!r}; expected one of {', '.join(KINDS)}")
        if kind in AGGREGATION:
            return self._list(rng, kind, context_tokens)
        if kind == "only_needles":
            return self._needles(rng, context_tokens)
        statements, asked = _stated(rng, kind)
        body = FILLER if kind == "single_filler" else self._sentences
        start = 0 if kind == "single_filler" else rng.randrange(len(body))
        return Task(kind, self._hidden(rng, statements, islice(cycle(body), start, None), context_tokens), asked)

    def _hidden(self, rng: random.Random, statements: Sequence[str], body: Iterable[str], tokens: int) -> str:
        """Sentences filling `tokens` tokens, the statements spread among them in their order."""
        left = tokens - sum(map(self._count_tokens, statements)) - 1
        if left < 0:
            raise ValueError(f"{len(statements)} statements do not fit into {tokens} tokens; give more")
        text: list[str] = []
        for sentence in body:
            left -= self._count_tokens(f" {sentence}")
            if left < 0:
                break
            text.append(f" {sentence}")
        places = sorted(rng.randrange(len(text) + 1) for _ in statements)
        for shift, (place, statement) in enumerate(zip(places, statements, strict=True)):
            text.insert(place + shift, statement)
        return "".join(text) + "\n"

    def _needles(self, rng: random.Random, tokens: int) -> Task:
        """Nothing but facts, of as many names as fit, one of which is asked for."""
        facts: list[tuple[str, str, str]] = []
        left = tokens - 1
        for attribute in rng.sample(FOUR_DIGITS, len(FOUR_DIGITS)):
            for name in draw_names(rng, _NAMES_IN_NEEDLES, held_out=True):
                value = draw_value(rng, attribute)
                left -= self._count_tokens(fact(attribute, name, value))
                if left < 0:
                    break
                facts.append((attribute, name, value))
        if not facts:
            raise ValueError(f"no fact fits into {tokens} tokens; give more")
        rng.shuffle(facts)
        attribute, name, value = rng.choice(facts)
        context = "".join(fact(*each) for each in facts) + "\n"
        return Task("only_needles", context, ((question(attribute, name), f" {value}."),))

    def _list(self, rng: random.Random, kind: str, tokens: int) -> Task:
        """Words without numbers, which would be most of the tokens."""
        words = rng.sample(self._words, len(self._words))
        draw = _common_words if kind == "common_words" else _frequent_words
        items = [f" {word}" for word in draw(rng, words, tokens + CONTINUED_WORDS)]
        sizes = list(accumulate(map(self._count_tokens, items)))
        fit = bisect_right(sizes, tokens)
        return Task(kind, "".join(items[:fit]), (), "".join(items[fit : fit + CONTINUED_WORDS]))


def _stated(rng: random.Random, kind: str) -> tuple[list[str], tuple[tuple[str, str], ...]]:
    """Statements in their order, and what is asked about them."""
    attribute = rng.choice(FOUR_DIGITS)
    if kind in ("single_filler", "single_text", "multi_key", "multi_query"):
        names = draw_names(rng, 1 if kind.startswith("single") else KEYS, held_out=True)
        facts = [(attribute, name, draw_value(rng, attribute)) for name in names]
        asked = facts if kind == "multi_query" else facts[:1]
        return _shuffled(rng, [fact(*each) for each in facts]), _questions(asked)
    if kind == "multi_value":
        (name,) = draw_names(rng, 1, held_out=True)
        attributes = [attribute, *rng.sample(OTHER_ATTRIBUTES, VALUES - 1)]
        facts = [(each, name, draw_value(rng, each)) for each in attributes]
        return _shuffled(rng, [fact(*each) for each in facts]), _questions(facts)
    if kind == "records":
        facts = [(attribute, name, draw_value(rng, attribute)) for name in draw_names(rng, CHAINS, held_out=True)]
        statements = [text for _, name, value in facts for text in (consider(name), its(attribute, value))]
        return statements, _questions(facts)
    if kind == "aliases":
        names = draw_names(rng, 2 * CHAINS, held_out=True)
        pairs = [(old, new, draw_value(rng, attribute)) for old, new in zip(names[::2], names[1::2], strict=True)]
        first = [alias(new, old) for old, new, _ in pairs]
        return first + [fact(attribute, new, value) for _, new, value in pairs], _questions(
            [(attribute, old, value) for old, _, value in pairs]
        )
    names = draw_names(rng, HOPS + 1, held_out=True)
    value = draw_value(rng, attribute)
    links = [alias(new, old) for old, new in pairwise(names)]
    return [*links, fact(attribute, names[-1], value)], _questions([(attribute, name, value) for name in names])


def _questions(facts: Sequence[tuple[str, str, str]]) -> tuple[tuple[str, str], ...]:
    return tuple((question(attribute, name), f" {value}.") for attribute, name, value in facts)


def _shuffled(rng: random.Random, statements: list[str]) -> list[str]:
    rng.shuffle(statements)
    return statements


def _common_words(rng: random.Random, words: Sequence[str], count: int) -> list[str]:
    """Ten words thirty times each among words that come three times; in a short list half of it is the ten."""
    times = min(COMMON_TIMES, max(1, count // (2 * COMMON_WORDS)))
    others = max(0, count - COMMON_WORDS * times)
    drawn = [word for word in words[:COMMON_WORDS] for _ in range(times)]
    drawn += islice((word for word in cycle(words[COMMON_WORDS:]) for _ in range(OTHER_TIMES)), others)
    return _shuffled(rng, drawn)


def _frequent_words(rng: random.Random, words: Sequence[str], count: int) -> list[str]:
    """Words drawn by Zipf's law."""
    shares = [rank**-ZIPF_EXPONENT for rank in range(1, len(words) + 1)]
    return rng.choices(words, shares, k=count)
