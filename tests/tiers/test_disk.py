"""The disk tier on a real file system: restarts, refusals, corruption, faults of the operating system."""

import errno
import fcntl
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvloom.core import ChunkInfo, ChunkKey, EncodedChunk
from kvloom.errors import ChunkCorruptError, TierError, TierFullError, TierUnavailableError
from kvloom.kvstore.tiers.disk.files import Files, OpenFile
from kvloom.kvstore.tiers.disk.tier import DiskTier
from kvloom.testing import keys_of, make_blob, make_key, same_blob

from ..support.damage import flip, index_of, overwrite, stored_at, stored_bytes, write_journal
from ..support.patience import eventually, least_cpu_s


def same(found: EncodedChunk | None, seed: int, *, numbers: int = 100) -> bool:
    return found is not None and same_blob(found, make_blob(seed, numbers=numbers))


def segment_files(tier: DiskTier) -> list[Path]:
    return sorted((tier.path / "segments").iterdir())


def disk_bytes(tier: DiskTier) -> int:
    """What the segments really take."""
    return sum(file.stat().st_blocks * 512 for file in segment_files(tier))


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


class FaultyFiles(Files):
    """The real thing, except for calls by name that raise an errno."""

    def __init__(self) -> None:
        super().__init__()
        self.faults: dict[str, int] = {}
        self.calls: list[str] = []

    def __getattribute__(self, name: str) -> object:
        found = super().__getattribute__(name)
        if name.startswith("_") or not callable(found):
            return found
        self.calls.append(name)
        cause = name.removesuffix("_cached")
        if cause in self.faults:
            code = self.faults[cause]

            def fail(*_: object) -> None:
                raise OSError(code, os.strerror(code))

            return fail
        return found


@pytest.fixture
def files() -> FaultyFiles:
    return FaultyFiles()


@pytest.fixture
def tier(tmp_path: Path, files: FaultyFiles) -> Iterator[DiskTier]:
    tier = DiskTier(tmp_path / "kv", files=files)
    tier.put(make_key(1), make_blob(1))
    yield tier
    files.faults.clear()
    tier.close()


@pytest.mark.parametrize("durability", ["cache", "batch", "sync"])
def test_warm_restart(tmp_path: Path, durability: str) -> None:
    first = DiskTier(tmp_path, durability=durability)
    info = ChunkInfo(make_key(5), "tenant " + "ü" * 120, 2e9, 0.5)
    for number in (5, 3, 300, 5):
        first.put(make_key(number), make_blob(number), info)
    first.delete(make_key(3))
    used_bytes = first.used_bytes
    first.close()
    second = DiskTier(tmp_path, durability=durability)
    assert second.used_bytes == used_bytes and keys_of(second) == [make_key(300), make_key(5)]
    assert [entry.info for entry in second.entries()] == [info] * 2
    assert same(second.get(make_key(5)), 5) and second.check() == [] and second.changes() == []
    second.close()


def test_restart_reads_no_payload(tier: DiskTier, files: FaultyFiles) -> None:
    tier.close()
    opened: list[str] = []
    real = Files.open
    files.open = lambda path, mode: opened.append(path.name) or real(files, path, mode)  # type: ignore[method-assign]
    reopened = DiskTier(tier.path, files=files)
    assert keys_of(reopened) == [make_key(1)]
    reads = files.calls.count("preadv")
    assert reads < 8 and same(reopened.get(make_key(1)), 1) and files.calls.count("preadv") > reads
    reopened.close()


def test_reopens_thousands_of_chunks_quickly(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path)
    tier.put(make_key(0), make_blob(0))
    tier.close()
    segment, _, *rest = index_of(tmp_path).rows[
        make_key(0)
    ]  # further names for what lies there; the tier does not mind
    write_journal(tmp_path, ((make_key(n), (segment, 4096 * n, *rest)) for n in range(20_000)))
    with stored_at(tmp_path, make_key(0))[0].open("r+b") as file:
        file.truncate(4096 * 20_000)
    opened: list[DiskTier] = []  # a tier that is only read may be opened more than once
    took_s = least_cpu_s(lambda: opened.append(DiskTier(tmp_path)), 4)
    assert took_s < 0.4  # a fifth of what is promised for 100,000 in 2 s
    for tier in opened:
        assert len(tier.entries()) == 20_000
        tier.close()


