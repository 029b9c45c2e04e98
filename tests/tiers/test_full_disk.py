"""A disk that is full: said once a minute, counted, nothing stored in part and nothing lost."""

import errno
import gc
import logging
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvloom.errors import TierFullError, TierNoSpaceError
from kvloom.kvstore.store import KVStore
from kvloom.kvstore.tiers.disk.files import Files, OpenFile
from kvloom.kvstore.tiers.disk.tier import DiskTier, Durability
from kvloom.kvstore.tiers.host import HostTier
from kvloom.testing import keys_of, make_blob, make_chunk, make_key, same_blob, same_chunk

from ..support.simulated import PAGE_BYTES, Inode, SimulatedFiles


class SmallDisk(Files):
    """The real thing, with space for so many bytes in segments."""

    def __init__(self, space_bytes: int) -> None:
        super().__init__()
        self.space_bytes = space_bytes

    def pwritev(self, file: OpenFile, buffers: list[memoryview], offset: int) -> int:
        path = Path(f"/proc/self/fd/{file.fileno()}").resolve()
        if path.suffix == ".seg":
            used = sum(other.stat().st_blocks * 512 for other in path.parent.iterdir())
            if used + sum(map(len, buffers)) > self.space_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().pwritev(file, buffers, offset)


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("only root can mount a file system")
    yield tmp_path
    gc.collect()  # tracebacks of the test that refer to open files
    subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize("durability", ["cache", "batch", "sync"])
def test_a_real_one(tmpfs: Path, durability: Durability) -> None:
    tier = DiskTier(tmpfs / "kv", durability=durability, sync_interval_s=600)
    stored = 0
    with pytest.raises(TierNoSpaceError, match=f"cannot write in {tmpfs}/kv.*{os.strerror(errno.ENOSPC)}") as full:
        for number in range(100):
            tier.put(make_key(number), make_blob(number, numbers=20_000))
            stored += 1
    assert full.value.needed_bytes == 81_920 and isinstance(full.value, TierFullError)
    for _ in range(3):
        with pytest.raises(TierNoSpaceError):
            tier.put(make_key(99), make_blob(99, numbers=20_000))
        with pytest.raises(TierNoSpaceError):  # nor is anything replaced
            tier.put(make_key(0), make_blob(99, numbers=20_000))
    assert keys_of(tier) == [make_key(n) for n in range(stored)] and tier.check() == [] and stored > 20
    for number in range(stored):
        assert same_blob(tier.get(make_key(number)), make_blob(number, numbers=20_000))
    assert tier.delete(make_key(1)) and tier.delete(make_key(2))
    tier.put(make_key(99), make_blob(99, numbers=20_000))
    assert same_blob(tier.get(make_key(99)), make_blob(99, numbers=20_000)) and tier.check() == []
    tier.close()
    tier = DiskTier(tmpfs / "kv")
    assert set(keys_of(tier)) == {make_key(n) for n in (0, *range(3, stored), 99)} and tier.check() == []
    tier.close()


def test_a_store_on_a_disk_that_others_have_filled(tmpfs: Path, caplog: pytest.LogCaptureFixture) -> None:
    with KVStore([HostTier(None), DiskTier(tmpfs / "kv")]) as store:
        for number in range(20):
            store.put(make_key(number), make_chunk(number))
        filling = os.open(tmpfs / "theirs", os.O_WRONLY | os.O_CREAT)
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            while True:
                os.write(filling, bytes(65536))
        free_bytes = os.statvfs(tmpfs).f_bavail * 4096
        if free_bytes:
            os.write(filling, bytes(free_bytes))
        os.close(filling)
        large = make_chunk(99, tokens=500)  # more than evicting twice its size would free, by one chunk each
        for number in range(100, 130):
            store.put(make_key(number), large)
        disk = store.stats().tiers[1]
        assert disk.no_space >= 30 and disk.rejections == 30 and disk.errors == disk.timeouts == disk.recoveries == 0
        assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1
        assert os.strerror(errno.ENOSPC) in caplog.text
        for number in range(20):
            found = store.get(make_key(number))
            assert found is not None and same_chunk(found, make_chunk(number))
        assert store.locate(make_key(100)) == "host" and store.check() == []
        (tmpfs / "theirs").unlink()
        store.put(make_key(130), make_chunk(130))
        assert store.stats().tiers[1].puts == 21 and store.check() == []


def test_a_store_alone_on_a_full_disk_evicts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A disk without a capacity of its own is used as far as it goes."""
    with KVStore([DiskTier(tmp_path / "kv", files=SmallDisk(100_000))]) as store:
        for number in range(60):
            store.put(make_key(number), make_chunk(number))
            found = store.get(make_key(number))
            assert found is not None and same_chunk(found, make_chunk(number))
        disk = store.stats().tiers[0]
        assert disk.no_space == disk.evictions > 30 and disk.rejections == disk.errors == 0 and store.check() == []
        assert len(caplog.records) == 1 and "No space left" in caplog.text


def test_the_warning_comes_once_a_minute(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with KVStore([HostTier(None), DiskTier(tmp_path / "kv", files=SmallDisk(0))]) as store:
        for number in range(200):
            store.put(make_key(number), make_chunk(number))
        disk = store.stats().tiers[1]
        assert disk.no_space == disk.rejections == 200 and disk.puts == disk.chunks == 0
        assert len(caplog.records) == 1 and store.stats().puts == {"stored": 200}


@pytest.mark.parametrize("space_pages", range(0, 40, 3))
@pytest.mark.parametrize("durability", ["cache", "batch", "sync"])
def test_wherever_the_space_ends(durability: Durability, space_pages: int) -> None:
    """A simulated file system that has so many pages in all, for the journal as well."""
    files = SimulatedFiles()

    def pages(inode: Inode) -> int:
        return len(inode.pages) + sum(pages(child) for child in inode.names.values())

    def before(name: str) -> None:
        if name in ("pwritev", "allocate") and pages(files.root) >= space_pages:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    files.before = before
    try:
        tier = DiskTier(
            Path("/kv"), durability=durability, sync_interval_s=1e6, segment_bytes=5 * PAGE_BYTES, files=files
        )
    except TierFullError:
        assert space_pages < 6
        return
    stored: dict[int, int] = {}
    refused = 0
    for step in range(60):
        try:
            tier.put(make_key(step % 16), make_blob(step))
            stored[step % 16] = step
        except TierNoSpaceError:
            refused += 1
        if step % 20 == 19:
            try:
                stored.pop(step % 16 - 2, None) if tier.delete(make_key(step % 16 - 2)) else None
            except TierNoSpaceError:
                refused += 1
        for number, seed in stored.items():
            assert same_blob(tier.get(make_key(number)), make_blob(seed))
        assert set(keys_of(tier)) == {make_key(number) for number in stored} and tier.check() == []
    assert refused or space_pages > 20
    files.before = lambda _: None
    tier.put(make_key(0), make_blob(1000))
    stored[0] = 1000
    tier.close()
    reopened = DiskTier(Path("/kv"), files=files.restarted())
    assert {key[-1]: int(reopened.get(key).meta["seed"]) for key in keys_of(reopened)} == stored
    reopened.close()
