"""How a model is asked: its chat template where it has one, and the words of the statements in a context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ..connectors.identity.requests import chat_parts, lead_of
from .statements import FOUR_DIGITS


@dataclass(frozen=True, slots=True)
class Wording:
    """The sentences that state a fact, a record or an alias, and the question about one; as `str.format` templates.

    Attributes
    ----------
    attributes : of four digits, one of which a context is about.
    head, tail : the two halves of a fact, between which a document border may fall.
    consider, its : a record: the second sentence is worthless without the first.
    alias : another name for an entity.
    question, begun, answer : what is asked, how the answer is begun for the model, and what then must follow.
    list_question, list_begun, list_indent : asks for every fact of a context; the answer's lines are `name: value`.
    text_question, text_begun : asks a question in plain words, for an answer of a few.
    own_question : a user's own question.
    """

    attributes: Sequence[str]
    head: str
    tail: str
    consider: str
    its: str
    alias: str
    question: str
    begun: str
    answer: str
    list_question: str
    list_begun: str
    list_indent: str
    text_question: str
    text_begun: str
    own_question: str


STATEMENTS = Wording(
    attributes=FOUR_DIGITS,
    head=" The {attribute} of {name}",
    tail=" is {value}.",
    consider=" Now consider {name}.",
    its=" Its {attribute} is {value}.",
    alias=" {new_name} is the alias of {name}.",
    question="\nQ: What is the {attribute} of {name}?\nA:",
    begun="",
    answer=" {value}.",
    list_question="\nQ: What is the {attribute} of each name?\nA:",
    list_begun="",
    list_indent=" ",
    text_question="\nQ: {question}\nA:",
    text_begun="",
    own_question="\nQ: {question}\nA:",
)
"""The bundled model's own language, which base models understand, too."""

INSTRUCTIONS = Wording(
    attributes=("special magic number",),
    head=" The {attribute} for {name}",
    tail=" is {value}.",
    consider=" Now consider {name}.",
    its=" Its {attribute} is {value}.",
    alias=" {new_name} is another name for {name}.",
    question="\nWhat is the {attribute} for {name} mentioned in the text above?",
    begun="The {attribute} for {name} mentioned in the text is",
    answer=" {value}.",
    list_question="\nList every {attribute} mentioned in the text above, one on each line, as name: number.",
    list_begun="Here is every {attribute}:\n",
    list_indent="",
    text_question="\nAnswer the question based on the text above. Give only the answer.\nQuestion: {question}",
    text_begun="Answer:",
    own_question="\n{question}",
)
"""RULER's needles (arXiv 2404.06654), for models that follow instructions."""


@dataclass(frozen=True, slots=True)
class Frame:
    """What stands around a context and a question, for one tokenizer.

    Attributes
    ----------
    lead_ids : tokens before the context: the chat template's text before the user's words, or a BOS, or nothing.
    closing : text behind the question: the end of the user's turn and the begin of the assistant's.
    is_chat : whether it is a chat template.
    wording : for models of this kind.
    """

    lead_ids: tuple[int, ...]
    closing: str
    is_chat: bool
    wording: Wording


PLAIN = Frame((), "", False, STATEMENTS)
"""For a model without a chat template; its lead is the tokenizer's."""


def frame_of(tokenizer: PreTrainedTokenizerBase) -> Frame:
    """The frame for a tokenizer: by its chat template if it has one that can be taken apart, plain otherwise."""
    parts = chat_parts(tokenizer)
    if parts is None:
        return Frame(lead_of(tokenizer), "", False, STATEMENTS)
    opening, closing = parts
    lead_ids = tuple(tokenizer(opening, add_special_tokens=False, verbose=False).input_ids)
    return Frame(lead_ids, closing, True, INSTRUCTIONS)
