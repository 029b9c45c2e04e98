"""A warm cache opened read-only: by another user, on a read-only file system, beside processes that write."""

import errno
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvloom.core import ChunkInfo, Entry
from kvloom.errors import ChunkCorruptError, TierError, TierReadOnlyError, TierUnavailableError
from kvloom.kvstore.store import KVStore
from kvloom.kvstore.tiers.disk.files import Files, OpenFile
from kvloom.kvstore.tiers.disk.tier import DiskTier
from kvloom.kvstore.tiers.host import HostTier
from kvloom.testing import keys_of, make_blob, make_chunk, make_key, same_blob, same_chunk

from ..support.damage import flip

INFO = ChunkInfo(make_key(7), "tenant", None, 0.5)


class ReadingFiles(Files):
    """The real thing, but whatever writes or locks fails the test."""

    def open(self, path: Path, mode: str) -> OpenFile:
        assert mode == "rb"
        return super().open(path, mode)

    def __getattribute__(self, name: str) -> object:
        assert name not in (
            "pwritev", "will_sync", "fdatasync", "sync_folder", "rename", "unlink", "mkdir", "flock", "punch",
            "allocate",
        )  # fmt: skip
        return super().__getattribute__(name)


def read_only(path: Path, name: str = "disk") -> DiskTier:
    return DiskTier(path, name=name, read_only=True, files=ReadingFiles())


