"""A tier that tests can reach into, a clock that they can turn, and what the counters of a store must satisfy."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TypeVar

from kvloom.compress.raw import RawCodec
from kvloom.core import NOTHING, ChunkInfo, ChunkKey, EncodedChunk, Entry, Tier
from kvloom.errors import ChunkCorruptError, TierFullError, TierUnavailableError
from kvloom.kvstore.stats import StoreStats
from kvloom.kvstore.store import KVStore
from kvloom.testing import make_chunk, make_key

HEADER_BYTES = 40


class Clock:
    """Time that passes when told."""

    def __init__(self, now_s: float = 1e9) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


class SkippingClock:
    """Monotonic time that passes as usual, and in leaps when told."""

    skipped_s = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.skipped_s

    def skip(self, seconds: float) -> None:
        self.skipped_s += seconds


@dataclass
class Shelf:
    """What outlives a process: chunks in order of writing, those that are damaged, and who wrote or removed what."""

    chunks: dict[ChunkKey, tuple[EncodedChunk, ChunkInfo]] = field(default_factory=dict)
    corrupt: set[ChunkKey] = field(default_factory=set)
    log: list[tuple[object, Entry | ChunkKey]] = field(default_factory=list)


class ShelfTier:
    """A process's view of a shelf. Every chunk takes a header beside its tensors, and `put` says so."""

    failing = False

    def __init__(self, shelf: Shelf, capacity_bytes: int | None, *, name: str = "shelf") -> None:
        self.shelf = shelf
        self.capacity_bytes = capacity_bytes
        self.name = name
        self.closed = False
        self.seen = len(shelf.log)

    @property
    def used_bytes(self) -> int:
        return sum(map(self._size, self.shelf.chunks))

    def get(self, key: ChunkKey) -> EncodedChunk | None:
        self._expect_answer()
        if key in self.shelf.corrupt:
            self._remove(key)
            raise ChunkCorruptError(f"chunk {key.hex()} is damaged")
        found = self.shelf.chunks.get(key)
        return None if found is None else found[0]

    def get_layers(self, key: ChunkKey, start: int, stop: int) -> EncodedChunk | None:
        blob = self.get(key)
        return None if blob is None else blob.layers(start, stop)

    def put(self, key: ChunkKey, blob: EncodedChunk, info: ChunkInfo = NOTHING) -> int:
        self._expect_answer()
        nbytes = blob.nbytes + HEADER_BYTES
        used_bytes = self.used_bytes - (self._size(key) if key in self.shelf.chunks else 0)
        if self.capacity_bytes is not None and used_bytes + nbytes > self.capacity_bytes:
            raise TierFullError(f"{nbytes} bytes do not fit", needed_bytes=nbytes)
        self.shelf.chunks.pop(key, None)
        self.shelf.corrupt.discard(key)
        self.shelf.chunks[key] = blob, info
        self.shelf.log.append((self, Entry(key, nbytes, info)))
        return nbytes

    def delete(self, key: ChunkKey) -> bool:
        self._expect_answer()
        return self._remove(key)

    def __contains__(self, key: object) -> bool:
        return key in self.shelf.chunks

    def entries(self) -> list[Entry]:
        return [Entry(key, self._size(key), info) for key, (_, info) in self.shelf.chunks.items()]

    def close(self) -> None:
        self.closed = True

    def _remove(self, key: ChunkKey) -> bool:
        self.shelf.corrupt.discard(key)
        if self.shelf.chunks.pop(key, None) is None:
            return False
        self.shelf.log.append((self, key))
        return True

    def _size(self, key: ChunkKey) -> int:
        return self.shelf.chunks[key][0].nbytes + HEADER_BYTES

    def _expect_answer(self) -> None:
        if self.closed or self.failing:
            raise TierUnavailableError(f"tier {self.name!r} does not answer")


class SharedShelfTier(ShelfTier):
    """A view that other processes have too; while it is `silent`, it keeps to itself what they do."""

    silent = False

    def changes(self) -> list[Entry | ChunkKey]:
        self._expect_answer()
        if self.silent:
            return []
        news = [what for who, what in self.shelf.log[self.seen :] if who is not self]
        self.seen = len(self.shelf.log)
        return news


T = TypeVar("T", bound=Tier)


def filled(tier: T, *numbers: int) -> T:
    """The tier with chunks that a store finds there when it is opened, and no slower tier has."""
    for number in numbers:
        tier.put(make_key(number), RawCodec().encode(make_chunk(number)))
    return tier


def tiers_of(store: KVStore, key: ChunkKey) -> tuple[str, ...]:
    """Names of the tiers that hold the chunk, by the store's catalog."""
    return store.explain([key])[0].tiers


def assert_adds_up(stats: StoreStats) -> None:
    """The identities that the docstrings of the statistics promise."""
    assert stats.lookups == stats.hits + sum(stats.misses.values())
    moved = sum(tier.promotions + tier.demotions for tier in stats.tiers)
    assert sum(tier.puts for tier in stats.tiers) == stats.writes + moved
    assert stats.puts.get("stored", 0) <= stats.writes <= len(stats.tiers) * stats.puts.get("stored", 0)
    for tier in stats.tiers:
        assert tier.chunks == tier.arrivals + tier.puts - tier.replaced - tier.removals
        asked = tier.evictions + tier.expirations + tier.deletions
        found = tier.corruptions + tier.undecodable + tier.departures + tier.given_up
        assert tier.removals == asked + found
        assert tier.held_bytes == tier.added_bytes - tier.removed_bytes == sum(tier.namespace_bytes.values())
        assert tier.promotions <= tier.puts
        assert all(nbytes > 0 for nbytes in tier.namespace_bytes.values())
