"""Documents in requests to `kvloom serve`, as any OpenAI client sends them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ...connectors.hf.documents import document_text

_IDS = ("id", "id_", "doc_id")


def request_documents(documents: Iterable[Any], *, by_id: bool = False) -> dict[str, Any]:
    """What an OpenAI client is given as `extra_body`: the documents that the model reads, in this order.

    The service stores the KV of texts that it has not seen: the next request over them, in any order, reuses it.

    Parameters
    ----------
    documents : texts, or objects of a RAG framework that have one.
    by_id : send ids in place of texts; the service holds the documents (`POST /v1/documents`).

    Raises
    ------
    TypeError, ValueError : an entry is no document, is empty, or has no id.
    """
    if isinstance(documents, str | bytes | Mapping):
        raise TypeError(f"documents is of type {type(documents).__name__}; expected a list of documents")
    given = list(documents)
    if not by_id:
        return {"documents": [{"text": document_text(each, f"documents[{i}]")} for i, each in enumerate(given)]}
    return {"documents": [{"id": _id_of(each, f"documents[{i}]")} for i, each in enumerate(given)]}


def _id_of(document: Any, name: str) -> str:
    if isinstance(document, str):
        return document
    node = getattr(document, "node", document)  # LlamaIndex's nodes with a score
    for attribute in _IDS:
        if isinstance(found := getattr(node, attribute, None), str) and found:
            return found
    raise ValueError(f"{name} has no id; send its text, or give it the id that the service knows")
