"""Outcomes of loads, and of fetching the documents of a fusion, in a worker. Imports no engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ....core import KVChunk, KVSpec
from ..messages import Loaded


@dataclass(frozen=True, slots=True)
class Arrival:
    """A load or fusion that is over: its outcome, and the blocks into which nothing was loaded."""

    request_id: str
    loaded: Loaded
    bad_blocks: frozenset[int]


@dataclass(slots=True)
class RecomputeCost:
    """Seconds that computing loaded tokens took, as far as their chunks say so, and the tokens whose chunks do not."""

    recompute_s: float = 0.0
    unpriced_tokens: int = 0

    def add(self, tokens: int, chunk_tokens: int, chunk_recompute_s: float | None) -> None:
        """Add `tokens` of a chunk of `chunk_tokens`."""
        if chunk_recompute_s is None:
            self.unpriced_tokens += tokens
        else:
            self.recompute_s += chunk_recompute_s * tokens / chunk_tokens


@dataclass(frozen=True, slots=True)
class Fetched:
    """Which documents of a fusion are in its blocks now, their tokens by tier, and what computing them took.

    `documents`: how many of them, by tier. `read_s`: as of `Loaded`.
    """

    found: tuple[bool, ...]
    tokens: Mapping[str, int]
    cost: RecomputeCost = field(default_factory=RecomputeCost)
    documents: Mapping[str, int] = field(default_factory=dict)
    read_s: Mapping[str, float] = field(default_factory=dict)


UNKNOWN = -1
"""The position, and the id, of a token of which an engine has told neither."""


def fits(chunk: KVChunk, spec: KVSpec, count: int, first: int | None = None) -> bool:
    """Whether a chunk is what was asked for: of this model and rank, `count` tokens from position `first` on.

    A chunk of a prefix whose position is unknown was named by everything before it, and stands where it was found.
    """
    if chunk.spec != spec or len(chunk) != count:
        return False
    return first is None or int(chunk.positions[0]) in (first, UNKNOWN)
