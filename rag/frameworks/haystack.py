"""Haystack: a corpus as document store, retriever, ranker and generator."""

# Without `from __future__ import annotations`: Haystack reads the types of inputs from the signatures.

import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

try:
    from haystack import Document, component, default_from_dict, default_to_dict
    from haystack.dataclasses import ChatMessage, StreamingChunk
    from haystack.dataclasses.streaming_chunk import StreamingCallbackT, select_streaming_callback
    from haystack.document_stores.errors import DuplicateDocumentError
    from haystack.document_stores.types import DuplicatePolicy
    from haystack.utils import deserialize_callable, serialize_callable
    from haystack.utils.filters import document_matches_filter
except ImportError as error:
    raise ImportError(
        'kvloom.rag.frameworks.haystack needs Haystack: pip install "kvloom[haystack]"', name=error.name
    ) from error

from ...connectors.hf.answering import Generation, Sampling
from ..chat import chat_generation
from ..corpus import Corpus

_KEPT = "haystack"  # what a document is beside its text stands under this name in the corpus's metadata


class KVLoomDocumentStore:
    """Haystack's document store over a `Corpus`: what is written is computed once, and found by its words.

    Documents are texts; each is one passage. Components that name the same folder share one corpus.

    Parameters
    ----------
    folder : of the corpus.
    model : folder of a model of transformers.
    recompute_ratio, precompute : see `Corpus`.
    """

    def __init__(
        self, folder: str, model: str, *, recompute_ratio: float | None = None, precompute: bool = True
    ) -> None:
        self.folder = str(folder)
        self.model = str(model)
        self.recompute_ratio = recompute_ratio
        self.precompute = precompute
        self._lock = threading.Lock()
        self._corpus: Corpus | None = None

    @classmethod
    def over(cls, corpus: Corpus) -> "KVLoomDocumentStore":
        """A store over a corpus that is open; its owner closes it. It cannot be written into a pipeline's file."""
        store = cls(str(corpus.folder), "")
        store._corpus = corpus
        return store

    @property
    def corpus(self) -> Corpus:
        """Opened when it is first needed: a pipeline can be read and written without its model."""
        with self._lock:
            if self._corpus is None:
                self._corpus = Corpus(Path(self.folder), self.model, recompute_ratio=self.recompute_ratio)
            return self._corpus

    def close(self) -> None:
        with self._lock:
            if self._corpus is not None:
                self._corpus.close()
                self._corpus = None

    def to_dict(self) -> dict[str, Any]:
        data: dict[str, Any] = default_to_dict(
            self,
            folder=self.folder,
            model=self.model,
            recompute_ratio=self.recompute_ratio,
            precompute=self.precompute,
        )
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "KVLoomDocumentStore":
        store: KVLoomDocumentStore = default_from_dict(cls, data)
        return store

    def count_documents(self) -> int:
        return len(self.corpus.documents())

    def filter_documents(self, filters: dict[str, Any] | None = None) -> list[Document]:
        """Raises Haystack's `FilterError` for filters that are none."""
        found = [_document(each.text, each.metadata) for each in self.corpus.passages()]
        if not filters:
            return found
        if "operator" not in filters and "conditions" not in filters:
            raise ValueError("filters have no operator; expected a comparison or a logic of Haystack's")
        return [each for each in found if document_matches_filter(filters=filters, document=each)]

    def write_documents(self, documents: list[Document], policy: DuplicatePolicy = DuplicatePolicy.NONE) -> int:
        """How many were written. `NONE` is `FAIL`.

        Raises
        ------
        DuplicateDocumentError : a document has an id that is there, by `FAIL`; nothing is written then.
        ValueError : something else than documents with a text.
        """
        if not isinstance(documents, list) or any(not isinstance(each, Document) for each in documents):
            raise ValueError("documents is no list of Haystack's documents")
        if empty := [each.id for each in documents if not (each.content or "").strip()]:
            raise ValueError(f"document {empty[0]!r} has no text; kvloom keeps the KV of texts")
        known = {each.id for each in self.corpus.documents()}
        chosen = {each.id: each for each in documents}
        there = [name for name in chosen if name in known]
        if there and policy in (DuplicatePolicy.NONE, DuplicatePolicy.FAIL):
            raise DuplicateDocumentError(f"document {there[0]!r} is there already")
        if policy == DuplicatePolicy.SKIP:
            chosen = {name: each for name, each in chosen.items() if name not in known}
        if chosen:
            self.corpus.add(
                [each.content for each in chosen.values()],
                ids=list(chosen),
                metadata=[{_KEPT: _beside_text(each)} for each in chosen.values()],
                whole=True,
                precompute=self.precompute,
            )
        return len(documents) if policy == DuplicatePolicy.OVERWRITE else len(chosen)

    def delete_documents(self, document_ids: list[str]) -> None:
        self.corpus.remove(document_ids)


