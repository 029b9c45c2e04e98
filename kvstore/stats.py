"""What a store has done since it was opened, in numbers that add up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TierStats:
    """Counts of one tier. Bytes are those of encoded tensors, except `used_bytes`, which is what the tier says.

    Attributes
    ----------
    hits : lookups that this tier answered; `bytes_read` counts their bytes.
    puts : chunks written, by `put`, promotion or demotion alike; `bytes_written` counts their bytes.
    evictions : chunks removed for space; `demotions` of them were first written to a slower tier.
    promotions : chunks written to this tier because they were found in a slower one.
    corruptions : chunks that were found corrupt, and removed.
    rejections : chunks that did not fit.
    timeouts : operations that were given up because the tier did not answer in time.
    errors : operations that failed for any other reason, or were not begun because the tier is stalled or down.
    recoveries : times that the tier was down, and answered again.
    """

    name: str
    used_bytes: int
    capacity_bytes: int | None
    chunks: int
    hits: int = 0
    bytes_read: int = 0
    puts: int = 0
    bytes_written: int = 0
    evictions: int = 0
    demotions: int = 0
    promotions: int = 0
    corruptions: int = 0
    rejections: int = 0
    timeouts: int = 0
    errors: int = 0
    recoveries: int = 0


@dataclass(frozen=True, slots=True)
class StoreStats:
    """Counts of a store.

    Attributes
    ----------
    tiers : fastest first.
    misses : lookups without an answer, by reason: `absent`; `corrupt`, `undecodable`, `timeout` or `unavailable` if a
        tier that was asked had the chunk and could not give it.
    background_errors : prefetches that failed; the error itself is raised by their `result`.
    refused_prefetches : prefetches that were refused because too many were waiting.
    """

    tiers: tuple[TierStats, ...]
    misses: Mapping[str, int]
    background_errors: int = 0
    refused_prefetches: int = 0

    @property
    def hits(self) -> int:
        return sum(tier.hits for tier in self.tiers)

    @property
    def lookups(self) -> int:
        """Calls of `get` and `get_layers`."""
        return self.hits + sum(self.misses.values())
