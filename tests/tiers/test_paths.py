"""The folder that was meant when a tier was opened stays the folder, whatever becomes of the current directory."""

import os
import pathlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvloom.errors import TierError, TierUnavailableError
from kvloom.kvstore.store import KVStore
from kvloom.kvstore.tiers.disk.tier import DiskTier
from kvloom.kvstore.tiers.shared import SharedTier
from kvloom.testing import keys_of, make_blob, make_chunk, make_key, same_blob, same_chunk


@pytest.fixture(autouse=True)
def current_directory(tmp_path: Path) -> Iterator[None]:
    before = Path.cwd()
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    os.chdir(tmp_path / "here")
    yield
    os.chdir(before)


@pytest.mark.parametrize("durability", ["cache", "batch", "sync"])
@pytest.mark.parametrize("path", ["kv", "./kv", "../here/kv", Path("kv")])
def test_a_relative_path_is_resolved_when_it_is_given(tmp_path: Path, path: str | Path, durability: str) -> None:
    tier = DiskTier(path, durability=durability, segment_bytes=4096)
    tier.put(make_key(1), make_blob(1))
    os.chdir(tmp_path / "there")
    assert same_blob(tier.get(make_key(1)), make_blob(1))
    for number in range(2, 5):  # each in a segment of its own
        tier.put(make_key(number), make_blob(number))
        assert same_blob(tier.get(make_key(number)), make_blob(number))
    tier.delete(make_key(2))
    tier.flush()
    assert tier.check() == [] and tier.path.is_absolute()
    tier.close()
    assert list((tmp_path / "there").iterdir()) == []
    reopened = DiskTier(tmp_path / "here" / "kv")
    assert keys_of(reopened) == [make_key(n) for n in (1, 3, 4)]
    reopened.close()


def test_another_store_at_the_same_relative_path_is_not_adopted(tmp_path: Path) -> None:
    with KVStore([DiskTier("kv")]) as store:
        store.put(make_key(1), make_chunk(1))
        os.chdir(tmp_path / "there")
        other = DiskTier("kv")
        other.put(make_key(2), make_blob(2))
        found = store.get(make_key(1))
        assert found is not None and same_chunk(found, make_chunk(1))
        store.put(make_key(3), make_chunk(3))
        assert store.get(make_key(2)) is None and store.check() == [] and store.stats().tiers[0].errors == 0
        assert keys_of(other) == [make_key(2)]
        other.close()


def test_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "there"))
    tier = DiskTier("~/kv")
    assert tier.path == tmp_path / "there" / "kv"
    tier.close()
    assert list((tmp_path / "here").iterdir()) == []
    for path in ("~no-such-user/kv", "~no-such-user"):
        with pytest.raises(ValueError, match=r"path is '~no-such-user.*no such home directory"):
            DiskTier(path)


@pytest.mark.parametrize("path", ["", " ", "\t\n", "a\0b"])
def test_empty_paths_are_refused(tmp_path: Path, path: str) -> None:
    for read_only in (False, True):
        with pytest.raises(ValueError, match=r"path is .*; expected the path of a directory"):
            DiskTier(path, read_only=read_only)
    with pytest.raises(ValueError, match="name_or_path is"):
        SharedTier(path, 1 << 20)
    assert list((tmp_path / "here").iterdir()) == []


@pytest.mark.parametrize("path", [None, 7, b"kv", ["kv"]])
def test_what_is_no_path_is_refused(tmp_path: Path, path: object) -> None:
    with pytest.raises(TypeError, match=r"path is .*; expected text or a pathlib.Path"):
        DiskTier(path)  # type: ignore[arg-type]
    assert list((tmp_path / "here").iterdir()) == []


def test_the_current_directory_may_be_gone(tmp_path: Path) -> None:
    os.chdir(tmp_path / "there")
    (tmp_path / "there").rmdir()
    with pytest.raises(ValueError, match="the current directory is gone; give an absolute path"):
        DiskTier("kv")
    tier = DiskTier(tmp_path / "kv")
    tier.put(make_key(1), make_blob(1))
    assert tier.check() == []
    tier.close()


def test_a_path_that_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "kv"):
        with pytest.raises((TierError, TierUnavailableError), match="file"):
            DiskTier(path)
    assert pathlib.Path(tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no /dev/shm to write to")
def test_a_relative_path_of_shared_memory(tmp_path: Path) -> None:
    folder = Path(f"/dev/shm/kvloom-test-{os.getpid()}")
    folder.mkdir()
    try:
        os.chdir(folder)
        tier = SharedTier("./kv", 1 << 20)
        os.chdir(tmp_path)
        tier.put(make_key(1), make_blob(1))
        assert tier.path == folder / "kv" and same_blob(tier.get(make_key(1)), make_blob(1)) and tier.check() == []
        tier.close()
    finally:
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        folder.rmdir()
