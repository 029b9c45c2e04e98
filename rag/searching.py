"""Which passages may answer a question: words, vectors, or both."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
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
    from wordllama import WordLlama

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
        by_angle = [number for number, _ in _by_angle(catalog, question, max(count, 50), embedding)]
        scores = dict.fromkeys([*scores, *by_angle], 0.0)
        for ranking in ([number for number, _ in by_words], by_angle):
            for rank, number in enumerate(ranking):
                scores[number] += 1.0 / (_RANK_OFFSET + 1 + rank)
    best = sorted(scores, key=lambda number: (-scores[number], number))[:count]
    return _passages(catalog, [(number, scores[number]) for number in best])


def nearest(catalog: Catalog, text: str, count: int, embedding: Embedding) -> list[Passage]:
    """The passages whose vectors have the smallest angle to a text's, with its cosine as score."""
    return _passages(catalog, _by_angle(catalog, text, count, embedding))


def _by_angle(catalog: Catalog, text: str, count: int, embedding: Embedding) -> list[tuple[int, float]]:
    numbers, vectors = catalog.vectors()
    if not numbers:
        return []
    query = embedded(embedding, [text])[0]
    if len(query) != vectors.shape[1]:
        raise ValueError(
            f"the embedding gives vectors of {len(query)} numbers, the corpus holds vectors of {vectors.shape[1]}; "
            "use the embedding that the corpus was made with"
        )
    cosines = vectors @ query
    return [(numbers[i], float(cosines[i])) for i in np.argsort(-cosines, kind="stable")[:count]]


def _passages(catalog: Catalog, scored: Sequence[tuple[int, float]]) -> list[Passage]:
    found = catalog.by_number([number for number, _ in scored])
    return [replace(found[number], score=score) for number, score in scored if number in found]
