"""Chunks in host memory."""

from __future__ import annotations

from typing import Any

from ..encoding.copies import wait_for_devices
from .buffers import allocate_buffer, can_pin
from .heap import Heap
from .memory import MemoryTier
from .slab import Slab


class HostTier(MemoryTier[Any]):
    """Holds chunks in the memory of this process.

    In plain memory it holds references: `put` and `get` copy nothing, except what is on a device or leased from another
    tier. In pinned memory, which a device reads at full speed and beside other work, `put` copies into one buffer that
    is allocated at the start, and `get` gives views of it: a chunk that is read keeps its place until the last view is
    gone, also when it has been evicted, and its space is not free for so long. Copies to a device with
    `non_blocking=True` may still be running when the views go; such space waits for the devices before it is written.

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
            super().__init__(name, capacity_bytes, Heap(name, capacity_bytes))
            return
        if capacity_bytes is None:
            raise ValueError("capacity_bytes is None; pinned memory is allocated at the start, give its size")
        buffer = allocate_buffer(name, capacity_bytes, pinned=True)
        super().__init__(name, capacity_bytes, Slab(name, buffer, wait=wait_for_devices))