def test_refuses_foreign_folders(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(TierError, match="not a kvloom store") as refusal:
        DiskTier(tmp_path)
    assert not isinstance(refusal.value, TierUnavailableError)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(TierError, match="is a file"):
        DiskTier(tmp_path / "notes.txt")


@pytest.mark.parametrize("text", ['{"kind": "kvloom chunk directory", "format": 1}', "{", "[]", "\x00\xff", "7"])
def test_refuses_other_formats(tier: DiskTier, text: str) -> None:
    tier.close()
    marker = tier.path / "kvloom.json"
    assert json.loads(marker.read_text())["format"] == 2
    marker.write_text(text)
    with pytest.raises(TierError, match="not of a format that this release reads"):
        DiskTier(tier.path)
    fd = os.open(marker, os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the refusal left no lock
    os.close(fd)


def test_refuses_what_the_journal_cannot_hold(tier: DiskTier) -> None:
    with pytest.raises(ValueError, match="key has 3 bytes"):
        tier.put(ChunkKey(b"abc"), make_blob(1))
    with pytest.raises(ValueError, match="at most 255 bytes"):
        tier.put(make_key(2), make_blob(1), ChunkInfo(namespace="ü" * 128))
    tier.put(make_key(2), make_blob(2), ChunkInfo(namespace="ü" * 127 + "x"))
    assert tier.entries()[-1].info.namespace == "ü" * 127 + "x" and tier.check() == []


@pytest.mark.parametrize("offset", [0, 9, 20, 50, 60, 100, -30, -1])
def test_corrupt_chunk_is_quarantined(tier: DiskTier, offset: int) -> None:
    tier.put(make_key(2), make_blob(2))
    flip(tier.path, make_key(1), offset)
    damaged = stored_bytes(tier.path, make_key(1))
    used_bytes = tier.used_bytes
    with pytest.raises(ChunkCorruptError, match=make_key(1).hex()):
        tier.get(make_key(1))
    assert tier.get(make_key(1)) is None and make_key(1) not in tier and tier.check() == []
    (kept,) = (tier.path / "quarantine").iterdir()
    assert kept.read_bytes() == damaged and tier.used_bytes == used_bytes // 2
    assert same(tier.get(make_key(2)), 2)


def test_quarantine_is_bounded(tier: DiskTier) -> None:
    for number in range(20):
        tier.put(make_key(number), make_blob(number))
        flip(tier.path, make_key(number), -1)
        with pytest.raises(ChunkCorruptError):
            tier.get(make_key(number))
    kept = sorted(file.name[-2:] for file in (tier.path / "quarantine").iterdir())
    assert kept == sorted(f"{number:02x}" for number in range(4, 20))


@pytest.mark.parametrize("successor", ["replaced", "deleted"])
def test_quarantine_spares_the_successor(tier: DiskTier, files: FaultyFiles, successor: str) -> None:
    """Another thread replaces or deletes the corrupt chunk while this one is reading it."""
    flip(tier.path, make_key(1), -1)

    def act_then_read(file: OpenFile, buffers: list[memoryview], offset: int) -> int:
        del files.preadv
        if successor == "replaced":
            tier.put(make_key(1), make_blob(2))
        else:
            tier.delete(make_key(1))
        return os.preadv(file.fileno(), buffers, offset)

    files.preadv = act_then_read  # type: ignore[method-assign]
    found = tier.get(make_key(1))
    assert same(found, 2) if successor == "replaced" else found is None
    assert list((tier.path / "quarantine").iterdir()) == [] and tier.check() == []


def test_layers_verify_what_they_read(tier: DiskTier) -> None:
    assert tier.get_layers(make_key(1), 0, 1) is not None  # its header is cached now
    flip(tier.path, make_key(1), -1)
    assert tier.get_layers(make_key(1), 0, 3) is not None
    with pytest.raises(ChunkCorruptError, match="section 3"):
        tier.get_layers(make_key(1), 3, 4)
    assert make_key(1) not in tier


def test_layers_verify_a_header_that_was_read_before(tier: DiskTier) -> None:
    assert tier.get_layers(make_key(1), 0, 1) is not None
    flip(tier.path, make_key(1), 80)
    with pytest.raises(ChunkCorruptError, match="header"):
        tier.get_layers(make_key(1), 0, 1)
    assert make_key(1) not in tier


def test_layers_of_a_replaced_chunk(tier: DiskTier) -> None:
    for seed in (1, 2, 3):
        tier.put(make_key(1), make_blob(seed))
        found = tier.get_layers(make_key(1), 1, 3)
        assert found is not None and same_blob(found, make_blob(seed).layers(1, 3))


def test_swapped_chunks_and_missing_segments(tier: DiskTier) -> None:
    tier.put(make_key(2), make_blob(2))
    overwrite(tier.path, make_key(2), stored_bytes(tier.path, make_key(1)))
    with pytest.raises(ChunkCorruptError, match="asked for"):
        tier.get(make_key(2))
    path = tier.path
    tier.close()
    stored_at(path, make_key(1))[0].unlink()
    reopened = DiskTier(path)
    assert reopened.used_bytes == 0 and keys_of(reopened) == [] and reopened.check() == []
    reopened.close()


def test_segment_lost_while_open(tier: DiskTier) -> None:
    for file in segment_files(tier):
        file.unlink()
    with pytest.raises(ChunkCorruptError, match=make_key(1).hex()):
        tier.get(make_key(1))
    assert keys_of(tier) == [] and tier.check() == []


# ------------------------------------------------------------------------------------------------------------- space


def test_space_is_given_back_at_once(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path)
    for number in range(8):
        tier.put(make_key(number), make_blob(number, numbers=25_000))
    full = disk_bytes(tier)
    with stored_at(tmp_path, make_key(1))[0].open("rb"):  # a reader keeps the file open
        for number in range(4):
            tier.delete(make_key(number))
        tier.put(make_key(4), make_blob(4, numbers=25_000))
        assert disk_bytes(tier) <= full / 2 + 20_000
    assert same(tier.get(make_key(4)), 4, numbers=25_000)
    tier.close()


@pytest.mark.parametrize("durability", ["batch", "sync"])
def test_space_is_given_back_after_the_sync(tmp_path: Path, durability: str, files: FaultyFiles) -> None:
    tier = DiskTier(tmp_path, durability=durability, sync_interval_s=600, files=files)
    for number in range(2):
        tier.put(make_key(number), make_blob(number, numbers=25_000))
    tier.flush()
    files.calls.clear()
    tier.delete(make_key(0))
    assert "punch" not in files.calls
    tier.flush()
    calls = [call for call in files.calls if call in ("fdatasync", "punch")]
    assert calls == ["fdatasync", "punch"]  # nothing but the journal was written
    tier.close()
    assert not threads() & {"kvloom-commit"}


def test_dead_segments_go(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, segment_bytes=8192)
    for number in range(7):
        tier.put(make_key(number), make_blob(number))
    assert len(segment_files(tier)) == 4
    for number in range(7):
        tier.delete(make_key(number))
    assert len(segment_files(tier)) == 1 and tier.used_bytes == 0  # which this process appends to
    tier.close()
    tier = DiskTier(tmp_path)
    assert segment_files(tier) == [] and tier.check() == []
    tier.close()


def test_without_punching_segments_are_compacted(tmp_path: Path, files: FaultyFiles) -> None:
    files.faults["punch"] = errno.EOPNOTSUPP
    tier = DiskTier(tmp_path, segment_bytes=5 * 4096, files=files)
    for number in range(30):
        tier.put(make_key(number), make_blob(number))
    for number in range(30):
        if number % 5:
            tier.delete(make_key(number))
    assert keys_of(tier) == [make_key(n) for n in range(0, 30, 5)]  # in their old order
    assert len(segment_files(tier)) <= 4 and tier.check() == []
    assert all(same(tier.get(make_key(n)), n) for n in range(0, 30, 5))
    tier.close()
    tier = DiskTier(tmp_path)
    assert all(same(tier.get(make_key(n)), n) for n in range(0, 30, 5)) and tier.check() == []
    tier.close()


def test_what_a_kill_left_is_given_back_on_opening(tmp_path: Path, files: FaultyFiles) -> None:
    tier = DiskTier(tmp_path, files=files)
    for number in range(4):
        tier.put(make_key(number), make_blob(number, numbers=25_000))
    full = disk_bytes(tier)
    files.faults["punch"] = errno.EIO
    tier.delete(make_key(1))  # the chunk is gone; its space will be tried again
    assert disk_bytes(tier) == full and tier.get(make_key(1)) is None
    tier.close()
    files.faults.clear()
    tier = DiskTier(tmp_path, files=files)
    assert disk_bytes(tier) <= full * 3 / 4 + 10_000 and tier.check() == []
    assert all(same(tier.get(make_key(n)), n, numbers=25_000) for n in (0, 2, 3))
    tier.close()


def test_journal_is_rewritten(tmp_path: Path, files: FaultyFiles) -> None:
    files.slack_records = 20
    tier, other = DiskTier(tmp_path, files=files), DiskTier(tmp_path)
    for round_ in range(30):
        for number in range(5):
            info = ChunkInfo(make_key(9), f"tenant {round_ % 3}", None, 1.5)
            tier.put(make_key(number), make_blob(number + round_), info)
    assert (tmp_path / "journal").stat().st_size <= 128 * 40 and sorted(p.name for p in tmp_path.iterdir()) == [
        "journal", "kvloom.json", "quarantine", "segments",
    ]  # fmt: skip
    assert {entry.key for entry in other.changes()} == {make_key(n) for n in range(5)}
    other.put(make_key(7), make_blob(7))
    for reader in (tier, other):
        assert keys_of(reader) == [make_key(n) for n in (0, 1, 2, 3, 4, 7)] and reader.check() == []
        assert all(same(reader.get(make_key(n)), n + 29) for n in range(5)) and same(reader.get(make_key(7)), 7)
        assert reader.entries()[0].info == ChunkInfo(make_key(9), "tenant 2", None, 1.5)
    tier.close(), other.close()


# ------------------------------------------------------------------------------------------------------------ faults


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (errno.ENOSPC, TierFullError),
        (errno.EDQUOT, TierFullError),
        (errno.EIO, TierUnavailableError),
        (errno.EROFS, TierUnavailableError),
    ],
)
def test_failed_write_leaves_nothing(tier: DiskTier, files: FaultyFiles, code: int, error: type[TierError]) -> None:
    files.faults["pwritev"] = code
    with pytest.raises(error, match=os.strerror(code)) as refusal:
        tier.put(make_key(2), make_blob(2))
    assert not isinstance(refusal.value, TierFullError) or refusal.value.needed_bytes == 4096
    assert same(tier.get(make_key(1)), 1)
    files.faults.clear()
    assert keys_of(tier) == [make_key(1)] and tier.check() == []
    tier.put(make_key(2), make_blob(2))
    assert same(tier.get(make_key(2)), 2) and same(tier.get(make_key(1)), 1)


