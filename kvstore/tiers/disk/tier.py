"""Chunks in a directory: segments of payload, and a journal that says which chunk lies where.

kvloom.json   format of the directory; its lock orders the writes of all processes to the journal
journal       what happened to chunks (records.py), read on opening
segments/     containers of kvstore/format.py one behind the other; each process appends to a file of its own
quarantine/   copies of the newest containers that were found corrupt, for a post-mortem
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Literal, TypeAlias

from ....core import NOTHING, ChunkInfo, ChunkKey, EncodedChunk, Entry
from ....errors import (
    ChunkCorruptError,
    KVLoomError,
    TierFullError,
    TierNoSpaceError,
    TierReadOnlyError,
    TierUnavailableError,
)
from ...format import to_buffers
from ...guard.locks import release_owned
from ...keys import KEY_BYTES
from ...placement.quota import check_namespace
from .commit import GroupCommit, Written
from .containers import CachedReads, Containers, Read
from .directory import Directory
from .files import NO_SPACE, TOO_MANY_FILES, Files, absolute_path, read_exactly
from .index import Change, Index, Op, PayloadLocation, row_of, taken_bytes
from .journal import Journal
from .recovery import compact, keep_copy, lost_chunks, overlapping_chunks, recover
from .segments import Segments

Durability: TypeAlias = Literal["cache", "batch", "sync"]

_LARGEST_SEGMENT_BYTES, _SMALLEST_SEGMENT_BYTES = 1 << 30, 1 << 20
_ATTEMPTS = 16


class DiskTier:
    """Segments in a directory that several processes share; every read verifies what it returns.

    A chunk is visible complete or not at all, also after kill -9. What one process puts or deletes, the others see at
    their next call. Opening reads the journal and no payload. The space of a chunk that is deleted or replaced
    is given back at once (by punching holes; where the file system cannot, segments that are more than half dead are
    compacted), or in the classes `batch` and `sync` after the next sync, while others go on reading.

    After a power loss nothing that a read returns is wrong: what did not reach the device whole is found by its
    checksums, and is a miss. Which chunks are still there depends on the durability of the process that put them:

    `cache`
        Nothing is synced. Recent chunks may be gone, and recently deleted ones may be back.
    `batch`
        `put` returns when the chunk is written. All that was put since the last sync shares the next one, at most
        `sync_interval_s` later, or when 256 MiB have come together, or when `flush` is called: what was put before a
        `flush` is there. If a sync fails, its chunks are given up, and the next `put` or `flush` raises.
    `sync`
        `put` returns when the chunk is on the device; puts of several threads share syncs. If the sync fails, the chunk
        is given up.

    A chunk that was deleted or replaced may be gone, or be back, until the process that did it has synced.

    Parameters
    ----------
    path : a directory made by this class, an empty one, or one yet to be made, on a local file system. A relative path
        is resolved now, and `~` is the home directory.
    capacity_bytes : of the chunks of all processes, in steps of 4 KiB each; None for no limit. Chunks that are being
        written or wait for a sync, the journal (128 bytes for each record) and the quarantine (16 chunks) come on top.
    sync_interval_s : how long `batch` lets a chunk wait.
    segment_bytes : of a file of payload; None for a sixteenth of the capacity, within 1 MiB and 1 GiB.
    read_only : reads what is there, and follows what other processes write, but writes and locks nothing itself, so
        that the directory may be on a read-only file system or belong to another user. `put` and `delete` raise
        `TierReadOnlyError`. A chunk that is found corrupt is absent from then on, in this process alone.
    files : the operating system, for tests.

    Raises
    ------
    ValueError : an argument is not as described; `path` is empty.
    TierError : the directory is not a kvloom store, or of a format that this release does not read.
    TierUnavailableError : the file system refuses, or another process holds the lock of the directory for ten seconds.
    """

    may_stall = True  # for the device, for the lock of the directory, and for a swap device if it is a tmpfs

    def __init__(
        self,
        path: str | os.PathLike[str],
        capacity_bytes: int | None = None,
        *,
        name: str = "disk",
        durability: Durability = "cache",
        sync_interval_s: float = 1.0,
        segment_bytes: int | None = None,
        read_only: bool = False,
        files: Files | None = None,
    ) -> None:
        if capacity_bytes is not None and capacity_bytes < 0:
            raise ValueError(f"capacity_bytes is {capacity_bytes}; expected 0 or more, or None")
        if durability not in ("cache", "batch", "sync"):
            raise ValueError(f"durability is {durability!r}; expected 'cache', 'batch' or 'sync'")
        if not sync_interval_s > 0:
            raise ValueError(f"sync_interval_s is {sync_interval_s}; expected more than 0")
        if segment_bytes is None:
            share = _LARGEST_SEGMENT_BYTES if capacity_bytes is None else capacity_bytes // 16
            segment_bytes = min(max(share, _SMALLEST_SEGMENT_BYTES), _LARGEST_SEGMENT_BYTES)
        elif segment_bytes < 1:
            raise ValueError(f"segment_bytes is {segment_bytes}; expected 1 or more")
        self.name = name
        self.capacity_bytes = capacity_bytes
        self.durability = durability
        self.read_only = read_only
        self.path = absolute_path(path)
        self._files = Files() if files is None else files
        self._reserved: dict[int, int] = {}  # bytes of the put that is on its way, by thread
        self._closed = False
        self._pid = os.getpid()
        self._containers = Containers()
        try:
            self._directory = Directory(self._files, self.path, read_only=read_only)
        except OSError as exc:
            raise self._error("open", exc) from exc
        syncs = durability != "cache"
        self._segments = Segments(self._files, self.path / "segments", segment_bytes, syncs=syncs)
        try:
            for folder in () if read_only else ("segments", "quarantine"):
                self._files.mkdir(self.path / folder)
            self._journal = Journal(self._files, self._directory, read_only=read_only)
            if not read_only:
                recover(self._files, self._journal, self._segments)
        except BaseException as exc:
            self._directory.release()
            if isinstance(exc, OSError) and exc.errno is not None:
                raise self._error("open", exc) from exc
            raise
        # last, as these refer back to the tier: if opening fails, nothing must keep its files open
        self._commit = GroupCommit(self._sync, sync_interval_s)
        self.cached = CachedReads(self._files, self._journal, self._segments, self._containers, lambda: self._is_open)

    @property
    def used_bytes(self) -> int:
        """As of the last call of any other method."""
        return self._journal.index.used_bytes

    def get(self, key: ChunkKey) -> EncodedChunk | None:
        return self._read(key, self._containers.whole(key))

    def get_layers(self, key: ChunkKey, start: int, stop: int) -> EncodedChunk | None:
        return self._read(key, self._containers.layers(key, start, stop))

    def put(self, key: ChunkKey, blob: EncodedChunk, info: ChunkInfo = NOTHING) -> int:
        if len(key) != KEY_BYTES:
            raise ValueError(f"key has {len(key)} bytes; expected {KEY_BYTES}")
        check_namespace(info.namespace)
        with _Call(self._mend, "write", key):
            self._expect_writable()
            buffers = to_buffers(key, blob)
            nbytes = sum(map(len, buffers))
            self._commit.expect_sound()
            try:
                try:
                    self._put(key, buffers, nbytes, info)
                except OSError as exc:
                    if exc.errno not in NO_SPACE or not self._commit.has_freed:
                        raise
                    self._commit.flush()  # gives back what was deleted since the last sync
                    self._put(key, buffers, nbytes, info)
            except OSError as exc:
                if exc.errno in NO_SPACE:
                    raise self._error("write", exc, needed_bytes=taken_bytes(nbytes)) from exc
                raise
        return taken_bytes(nbytes)

    def delete(self, key: ChunkKey) -> bool:
        with _Call(self._mend, "delete", key):
            self._expect_open()
            found = self._journal.find(key)
            while found is not None:
                self._expect_writable()
                if self._remove(key, found):
                    return True
                found = self._journal.find(key)  # replaced in between
            return False

    def __contains__(self, key: object) -> bool:
        with _Call(self._mend, "look up"):
            return isinstance(key, bytes) and self._journal.find(ChunkKey(key)) is not None

    def entries(self) -> list[Entry]:
        with _Call(self._mend, "list"):
            return self._journal.entries()

    def changes(self) -> list[Entry | ChunkKey]:
        """The state of each chunk that others touched since the last call, in the order in which they did so last.

        What a call says that an exception cuts short is not said again; `entries` has the whole.
        """
        with _Call(self._mend, "list"):
            return self._journal.changes()

    def flush(self) -> None:
        """Returns when all that was put is durable; at once in the class `cache`, where nothing ever is."""
        with _Call(self._mend, "sync"):
            self._expect_open()
            if self.durability != "cache":
                self._commit.flush()

    def check(self) -> list[str]:
        """What is inconsistent, in words; empty if all is well. For a moment when nothing is put or deleted."""
        journal = self._journal
        with _Call(self._mend, "check"), journal.lock if self.read_only else journal.exclusive():
            journal.refresh()
            problems = journal.check()
            lost = lost_chunks(self._files, self._segments, journal.index)
            overlapping = overlapping_chunks(journal.index)
        problems += [f"chunk {key.hex()} lies beyond the end of its segment" for key in lost]
        problems += [f"chunk {key.hex()} overlaps another" for key in overlapping]
        return [f"tier {self.name!r}: {problem}" for problem in problems]

    def close(self) -> None:
        """Syncs if need be, and closes all files; every later call raises `TierUnavailableError`."""
        self._closed = True
        with _Call(self._mend, "close"):
            if self._journal.is_closed:
                return
            try:
                self._commit.close()
                if self.durability != "cache":
                    self._commit.flush()
            finally:
                self._segments.close()
                self._directory.close()
                self._journal.close()

    def _put(self, key: ChunkKey, buffers: list[memoryview], nbytes: int, info: ChunkInfo) -> None:
        taken = taken_bytes(nbytes)
        self._journal.find(key)
        self._expect_room(self._journal.index, key, taken, sum(tuple(self._reserved.values())))
        self._reserved[threading.get_ident()] = taken  # until the end of the call
        segment, offset = self._segments.reserve(nbytes, self._journal)
        location, old = PayloadLocation(segment.number, offset, nbytes), None
        try:
            self._segments.write(segment, offset, buffers)
            with self._journal.exclusive() as index:
                self._expect_room(index, key, taken, 0)  # others may have filled it
                old = index.get(key)
                self._journal.append([Change(Op.PUT, key, row_of(location, info))])
        except BaseException:
            if not self._is_stored(key, location):
                self._segments.give_back(segment, location)
            elif old is not None:
                self._give_back(old)
            raise
        self._reserved.pop(threading.get_ident(), None)
        if self.durability == "cache":
            if old is not None:
                self._release([old])
            return
        self._commit.join((key, location), old, waits=self.durability == "sync")

    def _is_stored(self, key: ChunkKey, location: PayloadLocation) -> bool:
        """Whether a chunk lies there by the journal, or may do so."""
        try:
            found = self._journal.find(key)
        except OSError:
            return True
        return found == location

    def _expect_room(self, index: Index, key: ChunkKey, taken: int, reserved: int) -> None:
        old = index.get(key)
        used = index.used_bytes - (0 if old is None else old.taken_bytes) + reserved
        if self.capacity_bytes is not None and used + taken > self.capacity_bytes:
            raise TierFullError(
                f"tier {self.name!r}: {taken} bytes do not fit, {used} of {self.capacity_bytes} are used",
                needed_bytes=taken,
            )

    def _read(self, key: ChunkKey, read: Read) -> EncodedChunk | None:
        with _Call(self._mend, "read"):
            for _ in range(_ATTEMPTS):
                self._expect_open()
                location = self._journal.find(key)
                if location is None:
                    return None
                try:
                    file = self._segments.opened(location.segment)
                    return read(partial(read_exactly, self._files.preadv, file, location.offset), location)
                except (ChunkCorruptError, FileNotFoundError) as exc:
                    if self._quarantine(key, location):
                        raise ChunkCorruptError(f"tier {self.name!r}, chunk {key.hex()}: {exc}") from exc
            return None  # replaced, each time while it was being read

    def _quarantine(self, key: ChunkKey, location: PayloadLocation) -> bool:
        """Removes what cannot be read as it was written and keeps a copy; False if the chunk is elsewhere by now.

        Whoever deletes or moves a chunk writes so before touching its bytes. What has gone from the journal since a
        reader looked there is therefore no sign of corruption.
        """
        if self.read_only:
            self._directory.expect_same()
            return self._journal.hide(key, location)
        return self._remove(key, location, is_damaged=True)

    def _remove(self, key: ChunkKey, location: PayloadLocation, *, is_damaged: bool = False) -> bool:
        """Removes a chunk that lies there, and gives its space back; False if it is elsewhere by now."""
        is_gone = False
        try:
            with self._journal.exclusive() as index:
                if index.get(key) != location:
                    return False
                self._journal.append([Change(Op.DELETE, key, None)])
                is_gone = True
            if is_damaged:
                with suppress(OSError):  # for a post-mortem only
                    keep_copy(self._files, self.path / "quarantine", self._segments, key, location)
        finally:
            if is_gone:
                self._give_back(location)
        return True

    def _give_back(self, location: PayloadLocation) -> None:
        """The chunk that lay there has left the journal."""
        if self.durability == "cache":
            self._release([location])
        else:
            self._commit.join(None, location)

    def _release(self, locations: list[PayloadLocation]) -> None:
        self._segments.free(locations, self._journal)
        if not self._segments.can_punch:
            for number in {location.segment for location in locations}:
                compact(self._files, self._journal, self._segments, number)

    def _sync(self, written: list[Written], freed: list[PayloadLocation]) -> None:
        """Makes a round durable; if that fails, gives up its chunks: they may survive or not."""
        try:
            self._segments.sync()
            self._journal.sync()
        except OSError as exc:
            self._journal.touch([key for key, _ in written])
            with self._journal.exclusive() as index:
                lost = [(key, location) for key, location in written if index.get(key) == location]
                self._journal.append([Change(Op.DELETE, key, None) for key, _ in lost])
            freed += [location for _, location in lost]
            self._journal.touch([key for key, _ in lost])
            raise TierUnavailableError(f"tier {self.name!r} cannot sync: {exc}; gave up {len(lost)} chunks") from exc
        finally:
            self._release(freed)

    @property
    def _is_open(self) -> bool:
        return not self._closed and os.getpid() == self._pid

    def _expect_open(self) -> None:
        if self._closed:
            raise TierUnavailableError(f"tier {self.name!r} is closed")
        if os.getpid() != self._pid:
            raise TierUnavailableError(f"tier {self.name!r} was opened before a fork; open it anew in this process")

    def _expect_writable(self) -> None:
        self._expect_open()
        if self.read_only:
            raise TierReadOnlyError(
                f"tier {self.name!r} was opened read-only; open {self.path} without read_only to write"
            )

    def _error(self, verb: str, exc: OSError, needed_bytes: int = 0) -> KVLoomError:
        """Maps an error of the operating system to one of a tier."""
        message = f"tier {self.name!r} cannot {verb} in {self.path}: {exc}"
        if exc.errno in NO_SPACE:
            return TierNoSpaceError(message, needed_bytes=needed_bytes)
        if exc.errno in (errno.EROFS, errno.EACCES, errno.EPERM) and not self.read_only:
            message += "; a store that is there can be opened with read_only=True"
        return TierUnavailableError(message)

    def _mend(self, exc: BaseException, verb: str, key: ChunkKey | None) -> None:
        """What is left to do when a call ends with an exception, which may come from anywhere at any instruction."""
        release_owned(self._commit.lock, self._segments.lock, self._journal.lock)
        self._directory.release()
        self._reserved.pop(threading.get_ident(), None)
        if isinstance(exc, KVLoomError):
            return
        if isinstance(exc, OSError) and exc.errno is not None:  # without one it is not from the operating system
            if exc.errno not in (*NO_SPACE, *TOO_MANY_FILES):
                self._journal.suspect()  # the device may have gone and come back
                self._segments.abandon()
                self._segments.close_readers()
            raise self._error(verb, exc) from exc
        if key is not None:
            self._journal.touch([key])  # the caller cannot know what became of it


class _Call:
    """A call of the tier: if it ends with an exception, `mend` is called with that.

    Parameters
    ----------
    verb : for messages.
    key : of the chunk that is written or deleted.
    """

    __slots__ = ("_key", "_mend", "_verb")

    def __init__(
        self, mend: Callable[[BaseException, str, ChunkKey | None], None], verb: str, key: ChunkKey | None = None
    ) -> None:
        self._mend, self._verb, self._key = mend, verb, key

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if exc is not None:
            self._mend(exc, self._verb, self._key)
