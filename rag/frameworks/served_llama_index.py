"""LlamaIndex over `kvloom serve`: a response synthesizer that sends nodes as documents."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Sequence
from typing import Any, Self

try:
    from llama_index.core.base.llms.types import (
        ChatMessage,
        ChatResponse,
        ChatResponseAsyncGen,
        ChatResponseGen,
        MessageRole,
    )
    from llama_index.core.base.response.schema import Response
    from llama_index.core.llms import LLM
    from llama_index.core.schema import NodeWithScore
except ImportError as error:
    raise ImportError(
        'kvloom.rag.frameworks.served_llama_index needs LlamaIndex: pip install "kvloom[llamaindex]"', name=error.name
    ) from error

from ..answers import INSTRUCTIONS
from .served import request_documents
from .synthesizer import TextSynthesizer

_WITH_USAGE = {"include_usage": True}


class ServedSynthesizer(TextSynthesizer):
    """Answers from nodes over kvloom's service: they go along as documents, not as a part of the prompt's text.

    `response.metadata["kvloom"]` says what was reused, `metadata["usage"]` has OpenAI's counts; a stream's are there
    when it has ended.

    Parameters
    ----------
    llm : an OpenAI client of LlamaIndex, `OpenAILike(api_base=..., api_key=..., model=..., is_chat_model=True)`.
    instructions : what stands between the documents and the question.
    streaming : give the answer in pieces.
    """

    def __init__(self, llm: LLM, *, instructions: str = INSTRUCTIONS, streaming: bool = False) -> None:
        self._instructions = instructions
        super().__init__(llm=llm, streaming=streaming)

    def get_response(self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any) -> Any:
        del response_kwargs
        said, body = self._messages(query_str), request_documents(text_chunks)
        if not self._streaming:
            return _Text(self._llm.chat(said, extra_body=body))
        return _Pieces(self._llm.stream_chat(said, extra_body=body, stream_options=_WITH_USAGE))

    async def aget_response(self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any) -> Any:
        del response_kwargs
        said, body = self._messages(query_str), request_documents(text_chunks)
        if not self._streaming:
            return _Text(await self._llm.achat(said, extra_body=body))
        return _AsyncPieces(await self._llm.astream_chat(said, extra_body=body, stream_options=_WITH_USAGE))

    def _messages(self, question: str) -> list[ChatMessage]:
        text = f"\n{self._instructions}\nQuestion: {question}" if self._instructions else f"\nQuestion: {question}"
        return [ChatMessage(role=MessageRole.USER, content=text)]

    def _prepare_response_output(self, response_str: Any, source_nodes: list[NodeWithScore]) -> Any:
        response = super()._prepare_response_output(response_str, source_nodes)
        if isinstance(response_str, _Text | _Pieces | _AsyncPieces):
            response_str.facts.update(response.metadata or {})
            response.metadata = response_str.facts
            if isinstance(response, Response):
                response.response = str(response_str)
        return response


class _Text(str):
    """A whole answer on its way through LlamaIndex, which passes on texts only."""

    __slots__ = ("facts",)
    facts: dict[str, Any]

    def __new__(cls, response: ChatResponse) -> Self:
        text = super().__new__(cls, response.message.content or "")
        text.facts = {}
        _learn(text.facts, response)
        return text

    def __str__(self) -> str:
        return self[:]


class _Pieces(Generator[str, None, None]):
    """An answer in pieces; `facts` are filled in when the service has sent them."""

    def __init__(self, responses: ChatResponseGen) -> None:
        self._responses: Any = responses
        self.facts: dict[str, Any] = {}

    def send(self, value: None) -> str:
        del value
        response = next(self._responses)
        _learn(self.facts, response)
        return response.delta or ""

    def throw(self, *error: Any) -> str:
        self._responses.close()
        return super().throw(*error)


class _AsyncPieces(AsyncGenerator[str, None]):
    """The same, asynchronous."""

    def __init__(self, responses: ChatResponseAsyncGen) -> None:
        self._responses: Any = responses
        self.facts: dict[str, Any] = {}

    async def asend(self, value: None) -> str:
        del value
        response = await anext(self._responses)
        _learn(self.facts, response)
        return response.delta or ""

    async def athrow(self, *error: Any) -> str:
        await self._responses.aclose()
        return await super().athrow(*error)


def _learn(facts: dict[str, Any], response: ChatResponse) -> None:
    """Takes over what the service has counted, if this part of its answer says it."""
    usage = getattr(response.raw, "usage", None)
    if usage is not None:
        counts = usage.model_dump(exclude_none=True)
        facts["kvloom"] = counts.pop("kvloom", {})
        facts["usage"] = counts
