"""Haystack: its document store tests, and pipelines that are written down, read again and run."""

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("haystack", reason="Haystack is not installed here; `make test-engines` runs this")

from haystack import Document, Pipeline
from haystack.core.errors import DeserializationError
from haystack.dataclasses import ChatMessage, StreamingChunk
from haystack.document_stores.errors import DuplicateDocumentError
from haystack.document_stores.types import DuplicatePolicy
from haystack.testing.document_store import DocumentStoreBaseTests

from kvloom.rag.frameworks.haystack import KVLoomChatGenerator, KVLoomDocumentStore, KVLoomRetriever, ReuseOrder

from .support import CODE, MODEL, QUESTION, RECORDS

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]


class TestDocumentStore(DocumentStoreBaseTests):
    @pytest.fixture
    def document_store(self, tmp_path: Path) -> Iterator[KVLoomDocumentStore]:
        store = KVLoomDocumentStore(str(tmp_path), str(MODEL), precompute=False)
        yield store
        store.close()

    def assert_documents_are_equal(self, received: list[Document], expected: list[Document]) -> None:
        def by_id(document: Document) -> str:
            return str(document.id)

        assert sorted(received, key=by_id) == sorted(expected, key=by_id)

    def test_write_documents(self, document_store: KVLoomDocumentStore) -> None:
        document = Document(content="test doc")
        assert document_store.write_documents([document]) == 1
        with pytest.raises(DuplicateDocumentError):
            document_store.write_documents([document], policy=DuplicatePolicy.NONE)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KVLoomDocumentStore]:
    made = KVLoomDocumentStore(str(tmp_path_factory.mktemp("corpus")), str(MODEL), recompute_ratio=1.0)
    made.write_documents([Document(id=name, content=text, meta={"kind": "record"}) for name, text in RECORDS.items()])
    yield made
    made.close()


def test_a_pipeline_survives_being_written_down(store: KVLoomDocumentStore) -> None:
    pipeline = Pipeline()
    pipeline.add_component("retriever", KVLoomRetriever(store, top_k=2))
    pipeline.add_component("order", ReuseOrder(store))
    pipeline.add_component("generator", KVLoomChatGenerator(store, max_tokens=6))
    pipeline.connect("retriever.documents", "order.documents")
    pipeline.connect("order.documents", "generator.documents")
    inputs = {
        "retriever": {"query": QUESTION},
        "generator": {"messages": [ChatMessage.from_user(f"\nQ: {QUESTION}\nA:")]},
    }
    (reply,) = pipeline.run(inputs)["generator"]["replies"]
    assert CODE in str(reply.text) and reply.meta["kvloom"]["is_exact"]
    written = pipeline.dumps()
    store.close()  # the pipeline that is read opens the corpus itself
    try:
        read = Pipeline.loads(written)
    except DeserializationError:
        read = Pipeline.loads(written, allowed_modules=["kvloom.*"])
    both = [pipeline.to_dict(), read.to_dict()]
    for each in both:
        each["connections"].sort(key=str)
    assert both[0] == both[1]
    (again,) = read.run(inputs)["generator"]["replies"]
    assert again.text == reply.text and again.meta["kvloom"]["recomputed_tokens"] == 0
    assert again.meta["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def test_replies_stream(store: KVLoomDocumentStore) -> None:
    pieces: list[str] = []

    def tell(chunk: StreamingChunk) -> None:
        pieces.append(chunk.content)

    documents = KVLoomRetriever(store).run(QUESTION)["documents"]
    generator = KVLoomChatGenerator(store, max_tokens=6)
    result = generator.run(f"\nQ: {QUESTION}\nA:", documents=documents, streaming_callback=tell)
    assert "".join(pieces) == result["replies"][0].text and len(pieces) > 1
    with pytest.raises(ValueError, match=r"generation_kwargs has \['n'\]"):
        generator.run("?", generation_kwargs={"n": 2})


def test_what_is_no_text_is_refused(store: KVLoomDocumentStore) -> None:
    with pytest.raises(ValueError, match="has no text"):
        store.write_documents([Document(id="picture", content=None)])
    with pytest.raises(ValueError, match="expected KVLoomDocumentStore"):
        KVLoomRetriever("store")  # type: ignore[arg-type]
    assert store.count_documents() == 4