def test_short_and_interrupted_reads_and_writes(tier: DiskTier, files: FaultyFiles) -> None:
    calls = 0

    def interrupted() -> None:
        nonlocal calls
        calls += 1
        if calls % 3 == 0:
            raise InterruptedError(errno.EINTR, "interrupted")

    def write(file: OpenFile, buffers: list[memoryview], offset: int) -> int:
        interrupted()
        return os.pwritev(file.fileno(), [next(b for b in buffers if len(b))[:7]], offset)

    def read(file: OpenFile, buffers: list[memoryview], offset: int) -> int:
        interrupted()
        return os.preadv(file.fileno(), [buffers[0][:11]], offset)

    files.pwritev, files.preadv = write, read  # type: ignore[method-assign]
    tier.put(make_key(2), make_blob(2))
    assert same(tier.get(make_key(2)), 2) and calls > 100
    del files.pwritev, files.preadv


@pytest.mark.parametrize("call", ["preadv", "open", "fstat"])
def test_failed_read_is_unavailable(tier: DiskTier, files: FaultyFiles, call: str) -> None:
    files.faults[call] = errno.EIO
    with pytest.raises(TierUnavailableError, match="cannot read"):
        tier.get(make_key(1))
    files.faults.clear()
    assert same(tier.get(make_key(1)), 1) and tier.check() == []


