"""Prefetch: in order, until the deadline, until it is cancelled, and never in anybody's way."""

import time
from collections.abc import Iterator

import pytest

from kvloom.compress.raw import RawCodec
from kvloom.core import ChunkKey, EncodedChunk
from kvloom.errors import TierUnavailableError
from kvloom.kvstore.placement.quota import Quota
from kvloom.kvstore.store import KVStore
from kvloom.kvstore.tiers.host import HostTier
from kvloom.testing import make_chunk, make_key, same_chunk

from ..support.fakes import SkippingClock
from ..support.faulty import LONG_S, FaultyTier, eventually, leaves_no_threads

no_threads_left = pytest.fixture(autouse=True)(leaves_no_threads)

CHUNK_BYTES = RawCodec().encode(make_chunk(0)).nbytes
KEYS = [make_key(number) for number in range(20)]


@pytest.fixture
def disk() -> FaultyTier:
    disk = FaultyTier()
    for number, key in enumerate(KEYS):
        disk.put(key, RawCodec().encode(make_chunk(number)))
    disk.calls.clear()
    return disk


@pytest.fixture
def store(disk: FaultyTier) -> Iterator[KVStore]:
    """20 chunks on the disk, and a host for 10."""
    with KVStore([HostTier(10 * CHUNK_BYTES), disk], timeout_s=LONG_S) as store:
        yield store
        disk.heal()
        assert eventually(lambda: store.check() == []) and store.stats().pinned == 0


def at_work(disk: FaultyTier) -> bool:
    return eventually(lambda: "get" in disk.calls)


def in_host(store: KVStore) -> list[ChunkKey]:
    return [key for key in KEYS if store.locate(key) == "host"]


def test_result(store: KVStore) -> None:
    prefetch = store.prefetch([KEYS[3], make_key(99), KEYS[1], KEYS[3]])
    assert prefetch.result(LONG_S) == 3 and prefetch.outcome == "finished" and prefetch.done()
    assert in_host(store) == [KEYS[1], KEYS[3]] and same_chunk(store.get(KEYS[3]), make_chunk(3))
    assert not prefetch.cancel() and prefetch.outcome == "finished"
    assert store.stats().lookups == 1


def test_stops_at_its_deadline(disk: FaultyTier) -> None:
    clock, get = SkippingClock(), disk.get

    def get_slowly(key: ChunkKey) -> EncodedChunk | None:
        clock.skip(30.0)
        return get(key)

    disk.get = get_slowly  # type: ignore[method-assign]
    with KVStore([HostTier(10 * CHUNK_BYTES), disk], monotonic=clock) as store:
        prefetch = store.prefetch(KEYS[:10], deadline_s=100.0)
        found = prefetch.result(LONG_S)
        assert prefetch.outcome == "late" and 0 < found < 8 and in_host(store) == KEYS[:found]  # in order
        assert disk.calls.count("get") <= found + 1


def test_a_stalled_tier_is_not_waited_for_past_the_deadline(store: KVStore, disk: FaultyTier) -> None:
    disk.gate.clear()
    begun_s = time.monotonic()
    prefetch = store.prefetch(KEYS[:10], deadline_s=1.0)
    assert prefetch.result(LONG_S) == 0 and prefetch.outcome == "late" and time.monotonic() - begun_s < LONG_S / 2
    assert store.stats().tiers[1].timeouts == 1 and disk.calls == ["get"]


def test_a_deadline_counts_from_the_call(store: KVStore, disk: FaultyTier) -> None:
    disk.gate.clear()
    first, second = store.prefetch(KEYS[:1]), store.prefetch(KEYS[1:2], deadline_s=0.02)
    time.sleep(0.03)
    disk.gate.set()
    assert second.result(LONG_S) == 0 and second.outcome == "late" and first.result(0) == 1
    for wrong in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="deadline_s is"):
            store.prefetch(KEYS, deadline_s=wrong)


def test_cancel_at_work(store: KVStore, disk: FaultyTier) -> None:
    disk.gate.clear()
    prefetch = store.prefetch(KEYS[:5])
    assert at_work(disk) and prefetch.outcome is None and not prefetch.done()
    with pytest.raises(TimeoutError, match="5 chunks has not ended within 0 s"):
        prefetch.result(0)
    assert prefetch.cancel() and not prefetch.done()
    disk.gate.set()
    assert prefetch.result(LONG_S) == 1 and prefetch.outcome == "cancelled"  # the chunk that was under way
    assert in_host(store) == KEYS[:1] and disk.calls == ["get"] and not prefetch.cancel()


