"""LangChain: a corpus as retriever, vector store, compressor and chat model."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from typing import Any, Self

try:
    from langchain_core.callbacks import (
        AsyncCallbackManagerForLLMRun,
        CallbackManagerForLLMRun,
        CallbackManagerForRetrieverRun,
        Callbacks,
    )
    from langchain_core.documents import BaseDocumentCompressor, Document
    from langchain_core.embeddings import Embeddings
    from langchain_core.language_models import BaseChatModel, LangSmithParams
    from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
    from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
    from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
    from langchain_core.retrievers import BaseRetriever
    from langchain_core.vectorstores import VectorStore
except ImportError as error:
    raise ImportError(
        'kvloom.rag.frameworks.langchain needs LangChain: pip install "kvloom[langchain]"', name=error.name
    ) from error

from pydantic import ConfigDict, Field, PrivateAttr

from ...connectors.hf.answering import Generation, Sampling
from ..catalog import Passage
from ..chat import chat_generation
from ..corpus import Corpus
from ..pieces import pieces_async, pieces_of

_ROLES = {"human": "user", "ai": "assistant", "system": "system"}


def as_document(passage: Passage) -> Document:
    """A passage as LangChain's document: the id of its document, behind it `#` and the place if it is only a part."""
    metadata = {
        **passage.metadata,
        "kvloom": {
            "document_id": passage.document_id,
            "passage": passage.number,
            "start": passage.start,
            "stop": passage.stop,
            **({"source": passage.source} if passage.source else {}),
        },
    }
    return Document(page_content=passage.text, metadata=metadata, id=f"{passage.document_id}#{passage.start}")


class CorpusRetriever(BaseRetriever):
    """The passages of a corpus that fit a question, in the order that reuses most.

    Parameters
    ----------
    corpus : whose passages.
    k : how many; `invoke(question, k=3)` overrides it.
    order_for_reuse : put passages first whose KV in that context is stored; False keeps the order of relevance.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    corpus: Corpus
    k: int = Field(default=5, ge=1)
    order_for_reuse: bool = True

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, k: int | None = None
    ) -> list[Document]:
        del run_manager
        found = self.corpus.search(query, passages=self.k if k is None else k)
        return [as_document(each) for each in (self.corpus.ordered(found) if self.order_for_reuse else found)]


class ReuseOrder(BaseDocumentCompressor):
    """Orders what any retriever found so that most of it is reused; adds and drops nothing."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    corpus: Corpus

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks = None
    ) -> Sequence[Document]:
        del query, callbacks
        return [documents[i] for i in self.corpus.order_of([document.page_content for document in documents])]


class CorpusStore(VectorStore):
    """A corpus as LangChain's vector store: what is added is computed once, and found by its vector.

    A document is one passage as long as it fits one; `add_documents` refuses larger ones, so that what is found is what
    was added: split them first, or use `Corpus.add` and `CorpusRetriever`.

    Parameters
    ----------
    corpus : opened with `embedding=embeddings.embed_documents`.
    embeddings : the same.
    """

    def __init__(self, corpus: Corpus, embeddings: Embeddings) -> None:
        if corpus.embedding is None:
            raise ValueError("the corpus has no embedding; open it with embedding=embeddings.embed_documents")
        self.corpus = corpus
        self._embeddings = embeddings

    @property
    def embeddings(self) -> Embeddings:
        return self._embeddings

    def add_texts(
        self, texts: Iterable[str], metadatas: list[dict[str, Any]] | None = None, *, ids: list[str] | None = None,
        **kwargs: Any,
    ) -> list[str]:  # fmt: skip
        """Texts with their ids; those without one get a random one. Equal ids replace each other."""
        del kwargs
        given = list(texts)
        names = [ids[i] if ids and ids[i] else str(uuid.uuid4()) for i in range(len(given))]
        if metadatas is not None and len(metadatas) != len(given):
            raise ValueError(f"metadatas has {len(metadatas)} entries for {len(given)} texts")
        if given:
            last = {name: i for i, name in enumerate(names)}
            chosen = sorted(last.values())
            self.corpus.add(
                [given[i] for i in chosen],
                ids=[names[i] for i in chosen],
                metadata=[metadatas[i] if metadatas else {} for i in chosen],
                whole=True,
            )
        return names

    def add_documents(self, documents: list[Document], **kwargs: Any) -> list[str]:
        ids = kwargs.pop("ids", None) or [document.id or "" for document in documents]
        return self.add_texts(
            [document.page_content for document in documents], [document.metadata for document in documents], ids=ids
        )

    def delete(self, ids: list[str] | None = None, **kwargs: Any) -> bool | None:
        del kwargs
        self.corpus.remove([each.id for each in self.corpus.documents()] if ids is None else ids)
        return True

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        return [_whole(passage) for passage in self.corpus.passages(ids)]

    def similarity_search(self, query: str, k: int = 4, **kwargs: Any) -> list[Document]:
        return [document for document, _ in self.similarity_search_with_score(query, k, **kwargs)]

    def similarity_search_with_score(self, query: str, k: int = 4, **kwargs: Any) -> list[tuple[Document, float]]:
        """Documents and the cosine of their angle to the query, the nearest first."""
        del kwargs
        return [(_whole(passage), passage.score) for passage in self.corpus.nearest(query, passages=k)]

    @classmethod
    def from_texts(
        cls, texts: list[str], embedding: Embeddings, metadatas: list[dict[str, Any]] | None = None, *,
        ids: list[str] | None = None, **kwargs: Any,
    ) -> Self:  # fmt: skip
        """Opens `Corpus(**kwargs)` and adds the texts."""
        store = cls(Corpus(embedding=embedding.embed_documents, **kwargs), embedding)
        store.add_texts(texts, metadatas, ids=ids)
        return store


