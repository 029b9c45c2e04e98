"""What a store has done since it was opened, in numbers that add up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TierStats:
    """Counts of one tier. Bytes are what chunks take there, except those read and written: of encoded tensors.

    While nothing is under way,

        chunks == arrivals + puts - replaced - evictions - expirations - deletions - corruptions - undecodable
                  - departures - given_up
        held_bytes == added_bytes - removed_bytes == sum(namespace_bytes.values())

    and `held_bytes == used_bytes` for a tier whose `put` says what a chunk takes.

    Attributes
    ----------
    chunks, held_bytes : in the catalog of the store; `used_bytes` is what the tier says.
    namespace_bytes : `held_bytes` by namespace.
    hits : lookups that this tier answered; `bytes_read` counts their bytes.
    arrivals : chunks that were there when the store was opened, or that another process put.
    puts : chunks written, by `put`, promotion or demotion alike; `bytes_written` counts their bytes.
    replaced : chunks written over by the same key, here or by another process.
    evictions : chunks removed for space; `demotions` of them were first written to a slower tier.
    expirations : chunks removed because their time was over.
    deletions : chunks removed by `delete`, or because a newer `put` did not reach the tier.
    corruptions, undecodable : chunks removed because they were damaged, or because no codec knew them.
    departures : chunks that another process removed, or that the tier has lost.
    given_up : chunks that left the catalog because writing them anew or removing them was given up after it had begun.
        The tier removes what is left of them as soon as it answers; until then `used_bytes` counts it, too.
    promotions : chunks written to this tier because they were found in a slower one.
    transcodes : chunks written to this tier in another form than they had in the tier that they came from.
    rejections : chunks that did not fit, or were not taken because the tier is read-only.
    no_space : writes for which the file system had no space, whatever the capacity of the tier says.
    timeouts : operations that were given up because the tier did not answer in time.
    errors : operations that failed for any other reason, or were not begun because the tier is stalled or down.
    recoveries : times that the tier was down, and answered again.
    unreachable : chunks that the tier knows and could not give, because the node that holds them does not answer. They
        count as departures, too, and are looked for again later.
    fewer_replicas : chunks that were stored with fewer replicas than asked for.
    """

    name: str
    used_bytes: int
    capacity_bytes: int | None
    chunks: int
    held_bytes: int
    namespace_bytes: Mapping[str, int]
    hits: int = 0
    bytes_read: int = 0
    arrivals: int = 0
    puts: int = 0
    bytes_written: int = 0
    replaced: int = 0
    evictions: int = 0
    expirations: int = 0
    deletions: int = 0
    corruptions: int = 0
    undecodable: int = 0
    departures: int = 0
    given_up: int = 0
    demotions: int = 0
    promotions: int = 0
    transcodes: int = 0
    rejections: int = 0
    no_space: int = 0
    timeouts: int = 0
    errors: int = 0
    recoveries: int = 0
    unreachable: int = 0
    fewer_replicas: int = 0
    added_bytes: int = 0
    removed_bytes: int = 0

    @property
    def removals(self) -> int:
        """Chunks that left the tier, for whatever reason; without those replaced."""
        asked = self.evictions + self.expirations + self.deletions
        return asked + self.corruptions + self.undecodable + self.departures + self.given_up


@dataclass(frozen=True, slots=True)
class StoreStats:
    """Counts of a store.

    While nothing is under way,

        lookups == hits + sum(misses.values())
        sum(tier.puts for tier in tiers) == writes + promotions + demotions, each summed over the tiers

    Attributes
    ----------
    tiers : fastest first.
    lookups : calls of `read` and `get`.
    misses : lookups without an answer, by reason: `absent`; `expired`; `corrupt`, `undecodable`, `timeout` or
        `unavailable` if a tier that was asked had the chunk and could not give it; `uncertified` if it had only a lossy
        form of it that no certificate covers; `error` if the call raised.
    puts : calls of `put` by outcome: `stored`, or `refused` if it raised.
    writes : chunks that these puts wrote, one for every tier that took one.
    pinned : different keys that are pinned now.
    overdue_pins : calls of `pinned` that their deadline ended.
    background_errors : prefetches that failed; the error itself is raised by their `result`.
    refused_prefetches : prefetches that were refused because too many were waiting.
    uncertified_uses : how often a lossy form was put or given back without a certificate, by `allow_uncertified`.
    """

    tiers: tuple[TierStats, ...]
    lookups: int
    misses: Mapping[str, int]
    puts: Mapping[str, int]
    writes: int
    pinned: int = 0
    overdue_pins: int = 0
    background_errors: int = 0
    refused_prefetches: int = 0
    uncertified_uses: int = 0

    @property
    def hits(self) -> int:
        return sum(tier.hits for tier in self.tiers)
