"""A tier in the memory of this process; what kind of memory is for `Heap` or `Slab` to know."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from typing import Generic, Protocol, TypeVar

from ...core import NOTHING, ChunkInfo, ChunkKey, EncodedChunk, Entry
from ...errors import TierUnavailableError


class Held(Protocol):
    """A chunk in some memory. `released`: its bytes are no longer counted, or lie under another chunk by now."""

    @property
    def nbytes(self) -> int: ...
    @property
    def released(self) -> bool: ...


H = TypeVar("H", bound=Held)


class Memory(Protocol[H]):
    """Keeps chunks without keys. Every method may be called from any thread."""

    @property
    def used_bytes(self) -> int: ...
    def hold(self, blob: EncodedChunk, instead_of: H | None = None) -> H:
        """Keeps a chunk; may release `instead_of`, also if it then fails with anything but `TierFullError`."""
        ...

    def read(self, held: H, /) -> EncodedChunk | None: ...
    def release(self, held: H, /) -> None: ...
    def check(self, held: Iterable[H]) -> list[str]: ...
    def close(self) -> None: ...


class MemoryTier(Generic[H]):
    """Chunks by key, each held by `memory`. Its lock guards the table and is never held during a copy.

    Parameters
    ----------
    capacity_bytes : as `memory` enforces it; None for no limit.
    """

    def __init__(self, name: str, capacity_bytes: int | None, memory: Memory[H]) -> None:
        self.name = name
        self.capacity_bytes = capacity_bytes
        self._memory = memory
        self._lock = threading.Lock()
        self._chunks: OrderedDict[ChunkKey, tuple[H, ChunkInfo]] = OrderedDict()
        self._closed = False

    @property
    def used_bytes(self) -> int:
        return self._memory.used_bytes

    def get(self, key: ChunkKey) -> EncodedChunk | None:
        self._expect_open()
        found = self._chunks.get(key)
        return None if found is None else self._memory.read(found[0])

    def get_layers(self, key: ChunkKey, start: int, stop: int) -> EncodedChunk | None:
        blob = self.get(key)
        return None if blob is None else blob.layers(start, stop)

    def put(self, key: ChunkKey, blob: EncodedChunk, info: ChunkInfo = NOTHING) -> int:
        self._expect_open()
        old = self._chunks.get(key)
        try:
            held = self._memory.hold(blob, None if old is None else old[0])
        except BaseException:
            with self._lock:
                if old is not None and old[0].released and self._chunks.get(key) is old:
                    del self._chunks[key]
            raise
        with self._lock:
            is_late = self._closed
            replaced = None if is_late else self._chunks.pop(key, None)
            if not is_late:
                self._chunks[key] = held, info
        if replaced is not None:
            self._memory.release(replaced[0])
        if is_late:
            self._memory.release(held)
            self._expect_open()
        return held.nbytes

    def delete(self, key: ChunkKey) -> bool:
        with self._lock:
            self._expect_open()
            found = self._chunks.pop(key, None)
        if found is not None:
            self._memory.release(found[0])
        return found is not None

    def __contains__(self, key: object) -> bool:
        return key in self._chunks

    def entries(self) -> list[Entry]:
        with self._lock:
            return [Entry(key, held.nbytes, info) for key, (held, info) in self._chunks.items()]

    def check(self) -> list[str]:
        """What is inconsistent, in words; empty if all is well. For a moment when no other thread writes."""
        with self._lock:
            return self._memory.check([held for held, _ in self._chunks.values()])

    def close(self) -> None:
        """Lets go of all chunks; every later call raises `TierUnavailableError`. What was read stays valid."""
        with self._lock:
            self._closed = True
            held = [held for held, _ in self._chunks.values()]
            self._chunks.clear()
        for chunk in held:
            self._memory.release(chunk)
        self._memory.close()

    def _expect_open(self) -> None:
        if self._closed:
            raise TierUnavailableError(f"tier {self.name!r} is closed")