class ChatKVLoom(BaseChatModel):
    """A chat model over the corpus's own engine: documents are fused from cached KV, not computed again.

    Give documents with a call, `model.invoke(messages, documents=retriever.invoke(question))`, or bind them. They stand
    before the first user's words. `usage_metadata` counts reused tokens as `cache_read`; `response_metadata["kvloom"]`
    has the rest. Over the service `ServedChat` is the chat model, over vLLM `ChatOpenAI`: docs/frameworks.md.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, populate_by_name=True)

    corpus: Corpus = Field(exclude=True)
    max_tokens: int = Field(default=256, ge=1)
    temperature: float = Field(default=0.0, ge=0.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    seed: int | None = None
    stop: list[str] | None = Field(default=None, alias="stop_sequences")
    _name: str = PrivateAttr(default="kvloom")

    @property
    def _llm_type(self) -> str:
        return "kvloom"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {"model": self.corpus.connector.layers.spec.model_id, "max_tokens": self.max_tokens}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop, **kwargs)
        params.update(
            ls_provider="kvloom",
            ls_model_name=str(kwargs.get("model") or self._identifying_params["model"]),
            ls_temperature=self.temperature,
            ls_max_tokens=self.max_tokens,
        )
        if stop or self.stop:
            params["ls_stop"] = list(stop or self.stop or ())
        return params

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        del run_manager
        generation = self._generation(messages, stop, kwargs)
        text = self.corpus.run(generation)
        return ChatResult(generations=[ChatGeneration(message=_message(text, generation))])

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        generation = self._generation(messages, stop, kwargs)
        for piece in pieces_of(generation, self.corpus.run):
            chunk = ChatGenerationChunk(message=AIMessageChunk(content=piece))
            if run_manager is not None:
                run_manager.on_llm_new_token(piece, chunk=chunk)
            yield chunk
        yield _last_chunk(generation)

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        generation = self._generation(messages, stop, kwargs)
        async for piece in pieces_async(generation, self.corpus.run):
            chunk = ChatGenerationChunk(message=AIMessageChunk(content=piece))
            if run_manager is not None:
                await run_manager.on_llm_new_token(piece, chunk=chunk)
            yield chunk
        yield _last_chunk(generation)

    def _generation(self, messages: list[BaseMessage], stop: list[str] | None, options: dict[str, Any]) -> Generation:
        documents = [each if isinstance(each, str) else each.page_content for each in options.get("documents") or ()]
        sampling = Sampling(
            options.get("max_tokens") or self.max_tokens,
            self.temperature if options.get("temperature") is None else options["temperature"],
            options.get("top_p") or self.top_p,
            self.seed if options.get("seed") is None else options["seed"],
            tuple(stop or self.stop or ()),
        )
        return chat_generation(self.corpus, [_as_message(message) for message in messages], documents, sampling)


def _as_message(message: BaseMessage) -> dict[str, str]:
    if message.type not in _ROLES:
        raise ValueError(f"a message is of type {message.type!r}; expected one of {', '.join(_ROLES)}")
    if isinstance(message.content, str):
        return {"role": _ROLES[message.type], "content": message.content}
    texts = []
    for part in message.content:
        text = part if isinstance(part, str) else part.get("text") if part.get("type") == "text" else None
        if not isinstance(text, str):
            raise ValueError("a message holds something else than text; kvloom's chat model reads text only")
        texts.append(text)
    return {"role": _ROLES[message.type], "content": "".join(texts)}


def _usage(generation: Generation) -> UsageMetadata:
    usage = generation.usage
    return UsageMetadata(
        input_tokens=usage.prompt_tokens,
        output_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        input_token_details=InputTokenDetails(cache_read=usage.reused_tokens),
    )


def _facts(generation: Generation) -> dict[str, Any]:
    usage = generation.usage
    return {
        "model_provider": "kvloom",
        "model_name": generation.connector().layers.spec.model_id,
        "finish_reason": generation.finish,
        "kvloom": {
            "reused_tokens": usage.reused_tokens,
            "recomputed_tokens": usage.recomputed_tokens,
            "saved_s": usage.saved_s,
            "prompt_s": usage.prompt_s,
            "is_exact": generation.is_exact,
        },
    }


def _message(text: str, generation: Generation) -> AIMessage:
    return AIMessage(content=text, usage_metadata=_usage(generation), response_metadata=_facts(generation))


def _last_chunk(generation: Generation) -> ChatGenerationChunk:
    return ChatGenerationChunk(
        message=AIMessageChunk(
            content="", usage_metadata=_usage(generation), response_metadata=_facts(generation), chunk_position="last"
        )
    )


def _whole(passage: Passage) -> Document:
    """A document that is one passage, as it was added."""
    return Document(page_content=passage.text, metadata=dict(passage.metadata), id=passage.document_id)
