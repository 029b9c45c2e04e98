"""What the page cache holds is read at once, and everything else by the way that can be given up."""

import errno
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvloom.errors import TierUnavailableError
from kvloom.kvstore.store import KVStore
from kvloom.kvstore.tiers.disk.files import Files, OpenFile
from kvloom.kvstore.tiers.disk.tier import DiskTier
from kvloom.testing import make_blob, make_chunk, make_key, same_blob, same_chunk


class Device(Files):
    """The real thing, whose device can stop answering, or have nothing in the page cache."""

    def __init__(self) -> None:
        super().__init__()
        self.answers = threading.Event()
        self.answers.set()
        self.refusal = 0
        self.error = 0
        self.waited = 0

    def preadv(self, file: OpenFile, buffers: list[memoryview], offset: int) -> int:
        self.waited += 1
        self.answers.wait(30)
        if self.error:
            raise OSError(self.error, os.strerror(self.error))
        return super().preadv(file, buffers, offset)

    def preadv_cached(self, file: OpenFile, buffers: list[memoryview], offset: int) -> int:
        if self.refusal:
            raise OSError(self.refusal, os.strerror(self.refusal))
        return super().preadv(file, buffers, offset)  # so that the test needs no kernel that can say what it has


@pytest.fixture
def device() -> Iterator[Device]:
    device = Device()
    yield device
    device.answers.set()


@pytest.fixture
def tier(tmp_path: Path, device: Device) -> Iterator[DiskTier]:
    tier = DiskTier(tmp_path / "kv", files=device)
    tier.put(make_key(1), make_blob(1))
    tier.get(make_key(1))  # its segment is open for reading from now on
    yield tier
    device.answers.set()
    tier.close()


def test_reads_as_the_tier_does(tier: DiskTier, device: Device) -> None:
    device.waited = 0
    found, part = tier.cached.get(make_key(1)), tier.cached.get_layers(make_key(1), 1, 3)
    assert found is not None and same_blob(found, make_blob(1))
    assert part is not None and same_blob(part, make_blob(1).layers(1, 3))
    assert device.waited == 0


def test_waits_for_nothing(tier: DiskTier, device: Device) -> None:
    with pytest.raises(BlockingIOError):
        tier.cached.get(make_key(2))  # which another process might have put
    for refusal in (errno.EAGAIN, errno.EIO):
        device.refusal = refusal
        with pytest.raises(BlockingIOError):
            tier.cached.get(make_key(1))
    device.refusal = 0
    device.error = errno.EIO
    with pytest.raises(TierUnavailableError):
        tier.get(make_key(1))  # which closes the segment
    device.error = 0
    with pytest.raises(BlockingIOError):
        tier.cached.get(make_key(1))


@pytest.mark.parametrize("file", ["segment", "journal"])
def test_waits_for_no_write(tier: DiskTier, device: Device, file: str) -> None:
    """While another thread writes, a chunk is read at once or, while the index changes, not at all."""
    took, write = threading.Event(), device.pwritev

    def stuck(open_file: OpenFile, buffers: list[memoryview], offset: int) -> int:
        if file in str(Path(f"/proc/self/fd/{open_file.fileno()}").readlink()):
            took.set()
            device.answers.wait(30)
        return write(open_file, buffers, offset)

    device.pwritev = stuck  # type: ignore[method-assign]
    device.answers.clear()
    writer = threading.Thread(target=lambda: tier.put(make_key(2), make_blob(2)))
    writer.start()
    took.wait(30)
    began_s = time.monotonic()
    if file == "segment":
        found = tier.cached.get(make_key(1))
        assert found is not None and same_blob(found, make_blob(1)) and not tier.cached.has_changes()
    else:
        assert tier.cached.has_changes()
        with pytest.raises(BlockingIOError):
            tier.cached.get(make_key(1))
    assert time.monotonic() - began_s < 10
    device.answers.set()
    writer.join()
    del device.pwritev
    found = tier.cached.get(make_key(1))
    assert found is not None and same_blob(found, make_blob(1))


def test_a_kernel_that_cannot_say_is_asked_once(tier: DiskTier, device: Device) -> None:
    device.refusal = errno.EOPNOTSUPP
    with pytest.raises(BlockingIOError):
        tier.cached.get(make_key(1))
    device.refusal = 0
    with pytest.raises(BlockingIOError):
        tier.cached.get(make_key(1))
    assert tier.get(make_key(1)) is not None


def test_news_of_others(tier: DiskTier) -> None:
    assert not tier.cached.has_changes()
    other = DiskTier(tier.path)
    other.put(make_key(2), make_blob(2))
    assert tier.cached.has_changes()
    with pytest.raises(BlockingIOError):
        tier.cached.get(make_key(1))  # until this process has read what the other wrote
    assert [change.key for change in tier.changes()] == [make_key(2)]
    assert not tier.cached.has_changes() and tier.cached.get(make_key(1)) is not None
    other.delete(make_key(1))
    with pytest.raises(BlockingIOError):
        tier.cached.get(make_key(1))
    assert tier.get(make_key(1)) is None
    other.close()


def test_a_closed_tier_has_nothing(tier: DiskTier) -> None:
    tier.close()
    with pytest.raises(BlockingIOError):
        tier.cached.get(make_key(1))


def test_a_store_reads_what_is_cached_from_a_device_that_is_stuck(tmp_path: Path, device: Device) -> None:
    with KVStore([DiskTier(tmp_path / "kv", files=device)], timeout_s=1.0) as store:
        store.put(make_key(1), make_chunk(1))
        store.get(make_key(1))
        device.answers.clear()
        found = store.get(make_key(1))
        assert found is not None and same_chunk(found, make_chunk(1))
        layer = store.get(make_key(1), layers=(1, 2))
        assert layer is not None and layer.first_layer == 1
        device.refusal = errno.EAGAIN
        assert store.get(make_key(1)) is None
        assert store.stats().misses == {"timeout": 1}
        device.answers.set()


def test_damage_is_dealt_with_by_the_tier(tmp_path: Path, device: Device) -> None:
    with KVStore([DiskTier(tmp_path / "kv", files=device)]) as store:
        store.put(make_key(1), make_chunk(1))
        assert store.get(make_key(1)) is not None
        (segment,) = (tmp_path / "kv" / "segments").iterdir()
        data = bytearray(segment.read_bytes())
        data[-1000] ^= 1
        with segment.open("r+b") as file:
            file.write(data)
        assert store.get(make_key(1)) is None
        assert store.stats().misses == {"corrupt": 1} and store.stats().tiers[0].corruptions == 1
        assert store.check() == []


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="this system cannot read the page cache alone")
def test_the_real_page_cache(tmp_path: Path) -> None:
    """Where the file system can do it, a chunk just written is read without waiting."""
    with (tmp_path / "text").open("w+b") as file:
        file.write(b"text")
        file.flush()
        try:
            os.preadv(file.fileno(), [bytearray(4)], 0, os.RWF_NOWAIT)
        except OSError:
            pytest.skip("the file system under the temporary folder cannot read the page cache alone")
    waited, files = [], Files()
    files.preadv = lambda *call: waited.append(1) or Files.preadv(files, *call)  # type: ignore[method-assign]
    with KVStore([DiskTier(tmp_path / "kv", files=files)]) as store:
        store.put(make_key(1), make_chunk(1))
        assert store.get(make_key(1)) is not None and waited
        waited.clear()
        found = store.get(make_key(1))
        assert found is not None and same_chunk(found, make_chunk(1))
        assert waited == []
