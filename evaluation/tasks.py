"""Tasks with known answers: documents of natural text with statements in them, a question, what must follow it."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from .statements import draw_names, draw_number
from .wording import STATEMENTS, Wording

EXTRACTED = 12  # facts that are asked for at once
SINGLE = f"needle{EXTRACTED}"  # kind of a question about one of them


@dataclass(frozen=True, slots=True)
class Task:
    """One question over documents.

    Attributes
    ----------
    answer : the value asked for; of `extract` all values.
    begun : how the answer is begun for the model.
    parts : the exact text that must follow, in pieces; those at odd places are values.
    """

    kind: str
    documents: tuple[str, ...]
    question: str
    answer: str
    begun: str = ""
    parts: tuple[str, ...] = ()


class TaskSampler:
    """Tasks over held-out names and natural text.

    Parameters
    ----------
    sentences : natural sentences to hide the statements in, taken in order from a random start.
    count_tokens : tokens in a text.
    wording : of statements and questions.
    split : whose names are drawn, `tune` or `check`; None for all held-out ones.
    """

    KINDS = ("needle", "needle8", "record", "alias")  # which the bundled model was trained on
    ALL_KINDS = (*KINDS, "astride", "extract")

    def __init__(
        self,
        sentences: Sequence[str],
        count_tokens: Callable[[str], int],
        *,
        wording: Wording = STATEMENTS,
        split: str | None = None,
    ) -> None:
        if not sentences:
            raise ValueError("sentences is empty: tasks need natural text to hide their statements in")
        self._sentences = sentences
        self._count_tokens = count_tokens
        self._wording = wording
        self._split = split

    def _document(
        self, rng: random.Random, statements: Sequence[str], tokens: int, *, begin: str = "", end: str = "\n"
    ) -> str:
        """Natural sentences filling `tokens` tokens, the statements spread among them in their order."""
        budget = tokens - sum(self._count_tokens(s) for s in (*statements, begin, end) if s)
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
        return begin + "".join(body) + end

    def sample(self, rng: random.Random, kind: str, *, context_tokens: int, num_documents: int = 8) -> Task:
        """One task, see `samples`."""
        return self.samples(rng, kind, context_tokens=context_tokens, num_documents=num_documents)[0]

    def samples(
        self,
        rng: random.Random,
        kind: str,
        *,
        context_tokens: int,
        num_documents: int = 8,
        most: int = 1,
        singles: int = 0,
    ) -> list[Task]:
        """Tasks over the same documents, which hold about `context_tokens` tokens together.

        `needle` and `needle8` state 1 and 8 facts. `record` names an entity in every document but the last and
        states its attribute in the next one, so that every answer needs two documents. `alias` states the aliases in
        the first half of the documents and the facts in the second half. `astride` cuts a fact at every border between
        documents: the name ends one, the value begins the next. `extract` states `EXTRACTED` facts and asks for all.

        Parameters
        ----------
        most : tasks, each about another fact; there are fewer where the documents state fewer.
        singles : of `extract`: so many tasks more, of the kind `SINGLE`, each about one of its facts.
        """
        if kind not in self.ALL_KINDS:
            raise ValueError(f"kind is {kind!r}; expected one of {', '.join(self.ALL_KINDS)}")
        if num_documents < 2:
            raise ValueError(f"num_documents is {num_documents}; expected at least 2")
        words, tokens = self._wording, context_tokens // num_documents
        attribute = rng.choice(words.attributes)
        statements: list[list[str]] = [[] for _ in range(num_documents)]
        ends, begins = ["\n"] * num_documents, [""] * num_documents
        asked: list[tuple[str, str]] = []

        def fact(name: str, value: str) -> str:
            return (words.head + words.tail).format(attribute=attribute, name=name, value=value)

        if kind in ("needle", "needle8"):
            for name, value in self._facts(rng, 1 if kind == "needle" else 8):
                statements[rng.randrange(num_documents)].append(fact(name, value))
                asked.append((name, value))
        elif kind == "extract":
            asked = list(self._facts(rng, EXTRACTED))
            places = sorted(rng.randrange(num_documents) for _ in asked)
            for place, (name, value) in zip(places, asked, strict=True):
                statements[place].append(fact(name, value))
        elif kind == "record":
            for i, (name, value) in enumerate(self._facts(rng, num_documents - 1)):
                statements[i].append(words.consider.format(name=name))
                statements[i + 1].append(words.its.format(attribute=attribute, value=value))
                asked.append((name, value))
        elif kind == "astride":
            for i, (name, value) in enumerate(self._facts(rng, num_documents - 1)):
                ends[i] = words.head.format(attribute=attribute, name=name)
                begins[i + 1] = words.tail.format(value=value)
                asked.append((name, value))
        else:
            half = num_documents // 2
            names = draw_names(rng, 2 * half, held_out=True, split=self._split)
            for i, (name, new_name) in enumerate(zip(names[:half], names[half:], strict=True)):
                value = draw_number(rng)
                statements[i].append(words.alias.format(new_name=new_name, name=name))
                statements[half + i].append(fact(new_name, value))
                asked.append((name, value))
        placed = zip(statements, begins, ends, strict=True)
        documents = tuple(self._document(rng, s, tokens, begin=begin, end=end) for s, begin, end in placed)
        if kind == "extract":
            extraction = self._extraction(documents, attribute, asked)
            chosen = rng.sample(asked, min(singles, len(asked)))
            return [extraction, *(self._about(documents, SINGLE, attribute, name, value) for name, value in chosen)]
        first = rng.choice(asked)
        chosen = [first, *(fact for fact in asked if fact != first)][:most]
        return [self._about(documents, kind, attribute, name, value) for name, value in chosen]

    def _about(self, documents: tuple[str, ...], kind: str, attribute: str, name: str, value: str) -> Task:
        words = self._wording
        question, begun = (text.format(attribute=attribute, name=name) for text in (words.question, words.begun))
        before, after = words.answer.split("{value}")
        return Task(kind, documents, question, value, begun, ("", before + value + after))

    def _facts(self, rng: random.Random, count: int) -> Iterator[tuple[str, str]]:
        for name in draw_names(rng, count, held_out=True, split=self._split):
            yield name, draw_number(rng)

    def _extraction(self, documents: tuple[str, ...], attribute: str, facts: Sequence[tuple[str, str]]) -> Task:
        words = self._wording
        parts: list[str] = []
        for name, value in facts:
            parts += [("\n" if parts else words.list_indent) + f"{name}:", f" {value}"]
        question, begun = (text.format(attribute=attribute) for text in (words.list_question, words.list_begun))
        return Task("extract", documents, question, " ".join(v for _, v in facts), begun, (*parts, "\n"))