@component
class KVLoomRetriever:
    """The documents of a `KVLoomDocumentStore` that fit a query, in the order that reuses most.

    Parameters
    ----------
    top_k : how many.
    order_for_reuse : put documents first whose KV in that context is stored; False keeps the order of relevance.
    """

    def __init__(self, document_store: KVLoomDocumentStore, top_k: int = 5, order_for_reuse: bool = True) -> None:
        if not isinstance(document_store, KVLoomDocumentStore):
            raise ValueError(f"document_store is of type {type(document_store).__name__}; expected KVLoomDocumentStore")
        self.document_store = document_store
        self.top_k = top_k
        self.order_for_reuse = order_for_reuse

    @component.output_types(documents=list[Document])
    def run(self, query: str, top_k: int | None = None) -> dict[str, list[Document]]:
        corpus = self.document_store.corpus
        found = corpus.search(query, passages=top_k or self.top_k)
        ordered = corpus.ordered(found) if self.order_for_reuse else found
        return {"documents": [_document(each.text, each.metadata, score=each.score) for each in ordered]}

    def to_dict(self) -> dict[str, Any]:
        data: dict[str, Any] = default_to_dict(
            self,
            document_store=self.document_store.to_dict(),
            top_k=self.top_k,
            order_for_reuse=self.order_for_reuse,
        )
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "KVLoomRetriever":
        return _with_store(cls, data)  # type: ignore[no-any-return]


@component
class ReuseOrder:
    """Orders what any retriever found so that most of it is reused; adds and drops nothing."""

    def __init__(self, document_store: KVLoomDocumentStore) -> None:
        self.document_store = document_store

    @component.output_types(documents=list[Document])
    def run(self, documents: list[Document]) -> dict[str, list[Document]]:
        order = self.document_store.corpus.order_of([each.content or "" for each in documents])
        return {"documents": [documents[i] for i in order]}

    def to_dict(self) -> dict[str, Any]:
        data: dict[str, Any] = default_to_dict(self, document_store=self.document_store.to_dict())
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "ReuseOrder":
        return _with_store(cls, data)  # type: ignore[no-any-return]


@component
class KVLoomChatGenerator:
    """The store's own engine as Haystack's chat generator: documents are fused from cached KV, not computed again.

    `replies[0].meta` has `usage` (`prompt_tokens`, `completion_tokens`, `total_tokens`) and `kvloom` (what was reused).

    Parameters
    ----------
    max_tokens : of a reply.
    streaming_callback : called with each piece.
    """

    def __init__(
        self,
        document_store: KVLoomDocumentStore,
        max_tokens: int = 256,
        streaming_callback: StreamingCallbackT | None = None,
    ) -> None:
        self.document_store = document_store
        self.max_tokens = max_tokens
        self.streaming_callback = streaming_callback

    def warm_up(self) -> None:
        """Loads the model."""
        self.document_store.corpus  # noqa: B018  opening it loads the model

    @component.output_types(replies=list[ChatMessage])
    def run(
        self,
        messages: list[ChatMessage] | str,
        documents: list[Document] | None = None,
        streaming_callback: StreamingCallbackT | None = None,
        generation_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, list[ChatMessage]]:
        """One reply to the messages; the documents stand before the first user's words."""
        callback = select_streaming_callback(self.streaming_callback, streaming_callback, requires_async=False)
        options = dict(generation_kwargs or {})
        sampling = Sampling(
            int(options.pop("max_tokens", self.max_tokens)),
            float(options.pop("temperature", 0.0)),
            float(options.pop("top_p", 1.0)),
            options.pop("seed", None),
            tuple(options.pop("stop", None) or ()),
        )
        if options:
            raise ValueError(
                f"generation_kwargs has {sorted(options)}; known are max_tokens, temperature, top_p, seed and stop"
            )
        said = [ChatMessage.from_user(messages)] if isinstance(messages, str) else messages

        def tell(piece: str) -> None:
            if callback is not None:
                callback(StreamingChunk(content=piece, meta={"model": self.document_store.model}))

        corpus = self.document_store.corpus
        generation = chat_generation(
            corpus,
            [{"role": message.role.value, "content": message.text or ""} for message in said],
            [each.content or "" for each in documents or ()],
            sampling,
        )
        generation.on_text = tell
        text = corpus.run(generation)
        return {"replies": [ChatMessage.from_assistant(text, meta=_meta(generation))]}

    def to_dict(self) -> dict[str, Any]:
        callback = self.streaming_callback
        data: dict[str, Any] = default_to_dict(
            self,
            document_store=self.document_store.to_dict(),
            max_tokens=self.max_tokens,
            streaming_callback=None if callback is None else serialize_callable(callback),
        )
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "KVLoomChatGenerator":
        parameters = data["init_parameters"]
        if parameters.get("streaming_callback"):
            parameters["streaming_callback"] = deserialize_callable(parameters["streaming_callback"])
        return _with_store(cls, data)  # type: ignore[no-any-return]


def _with_store(cls: Any, data: dict[str, Any]) -> Any:
    parameters = data["init_parameters"]
    if isinstance(parameters.get("document_store"), dict):
        parameters["document_store"] = KVLoomDocumentStore.from_dict(parameters["document_store"])
    return default_from_dict(cls, data)


def _beside_text(document: Document) -> dict[str, Any]:
    """What a document is beside its text, as JSON."""
    data = document.to_dict(flatten=False)
    return {name: data[name] for name in ("id", "meta", "embedding", "sparse_embedding") if data.get(name) is not None}


def _document(text: str, metadata: Any, *, score: float | None = None) -> Document:
    data = {**metadata[_KEPT], "content": text}
    if score is not None:
        data["score"] = score
    return Document.from_dict(data)


def _meta(generation: Generation) -> dict[str, Any]:
    usage = generation.usage
    return {
        "model": generation.connector().layers.spec.model_id,
        "index": 0,
        "finish_reason": generation.finish,
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.reused_tokens},
        },
        "kvloom": {**asdict(usage), "is_exact": generation.is_exact},
    }
