"""Catalog and tiers stay in step, also when a tier stalls, fails or is shared, and when what was given up ends late."""

import errno
import threading
import time
from collections.abc import Iterator

import pytest

from kvloom.compress.raw import RawCodec
from kvloom.core import NOTHING, ChunkInfo, ChunkKey, EncodedChunk, Entry
from kvloom.errors import TierFullError, TierUnavailableError
from kvloom.kvstore.guard.guarded_tier import GuardedTier
from kvloom.kvstore.placement.quota import Quota
from kvloom.kvstore.store import KVStore
from kvloom.kvstore.tiers.device import DeviceTier
from kvloom.kvstore.tiers.host import HostTier
from kvloom.testing import keys_of, make_chunk, make_key, same_chunk

from ..support.fakes import HEADER_BYTES, SharedShelfTier, Shelf, ShelfTier, SkippingClock, assert_adds_up, filled
from ..support.faulty import LONG_S, FaultyTier, eventually, leaves_no_threads

no_threads_left = pytest.fixture(autouse=True)(leaves_no_threads)

BLOB = RawCodec().encode(make_chunk(0))
CHUNK_BYTES = BLOB.nbytes
TAKEN_BYTES = CHUNK_BYTES + HEADER_BYTES
KEYS = [make_key(number) for number in range(20)]


@pytest.fixture
def disk() -> Iterator[FaultyTier]:
    disk = FaultyTier()
    yield disk
    disk.heal()


def put(store: KVStore, *numbers: int, namespace: str = "") -> None:
    for number in numbers:
        store.put(KEYS[number], make_chunk(number), namespace=namespace)


def in_order(store: KVStore) -> bool:
    assert_adds_up(store.stats())
    return store.check() == []


def settled(store: KVStore) -> bool:
    guards = [tier for tier in store.tiers if isinstance(tier, GuardedTier)]
    return not any(guard.running or guard.doubtful() for guard in guards)


# ------------------------------------------------------------------------------------------------ counters that add up


def test_what_was_given_up_is_counted(disk: FaultyTier) -> None:
    with KVStore([HostTier(None), disk], timeout_s=0.3) as store:
        put(store, 0, 1, 2)
        disk.gate.clear()
        put(store, 0, 3)  # written over; and new, so that the catalog never had it
        with pytest.raises(TierUnavailableError):
            store.delete(KEYS[1])
        tier = store.stats().tiers[1]
        assert (tier.given_up, tier.deletions, tier.replaced, tier.chunks) == (2, 0, 0, 1) and tier.timeouts == 2
        assert tier.held_bytes == CHUNK_BYTES < tier.used_bytes
        assert_adds_up(store.stats())
        disk.gate.set()
        assert eventually(lambda: settled(store))
        assert keys_of(disk) == [KEYS[2]] and in_order(store)
        tier = store.stats().tiers[1]
        assert tier.given_up == 2 and tier.held_bytes == tier.used_bytes == CHUNK_BYTES


def test_a_removal_that_failed_has_not_happened(disk: FaultyTier) -> None:
    with KVStore([HostTier(None), disk], timeout_s=LONG_S) as store:
        put(store, 0)
        disk.fail(errno.EIO, "delete")
        with pytest.raises(TierUnavailableError):
            store.delete(KEYS[0])
        tier = store.stats().tiers[1]
        assert (tier.given_up, tier.deletions, tier.chunks) == (0, 0, 1) and in_order(store)
        assert store.locate(KEYS[0]) == "disk"


class NoDeletions(ShelfTier):
    def delete(self, key: ChunkKey) -> bool:
        raise TierUnavailableError("read only")


