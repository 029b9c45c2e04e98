"""What came of loads and of the documents of fusions, as a worker knows it. Imports no engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ....core import KVChunk, KVSpec
from ..messages import Loaded


@dataclass(frozen=True, slots=True)
class Arrival:
    """A load that is over: what came, and the blocks in which nothing did."""

    request_id: str
    loaded: Loaded
    bad_blocks: frozenset[int]


@dataclass(slots=True)
class RecomputeCost:
    """What computing loaded tokens took, as far as their chunks say so, and how many tokens say nothing."""

    recompute_s: float = 0.0
    unpriced_tokens: int = 0

    def add(self, tokens: int, chunk_tokens: int, chunk_recompute_s: float | None) -> None:
        """`tokens` of a chunk of `chunk_tokens`."""
        if chunk_recompute_s is None:
            self.unpriced_tokens += tokens
        else:
            self.recompute_s += chunk_recompute_s * tokens / chunk_tokens


@dataclass(frozen=True, slots=True)
class Fetched:
    """Which documents of a fusion are in its blocks now, and the tiers that their tokens came from."""

    found: tuple[bool, ...]
    tokens: Mapping[str, int]
    worth: RecomputeCost = field(default_factory=RecomputeCost)


def fits(chunk: KVChunk, spec: KVSpec, count: int, first: int) -> bool:
    """Whether a chunk that came is what was asked for: of this model and rank, so many tokens from this position on."""
    return chunk.spec == spec and len(chunk) == count and int(chunk.positions[0]) == first
