"""Tiers against their contract, and what is particular to each."""

import errno
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvloom.core import ChunkKey, EncodedChunk
from kvloom.errors import ChunkCorruptError, TierError, TierFullError, TierUnavailableError
from kvloom.kvstore import format as container
from kvloom.kvstore.tiers.disk import DiskTier
from kvloom.kvstore.tiers.host import HostTier

from .contracts import TierContract, keys_of, make_blob, make_key, same_blob


def stored_file(tier: DiskTier, key: ChunkKey) -> Path:
    return tier.path / key.hex()[:2] / key.hex()


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def same(found: EncodedChunk | None, seed: int) -> bool:
    return found is not None and same_blob(found, make_blob(seed))


class TestHostTier(TierContract):
    def make_tier(self, capacity_bytes: int | None) -> HostTier:
        return HostTier(capacity_bytes)

    def test_copies_nothing(self, tier: HostTier) -> None:
        blob = make_blob(1)
        tier.put(make_key(1), blob)
        assert tier.get(make_key(1)) is blob
        part = tier.get_layers(make_key(1), 1, 2)
        assert part is not None and part.tensors["codes"].data_ptr() == blob.tensors["codes"][1].data_ptr()


class TestDiskTier(TierContract):
    @pytest.fixture(autouse=True)
    def folder(self, tmp_path: Path) -> None:
        self.paths: Iterator[Path] = (tmp_path / "deep" / str(n) for n in range(10))

    def make_tier(self, capacity_bytes: int | None) -> DiskTier:
        return DiskTier(next(self.paths), capacity_bytes)

    def test_used_bytes_are_file_sizes(self, tier: DiskTier) -> None:
        tier.put(make_key(1), make_blob(1))
        tier.put(make_key(2), make_blob(2, numbers=777))
        files = [stored_file(tier, make_key(n)) for n in (1, 2)]
        assert tier.used_bytes == sum(file.stat().st_size for file in files) and tier.check() == []
        assert files[0].read_bytes() == container.to_bytes(make_key(1), make_blob(1))


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[DiskTier]:
    tier = DiskTier(tmp_path / "kv")
    tier.put(make_key(1), make_blob(1))
    yield tier
    tier.close()


@pytest.mark.parametrize("durability", ["cache", "sync"])
def test_warm_restart(tmp_path: Path, durability: str) -> None:
    first = DiskTier(tmp_path, durability=durability)
    for number, written_ns in ((5, 20), (3, 30), (300, 10)):
        first.put(make_key(number), make_blob(number))
        os.utime(stored_file(first, make_key(number)), ns=(0, written_ns))
    used_bytes = first.used_bytes
    first.close()
    (tmp_path / "incoming" / "half").write_bytes(b"left over")
    second = DiskTier(tmp_path, durability=durability)
    assert second.used_bytes == used_bytes and keys_of(second) == [make_key(n) for n in (300, 5, 3)]
    assert same(second.get(make_key(3)), 3) and second.check() == []
    assert list((tmp_path / "incoming").iterdir()) == []
    second.close()


def test_restart_reads_no_payload(tier: DiskTier, monkeypatch: pytest.MonkeyPatch) -> None:
    tier.close()
    monkeypatch.setattr(os, "preadv", None)
    reopened = DiskTier(tier.path)
    assert keys_of(reopened) == [make_key(1)]
    reopened.close()


def test_one_process_at_a_time(tier: DiskTier) -> None:
    with pytest.raises(TierUnavailableError, match="already open"):
        DiskTier(tier.path)
    probe = "import fcntl, sys; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    marker = tier.path / "kvloom.json"
    result = subprocess.run([sys.executable, "-c", probe, marker], capture_output=True, text=True, check=False)
    assert "BlockingIOError" in result.stderr
    assert same(tier.get(make_key(1)), 1)
    tier.close()
    DiskTier(tier.path).close()


def test_refuses_foreign_folders(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(TierError, match="not a kvloom store") as refusal:
        DiskTier(tmp_path)
    assert not isinstance(refusal.value, TierUnavailableError)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(TierError, match="is a file"):
        DiskTier(tmp_path / "notes.txt")


@pytest.mark.parametrize("text", ['{"kind": "kvloom chunk directory", "format": 2}', "{", "[]", "\x00\xff", "7"])
def test_refuses_other_formats(tier: DiskTier, text: str) -> None:
    tier.close()
    marker = tier.path / "kvloom.json"
    assert json.loads(marker.read_text())["format"] == 1
    marker.write_text(text)
    with pytest.raises(TierError, match="not of a format that this release reads"):
        DiskTier(tier.path)
    fd = os.open(marker, os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the refusal left no lock
    os.close(fd)


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="capacity_bytes is -1"):
        DiskTier(tmp_path, -1)
    with pytest.raises(ValueError, match="durability is 'never'"):
        DiskTier(tmp_path, durability="never")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="capacity_bytes is -1"):
        HostTier(-1)


