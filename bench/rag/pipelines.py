"""The pipelines of RAG frameworks over a corpus, until their first piece of text."""

from __future__ import annotations

import time
from collections.abc import Sequence

from ...rag.answers import INSTRUCTIONS
from ...rag.catalog import Passage
from ...rag.corpus import Corpus

FRAMEWORKS = {"langchain": "langchain_core", "llamaindex": "llama_index.core", "haystack": "haystack"}
"""Names of the frameworks and the modules that show that they are installed."""


def first_piece_s(name: str, corpus: Corpus, question: str, passages: Sequence[Passage], tokens: int) -> float:
    """Seconds from the question and its passages to the first piece of the answer, through one framework."""
    asked = f"\n{INSTRUCTIONS}\nQuestion: {question}"
    began_s = time.perf_counter()
    if name == "langchain":
        from langchain_core.messages import HumanMessage

        from ...rag.frameworks.langchain import ChatKVLoom, as_document

        chat = ChatKVLoom(corpus=corpus, max_tokens=tokens)
        pieces = chat.stream([HumanMessage(asked)], documents=[as_document(each) for each in passages])
        next(piece for piece in pieces)
    elif name == "llamaindex":
        from ...rag.frameworks.llama_index import CorpusSynthesizer, as_node

        synthesizer = CorpusSynthesizer(corpus, max_tokens=tokens, streaming=True)
        response = synthesizer.synthesize(question, [as_node(each) for each in passages])
        next(iter(response.response_gen), "")
    elif name == "haystack":
        return _haystack_s(corpus, asked, passages, tokens)
    else:
        raise ValueError(f"name is {name!r}; expected one of {', '.join(FRAMEWORKS)}")
    return time.perf_counter() - began_s


def _haystack_s(corpus: Corpus, question: str, passages: Sequence[Passage], tokens: int) -> float:
    from haystack import Document

    from ...rag.frameworks.haystack import KVLoomChatGenerator, KVLoomDocumentStore

    store = KVLoomDocumentStore.over(corpus)
    first: list[float] = []
    began_s = time.perf_counter()
    KVLoomChatGenerator(store, max_tokens=tokens).run(
        question,
        documents=[Document(content=each.text) for each in passages],
        streaming_callback=lambda _: first.append(time.perf_counter()),
    )
    return (first[0] if first else time.perf_counter()) - began_s
