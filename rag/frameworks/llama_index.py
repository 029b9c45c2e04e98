"""LlamaIndex: a corpus as ingestion step, retriever, postprocessor, response synthesizer and LLM."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import asdict
from typing import Any, Self

try:
    from llama_index.core.base.base_retriever import BaseRetriever
    from llama_index.core.base.llms.types import (
        ChatMessage,
        ChatResponse,
        ChatResponseGen,
        CompletionResponse,
        CompletionResponseGen,
        LLMMetadata,
        MessageRole,
    )
    from llama_index.core.base.response.schema import Response
    from llama_index.core.bridge.pydantic import ConfigDict, Field
    from llama_index.core.callbacks import CallbackManager
    from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
    from llama_index.core.llms.custom import CustomLLM
    from llama_index.core.postprocessor.types import BaseNodePostprocessor
    from llama_index.core.schema import (
        BaseNode,
        MetadataMode,
        NodeRelationship,
        NodeWithScore,
        QueryBundle,
        RelatedNodeInfo,
        TextNode,
        TransformComponent,
    )
except ImportError as error:
    raise ImportError(
        'kvloom.rag.frameworks.llama_index needs LlamaIndex: pip install "kvloom[llamaindex]"', name=error.name
    ) from error

from ...connectors.hf.answering import Generation, Sampling
from ..answers import Answer
from ..catalog import Passage
from ..chat import chat_generation
from ..corpus import Corpus, passages_of
from ..pieces import pieces_of
from .synthesizer import TextSynthesizer


def as_node(passage: Passage) -> NodeWithScore:
    """A passage as LlamaIndex's node; its metadata stays out of the text that the model reads, which was computed."""
    metadata = {
        **passage.metadata,
        "document_id": passage.document_id,
        "start": passage.start,
        "stop": passage.stop,
        "source": passage.source,
    }
    node = TextNode(
        id_=f"{passage.document_id}#{passage.start}",
        text=passage.text,
        metadata=metadata,
        excluded_llm_metadata_keys=list(metadata),
        excluded_embed_metadata_keys=list(metadata),
        relationships={NodeRelationship.SOURCE: RelatedNodeInfo(node_id=passage.document_id)},
    )
    return NodeWithScore(node=node, score=passage.score)


class CorpusIngestion(TransformComponent):
    """A step of an `IngestionPipeline`: nodes are added to a corpus and their KV is computed; they pass unchanged."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    corpus: Corpus = Field(exclude=True)
    show_progress: bool = False

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        del kwargs
        if nodes:
            self.corpus.add(
                [node.get_content(metadata_mode=MetadataMode.LLM) for node in nodes],
                ids=[node.node_id for node in nodes],
                metadata=[node.metadata for node in nodes],
                whole=True,
                progress=self.show_progress,
            )
        return nodes


class CorpusRetriever(BaseRetriever):
    """The passages of a corpus that fit a question, in the order that reuses most.

    Parameters
    ----------
    similarity_top_k : how many.
    order_for_reuse : put passages first whose KV in that context is stored; False keeps the order of relevance.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        similarity_top_k: int = 5,
        order_for_reuse: bool = True,
        callback_manager: CallbackManager | None = None,
    ) -> None:
        self._corpus = corpus
        self._count = similarity_top_k
        self._is_ordered = order_for_reuse
        super().__init__(callback_manager=callback_manager)

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        found = self._corpus.search(query_bundle.query_str, passages=self._count)
        return [as_node(each) for each in (self._corpus.ordered(found) if self._is_ordered else found)]


class ReuseOrder(BaseNodePostprocessor):
    """Orders what any retriever found so that most of it is reused; adds and drops nothing."""

    corpus: Corpus = Field(exclude=True)

    @classmethod
    def class_name(cls) -> str:
        return "ReuseOrder"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        del query_bundle
        texts = [each.node.get_content(metadata_mode=MetadataMode.LLM) for each in nodes]
        return [nodes[i] for i in self.corpus.order_of(texts)]


