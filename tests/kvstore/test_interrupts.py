"""An exception at any instruction of a call: no lock, no pin, no chunk that the store does not know, no hang."""

import gc
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from kvloom.compress.raw import RawCodec
from kvloom.core import ChunkInfo, ChunkKey
from kvloom.errors import TierUnavailableError
from kvloom.kvstore.placement.quota import Quota
from kvloom.kvstore.store import KVStore
from kvloom.kvstore.tiers.disk.index import taken_bytes
from kvloom.kvstore.tiers.disk.tier import DiskTier
from kvloom.kvstore.tiers.host import HostTier
from kvloom.testing import make_chunk, make_key, same_chunk

from ..support.fakes import Clock, SharedShelfTier, Shelf, ShelfTier
from ..support.faulty import leaves_no_threads
from ..support.interrupts import at_some_positions

no_threads_left = pytest.fixture(autouse=True)(leaves_no_threads)

LONG_S = 20.0
TRIED = [
    pytest.param(2, id="few"),
    pytest.param(60, id="some", marks=pytest.mark.slow),
    pytest.param(None, id="all", marks=[pytest.mark.torture, pytest.mark.timeout(7200)]),
]
BLOB = RawCodec().encode(make_chunk(0))
HOST_BYTES = 4 * BLOB.nbytes
NUMBERS = range(6)
PUT, OTHER, EXTRA = 0, 1, 50
KEYS = [make_key(number) for number in NUMBERS]

Elsewhere: TypeAlias = Callable[[Callable[[], Any]], Any]


@pytest.fixture
def elsewhere() -> Iterator[Elsewhere]:
    """Calls something in another thread, which waits for whatever the test's thread has left locked."""
    with ThreadPoolExecutor(1) as threads:
        yield lambda call: threads.submit(call).result(timeout=LONG_S)


def host_alone(folder: Path, clock: Clock) -> KVStore:
    return KVStore([HostTier(HOST_BYTES, pinned=False)], clock=clock)


def with_disk(folder: Path, clock: Clock, timeout_s: float | None = LONG_S) -> KVStore:
    """Both tiers are full with four chunks, so that every put evicts and demotes."""
    disk = DiskTier(folder, 4 * taken_bytes(BLOB.nbytes + 1000))
    return KVStore([HostTier(HOST_BYTES, pinned=False), disk], clock=clock, timeout_s=timeout_s)


def unguarded(folder: Path, clock: Clock) -> KVStore:
    return with_disk(folder, clock, None)


def with_quotas(folder: Path, clock: Clock) -> KVStore:
    quotas = {"": Quota(0.0, 0.75)}
    return KVStore([HostTier(HOST_BYTES, pinned=False), HostTier(None, name="below")], clock=clock, quotas=quotas)


STORES: dict[str, Callable[[Path, Clock], KVStore]] = {
    "host": host_alone,
    "host and disk": with_disk,
    "unguarded disk": unguarded,
    "quotas": with_quotas,
}


class Trial:
    """A store, and the calls that are interrupted."""

    def __init__(self, store: KVStore, clock: Clock, elsewhere: Elsewhere) -> None:
        self.store, self.clock, self.elsewhere = store, clock, elsewhere
        store.take_placement_changes()

    def fill(self) -> None:
        for number in NUMBERS:
            self.store.put(make_key(number), make_chunk(number))

    def calls(self) -> dict[str, Callable[[], object]]:
        store, first = self.store, make_key(PUT)

        def pin() -> None:
            with store.pinned(KEYS[:3], deadline_s=1e6):
                pass

        def expire() -> None:
            store.put(first, make_chunk(PUT), ttl_s=5)
            self.clock.now_s += 6
            store.get(first)

        return {
            "put": lambda: store.put(first, make_chunk(PUT), after=make_key(OTHER), recompute_s=0.5),
            "put with quota": lambda: store.put(first, make_chunk(PUT), namespace="a"),
            "get": lambda: [store.get(key) for key in KEYS],
            "get in time": lambda: [store.get(key, timeout_s=LONG_S) for key in KEYS],
            "read layers": lambda: [store.read(key, layers=(1, 3)) for key in KEYS],
            "miss": lambda: store.get(make_key(99)),
            "expire": expire,
            "match": lambda: (store.match(KEYS), store.locate_prefix(KEYS), store.locate(first)),
            "pinned": pin,
            "prefetch": lambda: store.prefetch(KEYS[:2]).result(LONG_S),
            "cancel": lambda: [prefetch.cancel() for prefetch in [store.prefetch(KEYS) for _ in range(2)]],
            "delete": lambda: [store.delete(key) for key in KEYS],
            "encoded": lambda: (store.put_encoded(first, BLOB, ChunkInfo()), store.get_encoded(first)),
            "reports": lambda: (store.stats(), store.explain(KEYS), store.take_placement_changes(), store.check()),
        }

    def verify(self) -> None:
        """Another thread finds the store in order and goes on with it, and so does this one."""
        gc.collect(0)
        self.elsewhere(self._verify)
        self._verify()

    def _verify(self) -> None:
        store = self.store
        assert store.prefetch([]).result(LONG_S) == 0  # those of the interrupted call are over
        assert store.check() == []
        stats = store.stats()
        assert stats.pinned == 0
        for tier in stats.tiers:
            assert tier.chunks == tier.arrivals + tier.puts - tier.replaced - tier.removals
            assert tier.held_bytes == tier.added_bytes - tier.removed_bytes == sum(tier.namespace_bytes.values())
        for number in (*NUMBERS, 99):
            found = store.get(make_key(number))
            assert found is None or same_chunk(found, make_chunk(number))
        extra = make_key(EXTRA)
        store.put(extra, make_chunk(EXTRA))
        found = store.get(extra)
        assert found is not None and same_chunk(found, make_chunk(EXTRA))
        assert store.match([extra]) == 1 and store.delete(extra) and store.match([extra]) == 0
        assert store.check() == []
        with store.pinned(KEYS):
            assert store.stats().pinned == len(KEYS)
        assert store.stats().pinned == 0


