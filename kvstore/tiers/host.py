"""Chunks in host memory."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from ...core import EncodedChunk
from ..encoding.copies import on_cpu, wait_for_devices
from .buffers import allocate_buffer, can_pin
from .memory import MemoryTier
from .slab import Slab


class HostTier(MemoryTier[Any]):
    """Holds chunks in the memory of this process.

    In plain memory it holds references: `put` and `get` copy nothing, except what is on a device or leased from another
    tier. In pinned memory, which a device reads at full speed and beside other work, `put` copies into one buffer that
    is allocated at the start, and `get` gives views of it. A chunk that is read keeps its space until the last view is
    gone, also when it has been evicted. Copies to a device with `non_blocking=True` may still be running when the views
    go, so such space is written again only after the devices have done what was queued.

    The pinned form has not been run with CUDA yet, only with the same code over plain memory.

    Parameters
    ----------
    capacity_bytes : of the chunks' tensors, in pinned memory each rounded up to 256 bytes; None for no limit, in plain
        memory only.
    pinned : None for pinned memory if CUDA is there and `capacity_bytes` is given.

    Raises
    ------
    ValueError : `capacity_bytes` is negative, or None with `pinned=True`.
    TierUnavailableError : so much pinned memory cannot be had.
    """

    def __init__(self, capacity_bytes: int | None, *, name: str = "host", pinned: bool | None = None) -> None:
        if capacity_bytes is not None and capacity_bytes < 0:
            raise ValueError(f"capacity_bytes is {capacity_bytes}; expected 0 or more, or None")
        if pinned is None:
            pinned = capacity_bytes is not None and can_pin()
        self.pinned = pinned
        if not pinned:
            super().__init__(name, capacity_bytes, Heap(capacity_bytes))
            return
        if capacity_bytes is None:
            raise ValueError("capacity_bytes is None; pinned memory is allocated at the start, give its size")
        buffer = allocate_buffer(name, capacity_bytes, pinned=True)
        super().__init__(name, capacity_bytes, Slab(name, buffer, wait=wait_for_devices))


@dataclass(slots=True, eq=False)
class HeapChunk:
    """A chunk in the heap, and the bytes of its tensors."""

    blob: EncodedChunk
    nbytes: int
    released: bool = False


class Heap:
    """Keeps chunks by reference; copies only what is leased or on a device. See `Memory`."""

    def __init__(self, limit_bytes: int | None) -> None:
        self.limit_bytes = limit_bytes

    def hold(self, blob: EncodedChunk, _: HeapChunk | None) -> HeapChunk:
        return HeapChunk(on_cpu(blob, unleased=True), blob.nbytes)

    def keep(self) -> None:
        pass

    def abandon(self) -> bool:
        return False

    def reconcile(self, _: Collection[HeapChunk]) -> None:
        pass

    def read(self, chunk: HeapChunk) -> EncodedChunk:
        return chunk.blob

    def used_bytes(self, held_bytes: int) -> int:
        return held_bytes

    def release(self, _: HeapChunk) -> None:
        pass

    def check(self, _: Collection[HeapChunk]) -> list[str]:
        return []

    def close(self) -> None:
        pass
