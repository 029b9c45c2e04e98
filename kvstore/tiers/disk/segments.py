"""The payload of a store: containers one behind the other in files that only grow; dead parts are punched out.

Who may write a range `[offset, offset + taken)` of a segment, or give it back:

    reserved            the thread that reserved it, in the one process that appends to the segment
    in the journal      nobody; all processes read it
    no longer in it     the process that removed it from the journal; it punches the range
    never got into it   the thread that reserved it; after a kill, the process that opens the store next
    a whole segment     the process that appends to it, which holds its lock; then any process that finds no chunk in it

Offsets of a segment and numbers of segments are never used again, so punching a range that has left the journal, or
unlinking a segment that no process appends to and that has no chunk, is right at any later time.

A file is closed, and unlocked, when nothing refers to it any more: no thread that reads or writes, and no table here.
"""

from __future__ import annotations

import fcntl
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from .files import NO_SPACE, NOT_SUPPORTED, TOO_MANY_FILES, Files, Mode, OpenFile, write_fully
from .index import PayloadLocation, location_of, taken_bytes
from .journal import Journal

_FILE_NAME = re.compile(r"(\d{16})\.seg")
_OPEN_FILES = 64
_WRITE_BEHIND_BYTES = 4 << 20
_UNFREED_LOCATIONS = 1024  # that are tried again; the rest is found when the store is opened next


class Segment:
    """One that this process appends to. Its file is locked for as long as it is open.

    Attributes
    ----------
    end : where the next container goes.
    begun : up to where the device was asked to write.
    writes : how many containers were written.
    """

    def __init__(self, number: int, file: OpenFile) -> None:
        self.number = number
        self.file = file
        self.end = self.begun = self.writes = 0


