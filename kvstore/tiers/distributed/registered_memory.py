"""Memory that is registered with a transfer engine once and lent again and again: registering is slow."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..arena import Arena


class _Range:
    """Keeps a lent range taken as long as a tensor looks at it.

    Its end may come in any thread at any line: it takes no lock, and only appends.
    """

    __slots__ = ("__array_interface__", "_ended", "_memory", "_offset")

    def __init__(self, memory: Tensor, offset: int, ended: deque[int]) -> None:
        self._memory, self._offset, self._ended = memory, offset, ended

    def __del__(self) -> None:
        self._ended.append(self._offset)

    def storage(self) -> Tensor:
        """The range in a storage of its own, which keeps `self` alive."""
        data = self._memory.data_ptr(), False
        self.__array_interface__ = {"shape": (self._memory.nbytes,), "typestr": "|u1", "data": data, "version": 3}
        return torch.from_numpy(np.asarray(self))


class RegisteredMemory:
    """One buffer, of which ranges are lent. Every method may be called from any thread.

    Parameters
    ----------
    register, unregister : called with address and bytes of the buffer, and of each one that is made because no range is
        free.
    """

    def __init__(
        self, nbytes: int, register: Callable[[int, int], object], unregister: Callable[[int], object]
    ) -> None:
        self._memory = torch.empty(nbytes, dtype=torch.uint8)
        self._register, self._unregister = register, unregister
        register(self._memory.data_ptr(), nbytes)
        self._lock = threading.Lock()  # of the arena
        self._arena = Arena(nbytes)
        self._ended: deque[int] = deque()

    def empty(self, nbytes: int) -> tuple[Tensor, bool]:
        """`[nbytes]` uint8 of any content, registered; and whether `release` must follow the transfer.

        A range is given back when the last view of it is gone.
        """
        with self._lock:
            while self._ended:
                self._arena.release(self._ended.popleft())
            offset = self._arena.allocate(max(1, nbytes))
        if offset is not None:
            return _Range(self._memory[offset : offset + nbytes], offset, self._ended).storage(), False
        memory = torch.empty(nbytes, dtype=torch.uint8)
        self._register(memory.data_ptr(), nbytes)
        return memory, True

    def release(self, memory: Tensor) -> None:
        """The transfer into or out of a buffer that was made has ended; it stays as plain memory."""
        self._unregister(memory.data_ptr())
