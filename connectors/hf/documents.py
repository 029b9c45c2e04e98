"""Documents as callers give them: texts, or the document objects of RAG frameworks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import Any, TypeAlias

Document: TypeAlias = "str | Any"
"""A text, or an object that has one, see `document_texts`."""

# Where frameworks keep a document's text: LangChain, Haystack, LlamaIndex.
_TEXT_ATTRIBUTES = ("page_content", "content", "text")
_SHOWN_CHARACTERS = 40


def document_texts(documents: object) -> list[str]:
    """The texts of a list of documents.

    Parameters
    ----------
    documents : any ordered collection of texts, or of objects with a text in `page_content` (LangChain), `content`
        (Haystack), `text` or `get_content()` (LlamaIndex).

    Raises
    ------
    TypeError : no such collection, or an entry that is no document; the message names its index.
    ValueError : no documents, or one that is empty or no valid Unicode.
    """
    if isinstance(documents, str | bytes | bytearray) or _text_in(documents) is not None:
        raise TypeError(f"documents is one document, {_shown(documents)}; expected a list of documents")
    if isinstance(documents, Mapping | AbstractSet) or not isinstance(documents, Iterable):
        raise TypeError(f"documents is {_shown(documents)}; expected a list of documents, in the order of the context")
    texts = [document_text(document, f"documents[{i}]") for i, document in enumerate(documents)]
    if not texts:
        raise ValueError("documents is empty; give at least one text")
    return texts


def document_text(document: object, name: str = "document") -> str:
    """The text of one document, see `document_texts`; errors call it `name`."""
    text = _text_in(document)
    if text is None:
        raise TypeError(
            f"{name} is {_shown(document)}; expected a text (str), or an object with its text in page_content, "
            "content, text or get_content()"
        )
    if not text.strip():
        raise ValueError(f"{name} is empty; leave it out")
    return valid_text(text, name)


def valid_text(text: object, name: str) -> str:
    """`text` as a plain `str`.

    Raises
    ------
    TypeError : it is no text.
    ValueError : it has a lone surrogate, which no tokenizer can read.
    """
    if not isinstance(text, str):
        raise TypeError(f"{name} is {_shown(text)}; expected a text (str)")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} has a lone surrogate, {text[error.start]!r}, at character {error.start}; replace it, for instance "
            "by text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')"
        ) from None
    return str(text)


def _text_in(document: Any) -> str | None:
    if isinstance(document, str):
        return document
    if isinstance(document, type):
        return None
    for name in _TEXT_ATTRIBUTES:
        if isinstance(text := getattr(document, name, None), str):
            return text
    content = getattr(document, "get_content", None)
    text = content() if callable(content) else None
    return text if isinstance(text, str) else None


def _shown(value: object) -> str:
    """A short description of a wrong argument."""
    if value is None:
        return "None"
    kind = type(value).__name__
    if isinstance(value, str | bytes | bytearray | int | float):
        text = repr(value)
        return f"the {kind} {text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + '...'}"
    return f"of type {kind}"
