"""The folder of a store: what it is, and the lock that its processes share."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ....errors import TierError, TierUnavailableError
from .files import Files, lock_file, read_fully, same_file, write_fully

_MARKER = "kvloom.json"
_MARKER_FIELDS = {"kind": "kvloom chunk directory", "format": 2}
_FOREIGN_BUT_FINE = {_MARKER, "lost+found"}  # the second: the root of a file system given to the cache
_LOCK_TIMEOUT_S = 10.0  # the lock is held for microseconds, and while a journal is rewritten


class Directory:
    """A folder that is marked as a store. The lock on the marker orders all writes to the journal.

    Raises
    ------
    TierError : it is not a kvloom store, or of a format that this release does not read.
    """

    def __init__(self, files: Files, path: Path) -> None:
        self.path = path
        self._files = files
        self._mutex = threading.Lock()  # of the threads here; the lock of the file is that of the process
        self._marker = path / _MARKER
        try:
            files.mkdir(path)
        except FileExistsError as exc:
            raise TierError(f"{path} is a file; give the directory of a kvloom store") from exc
        names = set(files.listdir(path))
        if _MARKER not in names and not names <= _FOREIGN_BUT_FINE:
            raise TierError(f"{path} is not a kvloom store and not empty; give an empty or a new directory")
        self._fd = files.open(self._marker, os.O_RDWR | os.O_CREAT)
        try:
            with self.locked():
                self._claim()
        except BaseException:
            files.close(self._fd)
            raise

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Within, no other thread and no other process changes the journal.

        Raises `TierUnavailableError` if another holds the lock for ten seconds, `OSError` if the folder is gone or was
        replaced by another.
        """
        if not self._mutex.acquire(timeout=_LOCK_TIMEOUT_S):
            raise TierUnavailableError(f"another thread writes to {self.path} since {_LOCK_TIMEOUT_S} s")
        try:
            lock_file(self._files, self._fd, self._marker, _LOCK_TIMEOUT_S)
            try:
                if not same_file(self._files.fstat(self._fd), self._files.stat(self._marker)):
                    self._follow()
                    raise OSError(errno.ESTALE, "another directory has come in its place; it is used from now on")
                yield
            finally:
                self._files.flock(self._fd, fcntl.LOCK_UN)
        finally:
            self._mutex.release()

    def close(self) -> None:
        with self._mutex:
            self._files.close(self._fd)

    def _claim(self) -> None:
        buffer = bytearray(4096)
        text = bytes(buffer[: read_fully(self._files.preadv, self._fd, memoryview(buffer), 0)])
        if not text:  # new, or its making was cut short before anything else was stored
            write_fully(self._files, self._fd, [memoryview(json.dumps(_MARKER_FIELDS).encode() + b"\n")], 0)
            self._files.fdatasync(self._fd)
            self._files.sync_folder(self.path)
            self._files.sync_folder(self.path.parent)
        elif not _is_marker(text):
            raise TierError(
                f"{self._marker} is not of a format that this release reads ({_MARKER_FIELDS}); "
                "use the release that made it, or delete the directory"
            )

    def _follow(self) -> None:
        """The folder went away and another came in its place: its marker is the one to lock."""
        fd = self._files.open(self._marker, os.O_RDWR)
        try:
            lock_file(self._files, fd, self._marker, _LOCK_TIMEOUT_S)
        except BaseException:
            self._files.close(fd)
            raise
        self._files.close(self._fd)
        self._fd = fd
        self._claim()


def _is_marker(text: bytes) -> bool:
    try:
        return bool(json.loads(text) == _MARKER_FIELDS)
    except ValueError:
        return False