CALLS = [
    "put",
    "put with quota",
    "get",
    "get in time",
    "read layers",
    "miss",
    "expire",
    "match",
    "pinned",
    "prefetch",
    "cancel",
    "delete",
    "encoded",
    "reports",
]


@pytest.mark.parametrize("tried", TRIED)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", STORES)
def test_calls(tmp_path: Path, kind: str, call: str, tried: int | None, elsewhere: Elsewhere) -> None:
    clock = Clock()
    with STORES[kind](tmp_path, clock) as store:
        trial = Trial(store, clock, elsewhere)

        def prepare() -> Callable[[], object]:
            trial.fill()
            return trial.calls()[call]

        assert at_some_positions(prepare, trial.verify, tried) > 50
        began_s = time.monotonic()
        store.close()
        assert time.monotonic() - began_s < LONG_S / 2


@pytest.mark.parametrize("tried", TRIED)
@pytest.mark.parametrize("kind", STORES)
def test_close(tmp_path: Path, kind: str, tried: int | None, elsewhere: Elsewhere) -> None:
    """An interrupted `close` is completed by the next one, and the directory is free again."""
    stores: list[KVStore] = []

    def prepare() -> Callable[[], object]:
        stores.append(STORES[kind](tmp_path, Clock()))
        stores[-1].put(make_key(PUT), make_chunk(PUT))
        stores[-1].prefetch(KEYS)
        return stores[-1].close

    def verify() -> None:
        store = stores.pop()
        elsewhere(store.close)
        for ended in (lambda: store.get(make_key(PUT)), lambda: store.match(KEYS)):
            with pytest.raises(TierUnavailableError):
                elsewhere(ended)

    assert at_some_positions(prepare, verify, tried) > 50


@pytest.mark.parametrize("tried", TRIED)
def test_changes_of_other_processes_are_not_lost(tried: int | None, elsewhere: Elsewhere) -> None:
    """Even by a tier that says only once what is new."""
    shelf, clock = Shelf(), Clock()
    other = ShelfTier(shelf, None)
    with KVStore([HostTier(None, pinned=False), SharedShelfTier(shelf, None)], clock=clock) as store:

        def prepare() -> Callable[[], object]:
            store.delete(KEYS[0])
            other.put(KEYS[0], BLOB)
            other.put(KEYS[1], RawCodec().encode(make_chunk(1)))
            assert store.match(KEYS[1:2]) == 1
            other.delete(KEYS[1])
            return lambda: store.match(KEYS)

        def verify() -> None:
            elsewhere(check)
            check()

        def check() -> None:
            assert store.check() == []
            assert store.match(KEYS[:1]) == 1 and store.match(KEYS[1:2]) == 0
            found = store.get(KEYS[0])
            assert found is not None and same_chunk(found, make_chunk(0))

        assert at_some_positions(prepare, verify, tried) > 50


def test_a_pin_ends_with_its_context_manager() -> None:
    with KVStore([HostTier(None)]) as store:
        pin = store.pinned(KEYS)
        pin.__enter__()
        assert store.stats().pinned == len(KEYS)
        del pin
        assert store.stats().pinned == 0 and store.check() == []


def test_a_policy_that_fails_is_made_anew() -> None:
    """As an exception within it: what it has learned is lost, the catalog is not."""
    from kvloom.kvstore.eviction.lru import LRU

    class Broken(LRU):
        fails = False

        def touch(self, key: ChunkKey) -> None:
            if Broken.fails:
                raise ZeroDivisionError
            super().touch(key)

    with KVStore([HostTier(HOST_BYTES, pinned=False)], policy=Broken) as store:
        for number in range(4):
            store.put(make_key(number), make_chunk(number))
        Broken.fails = True
        with pytest.raises(ZeroDivisionError):
            store.get(make_key(0))
        Broken.fails = False
        assert same_chunk(store.get(make_key(0)), make_chunk(0)) and store.check() == []
        store.put(make_key(4), make_chunk(4))
        assert store.match([make_key(n) for n in (0, 2, 3, 4)]) == 4 and store.check() == []