def test_cancel_in_the_queue(store: KVStore, disk: FaultyTier) -> None:
    disk.gate.clear()
    first, second, third = (store.prefetch([key]) for key in KEYS[:3])
    assert at_work(disk) and second.cancel() and second.result(0) == 0 and second.outcome == "cancelled"
    disk.gate.set()
    assert first.result(LONG_S) == third.result(LONG_S) == 1 and in_host(store) == [KEYS[0], KEYS[2]]


def test_too_many_are_refused(disk: FaultyTier) -> None:
    with KVStore([HostTier(None), disk]) as store:
        disk.gate.clear()
        first = store.prefetch(KEYS[:1])
        assert at_work(disk)
        waiting = [store.prefetch([KEYS[1 + number % 2]]) for number in range(256)]
        refused = [store.prefetch([key]) for key in KEYS[3:6]]
        assert all(prefetch.result(0) == 0 and prefetch.outcome == "refused" for prefetch in refused)
        assert store.stats().refused_prefetches == 3 and store.stats().background_errors == 0
        disk.gate.set()
        assert [prefetch.result(LONG_S) for prefetch in (first, *waiting)] == [1] * 257
        assert in_host(store) == KEYS[:3] and store.prefetch([KEYS[3]]).result(LONG_S) == 1


def test_what_was_just_brought_is_not_evicted_for_the_rest(store: KVStore, disk: FaultyTier) -> None:
    prefetch = store.prefetch(KEYS)
    assert prefetch.result(LONG_S) == 10 and prefetch.outcome == "full" and in_host(store) == KEYS[:10]
    assert disk.calls.count("get") == 11
    assert store.prefetch(KEYS[10:]).result(LONG_S) == 10 and in_host(store) == KEYS[10:]  # pins end with it


def test_a_chunk_that_never_fits_stops_nothing(disk: FaultyTier) -> None:
    with KVStore([HostTier(2 * CHUNK_BYTES), disk]) as store:
        store.put(make_key(50), make_chunk(50, tokens=99))
        prefetch = store.prefetch([KEYS[0], make_key(50), KEYS[1]])
        assert prefetch.result(LONG_S) == 2 and prefetch.outcome == "finished" and in_host(store) == KEYS[:2]


def test_a_chunk_above_the_limit_of_its_namespace_stops_nothing(disk: FaultyTier) -> None:
    with KVStore([HostTier(10 * CHUNK_BYTES), disk], quotas={"a": Quota(limit_ratio=0.3)}) as store:
        store.put(make_key(50), make_chunk(50, tokens=25), namespace="a")
        prefetch = store.prefetch([KEYS[0], make_key(50), KEYS[1]])
        assert prefetch.result(LONG_S) == 2 and prefetch.outcome == "finished" and in_host(store) == KEYS[:2]


def test_pins_while_it_is_at_work(store: KVStore, disk: FaultyTier) -> None:
    disk.gate.clear()
    prefetch = store.prefetch(KEYS[:2])
    assert at_work(disk) and store.stats().pinned == 2
    disk.gate.set()
    prefetch.result(LONG_S)
    assert store.stats().pinned == 0


def test_a_tier_that_fails_is_passed_over(store: KVStore, disk: FaultyTier) -> None:
    disk.fail(5, "get")
    prefetch = store.prefetch(KEYS)
    assert prefetch.result(LONG_S) == 0 and prefetch.outcome == "finished"
    assert 3 <= store.stats().tiers[1].errors == len(disk.calls) < 10  # then it was down, and had nothing to give


def test_errors_are_raised_and_end_nothing(store: KVStore, disk: FaultyTier) -> None:
    disk.faults = {"get": ZeroDivisionError}
    prefetch = store.prefetch(KEYS)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            prefetch.result(LONG_S)
    assert prefetch.outcome == "failed" and store.stats().background_errors == 1 and store.stats().pinned == 0
    disk.heal()
    assert store.prefetch(KEYS[:2]).result(LONG_S) == 2


def test_closing_cancels(disk: FaultyTier) -> None:
    store = KVStore([HostTier(None), disk], timeout_s=0.3)
    disk.gate.clear()
    running, waiting = store.prefetch(KEYS), store.prefetch(KEYS)
    assert at_work(disk)
    store.close()
    assert waiting.result(0) == 0 and waiting.outcome == running.outcome == "cancelled"
    with pytest.raises(TierUnavailableError, match="the store is closed"):
        store.prefetch(KEYS)
    disk.gate.set()