class CorpusSynthesizer(TextSynthesizer):
    """Answers from nodes whose KV is fused, not computed again; `response.metadata["kvloom"]` says what was reused.

    Parameters
    ----------
    max_tokens : of an answer.
    streaming : give the answer in pieces.
    """

    def __init__(self, corpus: Corpus, *, max_tokens: int = 256, streaming: bool = False) -> None:
        self._corpus = corpus
        self._max_tokens = max_tokens
        super().__init__(llm=KVLoomLLM(corpus=corpus, max_tokens=max_tokens), streaming=streaming)

    def get_response(self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any) -> Any:
        del response_kwargs
        options = self._options(text_chunks)
        if not self._streaming:
            return _AnswerText(self._corpus.ask(query_str, **options))
        return (piece for piece in self._corpus.stream(query_str, **options) if isinstance(piece, str))

    async def aget_response(self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any) -> Any:
        del response_kwargs
        options = self._options(text_chunks)
        if not self._streaming:
            return _AnswerText(await asyncio.to_thread(self._corpus.ask, query_str, **options))
        return self._pieces_async(query_str, options)

    def _options(self, texts: Sequence[str]) -> dict[str, Any]:
        """For `Corpus.ask`: these texts, in this order."""
        return {"sources": passages_of(texts), "order_for_reuse": False, "max_new_tokens": self._max_tokens}

    async def _pieces_async(self, question: str, options: dict[str, Any]) -> AsyncGenerator[str, None]:
        async for piece in self._corpus.astream(question, **options):
            if isinstance(piece, str):
                yield piece

    def _prepare_response_output(self, response_str: Any, source_nodes: list[NodeWithScore]) -> Any:
        response = super()._prepare_response_output(response_str, source_nodes)
        if isinstance(response, Response) and isinstance(response_str, _AnswerText):
            answer = response_str.answer
            response.response = answer.text
            response.metadata = {
                **(response.metadata or {}),
                "kvloom": {**asdict(answer.usage), "is_exact": answer.is_exact, "finish": answer.finish},
            }
        return response


class KVLoomLLM(CustomLLM):
    """The corpus's own engine as an LLM. Give documents with a call: `llm.chat(messages, documents=[texts or nodes])`.

    They stand before the first user's words and are fused from cached KV. `raw["usage"]` has the counts.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    corpus: Corpus = Field(exclude=True)
    max_tokens: int = Field(default=256, ge=1)
    temperature: float = Field(default=0.0, ge=0.0)

    @classmethod
    def class_name(cls) -> str:
        return "KVLoomLLM"

    @property
    def metadata(self) -> LLMMetadata:
        layers = self.corpus.connector.layers
        return LLMMetadata(
            context_window=layers.max_tokens,
            num_output=self.max_tokens,
            is_chat_model=bool(getattr(self.corpus.connector.tokenizer, "chat_template", None)),
            model_name=layers.spec.model_id,
        )

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        generation = self._generation(messages, kwargs)
        text = self.corpus.run(generation)
        return ChatResponse(message=ChatMessage(role=MessageRole.ASSISTANT, content=text), raw=_raw(generation))

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        for text, delta, raw in self._growing(messages, kwargs):
            yield ChatResponse(message=ChatMessage(role=MessageRole.ASSISTANT, content=text), delta=delta, raw=raw)

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        del formatted
        generation = self._generation([ChatMessage(role=MessageRole.USER, content=prompt)], kwargs)
        text = self.corpus.run(generation)
        return CompletionResponse(text=text, raw=_raw(generation))

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        del formatted
        for text, delta, raw in self._growing([ChatMessage(role=MessageRole.USER, content=prompt)], kwargs):
            yield CompletionResponse(text=text, delta=delta, raw=raw)

    def _growing(
        self, messages: Sequence[ChatMessage], options: dict[str, Any]
    ) -> Iterator[tuple[str, str, dict[str, Any] | None]]:
        """Text so far, its last piece, and at the end what the answer took."""
        generation = self._generation(messages, options)
        text = ""
        for piece in pieces_of(generation, self.corpus.run):
            text += piece
            yield text, piece, None
        yield text, "", _raw(generation)

    def _generation(self, messages: Sequence[ChatMessage], options: dict[str, Any]) -> Generation:
        roles = {MessageRole.USER: "user", MessageRole.ASSISTANT: "assistant", MessageRole.SYSTEM: "system"}
        if wrong := [message.role for message in messages if message.role not in roles]:
            raise ValueError(f"a message has role {wrong[0]!r}; expected user, assistant or system")
        documents = [
            each if isinstance(each, str) else each.get_content(metadata_mode=MetadataMode.LLM)
            for each in options.get("documents") or ()
        ]
        sampling = Sampling(
            options.get("max_tokens") or self.max_tokens,
            options.get("temperature", self.temperature),
            stop=tuple(options.get("stop") or ()),
        )
        said = [{"role": roles[message.role], "content": message.content or ""} for message in messages]
        return chat_generation(self.corpus, said, documents, sampling)


class _AnswerText(str):
    """An answer's text on its way through LlamaIndex, which passes on texts only."""

    __slots__ = ("answer",)
    answer: Answer

    def __new__(cls, answer: Answer) -> Self:
        text = super().__new__(cls, answer.text)
        text.answer = answer
        return text


def _raw(generation: Generation) -> dict[str, Any]:
    return {
        "usage": {**asdict(generation.usage), "total_tokens": generation.usage.prompt_tokens
                  + generation.usage.completion_tokens},
        "finish_reason": generation.finish,
        "is_exact": generation.is_exact,
    }  # fmt: skip