def test_too_many_open_files(tmp_path: Path) -> None:
    files = FaultyFiles()
    tier = DiskTier(tmp_path, segment_bytes=4096, files=files)
    for number in range(4):
        tier.put(make_key(number), make_blob(number))
        assert same(tier.get(make_key(number)), number)
    tier.put(make_key(9), make_blob(9))
    limit = descriptors() - 2
    real = Files.open

    def open_(path: Path, mode: str) -> object:
        if descriptors() > limit:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real(files, path, mode)

    files.open = open_  # type: ignore[method-assign]
    before = descriptors()
    assert same(tier.get(make_key(9)), 9) and descriptors() == before - 3  # four were given up for one
    limit = -1
    with pytest.raises(TierUnavailableError, match=os.strerror(errno.EMFILE)):
        tier.get(make_key(2))
    del files.open
    assert same(tier.get(make_key(2)), 2)
    tier.close()


def test_read_only_file_system(tier: DiskTier, files: FaultyFiles) -> None:
    files.faults |= dict.fromkeys(("pwritev", "punch", "allocate"), errno.EROFS)
    assert same(tier.get(make_key(1)), 1)
    for call in (lambda: tier.put(make_key(2), make_blob(2)), lambda: tier.delete(make_key(1))):
        with pytest.raises(TierUnavailableError, match=os.strerror(errno.EROFS)):
            call()
    assert same(tier.get(make_key(1)), 1)
    files.faults["open"] = errno.EROFS
    with pytest.raises(TierUnavailableError, match="cannot open"):
        DiskTier(tier.path, files=files)
    files.faults.clear()
    assert tier.check() == [] and keys_of(tier) == [make_key(1)]


