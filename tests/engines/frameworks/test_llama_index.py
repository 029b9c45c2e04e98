"""LlamaIndex: ingestion, retrieval, synthesis and chat over cached documents."""

import asyncio
from collections.abc import Iterator

import pytest

pytest.importorskip("llama_index.core", reason="LlamaIndex is not installed here; `make test-engines` runs this")

from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.llms import ChatMessage
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import Document, NodeWithScore, TextNode

from kvloom.rag.corpus import Corpus
from kvloom.rag.frameworks.llama_index import (
    CorpusIngestion,
    CorpusRetriever,
    CorpusSynthesizer,
    KVLoomLLM,
    ReuseOrder,
)

from .support import CODE, QUESTION, RECORDS, open_corpus

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Corpus]:
    with open_corpus(tmp_path_factory.mktemp("corpus")) as made:
        documents = [Document(text=text, id_=name) for name, text in RECORDS.items()]
        splitter = SentenceSplitter(chunk_size=200, include_metadata=False)
        nodes = IngestionPipeline(transformations=[splitter, CorpusIngestion(corpus=made)]).run(documents=documents)
        assert len(nodes) == len(made.documents()) == 4
        yield made


def test_a_query_engine_answers_over_cached_nodes(corpus: Corpus) -> None:
    assert corpus.precompute() == 0  # the pipeline has computed everything
    engine = RetrieverQueryEngine(
        CorpusRetriever(corpus, similarity_top_k=2),
        CorpusSynthesizer(corpus, max_tokens=6),
        [ReuseOrder(corpus=corpus)],
    )
    response = engine.query(QUESTION)
    assert CODE in str(response)
    assert response.source_nodes and response.metadata["kvloom"]["is_exact"]
    again = engine.query(QUESTION)
    assert str(again) == str(response) and again.metadata["kvloom"]["recomputed_tokens"] == 0
    assert again.source_nodes[0].node.metadata["document_id"] in {each.id for each in corpus.documents()}
    assert str(asyncio.run(engine.aquery(QUESTION))) == str(response)


def test_streams(corpus: Corpus) -> None:
    retriever = CorpusRetriever(corpus, similarity_top_k=2)
    plain = RetrieverQueryEngine(retriever, CorpusSynthesizer(corpus, max_tokens=6)).query(QUESTION)
    streaming = RetrieverQueryEngine(retriever, CorpusSynthesizer(corpus, max_tokens=6, streaming=True))
    response = streaming.query(QUESTION)
    pieces = list(response.response_gen)
    assert "".join(pieces).strip() == str(plain) and len(pieces) > 1

    async def astream() -> str:
        found = await streaming.aquery(QUESTION)
        return "".join([piece async for piece in found.response_gen])

    assert asyncio.run(astream()).strip() == str(plain)


def test_the_llm_reads_documents(corpus: Corpus) -> None:
    llm = KVLoomLLM(corpus=corpus, max_tokens=6)
    nodes = CorpusRetriever(corpus, similarity_top_k=2).retrieve(QUESTION)
    said = [ChatMessage(role="user", content=f"\nQ: {QUESTION}\nA:")]
    response = llm.chat(said, documents=nodes)
    assert CODE in str(response.message.content)
    assert response.raw["usage"]["reused_tokens"] > 0
    *pieces, last = llm.stream_chat(said, documents=nodes)
    assert "".join(piece.delta for piece in pieces) == response.message.content
    assert last.raw["usage"]["completion_tokens"] == response.raw["usage"]["completion_tokens"]
    assert CODE in llm.complete(f"\nQ: {QUESTION}\nA:", documents=nodes).text
    assert CODE in list(llm.stream_complete(f"\nQ: {QUESTION}\nA:", documents=nodes))[-1].text
    assert CODE in str(asyncio.run(llm.achat(said, documents=nodes)).message.content)
    assert llm.metadata.context_window >= 512 and not llm.metadata.is_chat_model
    with pytest.raises(ValueError, match="role"):
        llm.chat([ChatMessage(role="tool", content="1")])


def test_what_is_ordered_for_reuse_is_what_was_found(corpus: Corpus) -> None:
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in RECORDS.values()]
    KVLoomLLM(corpus=corpus, max_tokens=1).complete("?", documents=nodes[:3])
    ordered = ReuseOrder(corpus=corpus).postprocess_nodes(nodes[::-1])
    assert [each.node.get_content() for each in ordered] == list(RECORDS.values())
    assert CorpusRetriever(corpus).retrieve("zeppelin") == []
