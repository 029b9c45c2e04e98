"""Servers that die, freeze, restart or slow down, or are cut off: nothing wrong or late, back by itself, counted."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

from kvloom.bench.harness.servers import Server, make_bucket, redis_server, s3_server
from kvloom.core import KVChunk, Tier
from kvloom.errors import TierError
from kvloom.kvstore.store import KVStore
from kvloom.testing import make_chunk, make_key, same_chunk

from ..support.patience import LONG_S, eventually
from ..support.proxy import Proxy
from .servers import BUCKET, a_sharing, expect, redis_tier, s3_tier

pytestmark = pytest.mark.slow

TIMEOUT_S = 1.0
FAULT_S = 6.0  # a call that waited for the end of a fault took longer than one that was given up on a busy machine
CHUNKS = 8


@dataclass
class Site:
    """A server behind a proxy, and how to open a tier through it."""

    server: Server
    proxy: Proxy
    open_tier: Callable[[], Tier]
    after_start: Callable[[], object] = field(default=lambda: None)


def redis_site(folder: Path) -> Iterator[Site]:
    expect("redis")
    with redis_server(folder) as server, Proxy(server.port or 0) as proxy:
        sharing = a_sharing()
        yield Site(server, proxy, lambda: redis_tier(server, sharing, proxy.port))


def s3_site(folder: Path) -> Iterator[Site]:
    expect("s3")
    with s3_server(folder) as server, Proxy(server.port or 0) as proxy:
        make_bucket(server, BUCKET)
        sharing = a_sharing(timeout_s=TIMEOUT_S)
        yield Site(server, proxy, lambda: s3_tier(server, sharing, proxy.port), lambda: make_bucket(server, BUCKET))


@pytest.fixture(params=[redis_site, s3_site], ids=["redis", "s3"])
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    yield from request.param(tmp_path)


@cache
def chunk(number: int) -> KVChunk:
    return make_chunk(number, tokens=2000)  # about a megabyte


class Clients:
    """Threads that put and get chunks, hold every answer against what was put, and keep the time of each call."""

    def __init__(self, store: KVStore) -> None:
        self._store = store
        self._ended = threading.Event()
        self.longest_s = 0.0
        self.wrong = 0
        self.failures: list[BaseException] = []
        self._threads = [threading.Thread(target=self._work, args=(n,)) for n in range(3)]
        for each in self._threads:
            each.start()

    def _work(self, first: int) -> None:
        number = first
        while not self._ended.is_set():
            number = (number + 1) % CHUNKS
            for call in (self._get, self._match, self._put):
                began_s = time.monotonic()
                try:
                    call(number)
                except TierError:
                    pass
                except BaseException as exc:  # noqa: BLE001
                    self.failures.append(exc)
                self.longest_s = max(self.longest_s, time.monotonic() - began_s)
            time.sleep(0.02)

    def _get(self, number: int) -> None:
        found = self._store.get(make_key(number))
        self.wrong += found is not None and not same_chunk(found, chunk(number))

    def _match(self, number: int) -> None:
        self._store.match([make_key(number), make_key(1000 + number)])

    def _put(self, number: int) -> None:
        self._store.put(make_key(number), chunk(number))

    def end(self) -> None:
        self._ended.set()
        for each in self._threads:
            each.join(60)


def faults() -> dict[str, tuple[Callable[[Site], None], Callable[[Site], None]]]:
    """Each fault: how it begins, and how it ends."""

    def kill(site: Site) -> None:
        site.server.kill()

    def start(site: Site) -> None:
        site.server.start()
        site.after_start()

    def pause(site: Site) -> None:
        site.server.pause()

    def resume(site: Site) -> None:
        site.server.resume()

    def freeze(site: Site) -> None:
        site.proxy.is_frozen = True

    def thaw(site: Site) -> None:
        site.proxy.is_frozen = False

    def cut(site: Site) -> None:
        site.proxy.cut()

    def slow(site: Site) -> None:
        site.proxy.bytes_per_s = 100_000.0  # ten seconds a chunk

    def fast(site: Site) -> None:
        site.proxy.bytes_per_s = None

    return {
        "killed": (kill, start),
        "frozen": (pause, resume),
        "partition": (freeze, thaw),
        "cut": (cut, lambda _: None),
        "slow": (slow, fast),
    }


@pytest.mark.parametrize("fault", list(faults()))
def test_a_fault_costs_time_and_nothing_else(site: Site, fault: str) -> None:
    begin, end = faults()[fault]
    store = KVStore([site.open_tier()], timeout_s=TIMEOUT_S)
    await_works(store)
    clients = Clients(store)
    time.sleep(0.5)
    begin(site)
    time.sleep(FAULT_S)
    end(site)
    await_works(store)
    clients.end()
    assert clients.failures == []
    assert clients.wrong == 0
    assert clients.longest_s < FAULT_S - 1.0
    counts = store.stats().tiers[0]
    if fault != "cut":
        assert counts.errors + counts.timeouts > 0 and (counts.recoveries > 0 or fault == "slow")
        assert sum(store.stats().misses.values()) > 0
    store.close()


def works(store: KVStore) -> bool:
    try:
        store.put(make_key(99), chunk(99))
    except TierError:
        return False
    found = store.get(make_key(99))
    return found is not None and same_chunk(found, chunk(99))


def await_works(store: KVStore) -> None:
    assert eventually(lambda: works(store)), store.stats()


def test_a_store_opens_without_its_server(site: Site) -> None:
    site.server.kill()
    began_s = time.monotonic()
    store = KVStore([site.open_tier()], timeout_s=TIMEOUT_S)
    assert store.match([make_key(1)]) == 0 and store.get(make_key(1)) is None
    assert time.monotonic() - began_s < LONG_S / 4
    site.server.start()
    site.after_start()
    await_works(store)
    store.close()