class Segments:
    """The segment files below a folder. Every method may be called from any thread.

    Attributes
    ----------
    lock : of what this process appends to; taken before the lock of the directory. Re-entrant, so that what an
        exception leaves held can be released.
    """

    def __init__(self, files: Files, folder: Path, segment_bytes: int, *, syncs: bool) -> None:
        self.segment_bytes = segment_bytes
        self.can_punch = True
        self.lock = threading.RLock()
        self._syncs = syncs
        self._files = files
        self._folder = folder
        self._current: Segment | None = None
        self._unsynced: dict[int, Segment] = {}
        self._created = self._durable_names = 0  # how many files were made, and how many of their names are durable
        self._unfreed: list[PayloadLocation] = []
        self._readers: OrderedDict[int, OpenFile] = OrderedDict()  # each use of it is one step of the interpreter

    def path(self, number: int) -> Path:
        return self._folder / f"{number:016d}.seg"

    def numbers(self) -> list[int]:
        found = map(_FILE_NAME.fullmatch, self._files.listdir(self._folder))
        return sorted(int(match[1]) for match in found if match)

    def reserve(self, nbytes: int, journal: Journal) -> tuple[Segment, int]:
        """Space for a container of its own: the segment, and the offset there. `journal` numbers a new segment."""
        taken = taken_bytes(nbytes)
        with self.lock:
            segment = self._current
            if segment is None or (segment.end and segment.end + taken > self.segment_bytes):
                segment = self._current = self._create(journal)
            offset = segment.end
            segment.end += taken
        return segment, offset

    def write(self, segment: Segment, offset: int, buffers: Iterable[memoryview]) -> None:
        """Writes a container into the space that was reserved for it."""
        try:
            write_fully(self._files, segment.file, buffers, offset)
        except OSError as exc:
            if exc.errno not in NO_SPACE:
                self._seal(segment)  # a new file, found by its path, may do better
            raise
        begin = None
        with self.lock:
            segment.writes += 1
            if self._syncs:
                self._unsynced[segment.number] = segment
            if self._syncs and segment.end - segment.begun >= _WRITE_BEHIND_BYTES:
                begin, segment.begun = segment.begun, segment.end
        if begin is not None:  # so that the device writes while the next chunks come
            self._files.will_sync(segment.file, begin, segment.begun - begin)

    def give_back(self, segment: Segment, location: PayloadLocation) -> None:
        """Gives back reserved space that has not got into the journal."""
        try:
            self._punch(segment.file, location.offset, location.taken_bytes)
        except OSError:
            self._retry_later(location)

    def sync(self) -> None:
        """What was written until now is durable afterwards; if that fails, those segments take nothing more."""
        with self.lock:
            unsynced = [(segment, segment.writes) for segment in self._unsynced.values()]
            created = self._created
        try:
            for segment, _ in unsynced:
                self._files.fdatasync(segment.file)
            if created > self._durable_names:
                self._files.sync_folder(self._folder)
                self._durable_names = created
        except OSError:
            for segment, _ in unsynced:
                self._seal(segment)
                self._unsynced.pop(segment.number, None)  # to sync again would succeed, and prove nothing
            raise
        with self.lock:
            for segment, writes in unsynced:
                if segment.writes == writes:
                    self._unsynced.pop(segment.number, None)

    def sync_files(self, numbers: Iterable[int]) -> None:
        """These segments, whoever wrote them, and their names are durable afterwards."""
        for number in numbers:
            self._files.fdatasync(self._open(number, "rb"))
        self._files.sync_folder(self._folder)

    def opened(self, number: int) -> OpenFile:
        """A segment to read from; raises `FileNotFoundError` if it is gone."""
        file = self._readers.get(number)
        if file is None:
            file = self._readers[number] = self._open(number, "rb")
        with suppress(KeyError):  # another thread has closed it
            self._readers.move_to_end(number)
            if len(self._readers) > _OPEN_FILES:
                self._readers.popitem(last=False)
        return file

    def opened_at_once(self, number: int) -> OpenFile:
        """As `opened`; raises `BlockingIOError` rather than open a file."""
        file = self._readers.get(number)
        if file is None:
            raise BlockingIOError
        with suppress(KeyError):
            self._readers.move_to_end(number)
        return file

    def free(self, locations: Iterable[PayloadLocation], journal: Journal) -> None:
        """Gives back the space of chunks that have left the journal; what cannot be given back now is tried again."""
        with self.lock:
            retried, self._unfreed = self._unfreed, []
        for location in (*retried, *locations):
            try:
                if journal.has_live(location.segment) or not self.discard(location.segment, journal):
                    file = self._open(location.segment, "r+b")
                    self._punch(file, location.offset, location.taken_bytes)
            except FileNotFoundError:
                continue
            except OSError:
                self._retry_later(location)

    def discard(self, number: int, journal: Journal) -> bool:
        """Unlinks a segment if it has no chunk and no process appends to it; whether it is gone."""
        self._readers.pop(number, None)
        file = self.claim(number)
        if file is None or journal.has_live(number):  # asked last: who appended may have done so until it was claimed
            return False
        self._files.unlink(self.path(number))
        return True

    def claim(self, number: int) -> OpenFile | None:
        """The segment opened and, for as long as it is open, locked; None if a process appends to it."""
        file = self._open(number, "r+b")
        try:
            self._files.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        return file

    def sweep(self, journal: Journal) -> None:
        """Unlinks what writers have left without a chunk; within `Journal.exclusive`, where segments are made."""
        for number in self.numbers():
            if not journal.has_live(number):
                with suppress(FileNotFoundError):
                    self.discard(number, journal)

    def punch_gaps(self, number: int, journal: Journal) -> None:
        """Punches everything but the chunks of the segment, unless a process appends to it; within `exclusive`."""
        file = self.claim(number)
        if file is None:
            return
        stat, end = self._files.fstat(file), 0
        # a file system may count some blocks of its own
        if stat.st_blocks * 512 <= journal.index.live_bytes[number] + (1 << 16):
            return
        for location in sorted(location_of(row) for _, row in journal.in_segment(number)):
            if location.offset > end:
                self._punch(file, end, location.offset - end)
            end = location.offset + location.taken_bytes
        if stat.st_size > end:
            self._punch(file, end, stat.st_size - end)

    def close_readers(self) -> None:
        self._readers.clear()

    def close(self) -> None:
        with self.lock:
            self._current = None
            self._unsynced.clear()
        self.close_readers()

    def abandon(self) -> None:
        """The next container goes into a new segment."""
        self._current = None

    def _create(self, journal: Journal) -> Segment:
        """A new segment; under the lock."""
        with journal.exclusive() as index:
            self.sweep(journal)
            # the clock: no number comes again, even if the journal and the folder have lost it
            number = max(index.last_segment + 1, time.time_ns() // 1000)
            file = self._open(number, "x+b")
            self._files.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._created += 1
        return Segment(number, file)

    def _seal(self, segment: Segment) -> None:
        with self.lock:
            if self._current is segment:
                self._current = None

    def _open(self, number: int, mode: Mode) -> OpenFile:
        try:
            return self._files.open(self.path(number), mode)
        except OSError as exc:
            if exc.errno not in TOO_MANY_FILES:
                raise
        self.close_readers()
        return self._files.open(self.path(number), mode)

    def _retry_later(self, location: PayloadLocation) -> None:
        with self.lock:
            self._unfreed = [*self._unfreed[-_UNFREED_LOCATIONS:], location]

    def _punch(self, file: OpenFile, offset: int, nbytes: int) -> None:
        if not self.can_punch:
            return
        try:
            self._files.punch(file, offset, nbytes)
        except OSError as exc:
            if exc.errno not in NOT_SUPPORTED:
                raise
            self.can_punch = False
