"""The memory that tiers allocate once, when they are made."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...errors import TierUnavailableError

_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device, not just the current one


class Pinning:
    """Keeps plain memory pinned for as long as a tensor made by `tensor()` refers to it."""

    def __init__(self, memory: Tensor) -> None:
        cudart = torch.cuda.cudart()
        self._memory = memory
        self._unregister = cudart.cudaHostUnregister
        error = int(cudart.cudaHostRegister(memory.data_ptr(), memory.nbytes, _PORTABLE))
        if error:
            del self._memory  # nothing to undo
            raise RuntimeError(f"cudaHostRegister returned error {error}")

    def __del__(self) -> None:
        if hasattr(self, "_memory"):
            self._unregister(self._memory.data_ptr())  # no caller is left to report an error to

    def tensor(self) -> Tensor:
        data = self._memory.data_ptr(), False
        self.__array_interface__ = {"shape": (self._memory.nbytes,), "typestr": "|u1", "data": data, "version": 3}
        return torch.from_numpy(np.asarray(self))


def can_pin() -> bool:
    """Whether there is a device for which memory could be pinned."""
    return torch.cuda.is_available()


def allocate_buffer(name: str, nbytes: int, *, device: torch.device | str = "cpu", pinned: bool = False) -> Tensor:
    """`[nbytes]` uint8 on a device, or in host memory that is pinned or plain.

    Parameters
    ----------
    name : of the tier, for messages.

    Raises
    ------
    TierUnavailableError : there is not so much memory, or no such device.
    """
    try:
        with torch.inference_mode(mode=False):  # else the buffer could be written in this mode only
            memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
            # torch's own allocator of pinned memory would round up to a power of two
            return Pinning(memory).tensor() if pinned and nbytes else memory
    except (RuntimeError, AssertionError) as exc:  # the latter from a torch without CUDA
        kind = "pinned" if pinned else str(device)
        raise TierUnavailableError(
            f"tier {name!r} cannot get {nbytes} bytes of {kind} memory; give a smaller capacity_bytes "
            f"or another device: {exc}"
        ) from exc
