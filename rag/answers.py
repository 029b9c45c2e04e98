"""What a corpus gives back: answers with their sources and what was reused, and what adding documents did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..connectors.hf.answering import Finish, Prompt, Usage, chat_prompt
from .catalog import Passage
from .files import Skipped

INSTRUCTIONS = "Answer the question in one short sentence. Use only the passages above."


@dataclass(frozen=True, slots=True)
class Added:
    """What `Corpus.add` did.

    Attributes
    ----------
    added, updated, unchanged, removed : ids of documents.
    passages : passages that are new.
    computed_tokens : tokens whose KV was computed now.
    skipped : files that were left out.
    """

    added: tuple[str, ...] = ()
    updated: tuple[str, ...] = ()
    unchanged: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    passages: int = 0
    computed_tokens: int = 0
    skipped: tuple[Skipped, ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer and what it rests on.

    Attributes
    ----------
    sources : passages in the order in which the model read them; empty if none fits the question.
    finish : `"stop"`, or `"length"` if the answer was cut.
    usage : tokens reused and recomputed, and the seconds until the first token (`prompt_s`).
    is_exact : whether every token's KV is that of a full prefill of this context.
    """

    text: str
    sources: tuple[Passage, ...]
    finish: Finish
    usage: Usage
    is_exact: bool


def question_prompt(tokenizer: Any, question: str, instructions: str) -> Prompt:
    """What stands around the passages: the model's chat template if it has one, otherwise lines `Q:` and `A:`."""
    if getattr(tokenizer, "chat_template", None):
        text = f"\n{instructions}\nQuestion: {question}" if instructions else f"\nQuestion: {question}"
        return chat_prompt(tokenizer, [{"role": "user", "content": text}], has_documents=True)
    return Prompt(f"\nQ: {question}\nA:")
