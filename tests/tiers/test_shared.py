"""`SharedTier`: in memory or not at all, for this user alone, and (once `DiskTier` can) for several processes."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvloom.errors import TierError, TierUnavailableError
from kvloom.kvstore.capabilities import ReportsChanges
from kvloom.kvstore.tiers import shared
from kvloom.kvstore.tiers.disk.tier import DiskTier
from kvloom.kvstore.tiers.shared import SharedTier
from kvloom.testing import TierContract, make_blob, make_key, same_blob

MIB = 1 << 20

pytestmark = pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no /dev/shm to write to")


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory."""
    folder = Path(tempfile.mkdtemp(prefix="kvloom-test-", dir="/dev/shm"))
    yield folder
    shutil.rmtree(folder)


class TestSharedTier(TierContract):
    @pytest.fixture(autouse=True)
    def folder(self, memory: Path) -> None:
        self.paths: Iterator[Path] = (memory / "deep" / str(n) for n in range(10))

    def make_tier(self, capacity_bytes: int | None) -> SharedTier:
        return SharedTier(next(self.paths), MIB if capacity_bytes is None else capacity_bytes)

    def test_is_a_disk_tier_for_this_user_alone(self, tier: SharedTier) -> None:
        assert isinstance(tier, DiskTier) and tier.durability == "cache"
        assert tier.path.stat().st_mode & 0o777 == 0o700


def test_by_name(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "_ROOT", memory)
    folder = memory / f"kvloom-{os.geteuid()}"
    for _ in range(2):
        tier = SharedTier("engines", MIB)
        assert tier.path == folder / "engines" and folder.stat().st_mode & 0o777 == 0o700
        tier.put(make_key(1), make_blob(1))
        tier.close()
    for place in ("", " ", ".", "..", "~", "a\0b"):
        with pytest.raises(ValueError, match="expected a name"):
            SharedTier(place, MIB)


def test_refuses_what_others_can_read_or_have_made(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "_ROOT", memory)
    folder = memory / f"kvloom-{os.geteuid()}"
    folder.mkdir(mode=0o755)
    with pytest.raises(TierError, match="not a folder of this user alone"):
        SharedTier("engines", MIB)
    folder.rmdir()
    (memory / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to(memory / "elsewhere")
    with pytest.raises(TierError, match="not a folder of this user alone"):
        SharedTier("engines", MIB)
    assert list((memory / "elsewhere").iterdir()) == []
    folder.unlink()
    monkeypatch.setattr(os, "geteuid", lambda: 4_000_000)
    with pytest.raises(TierError, match="not a folder of this user alone"):
        SharedTier("engines", MIB)


def test_refuses_what_is_not_in_memory(memory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = tmp_path / "mountinfo"
    device = f"{os.major(memory.stat().st_dev)}:{os.minor(memory.stat().st_dev)}"
    mounts.write_text(
        f"22 1 0:999 / /else rw - ramfs none rw\n23 1 {device} / /x rw shared:5 master:1 - ext4 /dev/sda1 rw\n"
    )
    monkeypatch.setattr(shared, "_MOUNTS", mounts)
    with pytest.raises(TierError, match="is on ext4, not in memory"):
        SharedTier(memory / "kv", MIB)
    mounts.write_text("")
    with pytest.raises(TierError, match="is on an unknown file system"):
        SharedTier(memory / "kv", MIB)
    assert list(memory.iterdir()) == []


def test_refuses_more_than_there_is(memory: Path) -> None:
    with pytest.raises(TierError, match="capacity_bytes is 1152921504606846976, the tmpfs of"):
        SharedTier(memory / "kv", 1 << 60)
    with pytest.raises(ValueError, match="capacity_bytes is -1"):
        SharedTier(memory / "kv", -1)
    (memory / "file").touch()
    with pytest.raises((TierError, TierUnavailableError), match="file"):
        SharedTier(memory / "file" / "kv", MIB)
    assert [path.name for path in memory.iterdir()] == ["file"]


OTHER = """
import sys
from kvloom.kvstore.tiers.shared import SharedTier
from kvloom.testing import make_blob, make_key, same_blob
tier = SharedTier(sys.argv[1] + "/kv", 1 << 24)
assert same_blob(tier.get(make_key(1)), make_blob(1))
tier.put(make_key(2), make_blob(2))
assert tier.delete(make_key(3))
tier.close()
"""


@pytest.mark.slow
def test_two_processes_see_one_another(memory: Path) -> None:
    tier = SharedTier(memory / "kv", 1 << 24)
    if not isinstance(tier, ReportsChanges):
        tier.close()
        pytest.skip("DiskTier does not share its directory between processes yet")
    tier.put(make_key(1), make_blob(1))
    tier.put(make_key(3), make_blob(3))
    subprocess.run([sys.executable, "-c", OTHER, str(memory)], check=True, cwd=Path(__file__).parent.parent.parent)
    changes = tier.changes()
    assert make_key(3) in changes and [c.key for c in changes if not isinstance(c, bytes)] == [make_key(2)]
    found = tier.get(make_key(2))
    assert found is not None and same_blob(found, make_blob(2)) and tier.get(make_key(3)) is None
    tier.close()
