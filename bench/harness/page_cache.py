"""The system's cache of file pages: emptied before a cold read, without privileges."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

_PROBE_BYTES = 1 << 20


def drop_page_cache(folder: Path) -> None:
    """Make the next reads of the files below `folder` come from the disk itself; needs no privileges."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fdatasync(handle)
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(handle)


def can_drop_page_cache(folder: Path) -> bool:
    """Whether `drop_page_cache` works in this folder; on a file system in memory it cannot."""
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        file.write(bytes(_PROBE_BYTES))
        os.fdatasync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            os.preadv(file.fileno(), [bytearray(4096)], 0, os.RWF_NOWAIT)
        except BlockingIOError:
            return True  # it would have to wait for the disk
        except OSError:
            return False  # a file system that cannot say
    return False


def file_system(folder: Path) -> str:
    """Kind of file system that holds the folder (`ext4`, `tmpfs`); `unknown` where the system does not say."""
    mounts = Path("/proc/self/mounts")
    if not mounts.exists():
        return "unknown"
    best, kind = -1, "unknown"
    whole = folder.resolve()
    for line in mounts.read_text(errors="replace").splitlines():
        _, point, found, *_ = line.split(" ")
        place = Path(point.replace("\\040", " "))
        if whole.is_relative_to(place) and len(place.parts) >= best:
            best, kind = len(place.parts), found
    return kind
