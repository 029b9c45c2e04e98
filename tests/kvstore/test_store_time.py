"""Expiry, pins with deadlines, promotion, tiers shared with other processes, and counters of all that."""

import sys
import threading
from pathlib import Path

import pytest

from kvloom.compress.raw import RawCodec
from kvloom.core import NOTHING, ChunkInfo, ChunkKey, EncodedChunk, Entry
from kvloom.errors import TierFullError
from kvloom.kvstore.capabilities import ReportsChanges
from kvloom.kvstore.eviction.policy import POLICIES
from kvloom.kvstore.placement.pins import Pins
from kvloom.kvstore.store import KVStore
from kvloom.kvstore.tiers.host import HostTier
from kvloom.testing import keys_of, make_chunk, make_key, same_chunk

from ..support.fakes import HEADER_BYTES, Clock, SharedShelfTier, Shelf, ShelfTier, assert_adds_up
from ..support.patience import LONG_S, least_cpu_s

CHUNK_BYTES = RawCodec().encode(make_chunk(0)).nbytes
TAKEN_BYTES = CHUNK_BYTES + HEADER_BYTES


@pytest.fixture
def clock() -> Clock:
    return Clock()


def put(store: KVStore, *numbers: int, ttl_s: float | None = None) -> None:
    for number in numbers:
        store.put(make_key(number), make_chunk(number), ttl_s=ttl_s)


def stored(store: KVStore, *numbers: int) -> list[int]:
    return [number for number in numbers if make_key(number) in store]


def test_an_expired_chunk_is_a_miss_and_is_removed_when_found(clock: Clock) -> None:
    tiers = [HostTier(None), ShelfTier(Shelf(), None)]
    with KVStore(tiers, clock=clock) as store:
        put(store, 1, 2, ttl_s=10)
        put(store, 3)
        clock.now_s += 9.999
        assert store.match([make_key(n) for n in (1, 2, 3)]) == 3 and store.get(make_key(1)) is not None
        clock.now_s += 0.001
        assert store.match([make_key(3), make_key(1)]) == 1 and stored(store, 1, 2, 3) == [3]
        assert store.locate(make_key(1)) is None and make_key(1) in tiers[0]
        assert store.get(make_key(1)) is None and store.get(make_key(2), layers=(0, 1)) is None
        assert all(len(tier.entries()) == 1 for tier in tiers) and tiers[1].used_bytes == TAKEN_BYTES
        assert store.get(make_key(1)) is None
        stats = store.stats()
        assert stats.misses == {"expired": 2, "absent": 1} and [tier.expirations for tier in stats.tiers] == [2, 2]
        put(store, 1)
        clock.now_s += 1e9
        assert store.get(make_key(1)) is not None and store.check() == []
        assert_adds_up(store.stats())


@pytest.mark.parametrize("policy", POLICIES)
def test_expired_chunks_go_before_any_victim(clock: Clock, policy: str) -> None:
    with KVStore([HostTier(4 * CHUNK_BYTES)], clock=clock, policy=policy) as store:
        put(store, 0, 1)
        put(store, 2, 3, ttl_s=10)
        for number in (2, 3, 2, 3):  # dear to every policy
            store.get(make_key(number))
        clock.now_s += 10
        with store.pinned([make_key(2)]):  # a pin keeps from eviction, not from expiry
            put(store, 4, 5)
        assert stored(store, 0, 1, 2, 3, 4, 5) == [0, 1, 4, 5]
        tier = store.stats().tiers[0]
        assert (tier.expirations, tier.evictions) == (2, 0) and store.check() == []
        put(store, 6)
        assert store.stats().tiers[0].evictions == 1


def test_what_expires_is_not_demoted(clock: Clock) -> None:
    tiers = [HostTier(2 * CHUNK_BYTES), ShelfTier(Shelf(), None)]
    with KVStore(tiers, clock=clock) as store:
        tiers[1].failing = True
        put(store, 0, 1, ttl_s=10)
        tiers[1].failing = False
        clock.now_s += 10
        put(store, 2, 3)
        assert store.stats().tiers[0].demotions == 0 and keys_of(tiers[1]) == [make_key(2), make_key(3)]


def test_time_to_live_goes_along_and_survives_reopening(clock: Clock) -> None:
    shelf = Shelf()
    below = ShelfTier(shelf, None)
    with KVStore([HostTier(CHUNK_BYTES), below], clock=clock) as store:
        below.failing = True
        put(store, 0, ttl_s=10)
        below.failing = False
        put(store, 1)  # demotes the other
        assert store.locate(make_key(0)) == "shelf" and store.stats().tiers[0].demotions == 1
        store.get(make_key(0))
        assert store.locate(make_key(0)) == "host"
        clock.now_s += 10
        assert stored(store, 0, 1) == [1]
        clock.now_s -= 5
    with KVStore([ShelfTier(shelf, None)], clock=clock) as store:
        assert stored(store, 0, 1) == [0, 1]
        clock.now_s += 5
        assert stored(store, 0, 1) == [1] and store.get(make_key(0)) is None and store.check() == []


