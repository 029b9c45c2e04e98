"""Chunks kept by reference, wherever the allocator has put them."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass

from ...core import EncodedChunk
from ...errors import TierFullError
from ..encoding.copies import on_cpu


@dataclass(slots=True, eq=False)
class Kept:
    """A chunk in the heap. `released` is guarded by the heap's lock."""

    blob: EncodedChunk
    nbytes: int
    released: bool = False


class Heap:
    """Counts the bytes of chunks that it refers to; copies only what is leased or on a device.

    Parameters
    ----------
    name : of the tier, for messages.
    capacity_bytes : of the chunks' tensors; None for no limit.
    """

    def __init__(self, name: str, capacity_bytes: int | None) -> None:
        self._name = name
        self._capacity_bytes = capacity_bytes
        self._lock = threading.Lock()
        self._used_bytes = 0

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    def hold(self, blob: EncodedChunk, instead_of: Kept | None = None) -> Kept:
        """The chunk, in place of `instead_of`, which is released by that.

        Raises
        ------
        TierFullError : it does not fit; nothing has changed.
        """
        kept = Kept(blob, blob.nbytes)
        with self._lock:
            replaced_bytes = 0 if instead_of is None or instead_of.released else instead_of.nbytes
            used_bytes = self._used_bytes + kept.nbytes - replaced_bytes
            if self._capacity_bytes is not None and used_bytes > self._capacity_bytes:
                raise TierFullError(
                    f"tier {self._name!r}: {kept.nbytes} bytes do not fit, "
                    f"{self._used_bytes} of {self._capacity_bytes} are used",
                    needed_bytes=kept.nbytes,
                )
            if instead_of is not None:
                instead_of.released = True
            self._used_bytes = used_bytes
        try:
            kept.blob = on_cpu(blob, unleased=True)
        except BaseException:
            self.release(kept)
            raise
        return kept

    def read(self, kept: Kept) -> EncodedChunk | None:
        """The chunk itself, also if it has just been released."""
        return kept.blob

    def release(self, kept: Kept) -> None:
        """Counts it no longer. Releasing again does nothing."""
        with self._lock:
            if not kept.released:
                kept.released = True
                self._used_bytes -= kept.nbytes

    def check(self, held: Iterable[Kept]) -> list[str]:
        """What is inconsistent if the tier holds just these chunks, in words."""
        held_bytes = sum(kept.blob.nbytes for kept in held)
        if held_bytes != self._used_bytes:
            return [f"tier {self._name!r}: chunks take {held_bytes} bytes, {self._used_bytes} are accounted"]
        return []

    def close(self) -> None:
        """Nothing is left to do once all chunks are released."""
