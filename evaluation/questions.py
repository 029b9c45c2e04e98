"""Questions in tokens, for any model: a lead, documents, what is asked behind them, the answer that must follow.

Every kind serves fusion (documents that were computed alone) and plain contexts (`Question.context`) alike:

- `needle`, `needle8`, `record`, `alias`: statements in natural text, see `TaskSampler`;
- `astride`: facts cut by the borders between documents;
- `extract`: twelve facts asked for at once, as lines of names and values (arXiv 2604.08426: methods that pass needles
  fail what is asked of many places);
- `multihop`: questions over excerpts of Wikipedia passages (MuSiQue), by their gold answer;
- `text`: a book in pieces, continued.

What methods are tuned on and what they are checked with differs by construction: the two splits share no name, no
passage, no page and no seed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import chain, pairwise

from transformers import PreTrainedTokenizerBase

from .models import token_counter
from .passages import CHECK, load_heldout, load_questions, sentences
from .passages import Question as PassageQuestion
from .tasks import SINGLE, Task, TaskSampler
from .wording import Frame, frame_of

MULTIHOP, TEXT, OWN = "multihop", "text", "question"
KINDS = (*TaskSampler.ALL_KINDS, MULTIHOP, TEXT)
ANSWERED = TaskSampler.ALL_KINDS
"""Kinds whose answers are right or wrong; of the others NLL and KL tell."""
_READ_TOKENS, _CONTINUED_TOKENS = 16, 32  # of a continued text: what stands for a question, and for an answer


@dataclass(frozen=True, slots=True)
class Question:
    """One question in tokens.

    Attributes
    ----------
    number : of the context within its kind; equal numbers give equal questions.
    lead : what stands before everything: a BOS, or the chat template's beginning, or nothing.
    documents : at least two, each of which may have been computed alone behind `lead`.
    question : what follows them: the question, the end of the user's turn, the begin of the assistant's.
    begun : the begin of the answer, given to the model.
    answer : the gold answer.
    values : spans (first, behind the last) of `answer` that are right or wrong as a whole: one value or several.
    group : questions of one group are about the same text and not independent of one another.
    """

    kind: str
    number: int
    lead: tuple[int, ...]
    documents: tuple[tuple[int, ...], ...]
    question: tuple[int, ...]
    begun: tuple[int, ...]
    answer: tuple[int, ...]
    values: tuple[tuple[int, int], ...]
    group: str

    @property
    def context(self) -> list[int]:
        """Lead and documents."""
        return [*self.lead, *chain.from_iterable(self.documents)]

    @property
    def asked(self) -> list[int]:
        """What follows the context up to the gold answer: never empty."""
        return [*self.question, *self.begun]

    @property
    def forced(self) -> list[int]:
        """What follows the context under teacher forcing; the last `len(answer)` of its outputs predict the answer."""
        return [*self.asked, *self.answer[:-1]]


class QuestionSampler:
    """Questions for the model of a tokenizer, of one split.

    Parameters
    ----------
    split : `check` for what is reported, `tune` for what a method's parameters are chosen on.
    context_tokens : of the documents together, about; they end at sentences, somewhat short of it.
    num_documents : of equal length, about.
    seed : another one gives other questions.
    frame : what stands around them; None for the tokenizer's own.
    texts : natural text to hide statements in; None for the bundled passages.

    Raises
    ------
    ValueError : too few tokens, no such split, or `texts` hold no whole sentence to hide a statement in.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        split: str = CHECK,
        context_tokens: int = 1024,
        num_documents: int = 8,
        seed: int = 0,
        frame: Frame | None = None,
        texts: Sequence[str] | None = None,
    ) -> None:
        if num_documents < 2 or context_tokens < 16 * num_documents:
            raise ValueError(
                f"{context_tokens} tokens in {num_documents} documents; expected at least 2, of at least 16 tokens each"
            )
        self.frame = frame or frame_of(tokenizer)
        self.split, self.context_tokens, self.num_documents, self.seed = split, context_tokens, num_documents, seed
        self._tokenizer = tokenizer
        self._passages = load_questions(split)
        if texts is None:
            texts = [passage for asked in self._passages for passage in asked.passages]
        self._filler = sentences(texts)
        if not self._filler:
            raise ValueError("the documents hold no whole sentences to hide facts in; ask about them with a question")

    def sample(self, kind: str, number: int) -> Question:
        """One question of a kind.

        Raises
        ------
        ValueError : there is no such kind.
        """
        return self.about_context(kind, number, most=1)[0]

    def about_context(self, kind: str, number: int, *, most: int) -> list[Question]:
        """Questions about one context, which form a group: at most so many, and one where the kind has one answer.

        Raises
        ------
        ValueError : there is no such kind.
        """
        if kind not in KINDS:
            raise ValueError(f"kind is {kind!r}; expected one of {', '.join(KINDS)}")
        rng = random.Random(f"{self.split} {self.seed} {kind} {number}")
        if kind == TEXT:
            return [self._continued(rng, number)]
        if kind == MULTIHOP:
            return [self._multihop(rng, number)]
        return self._about_facts(rng, kind, number, most=most)

    def extraction(self, number: int, *, singles: int) -> list[Question]:
        """`sample("extract", number)`, then questions about so many single facts of its context (`needle12`)."""
        rng = random.Random(f"{self.split} {self.seed} extract {number}")
        return self._about_facts(rng, "extract", number, singles=singles)

    def samples(self, kind: str, numbers: Sequence[int] | range) -> list[Question]:
        """Several questions of a kind."""
        return [self.sample(kind, number) for number in numbers]

    def contexts(self, kind: str, count: int, *, most: int = 1, first: int = 0) -> list[list[Question]]:
        """`count` questions of a kind, by the contexts that they are about.

        Parameters
        ----------
        most : questions about one context, see `about_context`.
        first : number of the first context.
        """
        found: list[list[Question]] = []
        while (missing := count - sum(map(len, found))) > 0:
            found.append(self.about_context(kind, first + len(found), most=min(most, missing)))
        return found

    def about(self, documents: Sequence[str], question: str) -> Question:
        """A user's own question about documents; nobody knows its answer."""
        texts = [text if text.endswith("\n") else f"{text}\n" for text in documents]
        asked = self.frame.wording.own_question.format(question=question)
        placed = tuple(tuple(self._document_ids(text)) for text in texts)
        return self._framed(Task(OWN, (), asked, ""), 0, placed, group=OWN)

    def _about_facts(
        self, rng: random.Random, kind: str, number: int, *, most: int = 1, singles: int = 0
    ) -> list[Question]:
        sizes = {"context_tokens": self.context_tokens, "num_documents": self.num_documents}
        tasks = self._tasks.samples(rng, kind, **sizes, most=most, singles=singles)
        documents = tuple(tuple(self._document_ids(text)) for text in tasks[0].documents)
        return [self._framed(task, number, documents, group=f"{kind} {number}") for task in tasks]

    @cached_property
    def _tasks(self) -> TaskSampler:
        counted = cache(token_counter(self._tokenizer))
        return TaskSampler(self._filler, counted, wording=self.frame.wording, split=self.split)

    @cached_property
    def _answerable(self) -> list[tuple[int, PassageQuestion]]:
        """Questions whose gold answer stands in a passage; passages are cut, and some answers with them."""
        return [
            (place, asked)
            for place, asked in enumerate(self._passages)
            if any(asked.answers[0].lower() in passage for passage in asked.passages)
        ]

    @cached_property
    def _prose(self) -> list[int]:
        return self._document_ids("\n".join(load_heldout(self.split)))

    def _multihop(self, rng: random.Random, number: int) -> Question:
        place, asked = self._answerable[number % len(self._answerable)]
        answer = asked.answers[0].lower()
        holding = [passage for passage in asked.passages if answer in passage]
        others = [passage for passage in asked.passages if answer not in passage]
        rng.shuffle(holding)
        rng.shuffle(others)
        chosen = [*holding, *others][: self.num_documents]
        rng.shuffle(chosen)
        width = self.context_tokens // self.num_documents
        documents = tuple(self._excerpt(passage, answer, width) for passage in chosen)
        words = self.frame.wording
        question = words.text_question.format(question=asked.question)
        task = Task(MULTIHOP, (), question, answer, words.text_begun, ("", f" {answer}"))
        return self._framed(task, number, documents, group=f"{MULTIHOP} {place}")

    def _excerpt(self, passage: str, answer: str, width: int) -> tuple[int, ...]:
        """`width` tokens of a passage, its beginning or what stands around the answer, ended by a new line."""
        found = passage.find(answer)
        start = max(0, found - 2 * width) if found >= 0 else 0  # tokens have about four characters
        if start:
            start = passage.find(" ", start) + 1
        ids = self._document_ids(passage[start:])[: width - 1]
        return (*ids, *self._document_ids("\n"))

    def _continued(self, rng: random.Random, number: int) -> Question:
        ids, behind = self._prose, _READ_TOKENS + _CONTINUED_TOKENS
        width = min(self.context_tokens, len(ids) - behind - 1)
        start = rng.randrange(len(ids) - width - behind)
        size = width // self.num_documents
        bounds = [start + size * i for i in range(self.num_documents)] + [start + width]
        documents = tuple(tuple(ids[a:b]) for a, b in pairwise(bounds))
        read, continued = ids[bounds[-1] :][:_READ_TOKENS], ids[bounds[-1] + _READ_TOKENS :][:_CONTINUED_TOKENS]
        group = f"{TEXT} {start // 4096}"  # pieces of the same pages
        return Question(TEXT, number, self.frame.lead_ids, documents, tuple(read), (), tuple(continued), (), group)

    def _framed(self, task: Task, number: int, documents: tuple[tuple[int, ...], ...], *, group: str) -> Question:
        question = self._ids(task.question + self.frame.closing)
        begun = self._ids(task.begun)
        answer: list[int] = []
        values = []
        for place, part in enumerate(task.parts):
            first = len(answer)
            answer += self._ids(part)
            if place % 2:
                values.append((first, len(answer)))
        return Question(
            task.kind,
            number,
            self.frame.lead_ids,
            documents,
            tuple(question),
            tuple(begun),
            tuple(answer),
            tuple(values) if task.kind in (*ANSWERED, SINGLE) else (),
            group,
        )

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids if text else []
        return ids

    def _document_ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, verbose=False
        ).input_ids
        return ids
