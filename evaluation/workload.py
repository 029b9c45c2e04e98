"""Cases for the demo and the fusion benchmark: documents, a question and, where it is known, the answer."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .passages import load_questions, sentences
from .tasks import TaskSampler
from .wording import PLAIN, Frame


@dataclass(frozen=True, slots=True)
class Case:
    """One question over documents; `answer` is the exact text that must follow, None if it is not known."""

    kind: str
    documents: tuple[str, ...]
    question: str
    answer: str | None = None


def task_cases(
    texts: Sequence[str] | None,
    count_tokens: Callable[[str], int],
    *,
    kind: str,
    count: int,
    context_tokens: int,
    num_documents: int = 8,
    seed: int = 0,
    frame: Frame = PLAIN,
) -> list[Case]:
    """Tasks of one kind (see `TaskSampler`), their statements hidden in natural text.

    Parameters
    ----------
    texts : the natural text; None for the bundled Wikipedia passages.
    count_tokens : tokens in a text.
    frame : how the model is asked; the chat template's beginning is the lead, and not in the documents.

    Raises
    ------
    ValueError : `texts` hold no whole sentence to hide a statement in.
    """
    if texts is None:
        texts = [passage for question in load_questions() for passage in question.passages]
    found = sentences(texts)
    if not found:
        raise ValueError("the documents hold no whole sentences to hide facts in; ask about them with --question TEXT")
    sampler = TaskSampler(found, count_tokens, wording=frame.wording)
    rng = random.Random(f"{kind} {seed}")
    tasks = [
        sampler.sample(rng, kind, context_tokens=context_tokens, num_documents=num_documents) for _ in range(count)
    ]
    return [Case(t.kind, t.documents, t.question + frame.closing + t.begun, "".join(t.parts)) for t in tasks]


def own_case(documents: Sequence[str], question: str, *, frame: Frame = PLAIN) -> Case:
    """A user's own question; nobody knows its answer."""
    return Case("question", tuple(documents), frame.wording.own_question.format(question=question) + frame.closing)


def question_cases(count: int, *, passages: int = 10, frame: Frame = PLAIN) -> list[Case]:
    """Real multi-hop questions over up to ten Wikipedia passages each (MuSiQue); a small model cannot answer them."""
    return [
        own_case(q.passages[:passages], q.question, frame=frame) for q in load_questions()[:count]
    ]  # answers are free text, so only the agreement with full prefill is measured