def state(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    return {
        str(file): (file.stat().st_mtime_ns, file.stat().st_ino, file.read_bytes())
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


@pytest.fixture
def warm(tmp_path: Path) -> Path:
    """The folder of a store with the chunks 1, 2 and 3."""
    tier = DiskTier(tmp_path / "kv")
    for number in range(4):
        tier.put(make_key(number), make_blob(number), INFO)
    tier.delete(make_key(0))
    tier.close()
    return tmp_path / "kv"


def assert_warm(tier: DiskTier) -> None:
    assert keys_of(tier) == [make_key(n) for n in (1, 2, 3)] and [entry.info for entry in tier.entries()] == [INFO] * 3
    for number in (1, 2, 3):
        assert same_blob(tier.get(make_key(number)), make_blob(number)) and make_key(number) in tier
        assert same_blob(tier.get_layers(make_key(number), 1, 3), make_blob(number).layers(1, 3))
    assert tier.get(make_key(0)) is None and make_key(0) not in tier and tier.changes() == [] and tier.check() == []


def assert_refuses(tier: DiskTier) -> None:
    for call in (lambda: tier.put(make_key(5), make_blob(5)), lambda: tier.delete(make_key(1))):
        with pytest.raises(TierReadOnlyError, match=r"was opened read-only; open .* without read_only to write"):
            call()
    assert not tier.delete(make_key(0))  # nothing to do
    assert_warm(tier)


def test_reads_and_writes_nothing(warm: Path) -> None:
    before = state(warm)
    tier = read_only(warm)
    assert_warm(tier)
    assert_refuses(tier)
    tier.flush()
    tier.close()
    tier.close()
    with pytest.raises(TierUnavailableError, match="is closed"):
        tier.get(make_key(1))
    assert state(warm) == before


def test_follows_those_who_write(warm: Path) -> None:
    tier = read_only(warm)
    files = Files()
    files.slack_records = 4  # so that the journal is rewritten
    writer = DiskTier(warm, segment_bytes=4096, files=files)
    for round_ in range(20):
        writer.put(make_key(5), make_blob(100 + round_), INFO)
        writer.delete(make_key(1)) if round_ == 3 else writer.put(make_key(6), make_blob(round_))
        assert same_blob(tier.get(make_key(5)), make_blob(100 + round_))
        assert (tier.get(make_key(1)) is None) == (round_ >= 3)
    changes = tier.changes()
    assert make_key(1) in changes and {c.key for c in changes if isinstance(c, Entry)} == {make_key(5), make_key(6)}
    assert keys_of(tier) == keys_of(writer) and tier.used_bytes == writer.used_bytes and tier.check() == []
    assert tier.cached.has_changes() is False
    writer.close()
    assert same_blob(tier.get(make_key(5)), make_blob(119))
    tier.close()


def test_keeps_no_writer_waiting(warm: Path) -> None:
    """Not even with the lock that it would take to write."""
    tiers = [read_only(warm) for _ in range(3)]
    files = Files()
    files.lock_timeout_s = 0.0
    writer = DiskTier(warm, files=files)
    writer.put(make_key(5), make_blob(5))
    assert all(same_blob(tier.get(make_key(5)), make_blob(5)) for tier in tiers)
    for tier in tiers:
        tier.close()
    writer.close()


def test_what_is_corrupt_is_absent_from_then_on(warm: Path) -> None:
    flip(warm, make_key(2), -1)
    before = state(warm)
    tier = read_only(warm)
    with pytest.raises(ChunkCorruptError, match=make_key(2).hex()):
        tier.get(make_key(2))
    assert tier.get(make_key(2)) is None and make_key(2) not in tier and not tier.delete(make_key(2))
    assert keys_of(tier) == [make_key(1), make_key(3)] and tier.check() == [] and state(warm) == before
    writer = DiskTier(warm)
    writer.put(make_key(2), make_blob(20))  # by a process that may: it is there again
    assert same_blob(tier.get(make_key(2)), make_blob(20)) and tier.check() == []
    writer.close(), tier.close()


def test_must_be_there_already(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    for path in ("none", "empty", "file", "file/kv"):
        with pytest.raises(TierError, match="is not a kvloom store; only an existing one can be opened read-only"):
            DiskTier(tmp_path / path, read_only=True)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["empty", "file"]


def test_a_store_that_is_being_made(warm: Path) -> None:
    (warm / "journal").unlink()
    with pytest.raises(TierUnavailableError, match="No such file"):
        DiskTier(warm, read_only=True)
    (warm / "kvloom.json").write_text('{"kind": "kvloom chunk directory", "format": 1}')
    with pytest.raises(TierError, match="not of a format that this release reads"):
        DiskTier(warm, read_only=True)


def test_the_folder_goes_away_and_comes_back(warm: Path) -> None:
    tier = read_only(warm)
    warm.rename(warm.parent / "away")
    with pytest.raises(TierUnavailableError, match="No such file"):
        tier.get(make_key(1))
    with pytest.raises(TierUnavailableError):
        tier.entries()
    (warm.parent / "away").rename(warm)
    assert_warm(tier)
    tier.close()


def test_another_folder_in_its_place(warm: Path) -> None:
    tier, other = read_only(warm), DiskTier(warm.parent / "other")
    other.put(make_key(5), make_blob(5))
    other.close()
    warm.rename(warm.parent / "away")
    (warm.parent / "other").rename(warm)
    with pytest.raises(TierUnavailableError, match="another directory has come in its place"):
        tier.get(make_key(1))
    assert tier.get(make_key(1)) is None and same_blob(tier.get(make_key(5)), make_blob(5)) and tier.check() == []
    assert {c if isinstance(c, bytes) else c.key for c in tier.changes()} == {make_key(n) for n in (1, 2, 3, 5)}
    tier.close()


# ----------------------------------------------------------------------------------------------- who may not write


def as_another_user(work: Callable[[], None]) -> None:
    """Runs `work` in a child that may write nowhere."""
    if os.geteuid():
        pytest.skip("only root can become another user")
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            work()
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.fixture
def theirs(warm: Path) -> Iterator[Path]:
    """The store in a folder that others can enter and nobody but root can write."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    path = folder / "kv"
    shutil.copytree(warm, path)
    for file in (path, *path.rglob("*")):
        file.chmod(0o555 if file.is_dir() else 0o444)
    yield path
    shutil.rmtree(folder)


def test_of_another_user(theirs: Path) -> None:
    def work() -> None:
        with pytest.raises(TierUnavailableError, match="can be opened with read_only=True"):
            DiskTier(theirs)
        tier = read_only(theirs)
        assert_refuses(tier)
        tier.close()

    as_another_user(work)


def test_of_another_user_who_goes_on_writing(theirs: Path) -> None:
    for file in (theirs, *theirs.rglob("*")):
        file.chmod(0o755 if file.is_dir() else 0o644)
    writer = DiskTier(theirs)
    writer.put(make_key(5), make_blob(5))

    def work() -> None:
        tier = read_only(theirs)
        assert same_blob(tier.get(make_key(5)), make_blob(5))
        tier.close()

    as_another_user(work)
    writer.put(make_key(6), make_blob(6))
    assert writer.check() == []
    writer.close()


def test_who_may_not_read_is_told_so(theirs: Path) -> None:
    (theirs / "journal").chmod(0o400)

    def work() -> None:
        with pytest.raises(TierUnavailableError, match=os.strerror(errno.EACCES)):
            DiskTier(theirs, read_only=True)

    as_another_user(work)


@pytest.fixture
def mounted(warm: Path, tmp_path: Path) -> Iterator[Path]:
    """The store on a read-only file system."""
    folder = tmp_path / "read-only"
    folder.mkdir()
    mount = ["mount", "--bind", "-o", "ro", str(warm), str(folder)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("only root can mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_on_a_read_only_file_system(mounted: Path) -> None:
    with pytest.raises(TierUnavailableError, match=r"Read-only file system.*can be opened with read_only=True"):
        DiskTier(mounted)
    tier = read_only(mounted)
    assert_refuses(tier)
    writer = DiskTier(mounted.parent / "kv")  # elsewhere it is mounted to be written
    writer.put(make_key(5), make_blob(5))
    assert same_blob(tier.get(make_key(5)), make_blob(5))
    writer.close(), tier.close()


# ------------------------------------------------------------------------------------------------- under a store


@pytest.fixture
def warm_store(tmp_path: Path) -> Path:
    with KVStore([DiskTier(tmp_path / "store")]) as store:
        for number in range(3):
            store.put(make_key(number), make_chunk(number))
    return tmp_path / "store"


@pytest.mark.parametrize("timeout_s", [10.0, None])
def test_under_a_store(warm_store: Path, timeout_s: float | None, caplog: pytest.LogCaptureFixture) -> None:
    """What cannot be written is counted, other tiers take it, and no refusal takes the tier down or fills the log."""
    with KVStore([HostTier(None), read_only(warm_store)], timeout_s=timeout_s) as store:
        for number in range(10, 40):
            store.put(make_key(number), make_chunk(number))
            assert store.locate(make_key(number)) == "host"
        for number in range(3):
            found = store.get(make_key(number))
            assert found is not None and same_chunk(found, make_chunk(number))
            store.put(make_key(number), make_chunk(number))
        with pytest.raises(TierReadOnlyError):
            store.delete(make_key(1))
        host, disk = store.stats().tiers
        assert host.puts >= 33 and disk.puts == 0 and disk.chunks == 3 and disk.hits == 3 and disk.errors == 0
        assert disk.rejections == 33 and disk.recoveries == 0 and disk.removals == 0
        assert store.check() == [] and caplog.records == []


def test_alone_under_a_store(warm_store: Path) -> None:
    with KVStore([read_only(warm_store)]) as store:
        with pytest.raises(TierReadOnlyError):
            store.put(make_key(10), make_chunk(10))
        found = store.get(make_key(1))
        assert found is not None and same_chunk(found, make_chunk(1)) and store.check() == []
        assert store.stats().puts == {"refused": 1}


def test_what_is_evicted_from_memory_is_not_demoted_there(warm_store: Path, caplog: pytest.LogCaptureFixture) -> None:
    chunk_bytes = 4 * make_chunk(0).keys.nbytes
    with KVStore([HostTier(chunk_bytes), read_only(warm_store)]) as store:
        for number in range(10, 30):
            store.put(make_key(number), make_chunk(number))
        assert store.check() == [] and store.stats().tiers[0].evictions > 10 and store.stats().tiers[1].errors == 0
        assert caplog.records == []


def test_corrupt_under_a_store(warm_store: Path) -> None:
    flip(warm_store, make_key(1), -1)
    with KVStore([read_only(warm_store)]) as store:
        for _ in range(3):
            assert store.get(make_key(1)) is None
        assert store.stats().misses == {"corrupt": 1, "absent": 2} and store.stats().tiers[0].corruptions == 1
        assert store.check() == []


def test_expired_under_a_store(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with KVStore([DiskTier(tmp_path / "kv")], clock=lambda: 1000.0) as store:
        store.put(make_key(1), make_chunk(1), ttl_s=5)
    with KVStore([read_only(tmp_path / "kv")], clock=lambda: 2000.0) as store:
        for _ in range(3):
            assert store.get(make_key(1)) is None and make_key(1) not in store
        assert store.stats().misses == {"expired": 3} and store.stats().tiers[0].errors == 0
        assert store.check() == [] and caplog.records == []
