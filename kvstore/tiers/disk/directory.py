"""The folder of a store: what it is, and the lock that its processes share."""

from __future__ import annotations

import errno
import fcntl
import json
import threading
from pathlib import Path
from typing import Self

from ....errors import TierError, TierUnavailableError
from ...guard.locks import is_held, release_owned
from .files import Files, OpenFile, lock_file, read_fully, same_file, write_fully

_MARKER = "kvloom.json"
_MARKER_FIELDS = {"kind": "kvloom chunk directory", "format": 2}
_REPLACED = "another directory has come in its place; it is used from now on"
_FOREIGN_BUT_FINE = {_MARKER, "lost+found"}  # the second: the root of a file system given to the cache


class Directory:
    """A folder that is marked as a store. The lock on the marker orders all writes to the journal.

    Parameters
    ----------
    read_only : nothing is made, and `locked` is never called.

    Raises
    ------
    TierError : it is not a kvloom store, or of a format that this release does not read.
    """

    def __init__(self, files: Files, path: Path, *, read_only: bool = False) -> None:
        self.path = path
        self._files = files
        self._mutex = threading.RLock()  # of the threads here; the lock of the file is that of the process
        self._marker = path / _MARKER
        self._file: OpenFile | None = None
        if read_only:
            marker = self._open_marker()
            self._check_marker(marker)
            self._seen = files.fstat(marker)
            return
        try:
            files.mkdir(path)
        except FileExistsError as exc:
            raise TierError(f"{path} is a file; give the directory of a kvloom store") from exc
        names = set(files.listdir(path))
        if _MARKER not in names and not names <= _FOREIGN_BUT_FINE:
            raise TierError(f"{path} is not a kvloom store and not empty; give an empty or a new directory")
        try:
            self._file = files.open(self._marker, "x+b")
        except FileExistsError:
            self._file = files.open(self._marker, "r+b")
        try:
            with self.locked():
                self._claim()
        except BaseException:
            self.release()
            raise

    def locked(self) -> Self:
        """Within, no other thread and no other process changes the journal.

        Raises `TierUnavailableError` if another holds the lock for too long, `OSError` if the folder is gone or was
        replaced by another.
        """
        return self

    def __enter__(self) -> None:
        if not self._mutex.acquire(timeout=self._files.lock_timeout_s):
            raise TierUnavailableError(f"another thread writes to {self.path} since {self._files.lock_timeout_s} s")
        try:
            if self._file is None:
                raise FileNotFoundError(errno.ENOENT, "the store is closed", str(self.path))
            lock_file(self._files, self._file, self._marker)
            if not same_file(self._files.fstat(self._file), self._files.stat(self._marker)):
                self._follow()
                raise OSError(errno.ESTALE, _REPLACED)
        except BaseException:
            self.release()
            raise

    def __exit__(self, *_: object) -> None:
        self.release()

    def expect_same(self) -> None:
        """For those who take no lock: raises `OSError` if the folder is gone, or was replaced by another."""
        stat = self._files.stat(self._marker)
        if not same_file(stat, self._seen):
            self._seen = stat
            raise OSError(errno.ESTALE, _REPLACED)

    def release(self) -> None:
        """Gives up the lock if this thread holds it."""
        if is_held(self._mutex):
            try:
                if self._file is not None:
                    self._files.flock(self._file, fcntl.LOCK_UN)
            finally:
                release_owned(self._mutex)

    def close(self) -> None:
        with self._mutex:
            self._file = None

    def _claim(self) -> None:
        if self._file is None or self._check_marker(self._file):
            return
        # new, or its making was cut short before anything else was stored
        write_fully(self._files, self._file, [memoryview(json.dumps(_MARKER_FIELDS).encode() + b"\n")], 0)
        self._files.fdatasync(self._file)
        self._files.sync_folder(self.path)
        self._files.sync_folder(self.path.parent)

    def _follow(self) -> None:
        """The folder went away and another came in its place: its marker is the one to lock."""
        file = self._files.open(self._marker, "r+b")
        lock_file(self._files, file, self._marker)
        self._file = file
        self._claim()

    def _open_marker(self) -> OpenFile:
        try:
            return self._files.open(self._marker, "rb")
        except (FileNotFoundError, NotADirectoryError) as exc:
            raise TierError(f"{self.path} is not a kvloom store; only an existing one can be opened read-only") from exc

    def _check_marker(self, file: OpenFile) -> bool:
        """False if the marker is empty."""
        buffer = bytearray(4096)
        text = bytes(buffer[: read_fully(self._files.preadv, file, memoryview(buffer), 0)])
        try:
            if text and json.loads(text) != _MARKER_FIELDS:
                raise ValueError("other fields")
        except ValueError as exc:
            raise TierError(
                f"{self._marker} is not of a format that this release reads ({_MARKER_FIELDS}); "
                "use the release that made it, or delete the directory"
            ) from exc
        return bool(text)
