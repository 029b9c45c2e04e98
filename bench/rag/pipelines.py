"""The pipelines of RAG frameworks, until their first piece of text: over a corpus's cached KV, and over texts alone."""

from __future__ import annotations

import time
from collections.abc import Sequence

from ...rag.answers import INSTRUCTIONS
from ...rag.catalog import Passage
from ...rag.corpus import Corpus

FRAMEWORKS = {"langchain": "langchain_core", "llamaindex": "llama_index.core", "haystack": "haystack"}
"""Names of the frameworks and the modules that show that they are installed."""


def first_piece_s(
    name: str, corpus: Corpus, question: str, passages: Sequence[Passage], tokens: int, *, is_cached: bool
) -> float:
    """Seconds from the question and its passages to the first piece of the answer, through one framework.

    Parameters
    ----------
    is_cached : the passages go along as documents, whose KV is fused. Otherwise their texts are a part of the prompt,
        as in the framework's own pipelines, and the same model computes them by its stock `generate`.

    Raises
    ------
    ValueError : no framework has this name.
    """
    if name not in FRAMEWORKS:
        raise ValueError(f"name is {name!r}; expected one of {', '.join(FRAMEWORKS)}")
    measure = {"langchain": _langchain_s, "llamaindex": _llama_index_s, "haystack": _haystack_s}[name]
    return measure(corpus, question, passages, tokens, is_cached)


def _asked(question: str, texts: Sequence[str] = ()) -> str:
    return "".join(f"{text}\n\n" for text in texts) + f"\n{INSTRUCTIONS}\nQuestion: {question}"


def _langchain_s(corpus: Corpus, question: str, passages: Sequence[Passage], tokens: int, is_cached: bool) -> float:
    from langchain_core.messages import HumanMessage

    from ...rag.frameworks.langchain import ChatKVLoom, as_document

    chat = ChatKVLoom(corpus=corpus, max_tokens=tokens)
    began_s = time.perf_counter()
    documents = [as_document(each) for each in passages]
    if is_cached:
        pieces = chat.stream([HumanMessage(_asked(question))], documents=documents)
    else:
        pieces = chat.stream([HumanMessage(_asked(question, [each.page_content for each in documents]))])
    next(piece for piece in pieces)
    return time.perf_counter() - began_s


def _llama_index_s(corpus: Corpus, question: str, passages: Sequence[Passage], tokens: int, is_cached: bool) -> float:
    from llama_index.core.response_synthesizers import BaseSynthesizer, get_response_synthesizer
    from llama_index.core.response_synthesizers.type import ResponseMode

    from ...rag.frameworks.llama_index import CorpusSynthesizer, KVLoomLLM, as_node

    synthesizer: BaseSynthesizer
    if is_cached:
        synthesizer = CorpusSynthesizer(corpus, max_tokens=tokens, streaming=True)
    else:
        llm = KVLoomLLM(corpus=corpus, max_tokens=tokens)
        synthesizer = get_response_synthesizer(llm=llm, response_mode=ResponseMode.SIMPLE_SUMMARIZE, streaming=True)
    began_s = time.perf_counter()
    response = synthesizer.synthesize(question, [as_node(each) for each in passages])
    next(iter(response.response_gen), "")
    return time.perf_counter() - began_s


def _haystack_s(corpus: Corpus, question: str, passages: Sequence[Passage], tokens: int, is_cached: bool) -> float:
    from haystack import Document

    from ...rag.frameworks.haystack import KVLoomChatGenerator, KVLoomDocumentStore

    store = KVLoomDocumentStore.over(corpus)
    generator = KVLoomChatGenerator(store, max_tokens=tokens)
    first: list[float] = []
    began_s = time.perf_counter()
    documents = [Document(content=each.text) for each in passages]
    generator.run(
        _asked(question) if is_cached else _asked(question, [each.content or "" for each in documents]),
        documents=documents if is_cached else None,
        streaming_callback=lambda _: first.append(time.perf_counter()),
    )
    return (first[0] if first else time.perf_counter()) - began_s