def test_a_chunk_that_was_written_counts_also_if_what_follows_fails() -> None:
    """Its headers take the namespace above its limit, and nothing can be evicted for that."""
    limit_ratio = (2 * CHUNK_BYTES + 3 * HEADER_BYTES // 2) / (20 * CHUNK_BYTES)
    with KVStore([NoDeletions(Shelf(), 20 * CHUNK_BYTES)], quotas={"a": Quota(0.0, limit_ratio)}) as store:
        put(store, 0, 1, namespace="a")
        stats = store.stats()
        assert stats.puts == {"stored": 2} and stats.writes == stats.tiers[0].chunks == 2 and stats.tiers[0].errors == 1
        assert in_order(store) and same_chunk(store.get(KEYS[1]), make_chunk(1))


# ------------------------------------------------------------------------------------------------- tiers that are down


def test_what_cannot_be_had_is_not_found(disk: FaultyTier) -> None:
    clock = SkippingClock()
    with KVStore([HostTier(CHUNK_BYTES), disk], timeout_s=LONG_S, monotonic=clock) as store:
        put(store, 0, 1)  # 0 is on the disk alone
        disk.fail(errno.EIO, "get")
        for _ in range(3):
            assert store.match([KEYS[1], KEYS[0]]) == 2 and store.locate(KEYS[0]) == "disk"
            assert store.get(KEYS[0]) is None
        clock.skip(-1000.0)
        calls = len(disk.calls)
        assert store.match([KEYS[1], KEYS[0]]) == 1 and store.match([KEYS[0]]) == 0
        assert store.locate(KEYS[0]) is None and KEYS[0] not in store and KEYS[1] in store
        assert store.prefetch([KEYS[0]]).result(LONG_S) == 0 and len(disk.calls) == calls
        clock.skip(2000.0)  # it is asked again
        disk.heal()
        assert store.match([KEYS[1], KEYS[0]]) == 2 and KEYS[0] in store
        assert same_chunk(store.get(KEYS[0]), make_chunk(0)) and store.stats().tiers[1].recoveries == 1
        assert in_order(store)


def test_a_stalled_tier_holds_nothing_for_the_time_being(disk: FaultyTier) -> None:
    clock = SkippingClock()
    with KVStore([filled(disk, 1), HostTier(None, name="below")], timeout_s=0.3, monotonic=clock) as store:
        put(store, 0)
        disk.gate.clear()
        assert store.match(KEYS[:2]) == 2
        for _ in range(3):
            assert store.get(KEYS[1]) is None
        clock.skip(-1000.0)
        assert store.match(KEYS[:2]) == 1  # a copy is below
        assert store.locate(KEYS[0]) == "below" and KEYS[1] not in store
        disk.gate.set()
        clock.skip(2000.0)
        assert eventually(lambda: store.match(KEYS[:2]) == 2 and store.get(KEYS[1]) is not None)
        assert eventually(lambda: settled(store)) and in_order(store)


# ------------------------------------------------------------------------------------------ tiers that stay full


def test_a_device_without_space_does_not_cost_all_chunks(disk: FaultyTier) -> None:
    """Others have filled it: whatever is evicted, nothing fits."""
    with KVStore([disk], timeout_s=LONG_S) as store:
        put(store, *range(10))
        disk.faults = {"put": lambda: TierFullError("no space", needed_bytes=CHUNK_BYTES)}
        with pytest.raises(TierFullError, match="no space"):
            put(store, 10)
        assert store.stats().tiers[0].evictions == 2 and store.stats().tiers[0].chunks == 8
        disk.heal()
        put(store, 10)
        assert KEYS[10] in store and in_order(store)


def test_a_device_gets_its_space_back_by_eviction(disk: FaultyTier) -> None:
    with KVStore([disk], timeout_s=LONG_S) as store:
        put(store, *range(10))

        write = disk.put

        def write_if_there_is_space(*args: object) -> int:
            if len(keys_of(disk)) >= 10:
                raise TierFullError("no space", needed_bytes=CHUNK_BYTES)
            return write(*args)

        disk.put = write_if_there_is_space
        put(store, 10)
        assert store.stats().tiers[0].evictions == 1 and KEYS[10] in store and in_order(store)


def test_memory_that_readers_hold_does_not_cost_all_chunks() -> None:
    """What is evicted there is not free before its last reader is gone."""
    probe = DeviceTier(1 << 20, device="cpu")
    chunk_bytes = probe.put(KEYS[0], BLOB)
    probe.close()
    tier = DeviceTier(8 * chunk_bytes, device="cpu")
    with KVStore([tier], policy="lru") as store:
        put(store, *range(8))
        reading = [tier.get(key) for key in KEYS[:8]]
        with pytest.raises(TierFullError):
            put(store, 8)
        assert store.stats().tiers[0].evictions == 3 and store.match(KEYS[3:8]) == 5
        del reading
        put(store, 8)
        assert KEYS[8] in store and store.stats().tiers[0].evictions == 3 and in_order(store)


def test_a_tier_that_has_shrunk_is_brought_to_its_size() -> None:
    """Many evictions for one chunk, and none of them in vain."""
    shelf = Shelf()
    with KVStore([ShelfTier(shelf, None)]) as store:
        put(store, *range(10))
    with KVStore([ShelfTier(shelf, 3 * TAKEN_BYTES)], policy="lru") as store:
        put(store, 10)
        assert store.stats().tiers[0].evictions == 8 and store.match([KEYS[8], KEYS[9], KEYS[10]]) == 3
        assert in_order(store)


# --------------------------------------------------------------------------------------------- tiers of several


class StallingShelf(SharedShelfTier):
    """A view of a shelf on a device: `put` and `changes` wait for a gate each."""

    may_stall = True

    def __init__(self, shelf: Shelf) -> None:
        super().__init__(shelf, None)
        self.puts, self.news = threading.Event(), threading.Event()
        self.asked = 0
        self.heal()

    def heal(self) -> None:
        self.puts.set(), self.news.set()

    def put(self, key: ChunkKey, blob: EncodedChunk, info: ChunkInfo = NOTHING) -> int:
        self.puts.wait(LONG_S)
        return super().put(key, blob, info)

    def changes(self) -> list[Entry | ChunkKey]:
        self.asked += 1
        self.news.wait(LONG_S)
        return super().changes()


@pytest.fixture
def shelf() -> Iterator[StallingShelf]:
    tier = StallingShelf(Shelf())
    yield tier
    tier.heal()


def test_changes_that_come_late_are_heeded(shelf: StallingShelf) -> None:
    """A tier says only once what is new: whoever did not wait for the answer must not lose it."""
    other = ShelfTier(shelf.shelf, None)
    with KVStore([HostTier(None), shelf], timeout_s=0.2) as store:
        put(store, 1)
        shelf.news.clear()
        other.put(KEYS[0], BLOB), other.delete(KEYS[1])
        asked, begun_s = shelf.asked, time.monotonic()
        for _ in range(50):
            assert store.match(KEYS[:1]) == 0 and KEYS[1] in store
        assert time.monotonic() - begun_s < LONG_S / 4 and shelf.asked == asked + 1  # one thread is at it
        assert store.stats().tiers[1].timeouts == 1
        shelf.news.set()
        assert eventually(lambda: store.stats().tiers[1].arrivals == store.stats().tiers[1].departures == 1)
        assert store.match(KEYS[:1]) == 1 and same_chunk(store.get(KEYS[0]), make_chunk(0))
        assert eventually(lambda: settled(store)) and in_order(store)


class DoubtingShelf(SharedShelfTier):
    """Cannot say once what it holds."""

    doubts = 0

    def __contains__(self, key: object) -> bool:
        if self.doubts:
            self.doubts -= 1
            raise TierUnavailableError("does not answer")
        return super().__contains__(key)


def test_changes_are_kept_if_the_tier_fails_among_them() -> None:
    tier = DoubtingShelf(Shelf(), None)
    other = ShelfTier(tier.shelf, None)
    with KVStore([tier]) as store:
        other.put(KEYS[0], BLOB), other.put(KEYS[1], BLOB)
        assert store.match(KEYS[:2]) == 2
        tier.doubts = 1
        other.delete(KEYS[0]), other.put(KEYS[2], BLOB)
        assert store.match([KEYS[2]]) == 0 and store.stats().tiers[0].errors == 1
        assert store.match([KEYS[2]]) == 1 and KEYS[0] not in store and in_order(store)


def test_a_late_undoing_takes_the_copy_of_another_process_along(shelf: StallingShelf) -> None:
    """And the catalog knows of it."""
    other = ShelfTier(shelf.shelf, None)
    with KVStore([HostTier(0), shelf], timeout_s=0.3) as store:
        shelf.puts.clear()
        with pytest.raises(TierUnavailableError):
            put(store, 0)
        other.put(KEYS[0], BLOB)
        assert KEYS[0] in store and store.stats().tiers[1].arrivals == 1
        shelf.puts.set()
        assert eventually(lambda: settled(store))
        assert KEYS[0] not in store and KEYS[0] not in shelf and store.stats().tiers[1].given_up == 1
        assert in_order(store)
        put(store, 0)
        assert KEYS[0] in store and in_order(store)
