"""Memory that was used before: the first touch of fresh memory costs several times the copy into it."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque

import numpy as np
import torch
from torch import Tensor

from ...core import EncodedChunk
from ..guard.locks import release_owned
from .copies import copy

_CAPACITY_BYTES = 256 << 20
_SMALLEST_BYTES = 1 << 15  # below, an allocator reuses memory by itself
_MOST_RETURNED = 64
_STEPS = 16  # sizes to a power of two, so that a buffer is at most 1/16 larger than what is asked for
_ALIGNMENT_BYTES = 64


class _Loan:
    """Keeps a lent buffer alive as long as a tensor looks at it; then the buffer can be lent again.

    `__del__` may run in any thread, at any line, also while that thread holds the lock of the pool. Hence it takes no
    lock and changes nothing but by `append`, which is atomic; what would be too much is left to the allocator.
    """

    __slots__ = ("__array_interface__", "_buffer", "_capacity_bytes", "_returned")

    def __init__(self, buffer: Tensor, returned: deque[Tensor], capacity_bytes: int) -> None:
        self._buffer, self._returned, self._capacity_bytes = buffer, returned, capacity_bytes

    def __del__(self) -> None:
        waiting = tuple(self._returned)
        if len(waiting) < _MOST_RETURNED and sum(other.nbytes for other in waiting) < self._capacity_bytes:
            self._returned.append(self._buffer)

    def storage(self, nbytes: int) -> Tensor:
        """The first `nbytes` of the buffer, in a storage of their own that keeps `self` alive."""
        data = self._buffer.data_ptr(), False
        self.__array_interface__ = {"shape": (nbytes,), "typestr": "|u1", "data": data, "version": 3}
        return torch.from_numpy(np.asarray(self))


class BufferPool:
    """Lends host memory, and again when the last view of what was lent is gone. Every method from any thread.

    Parameters
    ----------
    capacity_bytes : of memory that is kept while it is not in use; the longest unused goes first. About as much may
        come on top until `empty` is called next.
    """

    def __init__(self, capacity_bytes: int = _CAPACITY_BYTES) -> None:
        self._capacity_bytes = capacity_bytes
        self._lock = threading.RLock()  # of what follows
        self._is_torn = False  # an exception has interrupted a change
        self._idle: OrderedDict[int, Tensor] = OrderedDict()  # by address, longest unused first
        self._by_size: dict[int, list[Tensor]] = {}
        self._idle_bytes = 0
        self._returned: deque[Tensor] = deque()

    @property
    def idle_bytes(self) -> int:
        """Bytes of memory that is kept while it is not in use."""
        return self._idle_bytes

    def empty(self, nbytes: int) -> Tensor:
        """`[nbytes]` uint8 on the cpu, of any content, in a storage of its own; aligned to 64 bytes."""
        if nbytes < _SMALLEST_BYTES:
            return torch.empty(nbytes, dtype=torch.uint8)
        size = rounded(nbytes)
        try:
            with self._lock:
                buffer = self._take(size)
        except BaseException:
            release_owned(self._lock)
            raise
        if buffer is None:
            buffer = _allocate(size)
        return _Loan(buffer, self._returned, self._capacity_bytes).storage(nbytes)

    def copy(self, blob: EncodedChunk) -> EncodedChunk:
        """The chunk with its tensors copied, from the cpu, large ones into one buffer."""
        places, end = [], 0
        tensors = {}
        for name, tensor in blob.tensors.items():
            nbytes = tensor.nbytes
            if nbytes < _SMALLEST_BYTES:
                tensors[name] = tensor.detach().clone()
            else:
                places.append((name, tensor, end, end + nbytes))
                end += -(-nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        data = self.empty(end)
        for name, tensor, begin, stop in places:
            tensors[name] = data[begin:stop].view(tensor.dtype).view(tensor.shape)
        copy([(tensors[name], tensor) for name, tensor, _, _ in places])
        return EncodedChunk(blob.codec, tensors, blob.meta, blob.layered)

    def check(self) -> list[str]:
        """What is inconsistent, in words; empty if all is well. For a moment when no other thread uses the pool."""
        by_size = {buffer.data_ptr() for buffers in self._by_size.values() for buffer in buffers}
        idle_bytes = sum(buffer.nbytes for buffer in self._idle.values())
        if self._is_torn or (set(self._idle), self._idle_bytes) == (by_size, idle_bytes):
            return []
        return [f"{len(self._idle)} buffers of {idle_bytes} bytes are idle, {self._idle_bytes} bytes are accounted"]

    def _take(self, size: int) -> Tensor | None:
        if self._is_torn:  # what was idle is forgotten, which only costs the memory's first touch
            self._idle.clear()
            self._by_size.clear()
            self._idle_bytes = 0
        self._is_torn = True
        self._collect()
        buffers = self._by_size.get(size)
        buffer = buffers.pop() if buffers else None
        if buffer is not None:
            del self._idle[buffer.data_ptr()]
            self._idle_bytes -= size
        self._is_torn = False
        return buffer

    def _collect(self) -> None:
        while self._returned:
            buffer = self._returned.popleft()
            self._idle[buffer.data_ptr()] = buffer
            self._by_size.setdefault(buffer.nbytes, []).append(buffer)
            self._idle_bytes += buffer.nbytes
        while self._idle_bytes > self._capacity_bytes:
            _, buffer = self._idle.popitem(last=False)
            buffers = self._by_size[buffer.nbytes]
            buffers[:] = [other for other in buffers if other is not buffer]
            if not buffers:
                del self._by_size[buffer.nbytes]
            self._idle_bytes -= buffer.nbytes


def _allocate(nbytes: int) -> Tensor:
    if not torch.is_inference_mode_enabled():
        return torch.empty(nbytes, dtype=torch.uint8)
    with torch.inference_mode(mode=False):  # else the buffer could be written in this mode only
        return torch.empty(nbytes, dtype=torch.uint8)


def rounded(nbytes: int) -> int:
    """The least of 16 sizes to a power of two that is not below `nbytes`."""
    step = 1 << max(0, (nbytes - 1).bit_length() - _STEPS.bit_length())
    return -(-nbytes // step) * step
