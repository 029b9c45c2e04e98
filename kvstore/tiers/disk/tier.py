"""Chunks in a directory: segments of payload, and a journal that says which chunk lies where.

kvloom.json   format of the directory; its lock orders the writes of all processes to the journal
journal       what happened to chunks (records.py), replayed on opening
segments/     containers of kvstore/format.py one behind the other; each process appends to a file of its own
quarantine/   the newest containers that were found corrupt, for a post-mortem
"""

from __future__ import annotations

import errno
import os
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias

from ....core import NOTHING, ChunkInfo, ChunkKey, EncodedChunk, Entry
from ....errors import ChunkCorruptError, KVLoomError, TierFullError, TierUnavailableError
from ...format import to_buffers
from ...keys import KEY_BYTES
from ...placement.quota import check_namespace
from .commit import GroupCommit, Round
from .containers import CachedReads, Containers, Read
from .directory import Directory
from .files import NO_SPACE, Files, read_exactly
from .index import Index, Place, taken_bytes
from .journal import Journal
from .quarantine import keep_copy
from .records import Op
from .recovery import compact, lost_chunks, overlapping_chunks, recover
from .segments import Segments

Durability: TypeAlias = Literal["cache", "batch", "sync"]

_LARGEST_SEGMENT_BYTES, _SMALLEST_SEGMENT_BYTES = 1 << 30, 1 << 20
_BATCH_BYTES = 256 << 20
_ATTEMPTS = 16