@pytest.mark.parametrize("durability", ["cache", "batch", "sync"])
def test_directory_goes_away_and_comes_back(tmp_path: Path, durability: str) -> None:
    tier = DiskTier(tmp_path / "kv", durability=durability, sync_interval_s=600)
    for number in range(3):
        tier.put(make_key(number), make_blob(number))
    (tmp_path / "kv").rename(tmp_path / "away")
    with pytest.raises(TierUnavailableError, match="No such file"):
        tier.put(make_key(4), make_blob(4))
    with pytest.raises(TierUnavailableError):
        tier.get(make_key(1))
    (tmp_path / "away").rename(tmp_path / "kv")
    assert same(tier.get(make_key(1)), 1)
    tier.put(make_key(4), make_blob(4))
    assert keys_of(tier) == [make_key(n) for n in (0, 1, 2, 4)] and tier.check() == []
    tier.close()


def test_another_directory_in_its_place(tmp_path: Path) -> None:
    """As when a file system is mounted anew, restored from a copy or made empty."""
    tier = DiskTier(tmp_path / "kv")
    tier.put(make_key(1), make_blob(1))
    other = DiskTier(tmp_path / "other")
    other.put(make_key(2), make_blob(2))
    (tmp_path / "kv").rename(tmp_path / "gone")
    (tmp_path / "other").rename(tmp_path / "kv")
    with pytest.raises(TierUnavailableError, match="another directory has come in its place"):
        tier.delete(make_key(1))
    tier.put(make_key(3), make_blob(3))
    assert keys_of(tier) == [make_key(2), make_key(3)] and tier.check() == []
    assert same(tier.get(make_key(2)), 2) and same(tier.get(make_key(3)), 3) and tier.get(make_key(1)) is None
    changed = tier.changes()
    assert make_key(1) in changed and [entry.key for entry in changed if not isinstance(entry, bytes)] == [make_key(2)]
    tier.close(), other.close()


def test_after_a_fork_the_child_must_open_anew(tier: DiskTier) -> None:
    pid = os.fork()
    if not pid:
        try:
            tier.get(make_key(1))
        except TierUnavailableError:
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7 and same(tier.get(make_key(1)), 1)


def test_a_full_disk_still_deletes(tier: DiskTier, files: FaultyFiles) -> None:
    """The journal has set space aside: only segments cannot grow."""
    assert (tier.path / "journal").stat().st_blocks * 512 >= 1 << 20
    real = Files.pwritev

    def write(file: OpenFile, buffers: list[memoryview], offset: int) -> int:
        if "segments" in str(Path(f"/proc/self/fd/{file.fileno()}").readlink()):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(files, file, buffers, offset)

    files.pwritev = write  # type: ignore[method-assign]
    with pytest.raises(TierFullError):
        tier.put(make_key(2), make_blob(2))
    assert tier.delete(make_key(1)) and keys_of(tier) == [] and tier.check() == []
    del files.pwritev


# -------------------------------------------------------------------------------------------------------- durability


def test_sync_reaches_the_device(tmp_path: Path, files: FaultyFiles) -> None:
    tier = DiskTier(tmp_path, durability="sync", files=files)
    synced: list[str] = []
    files.fdatasync = lambda file: synced.append(Path(f"/proc/self/fd/{file.fileno()}").readlink().parts[-1])  # type: ignore[method-assign]
    files.sync_folder = lambda path: synced.append(path.name)  # type: ignore[method-assign]
    tier.put(make_key(1), make_blob(1))
    (segment,) = (file.name for file in segment_files(tier))
    assert synced == [segment, "segments", "journal"]
    synced.clear()
    tier.put(make_key(1), make_blob(2))  # its segment is there by now
    assert synced == [segment, "journal"]
    tier.close()


