"""Which passages may answer a question: words, vectors, or both."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .catalog import Catalog, Passage

Embedding: TypeAlias = "Callable[[Sequence[str]], NDArray[np.float32] | Sequence[Sequence[float]]]"
"""Texts to vectors `[N, E]`."""

_WORD = re.compile(r"\w+", re.UNICODE)
_RANK_OFFSET = 60  # of reciprocal rank fusion (Cormack, Clarke and Büttcher 2009)
# Words that stand in most English texts and questions: they say nothing about which passage is meant.
_COMMON = frozenset({
    "a", "an", "and", "are", "as", "at", "be", "by", "did", "do", "does", "for", "from", "had", "has", "have",
    "how", "in", "is", "it", "of", "on", "or", "that", "the", "their", "this", "to", "was", "were", "what",
    "when", "where", "which", "who", "whom", "whose", "why", "will", "with",
})  # fmt: skip


def packaged_embedding(name: str) -> Embedding:
    """The embedding model that an installed package ships, so that nothing is downloaded.

    Raises
    ------
    ValueError : no such name.
    ImportError : its package is not installed.
    """
    if name != "wordllama":
        raise ValueError(f"embedding is {name!r}; expected a function of texts, or 'wordllama'")
    if find_spec("wordllama") is None:
        raise ImportError("embedding 'wordllama' needs its package: pip install wordllama", name="wordllama")
    from wordllama import WordLlama  # type: ignore[import-not-found, unused-ignore]

    model: Any = WordLlama.load(disable_download=True)
    return lambda texts: np.asarray(model.embed(list(texts), norm=True), dtype=np.float32)


def embedded(embedding: Embedding, texts: Sequence[str]) -> NDArray[np.float32]:
    """Unit vectors `[N, E]`.

    Raises
    ------
    ValueError : the function gives something else than one row of finite numbers a text.
    """
    vectors = np.array(embedding(texts), dtype=np.float32)
    if vectors.ndim != 2 or len(vectors) != len(texts) or not vectors.shape[1] or not np.isfinite(vectors).all():
        raise ValueError(
            f"embedding gave an array {list(vectors.shape)} for {len(texts)} texts; expected [{len(texts)}, E] finite "
            "numbers"
        )
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.ascontiguousarray(vectors / np.where(lengths > 0, lengths, 1))


def search(catalog: Catalog, question: str, count: int, embedding: Embedding | None) -> list[Passage]:
    """The passages that fit a question best, best first.

    By BM25 over the question's words; with an embedding also by the angle between vectors, and both rankings united by
    reciprocal ranks.
    """
    words = list(dict.fromkeys(word.casefold() for word in _WORD.findall(question)))
    telling = [word for word in words if word not in _COMMON] or words
    by_words = catalog.match(telling, max(count, 50))
    scores = dict(by_words)
    if embedding is not None:
        numbers, vectors = catalog.vectors()
        if numbers:
            query = embedded(embedding, [question])[0]
            if len(query) != vectors.shape[1]:
                raise ValueError(
                    f"the embedding gives vectors of {len(query)} numbers, the corpus holds vectors of "
                    f"{vectors.shape[1]}; use the embedding that the corpus was made with"
                )
            near = np.argsort(-(vectors @ query), kind="stable")[: max(count, 50)]
            by_angle = [numbers[i] for i in near]
            scores = dict.fromkeys([*scores, *by_angle], 0.0)
            for ranking in ([number for number, _ in by_words], by_angle):
                for rank, number in enumerate(ranking):
                    scores[number] += 1.0 / (_RANK_OFFSET + 1 + rank)
    best = sorted(scores, key=lambda number: (-scores[number], number))[:count]
    found = catalog.by_number(best)
    return [_scored(found[number], scores[number]) for number in best if number in found]


def _scored(passage: Passage, score: float) -> Passage:
    return Passage(
        passage.number, passage.document_id, passage.start, passage.stop, passage.text, passage.title, passage.source,
        passage.metadata, score,
    )  # fmt: skip
