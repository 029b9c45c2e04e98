"""Chunks in a directory: one file for each, written aside and renamed into place.

kvloom.json   format of the directory; locked while a process has it open
00/ .. ff/    <key as hex>: one container of kvstore/format.py
incoming/     files being written; emptied on opening
quarantine/   the newest files that were found corrupt, for a post-mortem
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import re
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeAlias

from ...core import ChunkInfo, ChunkKey, EncodedChunk, Entry
from ...errors import ChunkCorruptError, KVLoomError, TierError, TierFullError, TierUnavailableError
from ..format import Header, read_chunk, read_header, to_buffers

Durability: TypeAlias = Literal["cache", "sync"]

_MARKER = "kvloom.json"
_MARKER_FIELDS = {"kind": "kvloom chunk directory", "format": 1}
_FOREIGN_BUT_FINE = {_MARKER, "lost+found"}  # the second: the root of a file system given to the cache
_FOLDER_NAME = re.compile("[0-9a-f]{2}")
_FILE_NAME = re.compile("[0-9a-f]{64}")
_QUARANTINE_FILES = 16
_CACHED_HEADERS = 256
_BUFFERS_PER_WRITE = 1024  # IOV_MAX
_NOTHING = ChunkInfo()

_Fingerprint: TypeAlias = tuple[ChunkKey, int, int]


class DiskTier:
    """One file per chunk; every read verifies what it returns.

    A chunk is visible complete or not at all, also after kill -9. The directory belongs to one process at a time.
    Opening lists names and sizes and reads no payload.

    Parameters
    ----------
    path : a directory made by this class, an empty one, or one yet to be made.
    capacity_bytes : of the chunks' files; None for no limit. A chunk that is replaced, files being written and the
        quarantine (at most 16 files) come on top.
    durability : `cache`: after a power loss recent chunks may be lost or torn; the torn are detected by their checksums
        when they are read. `sync`: when `put` returns, the chunk has reached the device.

    Raises
    ------
    TierError : the directory is not a kvloom store, or of a format that this release does not read.
    TierUnavailableError : another process has it open, or the file system refuses.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        capacity_bytes: int | None = None,
        *,
        name: str = "disk",
        durability: Durability = "cache",
    ) -> None:
        if capacity_bytes is not None and capacity_bytes < 0:
            raise ValueError(f"capacity_bytes is {capacity_bytes}; expected 0 or more, or None")
        if durability not in ("cache", "sync"):
            raise ValueError(f"durability is {durability!r}; expected 'cache' or 'sync'")
        self.name = name
        self.capacity_bytes = capacity_bytes
        self.durability = durability
        self.path = Path(path)
        self._lock = threading.Lock()
        self._sizes: OrderedDict[ChunkKey, int] = OrderedDict()
        self._infos: dict[ChunkKey, ChunkInfo] = {}
        self._headers: OrderedDict[_Fingerprint, Header] = OrderedDict()
        self._used_bytes = 0
        self._reserved_bytes = 0  # of puts between the check of the capacity and the rename
        self._numbers = itertools.count()
        self._folders: set[str] = set()
        self._closed = False
        with self._os_errors("open"):
            self._marker_fd = self._claim()
            try:
                self._scan()
            except BaseException:
                os.close(self._marker_fd)
                raise

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    def get(self, key: ChunkKey) -> EncodedChunk | None:
        return self._read(key, lambda fd: read_chunk(_reader(fd), _read_header(fd, key)))

    def get_layers(self, key: ChunkKey, start: int, stop: int) -> EncodedChunk | None:
        return self._read(key, lambda fd: read_chunk(_reader(fd), self._cached_header(fd, key), (start, stop)))

    def put(self, key: ChunkKey, blob: EncodedChunk, info: ChunkInfo = _NOTHING) -> None:
        buffers = to_buffers(key, blob)
        size = sum(map(len, buffers))
        with self._lock:
            self._expect_open()
            used_bytes = self._used_bytes - self._sizes.get(key, 0) + self._reserved_bytes
            if self.capacity_bytes is not None and used_bytes + size > self.capacity_bytes:
                raise TierFullError(
                    f"tier {self.name!r}: {size} bytes do not fit, {used_bytes} of {self.capacity_bytes} are used",
                    needed_bytes=size,
                )
            self._reserved_bytes += size
        incoming = self.path / "incoming" / f"{key.hex()}.{next(self._numbers)}"
        try:
            with self._os_errors("write", needed_bytes=size):
                try:
                    self._write(incoming, buffers)
                    with self._lock:
                        self._expect_open()
                        self._make_folder(key)
                        incoming.rename(self._file(key))
                        self._used_bytes += size - self._sizes.pop(key, 0)
                        self._sizes[key] = size
                        self._infos[key] = info
                except BaseException:
                    incoming.unlink(missing_ok=True)
                    raise
                if self.durability == "sync":
                    _sync_folder(self._file(key).parent)
        finally:
            with self._lock:
                self._reserved_bytes -= size

    def delete(self, key: ChunkKey) -> bool:
        with self._os_errors("delete"), self._lock:
            self._expect_open()
            if key not in self._sizes:
                return False
            self._file(key).unlink(missing_ok=True)
            self._forget(key)
            return True

    def __contains__(self, key: object) -> bool:
        return key in self._sizes

    def entries(self) -> list[Entry]:
        with self._lock:
            return [Entry(key, size, self._infos.get(key, _NOTHING)) for key, size in self._sizes.items()]

    def check(self) -> list[str]:
        """What is inconsistent, in words; empty if all is well. Compares names and sizes, not payloads."""
        with self._os_errors("check"), self._lock:
            self._expect_open()
            found = {key: size for key, size, _ in self._list_files()}
            problems = [
                f"chunk {key.hex()} has a file of {found.get(key)} bytes, {self._sizes.get(key)} are accounted"
                for key in found.keys() | self._sizes.keys()
                if found.get(key) != self._sizes.get(key)
            ]
            if sum(self._sizes.values()) != self._used_bytes:
                problems.append(f"chunks take {sum(self._sizes.values())} bytes, {self._used_bytes} are accounted")
            return [f"tier {self.name!r}: {problem}" for problem in problems]

    def close(self) -> None:
        """Lets another process open the directory; every later call raises `TierUnavailableError`."""
        with self._lock:
            if not self._closed:
                self._closed = True
                os.close(self._marker_fd)

    def _claim(self) -> int:
        """Locks the marker file, makes it if the directory is empty, and returns its descriptor."""
        if self.path.exists() and not self.path.is_dir():
            raise TierError(f"{self.path} is a file; give the directory of a kvloom store")
        self.path.mkdir(parents=True, exist_ok=True)
        marker = self.path / _MARKER
        if not marker.exists() and not {entry.name for entry in self.path.iterdir()} <= _FOREIGN_BUT_FINE:
            raise TierError(f"{self.path} is not a kvloom store and not empty; give an empty or a new directory")
        fd = os.open(marker, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as exc:
                raise TierUnavailableError(
                    f"{self.path} is already open, here or in another process; close it there or give another directory"
                ) from exc
            text = os.pread(fd, 4096, 0)
            if not text:  # new, or its making was cut short before anything else was stored
                os.pwrite(fd, json.dumps(_MARKER_FIELDS).encode() + b"\n", 0)
                os.fsync(fd)
            elif not _is_marker(text):
                raise TierError(
                    f"{marker} is not of a format that this release reads ({_MARKER_FIELDS}); "
                    "use the release that made it, or delete the directory"
                )
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _scan(self) -> None:
        for folder in ("incoming", "quarantine"):
            (self.path / folder).mkdir(exist_ok=True)
        self._folders = {entry.name for entry in self.path.iterdir() if _FOLDER_NAME.fullmatch(entry.name)}
        for file in (self.path / "incoming").iterdir():
            file.unlink()
        for key, size, _ in sorted(self._list_files(), key=lambda entry: entry[2]):
            self._sizes[key] = size
            self._used_bytes += size

    def _list_files(self) -> Iterator[tuple[ChunkKey, int, int]]:
        """Key, bytes and time of the last write of every chunk on disk."""
        for folder in self._folders:
            with os.scandir(self.path / folder) as files:
                for file in files:
                    if _FILE_NAME.fullmatch(file.name):
                        stat = file.stat(follow_symlinks=False)
                        yield ChunkKey(bytes.fromhex(file.name)), stat.st_size, stat.st_mtime_ns

    def _read(self, key: ChunkKey, read: Callable[[int], EncodedChunk]) -> EncodedChunk | None:
        with self._os_errors("read"):
            self._expect_open()
            if key not in self._sizes:
                return None
            try:
                fd = os.open(self._file(key), os.O_RDONLY)
            except FileNotFoundError:
                self._missing(key)
                return None
            try:
                return read(fd)
            except ChunkCorruptError as exc:
                self._quarantine(key, fd)
                raise ChunkCorruptError(f"tier {self.name!r}, chunk {key.hex()}: {exc}") from exc
            finally:
                os.close(fd)

    def _cached_header(self, fd: int, key: ChunkKey) -> Header:
        """The header of an open file; a replaced file is another inode, so a stale header is never used."""
        stat = os.fstat(fd)
        fingerprint = key, stat.st_ino, stat.st_mtime_ns
        with self._lock:
            header = self._headers.pop(fingerprint, None)
        header = header or _read_header(fd, key)
        with self._lock:
            self._headers[fingerprint] = header
            if len(self._headers) > _CACHED_HEADERS:
                self._headers.popitem(last=False)
        return header

    def _missing(self, key: ChunkKey) -> None:
        with self._lock:
            if key not in self._sizes or self._file(key).exists():
                return  # deleted or replaced while this thread was on its way
            self._forget(key)
        raise ChunkCorruptError(f"tier {self.name!r}, chunk {key.hex()}: its file is gone")

    def _quarantine(self, key: ChunkKey, fd: int) -> None:
        folder = self.path / "quarantine"
        with self._lock:
            try:
                same = os.path.samestat(os.fstat(fd), self._file(key).stat())
            except FileNotFoundError:
                return
            if same:  # and not a good chunk that has replaced it
                self._file(key).rename(folder / f"{time.time_ns():020d}-{key.hex()}")
                self._forget(key)
            for file in sorted(folder.iterdir())[:-_QUARANTINE_FILES]:
                file.unlink(missing_ok=True)

    def _forget(self, key: ChunkKey) -> None:
        self._used_bytes -= self._sizes.pop(key, 0)
        self._infos.pop(key, None)

    def _write(self, file: Path, buffers: list[memoryview]) -> None:
        fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            pending = deque(buffers)
            while pending:
                written = os.writev(fd, list(itertools.islice(pending, _BUFFERS_PER_WRITE)))
                while pending and written >= len(pending[0]):
                    written -= len(pending.popleft())
                if written:
                    pending[0] = pending[0][written:]
            if self.durability == "sync":
                os.fsync(fd)
        finally:
            os.close(fd)

    def _make_folder(self, key: ChunkKey) -> None:
        folder = self._file(key).parent
        if folder.name not in self._folders:
            folder.mkdir(exist_ok=True)
            if self.durability == "sync":
                _sync_folder(self.path)
            self._folders.add(folder.name)

    def _file(self, key: ChunkKey) -> Path:
        name = key.hex()
        return self.path / name[:2] / name

    def _expect_open(self) -> None:
        if self._closed:
            raise TierUnavailableError(f"tier {self.name!r} is closed")

    @contextmanager
    def _os_errors(self, verb: str, *, needed_bytes: int = 0) -> Iterator[None]:
        """The one place where what the operating system says becomes what a tier says."""
        try:
            yield
        except KVLoomError:
            raise
        except OSError as exc:
            message = f"tier {self.name!r} cannot {verb} in {self.path}: {exc}"
            if exc.errno in (errno.ENOSPC, errno.EDQUOT):
                raise TierFullError(message, needed_bytes=needed_bytes) from exc
            raise TierUnavailableError(message) from exc


def _is_marker(text: bytes) -> bool:
    try:
        return bool(json.loads(text) == _MARKER_FIELDS)
    except ValueError:
        return False


def _reader(fd: int) -> Callable[[memoryview, int], None]:
    def read_at(buffer: memoryview, offset: int) -> None:
        while buffer:
            count = os.preadv(fd, [buffer], offset)
            if not count:
                raise ChunkCorruptError(f"file ends at byte {offset}")
            buffer, offset = buffer[count:], offset + count

    return read_at


def _read_header(fd: int, key: ChunkKey) -> Header:
    return read_header(_reader(fd), os.fstat(fd).st_size, key)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