class DiskTier:
    """Segments in a directory that several processes share; every read verifies what it returns.

    A chunk is visible complete or not at all, also after kill -9. What one process puts or deletes, the others see at
    their next call. Opening replays the journal and reads no payload. The space of a chunk that is deleted or replaced
    is given back at once (by punching holes; where the file system cannot, segments that are more than half dead are
    compacted), or in the classes `batch` and `sync` after the next sync, while others go on reading.

    After a power loss nothing that a read returns is wrong: what did not reach the device whole is found by its
    checksums, and is a miss. Which chunks are still there is a matter of the durability of the process that put them:

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
    path : a directory made by this class, an empty one, or one yet to be made, on a local file system.
    capacity_bytes : of the chunks of all processes, in steps of 4 KiB each; None for no limit. Chunks that are being
        written or wait for a sync, the journal (128 bytes for each record) and the quarantine (16 chunks) come on top.
    sync_interval_s : how long `batch` lets a chunk wait.
    segment_bytes : of a file of payload; None for a sixteenth of the capacity, within 1 MiB and 1 GiB.
    files : the operating system, for tests.

    Raises
    ------
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
        self.path = Path(path)
        self._files = Files() if files is None else files
        self._lock = threading.Lock()  # of the two below
        self._reserved: Counter[ChunkKey] = Counter()  # bytes of puts that are on their way
        self._closed = False
        self._pid = os.getpid()
        self._commit = GroupCommit(self._sync, sync_interval_s)
        with self._os_errors("open"):
            self._directory = Directory(self._files, self.path)
            with ExitStack() as undo:
                undo.callback(self._directory.close)
                for folder in ("segments", "quarantine"):
                    self._files.mkdir(self.path / folder)
                self._journal = Journal(self._files, self._directory)
                undo.callback(self._journal.close)
                syncs = durability != "cache"
                self._segments = Segments(self._files, self.path / "segments", segment_bytes, syncs=syncs)
                recover(self._files, self._journal, self._segments)
                undo.pop_all()
        self._containers = Containers()
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
        buffers = to_buffers(key, blob)
        nbytes = sum(map(len, buffers))
        with self._os_errors("write", needed_bytes=taken_bytes(nbytes)):
            self._expect_open()
            self._commit.expect_sound()
            try:
                self._put(key, buffers, nbytes, info)
            except OSError as exc:
                if exc.errno not in NO_SPACE or not self._commit.has_freed:
                    raise
                self._commit.flush()  # gives back what was deleted since the last sync
                self._put(key, buffers, nbytes, info)
        return taken_bytes(nbytes)

    def delete(self, key: ChunkKey) -> bool:
        with self._os_errors("delete"):
            self._expect_open()
            if self._journal.find(key) is None:
                return False
            with self._journal.exclusive() as index:
                old = index.places.get(key)
                if old is None:
                    return False
                self._journal.append([(Op.DELETE, key, None)])
            self._let_go(old)
            return True

    def __contains__(self, key: object) -> bool:
        with self._os_errors("look up"):
            return isinstance(key, bytes) and self._journal.find(ChunkKey(key)) is not None

    def entries(self) -> list[Entry]:
        with self._os_errors("list"):
            return self._journal.entries()

    def changes(self) -> list[Entry | ChunkKey]:
        """The state of each chunk that others touched since the last call, in the order in which they did so last."""
        with self._os_errors("list"):
            return self._journal.changes()

    def flush(self) -> None:
        """Returns when all that was put is durable; at once in the class `cache`, where nothing ever is."""
        with self._os_errors("sync"):
            self._expect_open()
            if self.durability != "cache":
                self._commit.flush()

    def check(self) -> list[str]:
        """What is inconsistent, in words; empty if all is well. For a moment when nothing is put or deleted."""
        with self._os_errors("check"):
            problems = self._journal.check()
            with self._journal.exclusive() as index:
                lost = lost_chunks(self._files, self._segments, index)
                overlapping = overlapping_chunks(index)
        problems += [f"chunk {key.hex()} lies beyond the end of its segment" for key in lost]
        problems += [f"chunk {key.hex()} overlaps another" for key in overlapping]
        return [f"tier {self.name!r}: {problem}" for problem in problems]

    def close(self) -> None:
        """Syncs if need be and lets go of the directory; every later call raises `TierUnavailableError`."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        with self._os_errors("close"):
            try:
                self._commit.close()
                if self.durability != "cache":
                    self._commit.flush()
            finally:
                self._segments.close()
                self._journal.close()
                self._directory.close()

    def _put(self, key: ChunkKey, buffers: list[memoryview], nbytes: int, info: ChunkInfo) -> None:
        taken = taken_bytes(nbytes)
        self._journal.find(key)
        with self._reservation(key, taken), self._segments.written(taken, buffers, self._journal) as (number, offset):
            place = Place(number, offset, nbytes, info)
            with self._journal.exclusive() as index:
                old = index.places.get(key)
                self._expect_room(index, old, taken, 0)  # others may have filled it
                self._journal.append([(Op.PUT, key, place)])
        if self.durability == "cache":
            if old is not None:
                self._release([old])
            return
        opened = self._commit.join((key, place), old, in_background=self.durability == "batch")
        if self.durability == "sync" or opened.nbytes > _BATCH_BYTES:
            self._commit.wait(opened)

    @contextmanager
    def _reservation(self, key: ChunkKey, taken: int) -> Iterator[None]:
        index = self._journal.index
        with self._lock:
            self._expect_room(index, index.places.get(key), taken, self._reserved.total())
            self._reserved[key] += taken
        try:
            yield
        finally:
            with self._lock:
                self._reserved[key] -= taken
                if not self._reserved[key]:
                    del self._reserved[key]

    def _expect_room(self, index: Index, old: Place | None, taken: int, reserved: int) -> None:
        used = index.used_bytes - (0 if old is None else old.taken_bytes) + reserved
        if self.capacity_bytes is not None and used + taken > self.capacity_bytes:
            raise TierFullError(
                f"tier {self.name!r}: {taken} bytes do not fit, {used} of {self.capacity_bytes} are used",
                needed_bytes=taken,
            )

    def _read(self, key: ChunkKey, read: Read) -> EncodedChunk | None:
        with self._os_errors("read"):
            for _ in range(_ATTEMPTS):
                self._expect_open()
                place = self._journal.find(key)
                if place is None:
                    return None
                try:
                    with self._segments.reading(place.segment) as fd:
                        return read(partial(read_exactly, self._files.preadv, fd, place.offset), place)
                except (ChunkCorruptError, FileNotFoundError) as exc:
                    if self._quarantine(key, place):
                        raise ChunkCorruptError(f"tier {self.name!r}, chunk {key.hex()}: {exc}") from exc
            return None  # replaced, each time while it was being read

    def _quarantine(self, key: ChunkKey, place: Place) -> bool:
        """Removes what cannot be read as it was written and keeps a copy; False if the chunk is elsewhere by now.

        Whoever deletes or moves a chunk writes so before touching its bytes. What has gone from the journal since a
        reader looked there is therefore no sign of corruption.
        """
        with self._journal.exclusive() as index:
            found = index.places.get(key)
            if found is None or found.at != place.at:
                return False
            self._journal.append([(Op.DELETE, key, None)])
        with suppress(OSError):  # for a post-mortem only
            keep_copy(self._files, self.path / "quarantine", self._segments, key, place)
        self._let_go(place)
        return True

    def _let_go(self, place: Place) -> None:
        """What lay there has left the journal."""
        if self.durability == "cache":
            self._release([place])
        else:
            self._commit.join(None, place, in_background=True)

    def _release(self, places: list[Place]) -> None:
        self._segments.free(places, self._journal)
        if not self._segments.can_punch:
            for number in {place.segment for place in places}:
                compact(self._files, self._journal, self._segments, number)

    def _sync(self, opened: Round) -> None:
        """Makes a round durable; if that fails, gives up its chunks: whether they will be there nobody can say."""
        try:
            self._segments.sync()
            self._journal.sync()
        except OSError as exc:
            self._journal.touch([key for key, _ in opened.written])
            with self._journal.exclusive() as index:
                lost = [(key, place) for key, place in opened.written if index.places.get(key) == place]
                self._journal.append([(Op.DELETE, key, None) for key, _ in lost])
            opened.freed += [place for _, place in lost]
            self._journal.touch([key for key, _ in lost])
            raise TierUnavailableError(f"tier {self.name!r} cannot sync: {exc}; gave up {len(lost)} chunks") from exc
        finally:
            self._release(opened.freed)

    @property
    def _is_open(self) -> bool:
        return not self._closed and os.getpid() == self._pid

    def _expect_open(self) -> None:
        if self._closed:
            raise TierUnavailableError(f"tier {self.name!r} is closed")
        if os.getpid() != self._pid:
            raise TierUnavailableError(f"tier {self.name!r} was opened before a fork; open it anew in this process")

    @contextmanager
    def _os_errors(self, verb: str, *, needed_bytes: int = 0) -> Iterator[None]:
        """The one place where what the operating system says becomes what a tier says."""
        try:
            yield
        except KVLoomError:
            raise
        except OSError as exc:
            message = f"tier {self.name!r} cannot {verb} in {self.path}: {exc}"
            if exc.errno in NO_SPACE:
                raise TierFullError(message, needed_bytes=needed_bytes) from exc
            if exc.errno not in (errno.EMFILE, errno.ENFILE) and verb != "open":
                self._journal.suspect()  # the device may have gone and come back
                self._segments.abandon()
                self._segments.close_readers()
            raise TierUnavailableError(message) from exc