def test_cache_syncs_nothing(tier: DiskTier, files: FaultyFiles) -> None:
    files.calls.clear()
    tier.put(make_key(2), make_blob(2))
    tier.delete(make_key(1))
    tier.flush()
    assert not {"fdatasync", "sync_folder"} & set(files.calls)


def test_batch_syncs_in_the_background(tmp_path: Path, files: FaultyFiles) -> None:
    tier = DiskTier(tmp_path, durability="batch", sync_interval_s=0.05, files=files)
    files.calls.clear()
    for number in range(3):
        tier.put(make_key(number), make_blob(number))
    assert eventually(lambda: "fdatasync" in files.calls and "kvloom-commit" not in threads())
    assert files.calls.count("fdatasync") <= 6
    tier.close()


@pytest.mark.parametrize("call", ["put", "flush", "close"])
def test_a_failed_batch_makes_itself_heard(tmp_path: Path, files: FaultyFiles, call: str) -> None:
    tier = DiskTier(tmp_path, durability="batch", sync_interval_s=0.02, files=files)
    tier.put(make_key(0), make_blob(0))
    tier.flush()
    files.faults["fdatasync"] = errno.EIO
    tier.put(make_key(1), make_blob(1))
    assert eventually(lambda: make_key(1) not in tier)
    assert tier.changes() == [make_key(1)]  # given up: nobody can say whether it would survive
    files.faults.clear()

    def put() -> None:
        """The background says that it failed a moment after the chunk is gone."""
        eventually(lambda: tier.put(make_key(2), make_blob(2)) < 0)

    calls = {"put": put, "flush": tier.flush, "close": tier.close}
    with pytest.raises(TierUnavailableError, match=os.strerror(errno.EIO)):
        calls[call]()
    if call != "close":
        tier.put(make_key(2), make_blob(2))
        tier.flush()
        assert keys_of(tier) == [make_key(0), make_key(2)] and tier.check() == []
        tier.close()
    assert "kvloom-commit" not in threads()


def test_a_failed_sync_gives_the_chunk_up(tmp_path: Path, files: FaultyFiles) -> None:
    tier = DiskTier(tmp_path, durability="sync", files=files)
    files.faults["fdatasync"] = errno.EIO
    with pytest.raises(TierUnavailableError, match=os.strerror(errno.EIO)):
        tier.put(make_key(1), make_blob(1))
    assert keys_of(tier) == [] and tier.check() == []
    files.faults.clear()
    tier.put(make_key(1), make_blob(1))
    assert same(tier.get(make_key(1)), 1)
    tier.close()


def test_threads_share_syncs(tmp_path: Path, files: FaultyFiles) -> None:
    tier = DiskTier(tmp_path, durability="sync", files=files)
    tier.put(make_key(0), make_blob(0))
    files.calls.clear()
    real = Files.fdatasync

    def slow(file: OpenFile) -> None:
        time.sleep(0.02)
        real(files, file)

    files.fdatasync = slow  # type: ignore[method-assign]
    workers = [
        threading.Thread(
            target=lambda first: [tier.put(make_key(first + n), make_blob(n)) for n in range(5)], args=(i * 10,)
        )
        for i in range(8)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert files.calls.count("fdatasync") < 36  # alone they would have been 80
    assert len(keys_of(tier)) == 40 and tier.check() == []
    tier.close()


def test_flush_before_giving_up_on_a_full_disk(tmp_path: Path, files: FaultyFiles) -> None:
    """Space that waits for the next sync is space: eviction must not go on and on."""
    tier = DiskTier(tmp_path, durability="batch", sync_interval_s=600, files=files)
    tier.put(make_key(1), make_blob(1))
    tier.delete(make_key(1))
    real, punched = Files.pwritev, []
    files.punch = lambda file, offset, nbytes: punched.append(nbytes)  # type: ignore[method-assign]

    def write(file: OpenFile, buffers: list[memoryview], offset: int) -> int:
        if not punched:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(files, file, buffers, offset)

    files.pwritev = write  # type: ignore[method-assign]
    tier.put(make_key(2), make_blob(2))
    assert same(tier.get(make_key(2)), 2)
    del files.punch, files.pwritev
    tier.close()
