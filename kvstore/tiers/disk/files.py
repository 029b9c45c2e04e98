"""The seam to the operating system: the few calls that the disk tier makes, which tests refuse, cut short or lose."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import TypeAlias

from ....errors import ChunkCorruptError, TierUnavailableError

Preadv: TypeAlias = Callable[[int, list[memoryview], int], int]

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
NOT_SUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV)

_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # linux/falloc.h
_BUFFERS_PER_WRITE = 1024  # IOV_MAX
_BEGIN_WRITING = 2  # SYNC_FILE_RANGE_WRITE
_READ_CACHED = getattr(os, "RWF_NOWAIT", 0)  # Linux alone has it
_FIRST_PAUSE_S, _LAST_PAUSE_S = 5e-5, 2e-3


class Files:
    """What the operating system does with files; every method raises `OSError`."""

    def __init__(self) -> None:
        library = ctypes.CDLL(None, use_errno=True)
        self._fallocate = getattr(library, "fallocate", None)  # Linux alone has these two
        if self._fallocate is not None:
            self._fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
        self._sync_file_range = getattr(library, "sync_file_range", None)
        if self._sync_file_range is not None:
            self._sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]

    def open(self, path: Path, flags: int) -> int:
        return os.open(path, flags, 0o644)

    def close(self, fd: int) -> None:
        os.close(fd)

    def preadv(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        return os.preadv(fd, buffers, offset)

    def preadv_cached(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        """As `preadv`, from the page cache alone: raises `BlockingIOError` rather than wait for the device."""
        if not _READ_CACHED:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return os.preadv(fd, buffers, offset, _READ_CACHED)

    def pwritev(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        return os.pwritev(fd, buffers, offset)

    def will_sync(self, fd: int, offset: int, nbytes: int) -> None:
        """Has the device begin to write what was written to a range; a hint, of which no failure is told."""
        if self._sync_file_range is not None:
            self._sync_file_range(fd, offset, nbytes, _BEGIN_WRITING)

    def fdatasync(self, fd: int) -> None:
        os.fdatasync(fd)

    def sync_folder(self, path: Path) -> None:
        """Makes the names in a folder durable."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def rename(self, old: Path, new: Path) -> None:
        old.replace(new)

    def unlink(self, path: Path) -> None:
        path.unlink()

    def mkdir(self, path: Path) -> None:
        """Also makes its parents; nothing if it is there."""
        path.mkdir(parents=True, exist_ok=True)

    def listdir(self, path: Path) -> list[str]:
        return [entry.name for entry in path.iterdir()]

    def flock(self, fd: int, operation: int) -> None:
        fcntl.flock(fd, operation)

    def fstat(self, fd: int) -> os.stat_result:
        return os.fstat(fd)

    def stat(self, path: Path) -> os.stat_result:
        return path.stat()

    def punch(self, fd: int, offset: int, nbytes: int) -> None:
        """Gives the space of a range back; it reads as zeros then."""
        self._allocate(fd, _KEEP_SIZE | _PUNCH_HOLE, offset, nbytes)

    def allocate(self, fd: int, offset: int, nbytes: int) -> None:
        """Sets space aside, also beyond the end of the file, which stays where it is."""
        self._allocate(fd, _KEEP_SIZE, offset, nbytes)

    def _allocate(self, fd: int, mode: int, offset: int, nbytes: int) -> None:
        if self._fallocate is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        while self._fallocate(fd, mode, offset, nbytes):
            code = ctypes.get_errno()
            if code != errno.EINTR:
                raise OSError(code, os.strerror(code))


def read_fully(preadv: Preadv, fd: int, buffer: memoryview, offset: int) -> int:
    """Reads until the buffer is full or the file ends; how many bytes were read."""
    done = 0
    while done < len(buffer):
        try:
            count = preadv(fd, [buffer[done:]], offset + done)
        except InterruptedError:
            continue
        if not count:
            break
        done += count
    return done


def read_exactly(preadv: Preadv, fd: int, base: int, buffer: memoryview, offset: int) -> None:
    """Fills the buffer from `base + offset` on; raises `ChunkCorruptError` if the file is too short for it."""
    if read_fully(preadv, fd, buffer, base + offset) < len(buffer):
        raise ChunkCorruptError(f"file ends before byte {base + offset + len(buffer)}")


def write_fully(files: Files, fd: int, buffers: Iterable[memoryview], offset: int) -> None:
    pending = deque(buffers)
    while pending:
        try:
            written = files.pwritev(fd, list(islice(pending, _BUFFERS_PER_WRITE)), offset)
        except InterruptedError:
            continue
        offset += written
        while pending and written >= len(pending[0]):
            written -= len(pending.popleft())
        if written:
            pending[0] = pending[0][written:]


def lock_file(files: Files, fd: int, path: Path, timeout_s: float) -> None:
    """Takes the exclusive lock of an open file; raises `TierUnavailableError` if another holds it for too long."""
    give_up_at_s, pause_s = time.monotonic() + timeout_s, _FIRST_PAUSE_S
    while True:
        try:
            files.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            if time.monotonic() > give_up_at_s:
                raise TierUnavailableError(
                    f"{path} is locked by another process since {timeout_s} s; is that process stopped?"
                ) from exc
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LAST_PAUSE_S)
        except InterruptedError:
            continue
        else:
            return


def same_file(a: os.stat_result, b: os.stat_result) -> bool:
    return (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino)


class Descriptor:
    """An open file that several threads use; once retired, it is closed by the last of them.

    The owner retires it once and hands it out no more; `with descriptor as fd` is a use, as is `hold` until `release`.
    """

    def __init__(self, files: Files, fd: int) -> None:
        self._files = files
        self._fd = fd
        self._lock = threading.Lock()
        self._users = 1  # the owner

    def hold(self) -> int:
        with self._lock:
            if not self._users:
                raise OSError(errno.EBADF, "the file was closed in the meantime")
            self._users += 1
            return self._fd

    def release(self) -> None:
        with self._lock:
            self._users -= 1
            last = not self._users
        if last:
            self._files.close(self._fd)

    retire = release

    def __enter__(self) -> int:
        return self.hold()

    def __exit__(self, *_: object) -> None:
        self.release()
