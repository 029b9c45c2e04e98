"""Memory that this process shares with a service on this host; `service/transfer/shared_memory.py` has the protocol."""

from __future__ import annotations

import mmap
import os
import socket
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ....errors import TierUnavailableError
from ...encoding.copies import copy_bytes
from ..arena import Arena

_LEASE_BYTES = 8


class _Borrowed:
    """What a borrowed storage keeps alive, and by whose end the range is given back.

    The end may come in any thread at any line: it takes no lock, and only appends.
    """

    __slots__ = ("__array_interface__", "_ended", "_lease", "_memory")

    def __init__(self, memory: NDArray[np.uint8], lease: int, ended: deque[int]) -> None:
        self._memory, self._lease, self._ended = memory, lease, ended

    def __del__(self) -> None:
        self._ended.append(self._lease)

    def storage(self) -> Tensor:
        self.__array_interface__ = {
            "shape": (self._memory.nbytes,),
            "typestr": "|u1",
            "data": (self._memory.ctypes.data, False),
            "version": 3,
        }
        return torch.from_numpy(np.asarray(self))


def _private(descriptor: int) -> mmap.mmap:
    """The memory behind a descriptor that nobody can write through: whoever writes here gets pages of its own."""
    nbytes = os.fstat(descriptor).st_size
    return mmap.mmap(descriptor, nbytes, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)


class SharedMemorySession:
    """One client's session. Every method may be called from any thread.

    Parameters
    ----------
    name, ticket : as the service gave them.
    nbytes : of the whole memory.
    timeout_s : for the exchange on the socket.

    Raises
    ------
    OSError : the service is on another host, or the session is gone.
    """

    def __init__(self, session_id: str, name: str, ticket: bytes, nbytes: int, timeout_s: float) -> None:
        self.id = session_id
        self._half_bytes = nbytes // 2
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(timeout_s)
            self._socket.connect("\0" + name)
            self._socket.sendall(ticket)
            _, descriptors, _, _ = socket.recv_fds(self._socket, 1, 2)
            if not descriptors:
                raise OSError("the service gave no memory")
            try:
                if os.fstat(descriptors[0]).st_size != nbytes:
                    raise OSError("the service gave memory of another size")
                self._view = memoryview(mmap.mmap(descriptors[0], nbytes))
                self._memories = {"session": np.frombuffer(self._view, np.uint8)[: self._half_bytes]}
                if len(descriptors) > 1:
                    self._memories["pool"] = np.frombuffer(_private(descriptors[1]), np.uint8)
            finally:
                for descriptor in descriptors:
                    os.close(descriptor)
        except BaseException:
            self._socket.close()
            raise
        self._lock = threading.Lock()  # of the arena and the socket
        self._arena = Arena(self._half_bytes)
        self._ended: deque[int] = deque()

    def borrowed(self, lease: int, offset: int, nbytes: int, memory: str = "session") -> Tensor:
        """`[nbytes]` uint8: a range that the service has lent, given back when the last view of it is gone.

        Parameters
        ----------
        memory : `session` for the service's half of the session's, `pool` for that in which the pool's chunks lie.

        Raises
        ------
        TierUnavailableError : the range is not within that memory.
        """
        whole = self._memories.get(memory)
        if whole is None or not 0 <= offset <= offset + nbytes <= len(whole):
            raise TierUnavailableError(f"the service lends [{offset}, {offset + nbytes}), which is not its own")
        return _Borrowed(whole[offset : offset + nbytes], lease, self._ended).storage()

    @contextmanager
    def written(self, buffers: Sequence[memoryview], nbytes: int) -> Iterator[int | None]:
        """Offset of a copy of the buffers in this client's half; None if there is no room for it now."""
        with self._lock:
            offset = self._arena.allocate(nbytes)
        if offset is None:
            yield None
            return
        try:
            end = self._half_bytes + offset
            for buffer in buffers:
                copy_bytes(self._view[end : end + len(buffer)], buffer)
                end += len(buffer)
            yield self._half_bytes + offset
        finally:
            with self._lock:
                self._arena.release(offset)

    def give_back(self) -> None:
        """Tells the service of ranges that nobody here reads any more. Raises `OSError` if it is gone."""
        with self._lock:
            message = b""
            while self._ended:
                message += self._ended.popleft().to_bytes(_LEASE_BYTES, "little")
            if message:
                self._socket.sendall(message)

    def close(self) -> None:
        """Ends the session. What was read stays valid as long as somebody has it."""
        self._socket.close()