@pytest.mark.parametrize("offset", [0, 9, 20, 50, 60, 100, -30, -1])
def test_corrupt_file_is_quarantined(tier: DiskTier, offset: int) -> None:
    tier.put(make_key(2), make_blob(2))
    damaged = stored_file(tier, make_key(1))
    flip(damaged, offset)
    with pytest.raises(ChunkCorruptError, match=make_key(1).hex()):
        tier.get(make_key(1))
    assert tier.get(make_key(1)) is None and make_key(1) not in tier and tier.check() == []
    assert len(list((tier.path / "quarantine").iterdir())) == 1 and not damaged.exists()
    assert tier.used_bytes == stored_file(tier, make_key(2)).stat().st_size
    assert same(tier.get(make_key(2)), 2)


def test_quarantine_is_bounded(tier: DiskTier) -> None:
    for number in range(20):
        tier.put(make_key(number), make_blob(number))
        flip(stored_file(tier, make_key(number)), -1)
        with pytest.raises(ChunkCorruptError):
            tier.get(make_key(number))
    kept = sorted(file.name[-2:] for file in (tier.path / "quarantine").iterdir())
    assert kept == sorted(f"{number:02x}" for number in range(4, 20))


def test_quarantine_spares_the_successor(tier: DiskTier, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread replaces the corrupt chunk while this one is reading it."""
    flip(stored_file(tier, make_key(1)), -1)
    preadv = os.preadv

    def replace_then_read(fd: int, buffers: list[memoryview], offset: int) -> int:
        monkeypatch.undo()
        tier.put(make_key(1), make_blob(2))
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", replace_then_read)
    with pytest.raises(ChunkCorruptError):
        tier.get(make_key(1))
    assert same(tier.get(make_key(1)), 2) and list((tier.path / "quarantine").iterdir()) == [] and tier.check() == []


def test_layers_verify_what_they_read(tier: DiskTier) -> None:
    assert tier.get_layers(make_key(1), 0, 1) is not None  # its header is cached now
    file, last_layer = stored_file(tier, make_key(1)), -1
    flip(file, last_layer)
    assert tier.get_layers(make_key(1), 0, 3) is not None
    with pytest.raises(ChunkCorruptError, match="section 3"):
        tier.get_layers(make_key(1), 3, 4)
    assert make_key(1) not in tier


def test_layers_of_a_replaced_chunk(tier: DiskTier) -> None:
    for seed in (1, 2, 3):
        tier.put(make_key(1), make_blob(seed))
        found = tier.get_layers(make_key(1), 1, 3)
        assert found is not None and same_blob(found, make_blob(seed).layers(1, 3))


def test_swapped_and_missing_files(tier: DiskTier) -> None:
    tier.put(make_key(2), make_blob(2))
    stored_file(tier, make_key(1)).rename(stored_file(tier, make_key(2)))
    with pytest.raises(ChunkCorruptError, match="asked for"):
        tier.get(make_key(2))
    with pytest.raises(ChunkCorruptError, match="its file is gone"):
        tier.get(make_key(1))
    assert tier.used_bytes == 0 and keys_of(tier) == [] and tier.check() == []


@pytest.mark.parametrize(
    ("code", "error"),
    [(errno.ENOSPC, TierFullError), (errno.EIO, TierUnavailableError), (errno.EMFILE, TierUnavailableError)],
)
def test_failed_write_leaves_nothing(
    tier: DiskTier, monkeypatch: pytest.MonkeyPatch, code: int, error: type[TierError]
) -> None:
    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "writev", fail)
        with pytest.raises(error, match=os.strerror(code)):
            tier.put(make_key(2), make_blob(2))
    assert keys_of(tier) == [make_key(1)] and tier.check() == [] and list((tier.path / "incoming").iterdir()) == []
    tier.put(make_key(2), make_blob(2))
    assert same(tier.get(make_key(2)), 2)


def test_short_reads_and_writes(tier: DiskTier, monkeypatch: pytest.MonkeyPatch) -> None:
    writev, preadv = os.writev, os.preadv
    monkeypatch.setattr(os, "writev", lambda fd, buffers: writev(fd, [next(b for b in buffers if len(b))[:7]]))
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:11]], offset))
    tier.put(make_key(2), make_blob(2))
    assert same(tier.get(make_key(2)), 2)


def test_failed_read_is_unavailable(tier: DiskTier, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "I/O error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fail)
        with pytest.raises(TierUnavailableError, match="cannot read"):
            tier.get(make_key(1))
    assert same(tier.get(make_key(1)), 1)


def test_sync_reaches_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = DiskTier(tmp_path, durability="sync")
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(str(Path(f"/proc/self/fd/{fd}").readlink())))
    tier.put(make_key(1), make_blob(1))
    folder = stored_file(tier, make_key(1)).parent
    assert Path(synced[0]).parent.name == "incoming" and synced[1:] == [str(tmp_path), str(folder)]
    synced.clear()
    tier.put(make_key(1), make_blob(2))  # the folder is there by now
    assert Path(synced[0]).parent.name == "incoming" and synced[1:] == [str(folder)]
    tier.close()
