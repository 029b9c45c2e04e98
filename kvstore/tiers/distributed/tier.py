"""A tier over an engine that keeps bytes by name on other machines: Redis, an object store, Mooncake."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

from ....core import NOTHING, ChunkInfo, ChunkKey, EncodedChunk, Entry
from ....errors import ChunkCorruptError, ChunkUnreachableError, TierFullError, TierUnavailableError
from ...format import Container, Header, layer_ranges, read_container, read_header, read_layers
from .byte_store import Arriving, BytesInFlight, ByteStore, Outgoing
from .record import MOST_RECORD_BYTES, read_record, to_record

T = TypeVar("T")

_FIRST_READ_BYTES = 1 << 14  # holds record and header of most chunks
_KEPT_HEADERS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharing:
    """How a tier shares an engine with others.

    Attributes
    ----------
    name : of the tier.
    prefix : of the names of all objects; tiers with different prefixes share nothing.
    capacity_bytes : what this process may know of at most, chunks of others that it has found included; its store then
        evicts by its policy. None leaves that to the engine.
    in_flight_bytes : of chunks that move at a time; a larger one moves alone.
    recheck_s : a chunk that was not there is not asked for again within this time.
    timeout_s : longest time that the engine is waited for.

    Raises
    ------
    ValueError : a number is out of range, or a text is empty.
    """

    name: str
    prefix: str = "kvloom:"
    capacity_bytes: int | None = None
    in_flight_bytes: int = 256 << 20
    recheck_s: float = 0.5
    timeout_s: float = 5.0

    def __post_init__(self) -> None:
        if not self.name or not self.prefix:
            raise ValueError(f"name is {self.name!r}, prefix {self.prefix!r}; expected texts that are not empty")
        if self.capacity_bytes is not None and self.capacity_bytes < 0:
            raise ValueError(f"capacity_bytes is {self.capacity_bytes}; expected 0 or more, or None")
        if self.in_flight_bytes < 1:
            raise ValueError(f"in_flight_bytes is {self.in_flight_bytes}; expected 1 or more")
        if not self.recheck_s >= 0:
            raise ValueError(f"recheck_s is {self.recheck_s}; expected seconds, 0 or more")
        if not 0 < self.timeout_s < threading.TIMEOUT_MAX:
            raise ValueError(f"timeout_s is {self.timeout_s}; expected seconds above 0")


class DistributedTier:
    """Chunks in an engine that other machines use, too: one object a chunk, a record and its container.

    The engine's own client moves the bytes; what comes back is verified. Others may put chunks, and the engine may
    remove some: they are found when they are asked for (`FindsChunks`), not listed. `entries` are those that this
    process has put or found.

    Parameters
    ----------
    store : owned.
    clock : Unix time in seconds; for chunks that expire.
    """

    may_stall = True

    def __init__(self, store: ByteStore, sharing: Sharing, *, clock: Callable[[], float] = time.time) -> None:
        self.name = sharing.name
        self.capacity_bytes = sharing.capacity_bytes
        self.recheck_s = sharing.recheck_s
        self._prefix = sharing.prefix
        self._store = store
        self._clock = clock
        self._in_flight = BytesInFlight(sharing.in_flight_bytes, sharing.timeout_s)
        self._lock = threading.Lock()  # of what follows
        self._known: OrderedDict[ChunkKey, Entry] = OrderedDict()
        self._used_bytes = 0
        self._reserved_bytes = 0  # of chunks that are being put
        self._headers: OrderedDict[ChunkKey, tuple[Header, int]] = OrderedDict()  # and where the container begins
        self._closed = False

    @property
    def used_bytes(self) -> int:
        """Of the chunks that this process has put or found."""
        return self._used_bytes

    @property
    def counts(self) -> Mapping[str, int]:
        return self._store.counts

    def get(self, key: ChunkKey) -> EncodedChunk | None:
        return self._again_if_torn(lambda: self._get(key), key)

    def get_layers(self, key: ChunkKey, start: int, stop: int) -> EncodedChunk | None:
        return self._again_if_torn(lambda: self._get_layers(key, start, stop), key)

    def put(self, key: ChunkKey, blob: EncodedChunk, info: ChunkInfo = NOTHING) -> int:
        self._expect_open()
        container = Container(key, blob)
        outgoing = Outgoing(to_record(key, info, container.nbytes), container)
        nbytes = outgoing.nbytes
        with self._reserved(key, nbytes), self._in_flight.moving(nbytes):
            self._store.put(self._object(key), outgoing, info.expires_at_s)
            with self._lock:
                self._remove(key)
                self._known[key] = Entry(key, nbytes, info)
                self._used_bytes += nbytes
        return nbytes

    def delete(self, key: ChunkKey) -> bool:
        self._expect_open()
        was_there = self._store.delete(self._object(key))
        self._forget(key)
        return was_there

    def __contains__(self, key: object) -> bool:
        if not isinstance(key, bytes) or len(key) != 32 or self._closed:
            return False
        return self._store.find([self._object(ChunkKey(key))], 0)[0] is not None

    def entries(self) -> list[Entry]:
        with self._lock:
            return list(self._known.values())

    def find(self, keys: Sequence[ChunkKey]) -> list[Entry | None]:
        """What the engine holds of each key. What is expired, or damaged at its beginning, counts as absent."""
        self._expect_open()
        found: list[Entry | None] = []
        for key, there in zip(keys, self._store.find([*map(self._object, keys)], MOST_RECORD_BYTES), strict=True):
            entry = None
            if there is not None:
                try:
                    info = NOTHING if there.head is None else read_record(there.head, key, there.nbytes)[0]
                    entry = None if self._is_expired(info) else Entry(key, there.nbytes, info)
                except ChunkCorruptError:
                    pass
            found.append(entry)
        with self._lock:
            for entry in found:
                if entry is not None and entry.key not in self._known:
                    self._known[entry.key] = entry
                    self._used_bytes += entry.nbytes
        return found

    def check(self) -> list[str]:
        """What is inconsistent, in words; empty if all is well. For a moment when no other thread writes."""
        with self._lock:
            known_bytes = sum(entry.nbytes for entry in self._known.values())
            if known_bytes == self._used_bytes and not self._reserved_bytes:
                return []
            accounted = f"{self._used_bytes} accounted, {self._reserved_bytes} reserved"
        return [f"tier {self.name!r}: {known_bytes} bytes are known, {accounted}"]

    def close(self) -> None:
        self._closed = True
        self._store.close()

    def _get(self, key: ChunkKey) -> EncodedChunk | None:
        self._expect_open()
        known = self._known.get(key)
        nbytes = None if known is None else known.nbytes
        reading = self._store.reading(self._object(key), nbytes)
        with self._noting_absence(key), self._in_flight.moving(nbytes or 0), reading as arriving:
            blob, is_expired = (None, False) if arriving is None else self._received(key, arriving)
        if is_expired:
            self.delete(key)
        elif blob is None:
            self._forget(key)
        return blob

    def _received(self, key: ChunkKey, arriving: Arriving) -> tuple[EncodedChunk | None, bool]:
        """The chunk, each piece verified while others are under way; or none, and whether it is expired."""
        data, view = arriving.data, arriving.data.numpy().data
        arriving.until(min(MOST_RECORD_BYTES, len(view)))
        info, begin = read_record(view, key, len(view))
        if self._is_expired(info):
            return None, True

        def arrive(buffer: memoryview, offset: int) -> None:
            """The bytes come to lie where they are looked at."""
            arriving.until(begin + offset + len(buffer))

        blob = read_container(arrive, len(view) - begin, key, lambda _: data[begin:])
        return (replace(blob, leased=True) if self._store.lends else blob), False

    def _get_layers(self, key: ChunkKey, start: int, stop: int) -> EncodedChunk | None:
        self._expect_open()
        with self._noting_absence(key):
            found = self._headers.get(key) or self._read_header(key)
            if found is None:
                self._forget(key)
                return None
            header, begin = found
            ranges = layer_ranges(header, start, stop)
            with self._in_flight.moving(sum(to - at for at, to in ranges)):
                parts = self._store.get_ranges(self._object(key), [(begin + at, begin + to) for at, to in ranges])
        if parts is None:
            self._forget(key)
            return None
        at_offset = {at: part for (at, _), part in zip(ranges, parts, strict=True)}

        def read_at(buffer: memoryview, offset: int) -> None:
            part = at_offset[offset]
            if len(part) != len(buffer):
                raise ChunkCorruptError(f"{len(part)} of {len(buffer)} bytes at {offset}")
            buffer[:] = part

        return read_layers(read_at, header, start, stop)

    def _read_header(self, key: ChunkKey) -> tuple[Header, int] | None:
        """The header of a chunk, kept for further layers, and where its container begins."""
        name = self._object(key)
        (there,) = self._store.find([name], _FIRST_READ_BYTES)
        if there is None:
            return None
        head = there.head
        if head is None:
            parts = self._store.get_ranges(name, [(0, min(there.nbytes, _FIRST_READ_BYTES))])
            if parts is None:
                return None
            head = bytes(parts[0])
        info, begin = read_record(head, key, there.nbytes)
        if self._is_expired(info):
            return None

        def read_at(buffer: memoryview, offset: int) -> None:
            at, to = begin + offset, begin + offset + len(buffer)
            parts = [memoryview(head)[at:to]] if to <= len(head) else self._store.get_ranges(name, [(at, to)])
            if parts is None or len(parts[0]) != len(buffer):
                raise ChunkCorruptError("the chunk has become shorter while it was read")
            buffer[:] = parts[0]

        found = read_header(read_at, there.nbytes - begin, key), begin
        with self._lock:
            self._headers[key] = found
            while len(self._headers) > _KEPT_HEADERS:
                self._headers.popitem(last=False)
        return found

    def _again_if_torn(self, read: Callable[[], T], key: ChunkKey) -> T:
        """A chunk that others replace while it is read is no damaged one: read it once more."""
        try:
            return read()
        except ChunkCorruptError:
            with self._lock:
                self._headers.pop(key, None)
            return read()

    @contextmanager
    def _noting_absence(self, key: ChunkKey) -> Iterator[None]:
        try:
            yield
        except ChunkUnreachableError:
            self._forget(key)
            raise

    @contextmanager
    def _reserved(self, key: ChunkKey, nbytes: int) -> Iterator[None]:
        """Room for a chunk that is being put; raises `TierFullError`."""
        with self._lock:
            old = self._known.get(key)
            held_bytes = self._used_bytes + self._reserved_bytes - (0 if old is None else old.nbytes)
            if self.capacity_bytes is not None and held_bytes + nbytes > self.capacity_bytes:
                raise TierFullError(
                    f"tier {self.name!r}: {nbytes} bytes do not fit, {held_bytes} of {self.capacity_bytes} are used",
                    needed_bytes=nbytes,
                )
            self._reserved_bytes += nbytes
        try:
            yield
        finally:
            with self._lock:
                self._reserved_bytes -= nbytes

    def _object(self, key: ChunkKey) -> str:
        return self._prefix + key.hex()

    def _forget(self, key: ChunkKey) -> None:
        with self._lock:
            self._remove(key)

    def _remove(self, key: ChunkKey) -> None:
        self._headers.pop(key, None)
        entry = self._known.pop(key, None)
        self._used_bytes -= 0 if entry is None else entry.nbytes

    def _is_expired(self, info: ChunkInfo) -> bool:
        return info.expires_at_s is not None and info.expires_at_s <= self._clock()

    def _expect_open(self) -> None:
        if self._closed:
            raise TierUnavailableError(f"tier {self.name!r} is closed")
