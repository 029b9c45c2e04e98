"""The seam to the operating system: the few calls that the disk tier makes; tests make them fail, cut short or lost."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import time
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from io import FileIO
from itertools import islice
from pathlib import Path
from typing import Literal, TypeAlias

from ....errors import ChunkCorruptError, TierUnavailableError

Mode: TypeAlias = Literal["rb", "r+b", "x+b", "w+b"]
Preadv: TypeAlias = Callable[["OpenFile", list[memoryview], int], int]

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE)
NOT_SUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV)

_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # linux/falloc.h
_BUFFERS_PER_WRITE = 1024  # IOV_MAX
_BEGIN_WRITING = 2  # SYNC_FILE_RANGE_WRITE
_READ_CACHED = getattr(os, "RWF_NOWAIT", 0)  # Linux alone has it
_FIRST_PAUSE_S, _LAST_PAUSE_S = 5e-5, 2e-3
_open = partial(os.open, mode=0o644)


class OpenFile(FileIO):
    """An open file, closed when the last reference to it is gone; so it stays open for whoever uses it."""

    __del__ = FileIO.close


class Files:
    """What the operating system does with files; every method raises `OSError`.

    Attributes
    ----------
    lock_timeout_s : how long to wait for another process that has the lock of a store. It is held for microseconds, and
        while a journal is rewritten.
    slack_records : that a journal may have beyond two for each chunk, before it is rewritten.
    """

    lock_timeout_s = 10.0
    slack_records = 16384

    def __init__(self) -> None:
        library = ctypes.CDLL(None, use_errno=True)
        self._fallocate = getattr(library, "fallocate", None)  # Linux alone has these two
        if self._fallocate is not None:
            self._fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
        self._sync_file_range = getattr(library, "sync_file_range", None)
        if self._sync_file_range is not None:
            self._sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]

    def open(self, path: Path, mode: Mode) -> OpenFile:
        """Opens a file to read, to update, or to update after it was made (`x`) or made empty (`w`)."""
        return OpenFile(path, mode, opener=_open)

    def preadv(self, file: OpenFile, buffers: list[memoryview], offset: int) -> int:
        return os.preadv(file.fileno(), buffers, offset)

    def preadv_cached(self, file: OpenFile, buffers: list[memoryview], offset: int) -> int:
        """As `preadv`, from the page cache alone: raises `BlockingIOError` rather than wait for the device."""
        if not _READ_CACHED:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return os.preadv(file.fileno(), buffers, offset, _READ_CACHED)

    def pwritev(self, file: OpenFile, buffers: list[memoryview], offset: int) -> int:
        return os.pwritev(file.fileno(), buffers, offset)

    def will_sync(self, file: OpenFile, offset: int, nbytes: int) -> None:
        """Asks the device to begin to write a range; a hint, whose failure is not reported."""
        if self._sync_file_range is not None:
            self._sync_file_range(file.fileno(), offset, nbytes, _BEGIN_WRITING)

    def fdatasync(self, file: OpenFile) -> None:
        os.fdatasync(file.fileno())

    def sync_folder(self, path: Path) -> None:
        """Makes the names in a folder durable."""
        # No object of Python's owns the descriptor of a folder. So that an exception between any two instructions does
        # not leak it, it gets into the list as it is opened, leaves it as it is closed, and is looked for there twice.
        opened: list[int] = []
        try:
            try:
                opened.extend(map(os.open, [path], [os.O_RDONLY | os.O_DIRECTORY]))
                os.fsync(opened[0])
            finally:
                opened[:] = filter(None, map(os.close, opened))
        finally:
            opened[:] = filter(None, map(os.close, opened))

    def rename(self, old: Path, new: Path) -> None:
        old.replace(new)

    def unlink(self, path: Path) -> None:
        path.unlink()

    def mkdir(self, path: Path) -> None:
        """Also makes its parents; nothing if it is there."""
        path.mkdir(parents=True, exist_ok=True)

    def listdir(self, path: Path) -> list[str]:
        return [entry.name for entry in path.iterdir()]

    def flock(self, file: OpenFile, operation: int) -> None:
        fcntl.flock(file.fileno(), operation)

    def fstat(self, file: OpenFile) -> os.stat_result:
        return os.fstat(file.fileno())

    def stat(self, path: Path) -> os.stat_result:
        return path.stat()

    def punch(self, file: OpenFile, offset: int, nbytes: int) -> None:
        """Gives the space of a range back; it reads as zeros then."""
        self._allocate(file, _KEEP_SIZE | _PUNCH_HOLE, offset, nbytes)

    def allocate(self, file: OpenFile, offset: int, nbytes: int) -> None:
        """Sets space aside, also beyond the end of the file, which stays where it is."""
        self._allocate(file, _KEEP_SIZE, offset, nbytes)

    def _allocate(self, file: OpenFile, mode: int, offset: int, nbytes: int) -> None:
        if self._fallocate is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        while self._fallocate(file.fileno(), mode, offset, nbytes):
            code = ctypes.get_errno()
            if code != errno.EINTR:
                raise OSError(code, os.strerror(code))


def absolute_path(path: str | os.PathLike[str], argument: str = "path") -> Path:
    """The path of a directory, resolved now: what is relative goes by the current directory, `~` is the home directory.

    Raises
    ------
    ValueError : it is empty, or cannot be resolved.
    TypeError : it is no path.
    """
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else path
    if not isinstance(text, str):
        raise TypeError(f"{argument} is {path!r}; expected text or a pathlib.Path")
    if not text.strip() or "\0" in text:
        raise ValueError(f"{argument} is {text!r}; expected the path of a directory")
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError as exc:
        raise ValueError(f"{argument} is {text!r}, and there is no such home directory; give an absolute path") from exc
    except FileNotFoundError as exc:
        raise ValueError(f"{argument} is {text!r}, and the current directory is gone; give an absolute path") from exc


def read_fully(preadv: Preadv, file: OpenFile, buffer: memoryview, offset: int) -> int:
    """Reads until the buffer is full or the file ends; how many bytes were read."""
    done = 0
    while done < len(buffer):
        try:
            count = preadv(file, [buffer[done:]], offset + done)
        except InterruptedError:
            continue
        if not count:
            break
        done += count
    return done


def read_exactly(preadv: Preadv, file: OpenFile, base: int, buffer: memoryview, offset: int) -> None:
    """Fills the buffer from `base + offset` on; raises `ChunkCorruptError` if the file is too short for it."""
    if read_fully(preadv, file, buffer, base + offset) < len(buffer):
        raise ChunkCorruptError(f"file ends before byte {base + offset + len(buffer)}")


def write_fully(files: Files, file: OpenFile, buffers: Iterable[memoryview], offset: int) -> None:
    pending = deque(buffers)
    while pending:
        try:
            written = files.pwritev(file, list(islice(pending, _BUFFERS_PER_WRITE)), offset)
        except InterruptedError:
            continue
        offset += written
        while pending and written >= len(pending[0]):
            written -= len(pending.popleft())
        if written:
            pending[0] = pending[0][written:]


def lock_file(files: Files, file: OpenFile, path: Path) -> None:
    """Takes the exclusive lock of an open file; raises `TierUnavailableError` if another holds it for too long."""
    give_up_at_s, pause_s = time.monotonic() + files.lock_timeout_s, _FIRST_PAUSE_S
    while True:
        try:
            files.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            if time.monotonic() > give_up_at_s:
                raise TierUnavailableError(
                    f"{path} is locked by another process since {files.lock_timeout_s} s; is that process stopped?"
                ) from exc
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LAST_PAUSE_S)
        except InterruptedError:
            continue
        else:
            return


def same_file(a: os.stat_result, b: os.stat_result) -> bool:
    return (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino)
