"""Reading chunks out of segments, each byte verified; what is in the page cache also without waiting."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TypeAlias

from ....core import ChunkKey, EncodedChunk
from ....errors import ChunkCorruptError
from ...encoding.buffer_pool import BufferPool
from ...format import Header, ReadAt, read_container, read_header, read_layers
from .files import NOT_SUPPORTED, Files, read_exactly
from .index import PayloadLocation
from .journal import Journal
from .segments import Segments

Read: TypeAlias = Callable[[ReadAt, PayloadLocation], EncodedChunk]

_CACHED_HEADERS = 256


class Containers:
    """How a chunk is read from where it lies, into memory that was used before. Every method from any thread."""

    def __init__(self) -> None:
        self._buffers = BufferPool()
        self._headers: OrderedDict[PayloadLocation, Header] = OrderedDict()  # each use is one step of the interpreter

    def whole(self, key: ChunkKey) -> Read:
        def read(read_at: ReadAt, location: PayloadLocation) -> EncodedChunk:
            return read_container(read_at, location.nbytes, key, self._buffers.empty)

        return read

    def layers(self, key: ChunkKey, start: int, stop: int) -> Read:
        def read(read_at: ReadAt, location: PayloadLocation) -> EncodedChunk:
            return read_layers(read_at, self._header(read_at, key, location), start, stop, self._buffers.empty)

        return read

    def _header(self, read_at: ReadAt, key: ChunkKey, location: PayloadLocation) -> Header:
        """A location names one container for ever, so a cached header is stale only if the device has changed it."""
        header = self._headers.get(location)
        if header is None or not header.matches(read_at):
            header = read_header(read_at, location.nbytes, key)
        self._headers[location] = header
        with suppress(KeyError):  # other threads have removed it
            self._headers.move_to_end(location)
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
            location = self._journal.find_at_once(key)
            file = self._segments.opened_at_once(location.segment)
            return read(partial(read_exactly, self._files.preadv_cached, file, location.offset), location)
        except BlockingIOError:
            raise
        except (OSError, ChunkCorruptError) as exc:
            if isinstance(exc, OSError) and exc.errno in NOT_SUPPORTED:
                self._is_supported = False
            raise BlockingIOError from exc
