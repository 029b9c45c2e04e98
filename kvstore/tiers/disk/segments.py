"""The payload of a store: containers one behind the other in files that only grow; dead parts are punched out.

Who owns and who frees a range `[offset, offset + taken)` of a segment:

    reserved            the thread that reserved it, in the one process that appends to the segment
    in the journal      everybody, for reading
    no longer in it     the process that wrote so; it punches the range
    never got into it   the thread that reserved it; after a kill, who next opens the store
    a whole segment     the process that appends to it, which holds its lock; then whoever finds it without a chunk

Offsets of a segment and numbers of segments are never used again, so punching a range that has left the journal, or
unlinking a segment that nobody appends to and that has no chunk, is right at any later time.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ....core import NOTHING
from .files import NO_SPACE, NOT_SUPPORTED, Descriptor, Files, write_fully
from .index import Place
from .journal import Journal

_FILE_NAME = re.compile(r"(\d{16})\.seg")
_OPEN_FILES = 64
_WRITE_BEHIND_BYTES = 4 << 20
_UNFREED_PLACES = 1024  # that are tried again; the rest is found when the store is opened next


class Segment:
    """One that this process appends to. Its file is locked as long as it is open: until it is full, written and synced.

    Attributes
    ----------
    end : where the next container goes.
    begun : up to where the device was asked to write.
    """

    def __init__(self, number: int, file: Descriptor) -> None:
        self.number = number
        self.file = file
        self.end = self.begun = 0


class Segments:
    """The segment files below a folder. Every method may be called from any thread."""

    def __init__(self, files: Files, folder: Path, segment_bytes: int, *, syncs: bool) -> None:
        self.segment_bytes = segment_bytes
        self.can_punch = True
        self._syncs = syncs
        self._files = files
        self._folder = folder
        self._lock = threading.Lock()  # of everything below; taken before the lock of the directory
        self._current: Segment | None = None
        self._unsynced: dict[int, Segment] = {}
        self._has_new_files = False
        self._unfreed: list[Place] = []
        self._readers_lock = threading.RLock()
        self._readers: OrderedDict[int, Descriptor] = OrderedDict()

    def path(self, number: int) -> Path:
        return self._folder / f"{number:016d}.seg"

    def numbers(self) -> list[int]:
        found = map(_FILE_NAME.fullmatch, self._files.listdir(self._folder))
        return sorted(int(match[1]) for match in found if match)

    @contextmanager
    def written(self, taken: int, buffers: Iterable[memoryview], journal: Journal) -> Iterator[tuple[int, int]]:
        """Writes a container into space of its own: number of the segment and offset.

        If anything fails until the end of the `with`, the space is given back. `journal` numbers a new segment.
        """
        with self._lock:
            segment = self._current
            if segment is None or (segment.end and segment.end + taken > self.segment_bytes):
                segment = self._create(journal)
            offset = segment.end
            segment.end += taken
            fd = segment.file.hold()
        try:
            write_fully(self._files, fd, buffers, offset)
            begin = None
            with self._lock:
                if self._syncs and segment.number not in self._unsynced:
                    segment.file.hold()
                    self._unsynced[segment.number] = segment
                if self._syncs and segment.end - segment.begun >= _WRITE_BEHIND_BYTES:
                    begin, segment.begun = segment.begun, segment.end
            if begin is not None:  # so that the device writes while the next chunks come
                self._files.will_sync(fd, begin, segment.begun - begin)
            yield segment.number, offset
        except BaseException as exc:
            if isinstance(exc, OSError) and exc.errno not in NO_SPACE:
                self._seal(segment)  # a new file, found by its path, may do better
            try:
                self._punch(fd, offset, taken)
            except OSError:
                self._keep_in_mind(Place(segment.number, offset, taken, NOTHING))
            raise
        finally:
            segment.file.release()

    def sync(self) -> None:
        """What was written until now is durable afterwards; if that fails, those segments take nothing more."""
        with self._lock:
            unsynced, self._unsynced = self._unsynced, {}
            has_new_files, self._has_new_files = self._has_new_files, False
        try:
            for segment in unsynced.values():
                with segment.file as fd:
                    self._files.fdatasync(fd)
            if has_new_files:
                self._files.sync_folder(self._folder)
        except OSError:
            self._has_new_files = has_new_files
            for segment in unsynced.values():
                self._seal(segment)
            raise
        finally:
            for segment in unsynced.values():
                segment.file.release()

    def sync_files(self, numbers: Iterable[int]) -> None:
        """These segments, whoever wrote them, and their names are durable afterwards."""
        for number in numbers:
            fd = self._open(self.path(number), os.O_RDONLY)
            try:
                self._files.fdatasync(fd)
            finally:
                self._files.close(fd)
        self._files.sync_folder(self._folder)

    @contextmanager
    def reading(self, number: int) -> Iterator[int]:
        """A descriptor to read from; raises `FileNotFoundError` if the segment is gone."""
        with self._readers_lock:
            file = self._readers.pop(number, None)
            if file is None:
                file = Descriptor(self._files, self._open(self.path(number), os.O_RDONLY))
            self._readers[number] = file
            if len(self._readers) > _OPEN_FILES:
                self._readers.popitem(last=False)[1].retire()
            fd = file.hold()
        try:
            yield fd
        finally:
            file.release()

    @contextmanager
    def reading_at_once(self, number: int) -> Iterator[int]:
        """As `reading`; raises `BlockingIOError` rather than wait for a lock or open a file."""
        if not self._readers_lock.acquire(blocking=False):
            raise BlockingIOError
        try:
            file = self._readers.get(number)
            if file is None:
                raise BlockingIOError
            self._readers.move_to_end(number)
            fd = file.hold()
        finally:
            self._readers_lock.release()
        try:
            yield fd
        finally:
            file.release()

    def free(self, places: Iterable[Place], journal: Journal) -> None:
        """Gives back the space of chunks that have left the journal; what cannot be given back now is kept in mind."""
        with self._lock:
            retried, self._unfreed = self._unfreed, []
        for place in (*retried, *places):
            try:
                if journal.has_live(place.segment) or not self.discard(place.segment, journal):
                    self._punch_place(place)
            except FileNotFoundError:
                continue
            except OSError:
                self._keep_in_mind(place)

    def discard(self, number: int, journal: Journal) -> bool:
        """Unlinks a segment if it has no chunk and nobody appends to it; whether it is gone."""
        with self._readers_lock:
            reader = self._readers.pop(number, None)
        if reader is not None:
            reader.retire()
        with self.claimed(number) as fd:
            if fd is None or journal.has_live(number):  # asked last: who appended may have done so until it was claimed
                return False
            self._files.unlink(self.path(number))
        return True

    @contextmanager
    def claimed(self, number: int) -> Iterator[int | None]:
        """The segment opened and locked, or None if a process appends to it."""
        fd = self._open(self.path(number), os.O_RDWR)
        try:
            try:
                self._files.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
            else:
                yield fd
        finally:
            self._files.close(fd)

    def sweep(self, journal: Journal) -> None:
        """Unlinks what writers have left without a chunk; under `Journal.exclusive`, as a new segment is made there."""
        for number in self.numbers():
            if not journal.has_live(number):
                with suppress(FileNotFoundError):
                    self.discard(number, journal)

    def punch_gaps(self, number: int, places: list[Place]) -> None:
        """Punches everything but these places, the only ones of the segment, unless a process appends to it."""
        with self.claimed(number) as fd:
            if fd is None:
                return
            stat, end = self._files.fstat(fd), 0
            # a file system may count some blocks of its own
            if stat.st_blocks * 512 <= sum(place.taken_bytes for place in places) + (1 << 16):
                return
            for place in sorted(places, key=lambda place: place.offset):
                if place.offset > end:
                    self._punch(fd, end, place.offset - end)
                end = place.offset + place.taken_bytes
            if stat.st_size > end:
                self._punch(fd, end, stat.st_size - end)

    def close_readers(self) -> None:
        with self._readers_lock:
            readers, self._readers = self._readers, OrderedDict()
        for file in readers.values():
            file.retire()

    def close(self) -> None:
        self.abandon()
        with self._lock:
            unsynced, self._unsynced = self._unsynced, {}
        for segment in unsynced.values():
            segment.file.release()
        self.close_readers()

    def abandon(self) -> None:
        """The next container goes into a new segment."""
        with self._lock:
            current = self._current
        if current is not None:
            self._seal(current)

    def _create(self, journal: Journal) -> Segment:
        """A new segment in place of the current one; under the lock."""
        fd = None
        try:
            with journal.exclusive() as index:
                self.sweep(journal)
                # the clock: no number comes again, even if the journal and the folder have lost it
                number = max(index.last_segment + 1, time.time_ns() // 1000)
                fd = self._open(self.path(number), os.O_RDWR | os.O_CREAT | os.O_EXCL)
                self._files.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            if fd is not None:
                self._files.close(fd)
            raise
        segment = Segment(number, Descriptor(self._files, fd))
        if self._current is not None:
            self._current.file.retire()
        self._current = segment
        self._has_new_files = True
        return segment

    def _seal(self, segment: Segment) -> None:
        with self._lock:
            if self._current is not segment:
                return
            self._current = None
        segment.file.retire()

    def _open(self, path: Path, flags: int) -> int:
        try:
            return self._files.open(path, flags)
        except OSError as exc:
            if exc.errno not in (errno.EMFILE, errno.ENFILE):
                raise
        self.close_readers()
        return self._files.open(path, flags)

    def _keep_in_mind(self, place: Place) -> None:
        with self._lock:
            self._unfreed = [*self._unfreed[-_UNFREED_PLACES:], place]

    def _punch_place(self, place: Place) -> None:
        fd = self._open(self.path(place.segment), os.O_RDWR)
        try:
            self._punch(fd, place.offset, place.taken_bytes)
        finally:
            self._files.close(fd)

    def _punch(self, fd: int, offset: int, nbytes: int) -> None:
        if not self.can_punch:
            return
        try:
            self._files.punch(fd, offset, nbytes)
        except OSError as exc:
            if exc.errno not in NOT_SUPPORTED:
                raise
            self.can_punch = False
