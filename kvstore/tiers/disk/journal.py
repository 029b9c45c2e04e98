"""The journal of a store: every process appends what it did, and reads what the others did.

Appending needs the lock of the directory, reading does not. Nothing in a journal is ever written again; one that holds
mostly what is no more is rewritten aside and renamed into place. Who still has the old one open sees that it has no
name any more, and reads the new one from its beginning.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TypeAlias

from ....core import ChunkKey, Entry
from .directory import Directory
from .files import Descriptor, Files, read_fully, write_fully
from .index import Index, Place
from .records import SLOT_BYTES, Op, Records, read_header

Change: TypeAlias = tuple[Op, ChunkKey, Place | None]

_SLACK_RECORDS = 16384  # that a journal may have beyond two for each chunk
_SET_ASIDE_BYTES = 1 << 20
_SET_ASIDE_LEFT_BYTES = 1 << 16  # 512 records, so that a full disk still takes deletions
_WRITE_BYTES = 1 << 20


class Journal:
    """What is in the store, as far as this process has read.

    Attributes
    ----------
    index : to be read under `exclusive` or by `find` and `entries`.
    """

    def __init__(self, files: Files, directory: Directory) -> None:
        self.index = Index()
        self._files = files
        self._directory = directory
        self._path = directory.path / "journal"
        self._lock = threading.RLock()  # of everything below; taken after the lock of the directory
        self._records = Records(0)
        self._file: Descriptor | None = None
        self._end = 0  # of the last valid record
        self._seen_bytes = 0  # length of the file when it was read last
        self._set_aside_bytes = 0
        self._slack_records = _SLACK_RECORDS
        self._touched: dict[ChunkKey, None] = {}
        self._is_suspect = False
        self._is_closed = False
        try:
            with directory.locked(), self._lock:
                try:
                    sound = self._open()
                except FileNotFoundError:
                    sound = False
                if not sound:
                    self._rewrite()
                self._touched.clear()
        except BaseException:
            self.close()
            raise

    def suspect(self) -> None:
        """Something failed: the next operation opens the journal anew."""
        self._is_suspect = True

    def find(self, key: ChunkKey) -> Place | None:
        """Where a chunk lies now, by what all processes wrote."""
        with self._lock:
            self._refresh()
            return self.index.places.get(key)

    def find_at_once(self, key: ChunkKey) -> Place:
        """As `find`; raises `BlockingIOError` rather than wait for a lock or read what others wrote, and if there is
        no such chunk.
        """
        if not self._lock.acquire(blocking=False):
            raise BlockingIOError
        try:
            place = self.index.places.get(key)
            if place is None or not self._is_current():
                raise BlockingIOError
            return place
        finally:
            self._lock.release()

    def has_changes_at_once(self) -> bool:
        """Whether `changes` may have something to tell, as far as can be said without waiting."""
        if not self._lock.acquire(blocking=False):
            return True
        try:
            return bool(self._touched) or not self._is_current()
        except OSError:
            return True
        finally:
            self._lock.release()

    def in_segment(self, number: int) -> list[tuple[ChunkKey, Place]]:
        """The chunks of a segment."""
        with self._lock:
            self._refresh()
            return [item for item in self.index.places.items() if item[1].segment == number]

    def has_live(self, number: int) -> bool:
        """Whether a segment has any chunk."""
        with self._lock:
            self._refresh()
            return number in self.index.live

    def entries(self) -> list[Entry]:
        with self._lock:
            self._refresh()
            return [Entry(key, place.taken_bytes, place.info) for key, place in self.index.places.items()]

    def changes(self) -> list[Entry | ChunkKey]:
        """The state of each chunk that others touched since the last call, in the order in which they did so last."""
        with self._lock:
            self._refresh()
            touched, self._touched = self._touched, {}
            places = self.index.places
            return [Entry(key, places[key].taken_bytes, places[key].info) if key in places else key for key in touched]

    @contextmanager
    def exclusive(self) -> Iterator[Index]:
        """Within, the index is that of all processes, and stays so but for `append`."""
        with self._directory.locked(), self._lock:
            self._refresh()
            yield self.index

    def append(self, changes: Sequence[Change]) -> None:
        """Writes and applies changes; within `exclusive`. All of them or, if `OSError` is raised, none."""
        size = self._files.fstat(self._fd).st_size
        if size // SLOT_BYTES > 2 * len(self.index.places) + self._slack_records:
            self._rewrite()
            size = self._files.fstat(self._fd).st_size
        begin = -(-size // SLOT_BYTES)  # behind whatever a writer that died left there
        slot, written = begin, []
        for op, key, place in changes:
            written.append(self._records.to_bytes(slot, op, key, place))
            slot += len(written[-1]) // SLOT_BYTES
        self._set_aside(slot * SLOT_BYTES)
        try:
            # A torn record is filled up so that it stays invalid: its last bytes are zeros, as a hole would be.
            filler = b"\xff" * (begin * SLOT_BYTES - size)
            write_fully(self._files, self._fd, [memoryview(filler + b"".join(written))], size)
        except BaseException as exc:
            self.suspect()  # names of namespaces may not have been written
            if not isinstance(exc, OSError) or not self._has(changes):
                raise
        for op, key, place in changes:
            if place is None:
                self.index.remove(key)
            elif op == Op.MOVE:
                self.index.move(key, place)
            else:
                self.index.put(key, place)
            self._touched.pop(key, None)
        self._end = self._seen_bytes = slot * SLOT_BYTES

    def touch(self, keys: Sequence[ChunkKey]) -> None:
        """Has `changes` report what this process did without being asked."""
        with self._lock:
            self._touched.update(dict.fromkeys(keys))

    def sync(self) -> None:
        """What was appended until now is durable afterwards."""
        with self._lock:
            file = self._opened
            fd = file.hold()
        try:
            self._files.fdatasync(fd)
        finally:
            file.release()

    def check(self) -> list[str]:
        """Whether the journal says what this process believes; in words, empty if all is well."""
        with self.exclusive() as believed:
            index = self._load(self._fd)[0]
            problems = [f"chunk {key.hex()} lies elsewhere than believed" for key in believed.differences(index)]
            if list(believed.places) != list(index.places):
                problems.append("chunks are not in the order in which they were written")
            if (believed.used_bytes, believed.live) != (index.used_bytes, index.live):
                problems.append(f"{believed.used_bytes} bytes are accounted, the journal says {index.used_bytes}")
            return problems

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            if self._file is not None:
                self._file.retire()
                self._file = None

    @property
    def _opened(self) -> Descriptor:
        if self._file is None:
            raise FileNotFoundError(f"{self._path} is closed")
        return self._file

    @property
    def _fd(self) -> int:
        """For use under the lock, under which nobody retires it."""
        with self._opened as fd:
            return fd

    def _is_current(self) -> bool:
        if self._is_suspect or self._file is None:
            return False
        stat = self._files.fstat(self._fd)
        return stat.st_nlink > 0 and stat.st_size == self._seen_bytes

    def _refresh(self) -> None:
        if self._is_suspect and not self._is_closed:
            self._open()
        fd = self._fd
        stat = self._files.fstat(fd)
        if not stat.st_nlink or stat.st_size < self._seen_bytes:
            self._open()
        elif stat.st_size > self._seen_bytes:
            data = memoryview(bytearray(stat.st_size - self._end))
            data = data[: read_fully(self._files.preadv, fd, data, self._end)]
            begin = self._end
            for reached, key in self._records.read(data, begin // SLOT_BYTES, self.index):
                self._end = begin + reached
                if key is not None:
                    self._touched.pop(key, None)
                    self._touched[key] = None
            self._seen_bytes = begin + len(data)

    def _open(self) -> bool:
        """Opens the journal that has the name now and reads all of it; whether its header is sound."""
        fd = self._files.open(self._path, os.O_RDWR)
        try:
            index, records, self._end, self._seen_bytes, sound = self._load(fd)
        except BaseException:
            self._files.close(fd)
            raise
        self._touched.update(dict.fromkeys(self.index.differences(index)))
        self._adopt(fd, records)
        self.index = index
        return sound

    def _adopt(self, fd: int, records: Records) -> None:
        if self._file is not None:
            self._file.retire()
        self._file = Descriptor(self._files, fd)
        self._records = records
        self._set_aside_bytes = 0
        self._is_suspect = False

    def _load(self, fd: int) -> tuple[Index, Records, int, int, bool]:
        data = memoryview(bytearray(self._files.fstat(fd).st_size))
        data = data[: read_fully(self._files.preadv, fd, data, 0)]
        generation, next_segment, sound = read_header(data)
        index, records, end = Index(), Records(generation), SLOT_BYTES
        index.last_segment = next_segment - 1
        for reached, _ in records.read(data[SLOT_BYTES:], 1, index):
            end = SLOT_BYTES + reached
        return index, records, end, len(data), sound

    def _rewrite(self) -> None:
        """The chunks that are there in a journal of their own; if that fails, the old one stays for the time being."""
        new = self._path.with_name("journal.new")
        records = Records(self._records.generation + 1)
        slot, written = 1, [records.header(self.index.last_segment + 1)]
        for key, place in self.index.places.items():
            written.append(records.to_bytes(slot, Op.PUT, key, place))
            slot += len(written[-1]) // SLOT_BYTES
        data = memoryview(b"".join(written))
        fd = None
        try:
            fd = self._files.open(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            write_fully(self._files, fd, [data[i : i + _WRITE_BYTES] for i in range(0, len(data), _WRITE_BYTES)], 0)
            self._files.fdatasync(fd)  # in every class of durability: what is lost here is all there is
            self._files.rename(new, self._path)
        except OSError:
            if fd is not None:
                self._files.close(fd)
            with suppress(OSError):
                self._files.unlink(new)
            self._slack_records *= 2  # tried again later, and not at every append
            if self._file is None:
                raise
            return
        self._adopt(fd, records)
        self._end = self._seen_bytes = len(data)
        self._slack_records = _SLACK_RECORDS
        try:
            self._files.sync_folder(self._directory.path)
        except OSError:
            self.suspect()
            raise

    def _set_aside(self, end: int) -> None:
        if end + _SET_ASIDE_LEFT_BYTES > self._set_aside_bytes:
            with suppress(OSError):  # a precaution; without it, a disk that is full may refuse deletions
                self._files.allocate(self._fd, end, _SET_ASIDE_BYTES)
            self._set_aside_bytes = end + _SET_ASIDE_BYTES

    def _has(self, changes: Sequence[Change]) -> bool:
        """Whether the journal holds these changes although writing them failed."""
        try:
            self._open()
        except OSError:
            return False
        places = self.index.places
        return all((places[key].at if key in places else None) == (place and place.at) for _, key, place in changes)
