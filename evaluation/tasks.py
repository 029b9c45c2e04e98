"""Test tasks of the reference model: documents of natural text with statements in them, one question, one answer."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .statements import FOUR_DIGITS, alias, consider, draw_names, draw_value, fact, its, question


@dataclass(frozen=True, slots=True)
class Task:
    """One question over documents. `answer` is the exact text that must follow `question`, without its full stop."""

    kind: str
    documents: tuple[str, ...]
    question: str
    answer: str


class TaskSampler:
    """Test tasks over held-out names and natural text.

    Parameters
    ----------
    sentences : natural sentences to hide the statements in, taken in order from a random start.
    count_tokens : tokens in a text.
    """

    KINDS = ("needle", "needle8", "record", "alias")

    def __init__(self, sentences: Sequence[str], count_tokens: Callable[[str], int]) -> None:
        if not sentences:
            raise ValueError("sentences is empty: tasks need natural text to hide their statements in")
        self._sentences = sentences
        self._count_tokens = count_tokens

    def _document(self, rng: random.Random, statements: Sequence[str], tokens: int) -> str:
        """Natural sentences filling `tokens` tokens, the statements spread among them in their order."""
        budget = tokens - sum(self._count_tokens(s) for s in statements) - 1
        start = rng.randrange(len(self._sentences))
        body: list[str] = []
        while budget > 0:
            sentence = " " + self._sentences[(start + len(body)) % len(self._sentences)]
            budget -= self._count_tokens(sentence)
            if budget < 0 and body:
                break
            body.append(sentence)
        places = sorted(rng.randrange(len(body) + 1) for _ in statements)
        for shift, (place, statement) in enumerate(zip(places, statements, strict=True)):
            body.insert(place + shift, statement)
        return "".join(body) + "\n"

    def sample(self, rng: random.Random, kind: str, *, context_tokens: int, num_documents: int = 8) -> Task:
        """One task whose documents hold about `context_tokens` tokens together.

        `needle` and `needle8` state 1 and 8 facts. `record` names an entity in every document but the last and
        states its attribute in the next one, so that every answer needs two documents. `alias` states the aliases in
        the first half of the documents and the facts in the second half.
        """
        if kind not in self.KINDS:
            raise ValueError(f"kind is {kind!r}; expected one of {', '.join(self.KINDS)}")
        if num_documents < 2:
            raise ValueError(f"num_documents is {num_documents}; expected at least 2")
        attribute = rng.choice(FOUR_DIGITS)
        statements: list[list[str]] = [[] for _ in range(num_documents)]
        asked: list[tuple[str, str]] = []
        if kind in ("needle", "needle8"):
            for name in draw_names(rng, 1 if kind == "needle" else 8, held_out=True):
                value = draw_value(rng, attribute)
                statements[rng.randrange(num_documents)].append(fact(attribute, name, value))
                asked.append((name, value))
        elif kind == "record":
            names = draw_names(rng, num_documents - 1, held_out=True)
            for i, name in enumerate(names):
                value = draw_value(rng, attribute)
                statements[i].append(consider(name))
                statements[i + 1].append(its(attribute, value))
                asked.append((name, value))
        else:
            half = num_documents // 2
            names = draw_names(rng, 2 * half, held_out=True)
            for i, (name, new_name) in enumerate(zip(names[:half], names[half:], strict=True)):
                value = draw_value(rng, attribute)
                statements[i].append(alias(new_name, name))
                statements[half + i].append(fact(attribute, new_name, value))
                asked.append((name, value))
        name, value = rng.choice(asked)
        documents = tuple(self._document(rng, s, context_tokens // num_documents) for s in statements)
        return Task(kind, documents, question(attribute, name), value)
