"""Chunks in the memory of a device."""

from __future__ import annotations

import torch

from ..encoding.copies import wait_for_devices
from .buffers import allocate_buffer
from .memory import MemoryTier
from .slab import Slab, SlabChunk


class DeviceTier(MemoryTier[SlabChunk]):
    """Holds the layered tensors of chunks in one buffer on a device, allocated at the start.

    `put` copies on a stream of its own and returns when the chunk is there. `get` copies nothing: the layered tensors
    are read-only views of the buffer on the device, ready for every stream. They stay valid for as long as they are
    referred to, also when the chunk has been evicted. Its space is free when the last view is gone and the devices have
    done what was queued until then; a `put` that needs the space waits for that, so streams need not be synchronised.
    Give the tier room to spare if `put` must not wait. Do not `put` while a CUDA graph is being captured.

    What is not layered (token ids, positions) stays in host memory and is not counted.

    Run and tested with `device="cpu"`; not run with CUDA yet: stream, asynchronous copies, the lease of device memory
    (`__cuda_array_interface__`) and the wait for the devices.

    Parameters
    ----------
    capacity_bytes : of the buffer; each tensor is rounded up to 256 bytes.
    device : `cuda`, `cuda:<index>`, or `cpu`.

    Raises
    ------
    ValueError : `capacity_bytes` is negative, or `device` of another kind.
    TierUnavailableError : there is no such device, or not so much memory on it.
    """

    def __init__(self, capacity_bytes: int, *, device: torch.device | str = "cuda", name: str = "device") -> None:
        if capacity_bytes < 0:
            raise ValueError(f"capacity_bytes is {capacity_bytes}; expected 0 or more")
        if str(device).partition(":")[0] not in ("cuda", "cpu"):
            raise ValueError(f"device is {str(device)!r}; expected 'cuda', 'cuda:<index>' or 'cpu'")
        buffer = allocate_buffer(name, capacity_bytes, device=device)
        self.device = buffer.device  # with its index, whatever is current when other threads come
        wait = wait_for_devices if buffer.is_cuda else None
        super().__init__(name, capacity_bytes, Slab(name, buffer, layered_only=True, wait=wait))
