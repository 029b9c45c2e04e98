"""The journal of a store: every process appends what it did, and reads what the others did.

Appending needs the lock of the directory, reading does not. Nothing in a journal is ever written again; one that holds
mostly what is no more is rewritten aside and renamed into place. A process that still has the old one open sees that it
has no name any more, and reads the new one from its beginning.

The index in memory follows the file. Whatever cuts a change of the index short, an error or an exception from anywhere,
leaves `_is_behind` set, and the next operation reads the file anew.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Self

from ....core import ChunkKey, Entry
from ...guard.locks import release_owned
from .directory import Directory
from .files import Files, Mode, OpenFile, read_fully, write_fully
from .index import Change, Index, Op, PayloadLocation, Row, info_of, location_of, taken_bytes
from .records import SLOT_BYTES, Records, read_header

_SET_ASIDE_BYTES = 1 << 20
_SET_ASIDE_LEFT_BYTES = 1 << 16  # 512 records, so that a full disk still takes deletions
_WRITE_BYTES = 1 << 20


class Journal:
    """What is in the store, as far as this process has read.

    Attributes
    ----------
    index : to be read within `exclusive`, or by the methods that look things up.
    is_closed : it was closed.
    lock : of all that changes here; taken after the lock of the directory. Re-entrant, so that what an exception leaves
        held can be released.
    """

    def __init__(self, files: Files, directory: Directory, *, read_only: bool = False) -> None:
        self.index = Index()
        self.lock = threading.RLock()
        self._files = files
        self._directory = directory
        self._path = directory.path / "journal"
        self._mode: Mode = "rb" if read_only else "r+b"
        self._hidden: set[PayloadLocation] = set()
        self._records = Records(0)
        self._file: OpenFile | None = None
        self._end = 0  # of the last valid record
        self._seen_bytes = 0  # length of the file when it was read last
        self._synced_bytes = 0
        self._set_aside_bytes = 0
        self._slack_records = files.slack_records
        self._touched: dict[ChunkKey, None] = {}
        self._is_behind = False  # the index changes, or its change was cut short
        self._is_suspect = False  # something failed, so that the file may be another by now
        self.is_closed = False
        if read_only:
            self._open()
        else:
            with directory.locked():
                try:
                    sound = self._open()
                except FileNotFoundError:
                    sound = False
                if not sound:
                    self._rewrite()
        self._touched.clear()

    def suspect(self) -> None:
        """Something failed: the next operation opens the journal anew."""
        self._is_suspect = True

    def find(self, key: ChunkKey) -> PayloadLocation | None:
        """Where a chunk lies now, by what all processes wrote."""
        location = self._find_current(key)
        if location is None:
            with self.lock:
                self.refresh()
                location = self.index.get(key)
        return location

    def find_at_once(self, key: ChunkKey) -> PayloadLocation:
        """As `find`; raises `BlockingIOError` rather than wait for a lock or read what others wrote, and if there is
        no such chunk.
        """
        location = self._find_current(key)
        if location is None:
            raise BlockingIOError
        return location

    def has_changes_at_once(self) -> bool:
        """Whether `changes` may have something to report, as far as can be said without waiting."""
        try:
            return bool(self._touched) or not self._is_current()
        except OSError:
            return True

    def in_segment(self, number: int) -> list[tuple[ChunkKey, Row]]:
        """The chunks of a segment."""
        with self.lock:
            self.refresh()
            return [item for item in self.index.rows.items() if item[1][0] == number]

    def has_live(self, number: int) -> bool:
        """Whether a segment has any chunk."""
        with self.lock:
            self.refresh()
            return number in self.index.live_bytes

    def entries(self) -> list[Entry]:
        with self.lock:
            self.refresh()
            return [_entry(key, row) for key, row in self.index.rows.items()]

    def changes(self) -> list[Entry | ChunkKey]:
        """The state of each chunk that others touched since the last call, in the order in which they did so last."""
        with self.lock:
            self.refresh()
            rows = self.index.rows
            states = [_entry(key, rows[key]) if key in rows else key for key in self._touched]
            self._touched = {}
            return states

    def refresh(self) -> None:
        """Reads what others wrote, under the lock."""
        if (self._is_behind or self._is_suspect) and not self.is_closed:
            self._open()
        file = self._opened
        stat = self._files.fstat(file)
        if not stat.st_nlink or stat.st_size < self._seen_bytes:
            self._open()
        elif stat.st_size > self._seen_bytes:
            data = memoryview(bytearray(stat.st_size - self._end))
            data = data[: read_fully(self._files.preadv, file, data, self._end)]
            begin = self._end
            self._is_behind = True
            for end, op, key, row in self._records.read(data, begin // SLOT_BYTES):
                if op != Op.NAMESPACE:
                    self._touched.pop(key, None)
                    self._touched[key] = None  # first: it must be reported, whatever becomes of the index
                    self.index.apply(Change(Op(op), key, row))
                self._end = begin + end
            self._seen_bytes = begin + len(data)
            self._is_behind = False

    def exclusive(self) -> Self:
        """Within, the index is that of all processes, and stays so but for `append`."""
        return self

    def __enter__(self) -> Index:
        self._directory.__enter__()
        try:
            self.lock.acquire()
            self.refresh()
        except BaseException:
            self.__exit__()
            raise
        return self.index

    def __exit__(self, *_: object) -> None:
        try:
            release_owned(self.lock)
        finally:
            self._directory.release()

    def append(self, changes: Sequence[Change]) -> None:
        """Writes and applies changes; within `exclusive`. All of them or, if `OSError` is raised, none."""
        size = self._files.fstat(self._opened).st_size
        if size // SLOT_BYTES > 2 * len(self.index.rows) + self._slack_records:
            self._rewrite()
            size = self._files.fstat(self._opened).st_size
        begin = -(-size // SLOT_BYTES)  # behind whatever a writer that died left there
        slot, written = begin, []
        self._is_behind = True  # from here on: the number of a new namespace may not get written
        for change in changes:
            written.append(self._records.to_bytes(slot, change))
            slot += len(written[-1]) // SLOT_BYTES
        self._set_aside(slot * SLOT_BYTES)
        try:
            # A torn record is filled up so that it stays invalid: its last bytes are zeros, as a hole would be.
            filler = b"\xff" * (begin * SLOT_BYTES - size)
            write_fully(self._files, self._opened, [memoryview(filler + b"".join(written))], size)
        except OSError:
            if not self._has(changes):
                raise
        for change in changes:
            self.index.apply(change)
            self._touched.pop(change.key, None)
        self._end = self._seen_bytes = slot * SLOT_BYTES
        self._is_behind = False

    def touch(self, keys: Sequence[ChunkKey]) -> None:
        """Has `changes` report what this process did without being asked, or without knowing that it did."""
        self._touched.update(dict.fromkeys(keys))

    def sync(self) -> None:
        """What was appended until now is durable afterwards."""
        with self.lock:
            file, end = self._opened, self._end
        if self._synced_bytes != end:
            self._files.fdatasync(file)
            self._synced_bytes = end

    def hide(self, key: ChunkKey, location: PayloadLocation) -> bool:
        """Forgets a chunk that lies there, in this process alone; False if it lies elsewhere by now."""
        with self.lock:
            self.refresh()
            if self.index.get(key) != location:
                return False
            self._hidden.add(location)
            self._is_behind = True
            return True

    def check(self) -> list[str]:
        """Whether the journal says what this process believes; in words, empty if all is well."""
        index = self._load(self._opened)[0]
        believed = self.index
        problems = [f"chunk {key.hex()} lies elsewhere than believed" for key in believed.differences(index)]
        if list(believed.rows) != list(index.rows):
            problems.append("chunks are not in the order in which they were written")
        if (believed.used_bytes, believed.live_bytes) != (index.used_bytes, index.live_bytes):
            problems.append(f"{believed.used_bytes} bytes are accounted, the journal says {index.used_bytes}")
        return problems

    def close(self) -> None:
        self.is_closed = True
        with self.lock:
            self._file = None

    @property
    def _opened(self) -> OpenFile:
        if self._file is None:
            raise FileNotFoundError(f"{self._path} is closed")
        return self._file

    def _find_current(self, key: ChunkKey) -> PayloadLocation | None:
        """Where a chunk lies, if that can be said without a lock; each step is one of the interpreter."""
        location = self.index.get(key)
        return location if location is not None and self._is_current() else None

    def _is_current(self) -> bool:
        file = self._file
        if file is None or self._is_behind or self._is_suspect:
            return False
        stat = self._files.fstat(file)
        return stat.st_nlink > 0 and stat.st_size == self._seen_bytes

    def _open(self) -> bool:
        """Opens the journal that has the name now and reads all of it; whether its header is sound."""
        file = self._files.open(self._path, self._mode)
        index, records, end, seen_bytes, sound = self._load(file)
        self._is_behind, self._is_suspect = True, False
        self._touched.update(dict.fromkeys(self.index.differences(index)))
        self._adopt(file, records, end, seen_bytes)
        self.index = index
        self._is_behind = False
        return sound

    def _adopt(self, file: OpenFile, records: Records, end: int, seen_bytes: int) -> None:
        self._file, self._records, self._end, self._seen_bytes = file, records, end, seen_bytes
        self._set_aside_bytes = self._synced_bytes = 0

    def _load(self, file: OpenFile) -> tuple[Index, Records, int, int, bool]:
        data = memoryview(bytearray(self._files.fstat(file).st_size))
        data = data[: read_fully(self._files.preadv, file, data, 0)]
        generation, next_segment, sound = read_header(data)
        index, records = Index(next_segment - 1), Records(generation)
        end = SLOT_BYTES + index.load(records.read(data[SLOT_BYTES:], 1))
        for key, row in list(index.rows.items()) if self._hidden else ():
            if location_of(row) in self._hidden:
                index.apply(Change(Op.DELETE, key, None))
        return index, records, end, len(data), sound

    def _rewrite(self) -> None:
        """Writes the chunks that are there into a journal of their own; if that fails, the old one stays for now."""
        new = self._path.with_name("journal.new")
        records = Records(self._records.generation + 1)
        slot, written = 1, [records.header(self.index.last_segment + 1)]
        for key, row in self.index.rows.items():
            written.append(records.to_bytes(slot, Change(Op.PUT, key, row)))
            slot += len(written[-1]) // SLOT_BYTES
        data = memoryview(b"".join(written))
        try:
            file = self._files.open(new, "w+b")
            write_fully(self._files, file, [data[i : i + _WRITE_BYTES] for i in range(0, len(data), _WRITE_BYTES)], 0)
            self._files.fdatasync(file)  # in every class of durability: what is lost here is all there is
            self._files.rename(new, self._path)
        except OSError:
            with suppress(OSError):
                self._files.unlink(new)
            self._slack_records *= 2  # tried again later, and not at every append
            if self._file is None:
                raise
            return
        self._is_behind = True
        self._adopt(file, records, len(data), len(data))
        self._is_behind = False
        self._slack_records = self._files.slack_records
        try:
            self._files.sync_folder(self._directory.path)
        except OSError:
            self.suspect()
            raise

    def _set_aside(self, end: int) -> None:
        if end + _SET_ASIDE_LEFT_BYTES > self._set_aside_bytes:
            with suppress(OSError):  # a precaution; without it, a disk that is full may refuse deletions
                self._files.allocate(self._opened, end, _SET_ASIDE_BYTES)
            self._set_aside_bytes = end + _SET_ASIDE_BYTES

    def _has(self, changes: Sequence[Change]) -> bool:
        """Whether the journal holds these changes although writing them failed."""
        try:
            self._open()
        except OSError:
            return False
        return all(self.index.get(key) == (None if row is None else location_of(row)) for _, key, row in changes)


def _entry(key: ChunkKey, row: Row) -> Entry:
    return Entry(key, taken_bytes(row[2]), info_of(row))
