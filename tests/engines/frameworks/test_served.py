"""LangChain, LlamaIndex and Haystack over a running `kvloom serve`: documents by text and id, streams, coroutines."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("langchain_openai", reason="LangChain is not installed here; `make test-engines` runs this")
pytest.importorskip("llama_index.llms.openai_like", reason="LlamaIndex is not installed here")
pytest.importorskip("haystack", reason="Haystack is not installed here")
pytest.importorskip("fastapi", reason="the service's packages are not installed here")

import haystack
from haystack.components.generators.chat import OpenAIChatGenerator
from haystack.components.retrievers.in_memory import InMemoryBM25Retriever
from haystack.dataclasses import ChatMessage as HaystackMessage
from haystack.document_stores.in_memory import InMemoryDocumentStore
from haystack.utils import Secret
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.messages import AIMessageChunk, HumanMessage
from langchain_core.runnables import RunnableLambda
from langchain_core.vectorstores import InMemoryVectorStore
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from llama_index.llms.openai_like import OpenAILike
from openai import NotFoundError

from kvloom.rag.frameworks.served import request_documents
from kvloom.rag.frameworks.served_haystack import DocumentsInRequest
from kvloom.rag.frameworks.served_langchain import ServedChat
from kvloom.rag.frameworks.served_llama_index import ServedSynthesizer

from ...service.serving import Service, service_in_thread
from .support import CODE, MODEL, QUESTION, RECORDS

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]

PROMPT = f"\nQ: {QUESTION}\nA:"
TOKENS = 6


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with service_in_thread(tmp_path_factory.mktemp("kv"), models={"tiny": MODEL}) as running:
        documents = [{"id": name, "text": text} for name, text in RECORDS.items()]
        assert running.ask("POST", "/v1/documents", {"documents": documents}).status == 202
        yield running


def is_reused(facts: dict[str, Any]) -> bool:
    return bool(facts["reused_tokens"] > facts["recomputed_tokens"] > 0)


def test_langchain(service: Service) -> None:
    model = ServedChat(base_url=f"{service.url}/v1", api_key=service.token, model="tiny", max_tokens=TOKENS)
    store = InMemoryVectorStore(DeterministicFakeEmbedding(size=8))
    store.add_documents([Document(text, id=name) for name, text in RECORDS.items()])
    chain = store.as_retriever(search_kwargs={"k": 4}) | RunnableLambda(
        lambda documents: model.invoke([HumanMessage(PROMPT)], documents=documents)
    )
    answer = chain.invoke(QUESTION)
    assert CODE in answer.text
    documents = [Document(RECORDS[name], id=name) for name in ("loom", "alice", "honey")]
    for order in (documents, documents[::-1]):
        for by_id in (False, True):
            answer = model.invoke([HumanMessage(PROMPT)], documents=order, by_id=by_id)
            facts = answer.response_metadata["token_usage"]["kvloom"]
            assert CODE in answer.text and is_reused(facts)
            assert answer.usage_metadata is not None
            assert answer.usage_metadata["input_token_details"]["cache_read"] == facts["reused_tokens"]
    pieces = list(model.stream([HumanMessage(PROMPT)], documents=documents[::-1]))
    whole = pieces[0]
    for piece in pieces[1:]:
        whole += piece
    assert isinstance(whole, AIMessageChunk) and whole.text == answer.text and len(pieces) > 3
    assert whole.usage_metadata == answer.usage_metadata
    assert is_reused(whole.response_metadata["token_usage"]["kvloom"])

    async def later() -> tuple[list[Any], Any]:  # in one event loop: the client keeps its connections
        prompt = [HumanMessage(PROMPT)]
        streamed = [piece async for piece in model.astream(prompt, documents=documents[::-1])]
        return streamed, await model.bind(documents=documents).ainvoke(prompt)

    streamed, bound = asyncio.run(later())
    assert "".join(piece.text for piece in streamed) == answer.text and CODE in bound.text
    assert "kvloom" in model.invoke("Hello", max_tokens=1).response_metadata["token_usage"]  # without documents
    with pytest.raises(NotFoundError, match="nobody"):
        model.invoke("?", documents=["nobody"], by_id=True)


class Found(BaseRetriever):
    """All records, in an order of its own."""

    def __init__(self, order: list[str]) -> None:
        super().__init__()
        self._order = order

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        del query_bundle
        return [NodeWithScore(node=TextNode(id_=name, text=RECORDS[name]), score=1.0) for name in self._order]


def test_llama_index(service: Service) -> None:
    llm = OpenAILike(
        api_base=f"{service.url}/v1", api_key=service.token, model="tiny", is_chat_model=True, max_tokens=TOKENS,
        temperature=0.0,
    )  # fmt: skip
    engine = RetrieverQueryEngine(Found(list(RECORDS)), ServedSynthesizer(llm))
    response = engine.query(QUESTION)
    reordered = RetrieverQueryEngine(Found(list(RECORDS)[::-1]), ServedSynthesizer(llm, instructions=""))
    again = reordered.query(QUESTION)
    for each in (response, again):
        assert str(each).strip() and len(each.source_nodes) == 4
        assert is_reused(each.metadata["kvloom"])
        assert (
            each.metadata["usage"]["prompt_tokens_details"]["cached_tokens"] == each.metadata["kvloom"]["reused_tokens"]
        )
    streaming = RetrieverQueryEngine(
        Found(list(RECORDS)[::-1]), ServedSynthesizer(llm, instructions="", streaming=True)
    )
    stream = streaming.query(QUESTION)
    pieces = list(stream.response_gen)
    assert "".join(pieces) == str(again) and len(pieces) > 2
    assert is_reused(stream.metadata["kvloom"]) and stream.metadata["usage"]["completion_tokens"] == TOKENS

    async def later() -> tuple[str, str, dict[str, Any]]:
        found = await streaming.aquery(QUESTION)
        text = "".join([piece async for piece in found.response_gen])
        return str(await reordered.aquery(QUESTION)), text, found.metadata

    whole, text, metadata = asyncio.run(later())
    assert whole == text == str(again) and is_reused(metadata["kvloom"])
    with pytest.raises(ValueError, match=r"documents\[0\] is empty"):
        ServedSynthesizer(llm).get_response(QUESTION, [" "])


def test_haystack(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVLOOM_TOKEN", service.token)
    store = InMemoryDocumentStore()
    store.write_documents([haystack.Document(id=name, content=text) for name, text in RECORDS.items()])
    pipeline = haystack.Pipeline()
    pipeline.add_component("retriever", InMemoryBM25Retriever(store, top_k=3))
    pipeline.add_component("request", DocumentsInRequest(by_id=True, generation_kwargs={"max_tokens": TOKENS}))
    generator = OpenAIChatGenerator(
        api_base_url=f"{service.url}/v1", api_key=Secret.from_env_var("KVLOOM_TOKEN"), model="tiny"
    )
    pipeline.add_component("generator", generator)
    pipeline.connect("retriever.documents", "request.documents")
    pipeline.connect("request.generation_kwargs", "generator.generation_kwargs")
    inputs = {"retriever": {"query": QUESTION}, "generator": {"messages": [HaystackMessage.from_user(PROMPT)]}}
    (reply,) = pipeline.run(inputs)["generator"]["replies"]
    assert CODE in reply.text and is_reused(reply.meta["usage"]["kvloom"])
    assert (
        reply.meta["usage"]["prompt_tokens_details"]["cached_tokens"] == reply.meta["usage"]["kvloom"]["reused_tokens"]
    )
    written = pipeline.dumps()
    assert service.token not in written
    documents = [haystack.Document(id=name, content=RECORDS[name]) for name in ("honey", "alice", "loom")]
    request = DocumentsInRequest(generation_kwargs={"max_tokens": TOKENS}).run(documents)["generation_kwargs"]
    said, pieces = [HaystackMessage.from_user(PROMPT)], []
    (reply,) = generator.run(
        said, generation_kwargs=request, streaming_callback=lambda each: pieces.append(each.content)
    )["replies"]
    assert CODE in reply.text and "".join(pieces) == reply.text and len(pieces) > 3
    assert is_reused(reply.meta["usage"]["kvloom"])
    (later,) = asyncio.run(generator.run_async(said, generation_kwargs=request))["replies"]
    assert later.text == reply.text and is_reused(later.meta["usage"]["kvloom"])


def test_requests_hold_texts_or_ids() -> None:
    documents = [Document("one", id="1"), TextNode(id_="2", text="two"), "three"]
    assert request_documents(documents) == {"documents": [{"text": "one"}, {"text": "two"}, {"text": "three"}]}
    assert request_documents(documents, by_id=True) == {"documents": [{"id": "1"}, {"id": "2"}, {"id": "three"}]}
    assert request_documents([NodeWithScore(node=documents[1])], by_id=True) == {"documents": [{"id": "2"}]}
    with pytest.raises(TypeError, match="expected a list"):
        request_documents("one text")
    with pytest.raises(ValueError, match=r"documents\[0\] has no id"):
        request_documents([Document("one")], by_id=True)
