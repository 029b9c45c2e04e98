"""A tier in the memory of this process; which memory, and how chunks lie there, is up to `Heap` or `Slab`."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection
from typing import Generic, Protocol, TypeVar

from ...core import NOTHING, ChunkInfo, ChunkKey, EncodedChunk, Entry
from ...errors import TierFullError, TierUnavailableError
from ..guard.locks import LockGuard


class MemoryChunk(Protocol):
    """A chunk in some memory. `released`: its bytes are no longer its own, and it counts as absent."""

    @property
    def nbytes(self) -> int: ...
    @property
    def released(self) -> bool: ...


C = TypeVar("C", bound=MemoryChunk)


class Memory(Protocol[C]):
    """Keeps chunks without keys. Every method may be called from any thread.

    Attributes
    ----------
    limit_bytes : what all chunks of the tier may take together; None if `hold` itself refuses what does not fit.
    """

    @property
    def limit_bytes(self) -> int | None: ...
    def hold(self, blob: EncodedChunk, replaced: C | None, /) -> C:
        """Keeps a chunk; may release `replaced`, also if it then fails with anything but `TierFullError`."""
        ...

    def keep(self) -> None:
        """The tier has the chunk that this thread was given by `hold`."""
        ...

    def abandon(self) -> bool:
        """The tier may have that chunk or not: `reconcile` will tell; False if there is none."""
        ...

    def reconcile(self, chunks: Collection[C], /) -> None:
        """The tier holds these chunks, and no others."""
        ...

    def read(self, chunk: C, /) -> EncodedChunk | None: ...
    def used_bytes(self, held_bytes: int, /) -> int:
        """What is taken, if the chunks of the tier take `held_bytes`."""
        ...

    def release(self, chunk: C, /) -> None: ...
    def check(self, chunks: Collection[C], /) -> list[str]: ...
    def close(self) -> None: ...


class MemoryTier(Generic[C]):
    """Chunks by key, each kept by `memory`. Its lock guards the table and is never held during a copy.

    An exception at any point of a method leaves the table as it was, or as it was to be, or without the chunk that was
    to be replaced. What follows from the table is made anew then.
    """

    def __init__(self, name: str, capacity_bytes: int | None, memory: Memory[C]) -> None:
        self.name = name
        self.capacity_bytes = capacity_bytes
        self._memory = memory
        self._lock = threading.RLock()  # of changes to the table; a look-up is one step of the interpreter
        self._guard = LockGuard(self._lock)
        self._table: OrderedDict[ChunkKey, tuple[C, ChunkInfo]] = OrderedDict()
        self._held_bytes: int | None = 0  # of the table; None while it changes, and if its last change was cut short
        self._is_torn = False  # `memory` may have a chunk that is not in the table
        self._closed = False

    @property
    def used_bytes(self) -> int:
        return self._memory.used_bytes(self._counted_bytes())

    def get(self, key: ChunkKey) -> EncodedChunk | None:
        self._expect_open()
        found = self._table.get(key)
        return None if found is None else self._memory.read(found[0])

    def get_layers(self, key: ChunkKey, start: int, stop: int) -> EncodedChunk | None:
        blob = self.get(key)
        return None if blob is None else blob.layers(start, stop)

    def put(self, key: ChunkKey, blob: EncodedChunk, info: ChunkInfo = NOTHING) -> int:
        self._expect_open()
        if self._is_torn or self._held_bytes is None:
            self._counted_bytes()
        replaced = self._find(key)
        if blob.leased:  # it would be copied in vain
            self._expect_room(blob.nbytes, replaced)
        with self._guard:
            try:
                chunk = self._memory.hold(blob, replaced)
                with self._lock:
                    self._expect_open()
                    self._expect_room(chunk.nbytes, self._find(key))
                    self._change(key, (chunk, info))
                self._memory.keep()
            except BaseException:
                if self._memory.abandon():
                    self._is_torn = True
                raise
        return chunk.nbytes

    def delete(self, key: ChunkKey) -> bool:
        with self._guard, self._lock:
            self._expect_open()
            was_there = self._find(key) is not None
            self._change(key, None)
        return was_there

    def __contains__(self, key: object) -> bool:
        return self._find(key) is not None

    def entries(self) -> list[Entry]:
        with self._guard, self._lock:
            return [Entry(key, chunk.nbytes, info) for key, (chunk, info) in self._table.items() if not chunk.released]

    def check(self) -> list[str]:
        """What is inconsistent, in words; empty if all is well. For a moment when no other thread writes."""
        with self._guard, self._lock:
            chunks = [chunk for chunk, _ in self._table.values()]
            held_bytes, found_bytes = self._counted_bytes(), sum(chunk.nbytes for chunk in chunks)
            problems = self._memory.check([chunk for chunk in chunks if not chunk.released])
        if held_bytes != found_bytes:
            problems.append(f"chunks take {found_bytes} bytes, {held_bytes} are accounted")
        return [f"tier {self.name!r}: {problem}" for problem in problems]

    def close(self) -> None:
        """Gives up all chunks; every later call raises `TierUnavailableError`. What was read stays valid."""
        self._closed = True
        with self._guard, self._lock:
            self._held_bytes = None
            self._table.clear()
        self._memory.close()

    def _find(self, key: object) -> C | None:
        found = self._table.get(key)  # type: ignore[call-overload]  # a key of another kind is not there
        return None if found is None or found[0].released else found[0]

    def _change(self, key: ChunkKey, entry: tuple[C, ChunkInfo] | None) -> None:
        """Puts an entry into the table, last, or removes the one that is there; under the lock."""
        held_bytes, old = self._counted_bytes(), self._table.get(key)
        self._held_bytes = None
        if entry is not None:
            self._table[key] = entry
            held_bytes += entry[0].nbytes
        elif old is not None:
            del self._table[key]
        if old is not None:
            if entry is not None:
                self._table.move_to_end(key)
            held_bytes -= old[0].nbytes
            self._memory.release(old[0])
        self._held_bytes = held_bytes

    def _counted_bytes(self) -> int:
        held_bytes = self._held_bytes
        if held_bytes is not None and not self._is_torn:
            return held_bytes
        with self._guard, self._lock:
            if self._held_bytes is None or self._is_torn:
                self._held_bytes, self._is_torn = None, False
                chunks = [chunk for chunk, _ in self._table.values()]
                self._memory.reconcile(chunks)
                self._held_bytes = sum(chunk.nbytes for chunk in chunks)
            return self._held_bytes

    def _expect_room(self, nbytes: int, replaced: C | None) -> None:
        limit_bytes = self._memory.limit_bytes
        if limit_bytes is None:
            return
        held_bytes = self._counted_bytes()
        if held_bytes - (0 if replaced is None else replaced.nbytes) + nbytes > limit_bytes:
            raise TierFullError(
                f"tier {self.name!r}: {nbytes} bytes do not fit, {held_bytes} of {limit_bytes} are used",
                needed_bytes=nbytes,
            )

    def _expect_open(self) -> None:
        if self._closed:
            raise TierUnavailableError(f"tier {self.name!r} is closed")