class FullShelf(ShelfTier):
    """Has no space when told."""

    is_full = False

    def put(self, key: ChunkKey, blob: EncodedChunk, info: ChunkInfo = NOTHING) -> int:
        if self.is_full:
            raise TierFullError("no space", needed_bytes=1)
        return super().put(key, blob, info)


def test_the_last_put_decides_when_a_chunk_expires(clock: Clock) -> None:
    """Also about the copies that it did not write."""
    below = FullShelf(Shelf(), None)
    with KVStore([HostTier(CHUNK_BYTES), below], clock=clock) as store:
        put(store, 0, 1)  # 0 is on the shelf now, for ever
        below.is_full = True
        put(store, 0, ttl_s=10)
        assert store.locate(make_key(0)) == "host" and store.stats().tiers[1].deletions == 1
        below.is_full = False
        clock.now_s += 10
        assert stored(store, 0) == [] and store.get(make_key(0)) is None and store.check() == []
        put(store, 0, ttl_s=10)
        put(store, 0)
        clock.now_s += 10
        assert stored(store, 0) == [0]
        assert_adds_up(store.stats())


def test_many_short_lives_do_not_pile_up(clock: Clock) -> None:
    key = make_key(1)
    with KVStore([HostTier(None)], clock=clock) as store:
        before = sys.getrefcount(key)
        for _ in range(500):
            store.put(key, make_chunk(1), ttl_s=10)
        assert sys.getrefcount(key) - before <= 2 * 1 + 65 + 10


def test_pins_end_at_their_deadline(clock: Clock) -> None:
    keys = [make_key(n) for n in range(3)]
    with KVStore([HostTier(3 * CHUNK_BYTES)], clock=clock) as store:
        put(store, 0, 1, 2)
        with store.pinned(keys, deadline_s=30.0), store.pinned(keys[:1]):
            assert store.stats().pinned == 3
            clock.now_s += 29.0
            with pytest.raises(TierFullError):
                put(store, 3)
            clock.now_s += 1.0
            assert store.stats().pinned == 1 and store.stats().overdue_pins == 1
            put(store, 4, 5, 6, 7)  # whoever was stuck does not fill the store
            assert stored(store, 0, 1, 2) == [0] and store.check() == []
        assert store.stats().pinned == 0 and store.check() == []
        with store.pinned(keys, deadline_s=30.0):
            clock.now_s += 1.0
        clock.now_s += 100.0
        assert store.stats().overdue_pins == 1


def test_pins_leave_nothing_behind(clock: Clock) -> None:
    with KVStore([HostTier(None)], clock=clock) as store:
        for number in range(1000):
            with store.pinned([make_key(number), make_key(number)], deadline_s=1e6):
                assert store.stats().pinned == 1
        assert store.stats().pinned == 0 and store.check() == []
    pins, keys = Pins(), tuple(make_key(n) for n in range(2))
    before = sys.getrefcount(keys)
    for number in range(1000):
        pins.hold(number, keys, 1e6)
        pins.release(number)
    assert len(pins) == 0 and pins.check() == [] and sys.getrefcount(keys) == before
    assert len(pins._deadlines) <= 66


def test_promotion() -> None:
    with KVStore([HostTier(CHUNK_BYTES), ShelfTier(Shelf(), None)]) as store:
        put(store, 0, 1)
        for promotions in (1, 1):
            assert same_chunk(store.get(make_key(0)), make_chunk(0))
            assert store.stats().tiers[0].promotions == promotions
        assert store.prefetch([make_key(1)]).result(LONG_S) == 1 and store.locate(make_key(1)) == "host"
        assert store.stats().tiers[0].promotions == 2
        assert_adds_up(store.stats())


class TwoProcesses:
    """Two stores over one shelf, as two processes would have."""

    def __init__(self, capacity_bytes: int | None = None, **options: object) -> None:
        self.shelf = Shelf()
        self.tiers = [SharedShelfTier(self.shelf, capacity_bytes) for _ in range(2)]
        self.one, self.two = (KVStore([HostTier(0), tier], **options) for tier in self.tiers)

    def assert_in_order(self) -> None:
        for store in (self.one, self.two):
            assert store.check() == []
            assert_adds_up(store.stats())


def test_what_another_process_puts_and_removes_is_noticed() -> None:
    both = TwoProcesses()
    assert isinstance(both.tiers[0], ReportsChanges) and not isinstance(HostTier(None), ReportsChanges)
    put(both.one, 1, 2)
    assert both.two.match([make_key(1), make_key(2), make_key(3)]) == 2
    assert same_chunk(both.two.get(make_key(2)), make_chunk(2))
    both.one.delete(make_key(1))
    assert make_key(1) not in both.two and both.two.locate(make_key(2)) == "shelf"
    put(both.two, 1)
    assert same_chunk(both.one.get(make_key(1)), make_chunk(1))
    both.two.delete(make_key(1)), put(both.two, 1)  # removed and put again since the other looked
    both.assert_in_order()
    assert stored(both.one, 1, 2) == [1, 2]
    tier = both.one.stats().tiers[1]
    assert (tier.puts, tier.deletions, tier.arrivals, tier.departures) == (2, 1, 2, 0)
    assert both.two.stats().tiers[1].departures == 1


