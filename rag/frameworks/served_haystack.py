"""Haystack over `kvloom serve`: documents of a pipeline go into the request of its OpenAI generator."""

# Without `from __future__ import annotations`: Haystack reads the types of inputs from the signatures.

from typing import Any

try:
    from haystack import Document, component
except ImportError as error:
    raise ImportError(
        'kvloom.rag.frameworks.served_haystack needs Haystack: pip install "kvloom[haystack]"', name=error.name
    ) from error

from .served import request_documents


@component
class DocumentsInRequest:
    """Connects a retriever's `documents` with the `generation_kwargs` of `OpenAIChatGenerator`.

    The reply's `meta["usage"]` counts reused tokens (`prompt_tokens_details.cached_tokens`) and has what kvloom says of
    the rest (`kvloom`), also in streams.

    Parameters
    ----------
    by_id : send ids in place of texts; the service holds the documents.
    generation_kwargs : further ones, such as `max_tokens`.
    """

    def __init__(self, by_id: bool = False, generation_kwargs: dict[str, Any] | None = None) -> None:
        self.by_id = by_id
        self.generation_kwargs = generation_kwargs

    @component.output_types(generation_kwargs=dict[str, Any])
    def run(self, documents: list[Document]) -> dict[str, dict[str, Any]]:
        given = dict(self.generation_kwargs or {})
        body = {**(given.pop("extra_body", None) or {}), **request_documents(documents, by_id=self.by_id)}
        return {"generation_kwargs": {"stream_options": {"include_usage": True}, **given, "extra_body": body}}
