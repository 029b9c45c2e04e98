"""Reading chunks out of segments, each byte verified; what is in the page cache also without waiting."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import TypeAlias

from ....core import ChunkKey, EncodedChunk
from ....errors import ChunkCorruptError
from ...encoding.buffer_pool import BufferPool
from ...format import Header, ReadAt, read_container, read_header, read_layers
from .files import NOT_SUPPORTED, Files, read_exactly
from .index import Place
from .journal import Journal
from .segments import Segments

Read: TypeAlias = Callable[[ReadAt, Place], EncodedChunk]

_CACHED_HEADERS = 256


class Containers:
    """How a chunk is read from its place, into memory that was used before. Every method from any thread."""

    def __init__(self) -> None:
        self._spares = BufferPool()
        self._lock = threading.Lock()
        self._headers: OrderedDict[tuple[int, int], Header] = OrderedDict()

    def whole(self, key: ChunkKey) -> Read:
        def read(read_at: ReadAt, place: Place) -> EncodedChunk:
            return read_container(read_at, place.nbytes, key, self._spares.empty)

        return read

    def layers(self, key: ChunkKey, start: int, stop: int) -> Read:
        def read(read_at: ReadAt, place: Place) -> EncodedChunk:
            return read_layers(read_at, self._header(read_at, key, place), start, stop, self._spares.empty)

        return read

    def _header(self, read_at: ReadAt, key: ChunkKey, place: Place) -> Header:
        """A place holds one container for ever, so a cached header is stale only if the device has changed it."""
        with self._lock:
            header = self._headers.pop(place.at, None)
        if header is None or not header.stands(read_at):
            header = read_header(read_at, place.nbytes, key)
        with self._lock:
            self._headers[place.at] = header
            if len(self._headers) > _CACHED_HEADERS:
                self._headers.popitem(last=False)
        return header


class CachedReads:
    """The chunks of a disk tier that are in the page cache, for callers that cannot be kept waiting.

    Every method raises `BlockingIOError` rather than wait for the device, for a lock that is held during I/O, or for
    other processes, and for whatever else the tier itself must deal with: nothing is counted, changed or quarantined.

    Parameters
    ----------
    is_open : whether the tier may be used now, by this process.
    """

    def __init__(
        self, files: Files, journal: Journal, segments: Segments, containers: Containers, is_open: Callable[[], bool]
    ) -> None:
        self._files = files
        self._journal = journal
        self._segments = segments
        self._containers = containers
        self._is_open = is_open
        self._is_supported = True

    def get(self, key: ChunkKey) -> EncodedChunk:
        return self._read(key, self._containers.whole(key))

    def get_layers(self, key: ChunkKey, start: int, stop: int) -> EncodedChunk:
        return self._read(key, self._containers.layers(key, start, stop))

    def has_changes(self) -> bool:
        return self._journal.has_changes_at_once()

    def _read(self, key: ChunkKey, read: Read) -> EncodedChunk:
        if not self._is_supported or not self._is_open():
            raise BlockingIOError
        try:
            place = self._journal.find_at_once(key)
            with self._segments.reading_at_once(place.segment) as fd:
                return read(partial(read_exactly, self._files.preadv_cached, fd, place.offset), place)
        except BlockingIOError:
            raise
        except (OSError, ChunkCorruptError) as exc:
            if isinstance(exc, OSError) and exc.errno in NOT_SUPPORTED:
                self._is_supported = False
            raise BlockingIOError from exc