def test_get_finds_what_another_process_has_just_put() -> None:
    both = TwoProcesses()
    assert both.two.get(make_key(1)) is None
    put(both.one, 1)
    assert same_chunk(both.two.get(make_key(1)), make_chunk(1))
    both.assert_in_order()


def test_space_is_made_among_the_chunks_of_all_processes() -> None:
    both = TwoProcesses(4 * TAKEN_BYTES, policy="lru")
    put(both.one, 0, 1, 2)
    put(both.two, 3, 4, 5)
    assert stored(both.one, *range(6)) == [2, 3, 4, 5] == stored(both.two, *range(6))
    put(both.one, 6, 7, 8, 9)
    both.assert_in_order()
    assert stored(both.two, *range(10)) == [6, 7, 8, 9]


def test_a_removal_that_was_overtaken_by_a_put_here_is_no_news() -> None:
    """Another process removes a chunk; this one has put it again before it reads of that."""
    both = TwoProcesses()
    put(both.one, 1)
    assert make_key(1) in both.two
    both.one.delete(make_key(1))
    blob = RawCodec().encode(make_chunk(1))
    both.tiers[1].silent = True
    both.two.put_encoded(make_key(1), blob)
    both.tiers[1].silent = False
    assert make_key(1) in both.two and both.two.check() == both.one.check() == []


def test_news_that_cannot_be_read_are_read_later(caplog: pytest.LogCaptureFixture) -> None:
    both = TwoProcesses()
    put(both.one, 1)
    both.tiers[1].failing = True
    assert make_key(1) not in both.two and both.two.stats().tiers[1].errors > 0
    both.tiers[1].failing = False
    assert make_key(1) in both.two
    both.assert_in_order()


class SlowNews(SharedShelfTier):
    """Waits inside `changes` until it is told to go on."""

    def __init__(self) -> None:
        super().__init__(Shelf(), None)
        self.asked, self.go_on = threading.Event(), threading.Event()
        self.slow = False

    def changes(self) -> list[Entry | ChunkKey]:
        if self.slow:
            self.asked.set()
            self.go_on.wait(LONG_S)
        return super().changes()


def test_one_slow_reader_of_news_stops_no_other() -> None:
    tier = SlowNews()
    with KVStore([tier]) as store:
        put(store, 1)
        tier.slow = True
        thread = threading.Thread(target=store.match, args=([make_key(1)],))
        thread.start()
        assert tier.asked.wait(LONG_S)
        assert store.match([make_key(1)]) == 1 and same_chunk(store.get(make_key(1)), make_chunk(1))
        tier.slow = False
        tier.go_on.set()
        thread.join(LONG_S)
        assert not thread.is_alive()


def test_lookups_that_raise_are_counted() -> None:
    with KVStore([HostTier(None)]) as store:
        put(store, 1)
        with pytest.raises(ValueError, match="has fewer"):
            store.get(make_key(1), layers=(2, 9))
        stats = store.stats()
        assert stats.lookups == 1 and stats.misses == {"error": 1} and stats.hits == 0


class ManyKeys(HostTier):
    """Says that it holds very many chunks."""

    def __init__(self, chunks: int) -> None:
        super().__init__(None)
        self.chunks = chunks

    def entries(self) -> list[Entry]:
        return [Entry(spread(number), 100, ChunkInfo()) for number in range(self.chunks)]


def spread(number: int) -> ChunkKey:
    """As real keys are: all over."""
    return ChunkKey((number * 0x9E3779B97F4A7C15 % 2**64).to_bytes(8, "little") * 4)


def test_match_is_fast() -> None:
    """A prompt of 1,000 stored chunks that start anywhere in a store that is not large; a loose bound."""
    with KVStore([ManyKeys(50_000)], policy="lru") as store:
        matched, starts = [], range(0, 49_000, 1200)
        prompts = iter([[spread(number) for number in range(start, start + 1000)] for start in starts])
        assert least_cpu_s(lambda: matched.append(store.match(next(prompts))), len(starts)) < 2e-3
        assert matched == [1000] * len(starts)


@pytest.mark.slow
def test_keys_are_not_forgotten_in_use(tmp_path: Path) -> None:
    """`match` takes no lock: chunks that stay stored, while they move up and down, are always found."""
    tiers = [HostTier(3 * CHUNK_BYTES), ShelfTier(Shelf(), None)]
    with KVStore(tiers, policy="lru") as store:
        put(store, *range(8))
        keys, done = [make_key(n) for n in range(8)], threading.Event()
        missed: list[int] = []

        def watch() -> None:
            while not done.is_set():
                missed.extend(n for n in [store.match(keys)] if n != 8)

        thread = threading.Thread(target=watch)
        thread.start()
        for round_ in range(100):
            for number in range(8):
                store.get(keys[number])
            put(store, round_ % 8)
        done.set()
        thread.join(LONG_S)
        assert not missed and store.stats().tiers[0].evictions > 100 and store.check() == []
