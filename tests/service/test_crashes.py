"""What is killed, full, or told a wrong time: nothing wrong is served, and what was acknowledged is there."""

import errno
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from kvloom.errors import KVLoomError, TierFullError, TierUnavailableError
from kvloom.kvstore.tiers.disk.files import Files, OpenFile
from kvloom.kvstore.tiers.disk.tier import DiskTier
from kvloom.kvstore.tiers.host import HostTier
from kvloom.service.pins import Pins
from kvloom.service.served_store import ServedStore
from kvloom.testing.chunks import make_blob, make_key, same_blob

from ..support.patience import eventually
from .serving import ServiceProcess, service_in_thread, service_process

pytestmark = pytest.mark.slow


class Load:
    """Threads that put and get until told to end; what was acknowledged, and what was wrong."""

    def __init__(self, service: ServiceProcess, threads: int = 4) -> None:
        self._service = service
        self._ended = threading.Event()
        self.acknowledged: set[int] = set()
        self.wrong: list[int] = []
        self._threads = [threading.Thread(target=self._work, args=(number,)) for number in range(threads)]
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _work(self, thread: int) -> None:
        number = thread * 100_000
        with self._service.client(timeout_s=2.0, retries=0) as client:
            while not self._ended.is_set():
                number += 1
                try:
                    client.put(make_key(number), make_blob(number, numbers=4000))
                    self.acknowledged.add(number)
                    found = client.get(make_key(number))
                    if found is not None and not same_blob(found, make_blob(number, numbers=4000)):
                        self.wrong.append(number)
                except KVLoomError:
                    time.sleep(0.02)


def assert_all_there(directory: Path, load: Load) -> None:
    assert load.wrong == [] and len(load.acknowledged) > 20
    with service_process(directory) as service, service.client() as client:
        for number in load.acknowledged:
            found = client.get(make_key(number))
            assert found is not None and same_blob(found, make_blob(number, numbers=4000)), number
        assert service.stop() == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sign", "durability"), [(signal.SIGTERM, "batch"), (signal.SIGTERM, "sync"), (signal.SIGKILL, "batch")]
)
def test_what_was_acknowledged_is_there_after_the_service_ended(tmp_path: Path, sign: int, durability: str) -> None:
    with service_process(tmp_path, "--set", f"durability={durability}") as service:
        load = Load(service)
        assert eventually(lambda: len(load.acknowledged) > 50)
        code = service.stop(sign)
        load.end()
        assert code == (0 if sign == signal.SIGTERM else -9)
    assert_all_there(tmp_path, load)


@pytest.mark.slow
def test_a_killed_service_is_a_miss_and_then_a_hit_again(tmp_path: Path) -> None:
    with service_process(tmp_path) as service:
        client = service.client(retries=0)
        client.put(make_key(1), make_blob(1))
        service.stop(signal.SIGKILL)
        with pytest.raises(TierUnavailableError):
            client.get(make_key(1))
    with service_process(tmp_path, "--set", "max_requests=64") as service:
        found = service.client().get(make_key(1))
        assert found is not None and same_blob(found, make_blob(1))


class FullFiles(Files):
    """A device that is full when told to be."""

    is_full = False

    def pwritev(self, file: OpenFile, buffers: list[memoryview], offset: int) -> int:
        if self.is_full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().pwritev(file, buffers, offset)

    def allocate(self, file: OpenFile, offset: int, nbytes: int) -> None:
        if self.is_full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().allocate(file, offset, nbytes)


def test_a_full_disk_costs_no_answer(tmp_path: Path) -> None:
    files = FullFiles()
    blobs = {number: make_blob(number, numbers=2000) for number in range(30)}
    tiers = [HostTier(10 * blobs[0].nbytes), DiskTier(tmp_path / "disk", files=files)]
    with service_in_thread(tmp_path, tiers) as service, service.client() as client:
        for number in range(10):
            client.put(make_key(number), blobs[number])
        files.is_full = True
        for number in range(10, 30):
            try:
                client.put(make_key(number), blobs[number])
            except (TierFullError, TierUnavailableError):
                continue
        for number in range(30):
            found = client.get(make_key(number))
            assert found is None or same_blob(found, blobs[number])
        files.is_full = False
        client.put(make_key(99), make_blob(99))
        assert client.get(make_key(99)) is not None and service.ask("GET", "/readyz", token=None).status == 200


def test_a_clock_that_jumps_ends_pins_at_most(tmp_path: Path) -> None:
    now_s = 1e9
    store = ServedStore([HostTier(None)], quotas={}, timeout_s=1.0)
    pins = Pins(store, 100, clock=lambda: now_s)
    pin = pins.add("a", [make_key(1)], 60)
    now_s -= 3600
    pins.follow()
    assert pins.get("a", pin.id) is pin
    now_s += 1e6
    pins.follow()
    with store.use() as kvstore:
        assert kvstore.stats().pinned == 0
    pins.close()
    store.close()
