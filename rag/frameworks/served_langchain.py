"""LangChain over `kvloom serve`: `ChatOpenAI` with documents."""

from __future__ import annotations

from typing import Any

try:
    from langchain_core.language_models import LanguageModelInput
    from langchain_core.outputs import ChatGenerationChunk
    from langchain_openai import ChatOpenAI
except ImportError as error:
    raise ImportError(
        'kvloom.rag.frameworks.served_langchain needs LangChain\'s OpenAI client: pip install "kvloom[langchain]" '
        "langchain-openai",
        name=error.name,
    ) from error

from .served import request_documents


class ServedChat(ChatOpenAI):
    """`ChatOpenAI` for kvloom's service: `invoke(messages, documents=retriever.invoke(question))`, streaming too.

    Documents are LangChain's or texts; `by_id=True` beside them sends their ids, for documents that the service holds.
    Reused tokens are `usage_metadata["input_token_details"]["cache_read"]`. The rest is
    `response_metadata["token_usage"]["kvloom"]`, also at the end of a stream, where `ChatOpenAI` drops it.
    """

    stream_usage: bool | None = True

    def _get_request_payload(
        self, input_: LanguageModelInput, *, stop: list[str] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        documents, by_id = kwargs.pop("documents", None), kwargs.pop("by_id", False)
        if documents:
            kwargs["extra_body"] = {**(kwargs.get("extra_body") or {}), **request_documents(documents, by_id=by_id)}
        payload: dict[str, Any] = super()._get_request_payload(input_, stop=stop, **kwargs)
        return payload

    def _convert_chunk_to_generation_chunk(
        self, chunk: dict[str, Any], default_chunk_class: type, base_generation_info: dict[str, Any] | None
    ) -> ChatGenerationChunk | None:
        made = super()._convert_chunk_to_generation_chunk(chunk, default_chunk_class, base_generation_info)
        facts = (chunk.get("usage") or {}).get("kvloom")
        if made is not None and facts:
            made.message.response_metadata["token_usage"] = {"kvloom": facts}
        return made
