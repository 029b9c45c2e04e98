"""LangChain's own standard tests, and a chain that answers over cached documents."""

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("langchain_tests", reason="LangChain is not installed here; `make test-engines` runs this")

from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding, Embeddings
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.retrievers import BaseRetriever
from langchain_core.vectorstores import VectorStore
from langchain_tests.integration_tests import (
    ChatModelIntegrationTests,
    RetrieversIntegrationTests,
    VectorStoreIntegrationTests,
)
from langchain_tests.unit_tests import ChatModelUnitTests

from kvloom.rag.corpus import Corpus
from kvloom.rag.frameworks.langchain import ChatKVLoom, CorpusRetriever, CorpusStore, ReuseOrder

from .support import CODE, QUESTION, RECORDS, open_corpus

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]

_CORPUS: list[Corpus] = []  # LangChain's tests build what they test from class attributes


@pytest.fixture(scope="module", autouse=True)
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Corpus]:
    with open_corpus(tmp_path_factory.mktemp("corpus")) as made:
        made.add(list(RECORDS.values()), ids=list(RECORDS))
        _CORPUS[:] = [made]
        yield made
    _CORPUS.clear()


class TestRetriever(RetrieversIntegrationTests):
    @property
    def retriever_constructor(self) -> type[BaseRetriever]:
        return CorpusRetriever

    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        return {"corpus": _CORPUS[0]}

    @property
    def retriever_query_example(self) -> str:
        return "the code, the loom, the honey"


class _ChatModel:
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatKVLoom

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"corpus": _CORPUS[0], "max_tokens": 8}

    @property
    def has_tool_calling(self) -> bool:
        return False

    @property
    def has_structured_output(self) -> bool:
        return False


class TestChatModelUnits(_ChatModel, ChatModelUnitTests):
    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"corpus": _CORPUS[0]}


class TestChatModel(_ChatModel, ChatModelIntegrationTests):
    pass


class _Embeddings(Embeddings):
    def __init__(self) -> None:
        self._fake = DeterministicFakeEmbedding(size=6)

    def embed_documents(self, texts: Sequence[str]) -> list[list[float]]:  # type: ignore[override]
        return self._fake.embed_documents(list(texts))

    def embed_query(self, text: str) -> list[float]:
        return self._fake.embed_query(text)


class TestStore(VectorStoreIntegrationTests):
    @pytest.fixture
    def vectorstore(self, tmp_path: Path) -> Iterator[VectorStore]:  # type: ignore[override]
        embeddings = _Embeddings()
        with open_corpus(tmp_path, embedding=embeddings.embed_documents) as corpus:
            yield CorpusStore(corpus, embeddings)


def test_a_chain_answers_over_cached_documents(corpus: Corpus) -> None:
    retriever = CorpusRetriever(corpus=corpus, k=2)
    documents = retriever.invoke(QUESTION)
    assert documents[0].metadata["kvloom"]["document_id"] == "alice"
    model = ChatKVLoom(corpus=corpus, max_tokens=6)
    prompt = [HumanMessage(f"\nQ: {QUESTION}\nA:")]
    answer = model.invoke(prompt, documents=documents)
    assert CODE in answer.text
    assert answer.usage_metadata is not None
    again = model.invoke(prompt, documents=documents)
    assert again.text == answer.text and again.usage_metadata is not None
    facts = again.response_metadata["kvloom"]
    assert facts["recomputed_tokens"] == 0 and facts["is_exact"]
    assert again.usage_metadata["input_token_details"]["cache_read"] == facts["reused_tokens"] > 0
    pieces = list(model.stream(prompt, documents=documents))
    assert "".join(piece.text for piece in pieces) == answer.text and len(pieces) > 2

    async def astream() -> str:
        return "".join([piece.text async for piece in model.astream(prompt, documents=documents)])

    assert asyncio.run(astream()) == answer.text
    assert CODE in model.bind(documents=documents).invoke(prompt).text


def test_what_is_ordered_for_reuse_is_what_was_found(corpus: Corpus) -> None:
    documents = [Document(text, metadata={"name": name}) for name, text in RECORDS.items()]
    ChatKVLoom(corpus=corpus, max_tokens=1).invoke("?", documents=documents[:3])
    order = ReuseOrder(corpus=corpus).compress_documents(documents[::-1], "?")
    assert [each.metadata["name"] for each in order] == ["alice", "harbour", "loom", "honey"]


def test_messages_that_are_no_text_are_refused(corpus: Corpus) -> None:
    model = ChatKVLoom(corpus=corpus)
    with pytest.raises(ValueError, match="something else than text"):
        model.invoke([HumanMessage([{"type": "image_url", "image_url": {"url": "data:,"}}])])
    with pytest.raises(ValueError, match="type 'tool'"):
        model.invoke([HumanMessage("?"), ToolMessage("1", tool_call_id="1")])
    with pytest.raises(ValueError, match="no embedding"):
        CorpusStore(corpus, _Embeddings())
    said = [SystemMessage("Be brief."), HumanMessage("\nQ: ?"), AIMessage("\nA: 1"), HumanMessage("\nQ: ?\nA:")]
    assert isinstance(model.invoke(said).text, str)
