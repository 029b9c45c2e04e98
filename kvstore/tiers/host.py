"""Chunks in the memory of this process."""

from __future__ import annotations

import threading
from collections import OrderedDict

from ...core import ChunkInfo, ChunkKey, EncodedChunk, Entry
from ...errors import TierFullError, TierUnavailableError

_NOTHING = ChunkInfo()


class HostTier:
    """Holds references to encoded chunks: `put` and `get` copy nothing.

    Parameters
    ----------
    capacity_bytes : of the chunks' tensors; None for no limit.
    """

    def __init__(self, capacity_bytes: int | None, *, name: str = "host") -> None:
        if capacity_bytes is not None and capacity_bytes < 0:
            raise ValueError(f"capacity_bytes is {capacity_bytes}; expected 0 or more, or None")
        self.name = name
        self.capacity_bytes = capacity_bytes
        self._lock = threading.Lock()
        self._chunks: OrderedDict[ChunkKey, tuple[EncodedChunk, ChunkInfo]] = OrderedDict()
        self._used_bytes = 0
        self._closed = False

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    def get(self, key: ChunkKey) -> EncodedChunk | None:
        self._expect_open()
        found = self._chunks.get(key)
        return None if found is None else found[0]

    def get_layers(self, key: ChunkKey, start: int, stop: int) -> EncodedChunk | None:
        blob = self.get(key)
        return None if blob is None else blob.layers(start, stop)

    def put(self, key: ChunkKey, blob: EncodedChunk, info: ChunkInfo = _NOTHING) -> None:
        with self._lock:
            self._expect_open()
            old = self._chunks.get(key)
            used_bytes = self._used_bytes + blob.nbytes - (0 if old is None else old[0].nbytes)
            if self.capacity_bytes is not None and used_bytes > self.capacity_bytes:
                raise TierFullError(
                    f"tier {self.name!r}: {blob.nbytes} bytes do not fit, "
                    f"{self._used_bytes} of {self.capacity_bytes} are used",
                    needed_bytes=blob.nbytes,
                )
            self._chunks[key] = blob, info
            self._chunks.move_to_end(key)
            self._used_bytes = used_bytes

    def delete(self, key: ChunkKey) -> bool:
        with self._lock:
            self._expect_open()
            found = self._chunks.pop(key, None)
            if found is not None:
                self._used_bytes -= found[0].nbytes
            return found is not None

    def __contains__(self, key: object) -> bool:
        return key in self._chunks

    def entries(self) -> list[Entry]:
        with self._lock:
            return [Entry(key, blob.nbytes, info) for key, (blob, info) in self._chunks.items()]

    def check(self) -> list[str]:
        """What is inconsistent, in words; empty if all is well."""
        with self._lock:
            held_bytes = sum(blob.nbytes for blob, _ in self._chunks.values())
            if held_bytes != self._used_bytes:
                return [f"tier {self.name!r}: chunks take {held_bytes} bytes, {self._used_bytes} are accounted"]
            return []

    def close(self) -> None:
        """Lets go of all chunks; every later call raises `TierUnavailableError`."""
        with self._lock:
            self._closed = True
            self._chunks.clear()
            self._used_bytes = 0

    def _expect_open(self) -> None:
        if self._closed:
            raise TierUnavailableError(f"tier {self.name!r} is closed")
