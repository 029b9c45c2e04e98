"""Memory that chunks lie in and that other processes map: clients of a pool read it, the service's workers write it.

A pool's tenants may read all of its chunks anyway, and are lent them without a copy. Clients get a descriptor that the
kernel lets nobody write through: the service maps the memory before it seals it. What was deleted can be read there
until its place is taken.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
from collections import deque

import numpy as np
import torch
from torch import Tensor

from ...kvstore.tiers.arena import Arena
from .containers import Container

SEAL_NOTHING_MORE, SEAL_SIZE, SEAL_FUTURE_WRITES = 0x0001, 0x0002 | 0x0004, 0x0010  # of F_ADD_SEALS
F_ADD_SEALS = 1033


class _Loan:
    """What a lent storage keeps alive. Its end may come in any thread at any line: it takes no lock, only appends."""

    __slots__ = ("__array_interface__", "_ended", "_memory", "_offset")

    def __init__(self, memory: mmap.mmap, offset: int, ended: deque[int]) -> None:
        self._memory, self._offset, self._ended = memory, offset, ended

    def __del__(self) -> None:
        self._ended.append(self._offset)

    def storage(self, address: int, nbytes: int) -> Tensor:
        self.__array_interface__ = {"shape": (nbytes,), "typestr": "|u1", "data": (address, False), "version": 3}
        return torch.from_numpy(np.asarray(self))


class PoolMemory:
    """One memory file. Every method may be called from any thread.

    Parameters
    ----------
    nbytes : at most; the system gives what is written to.
    for_workers : processes of the service write here, too; the descriptor goes to nobody else.

    Raises
    ------
    OSError : the system has no such memory, or cannot seal it.
    """

    def __init__(self, nbytes: int, *, for_workers: bool = False) -> None:
        self.nbytes = nbytes // mmap.PAGESIZE * mmap.PAGESIZE
        self.descriptor = os.memfd_create("kvloom-pool", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.descriptor, self.nbytes)
            self._memory = mmap.mmap(self.descriptor, self.nbytes)
            writes = 0 if for_workers else SEAL_FUTURE_WRITES
            fcntl.fcntl(self.descriptor, F_ADD_SEALS, SEAL_SIZE | writes | SEAL_NOTHING_MORE)
        except BaseException:
            os.close(self.descriptor)
            raise
        self._view = np.frombuffer(self._memory, np.uint8)
        self._lock = threading.Lock()  # of what follows
        self._arena = Arena(self.nbytes)
        self._ended: deque[int] = deque()

    @property
    def used_bytes(self) -> int:
        with self._lock:
            self._collect()
            return self._arena.used_bytes

    def empty(self, nbytes: int) -> Tensor | None:
        """`[nbytes]` uint8 of any content, given back with its last view; None if there is no room."""
        with self._lock:
            self._collect()
            offset = self._arena.allocate(max(nbytes, 1))
            if offset is None:
                return None
        return _Loan(self._memory, offset, self._ended).storage(self._view.ctypes.data + offset, nbytes)

    def locate(self, view: memoryview) -> int | None:
        """Where bytes lie in this memory; None if they lie elsewhere."""
        offset = int(np.frombuffer(view, np.uint8).ctypes.data) - int(self._view.ctypes.data) if len(view) else 0
        return offset if 0 <= offset <= offset + len(view) <= self.nbytes else None

    def offset_of(self, container: Container) -> int | None:
        """Where a container lies in this memory, header and all; None if it does not, or not in one piece."""
        header, *data = container.buffers
        found = [(np.frombuffer(part, np.uint8).ctypes.data, len(part)) for part in data if len(part)]
        if not found:
            return None
        offset = int(found[0][0]) - int(self._view.ctypes.data) - len(header)
        if not 0 <= offset <= offset + container.total_bytes <= self.nbytes:
            return None
        end = found[0][0]
        for address, nbytes in found:
            if address != end:
                return None
            end += nbytes
        return offset if self._memory[offset : offset + len(header)] == header else None

    def close(self) -> None:
        """Gives the descriptor back; memory that somebody uses stays."""
        os.close(self.descriptor)

    def _collect(self) -> None:
        """Takes note of what nobody uses any more. Its pages stay: sealed memory cannot go back to the system."""
        while self._ended:
            self._arena.release(self._ended.popleft())
