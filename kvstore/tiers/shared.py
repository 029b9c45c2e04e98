"""One copy of the chunks for all processes of a host."""

from __future__ import annotations

import os
from pathlib import Path

from ...errors import TierError, TierUnavailableError
from .disk.files import absolute_path
from .disk.tier import DiskTier

_ROOT = Path("/dev/shm")  # noqa: S108  the folder inside it belongs to the user alone, see `_make_private`
_MOUNTS = Path("/proc/self/mountinfo")
_IN_MEMORY = {"tmpfs", "ramfs"}


class SharedTier(DiskTier):
    """A `DiskTier` in memory (tmpfs): what one engine process puts, the others on the host find.

    The format, the verified reads and what several processes may do with one folder are those of `DiskTier`. A process
    that dies can leave no damage that `DiskTier` would not find, and holds no memory of others: `get` copies, and
    verifies what it has copied. Chunks outlive the processes, not the machine; they take memory until they are evicted
    or the folder is deleted.

    Parameters
    ----------
    name_or_path : a name, for a folder of this user in /dev/shm that no other user can read; or a path with a slash (or
        a `Path`), for a folder on a tmpfs. A relative path is resolved now, and `~` is the home directory.
    capacity_bytes : as for `DiskTier`; together with all else on that tmpfs it should fit there.

    Raises
    ------
    ValueError : `capacity_bytes` is negative, or `name_or_path` is neither.
    TierError : the folder is not in memory, or open to other users, or the tmpfs is smaller than `capacity_bytes`; also
        as `DiskTier`.
    TierUnavailableError : as `DiskTier`.
    """

    def __init__(self, name_or_path: str | os.PathLike[str], capacity_bytes: int, *, name: str = "shared") -> None:
        if capacity_bytes < 0:
            raise ValueError(f"capacity_bytes is {capacity_bytes}; expected 0 or more")
        try:
            folder = _folder(name_or_path)
            _expect_in_memory(folder, capacity_bytes)
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as exc:
            raise TierUnavailableError(
                f"tier {name!r} cannot make its folder for {str(name_or_path)!r}: {exc}"
            ) from exc
        super().__init__(folder, capacity_bytes, name=name, durability="cache")


def _folder(name_or_path: str | os.PathLike[str]) -> Path:
    if not isinstance(name_or_path, str) or "/" in name_or_path:
        return absolute_path(name_or_path, "name_or_path")
    if name_or_path.strip() in ("", ".", "..", "~") or "\0" in name_or_path:
        raise ValueError(f"name_or_path is {name_or_path!r}; expected a name, or a path with a slash")
    return _make_private(_ROOT / f"kvloom-{os.geteuid()}") / name_or_path


def _make_private(folder: Path) -> Path:
    """Makes the folder, or checks that it belongs to this user and that no other user can read or write there."""
    _expect_in_memory(folder, 0)
    folder.mkdir(mode=0o700, exist_ok=True)
    stat = folder.lstat()
    if not folder.is_dir() or folder.is_symlink() or stat.st_uid != os.geteuid() or stat.st_mode & 0o077:
        raise TierError(
            f"{folder} is not a folder of this user alone; delete it, or give the path of another folder on a tmpfs"
        )
    return folder


def _expect_in_memory(folder: Path, capacity_bytes: int) -> None:
    there = next(path for path in (folder, *folder.parents) if path.exists())
    kind = _file_system(there.stat().st_dev)
    if kind not in _IN_MEMORY:
        raise TierError(f"{folder} is on {kind}, not in memory; give a name, or a folder on a tmpfs, or use DiskTier")
    space = os.statvfs(there)
    total_bytes = space.f_blocks * space.f_frsize
    if 0 < total_bytes < capacity_bytes:  # 0: a tmpfs without a limit
        raise TierError(
            f"capacity_bytes is {capacity_bytes}, the {kind} of {folder} has {total_bytes}; give less, or make it "
            "larger (`mount -o remount,size=...`; for a container, `docker run --shm-size=...`)"
        )


def _file_system(device: int) -> str:
    """What kind of file system has this `st_dev`: `tmpfs`, `ext4`, ..."""
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in _MOUNTS.read_text().splitlines():
        fields = line.split()
        if fields[2] == number:
            return fields[fields.index("-") + 1]  # behind a varying number of optional fields
    return "an unknown file system"
