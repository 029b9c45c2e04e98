"""Chunks copied into one buffer, and lent to readers without a copy.

A reader's tensors may outlive the chunk's stay in the tier, and nobody tells us when they are done with, except the
tensors: each reading is a storage of its own over the chunk's range, and the end of that storage, wherever the last
view of it goes, ends the reading. A range is written again only after that, and after what was queued on devices until
then, since a kernel or copy may still read for whom has let go.

    a range is             owned by    until
    being written          `hold`      its caller has it, or the copy fails
    held                   the tier    `release`, or `hold` puts another in its place
    leaving                readers     the last storage over it is gone
    settling               the slab    the devices have done what was queued (`wait`)
    free                   the arena   `hold`
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...core import EncodedChunk
from ...errors import TierFullError, TierUnavailableError
from ..encoding.copies import copy, on_cpu
from .arena import Arena, aligned


class Place(NamedTuple):
    """Where a tensor begins in the range of its chunk, and what it is."""

    offset: int
    dtype: torch.dtype
    shape: torch.Size

    def of(self, data: Tensor) -> Tensor:
        """The tensor itself, a view of the range's bytes."""
        nbytes = self.shape.numel() * self.dtype.itemsize
        return data[self.offset : self.offset + nbytes].view(self.dtype).view(self.shape)


@dataclass(slots=True, eq=False)
class Placed:
    """A chunk in a slab. What changes is guarded by the slab's lock.

    Attributes
    ----------
    rest : the chunk without the tensors that `places` names.
    nbytes : of the range that begins at `offset`.
    readings : how many of `lent` are not over.
    settled : what `lent` was when the devices were last waited for, while nobody was reading.
    """

    rest: EncodedChunk
    places: Mapping[str, Place]
    offset: int
    nbytes: int
    released: bool = False
    readings: int = 0
    lent: int = 0
    settled: int = 0


class Reading:
    """What a lent storage keeps alive: the buffer, and by its own end the knowledge that the chunk is still read.

    The end may come in any thread, at any line (garbage collection), also while that thread holds the slab's lock.
    Hence no lock is taken and nothing is changed but by `append`, which is atomic.
    """

    __slots__ = ("__array_interface__", "__cuda_array_interface__", "_buffer", "_chunk", "_ended")

    def __init__(self, buffer: Tensor, chunk: Placed, ended: deque[Placed]) -> None:
        self._buffer, self._chunk, self._ended = buffer, chunk, ended

    def __del__(self) -> None:
        self._ended.append(self._chunk)

    def storage(self) -> Tensor:
        """The bytes of the chunk's range, `[nbytes]` uint8, in a storage of their own that keeps `self` alive."""
        address = self._buffer.data_ptr() + self._chunk.offset
        fields = {"shape": (self._chunk.nbytes,), "typestr": "|u1", "data": (address, False), "version": 3}
        if self._buffer.is_cuda:
            self.__cuda_array_interface__ = fields
            return torch.as_tensor(self, device=self._buffer.device)
        self.__array_interface__ = fields
        return torch.from_numpy(np.asarray(self))


class Slab:
    """Copies chunks into ranges of one buffer. Every method may be called from any thread; copies run outside the lock.

    Parameters
    ----------
    name : of the tier, for messages.
    buffer : `[bytes]` uint8, cpu or CUDA; the slab owns it.
    layered_only : tensors without a layer dimension stay in plain host memory and are not counted. They are small, and
        decoding needs them on the cpu.
    wait : returns when devices have done what was queued before the call; None if no device reads the buffer.
    """

    def __init__(
        self, name: str, buffer: Tensor, *, layered_only: bool = False, wait: Callable[[], None] | None = None
    ) -> None:
        self._name = name
        self._buffer: Tensor | None = buffer  # None once closed
        self._layered_only = layered_only
        self._wait = wait
        self._arena = Arena(buffer.nbytes)
        self._lock = threading.Lock()  # of all below; within `_waiting`, never around it
        self._waiting = threading.Lock()
        self._ended: deque[Placed] = deque()  # chunks of readings that are over; emptied by whoever comes next
        self._leaving: set[Placed] = set()
        self._settling: list[Placed] = []

    @property
    def used_bytes(self) -> int:
        """What `hold` cannot use: chunks, and ranges of former chunks that are being read."""
        with self._lock:
            self._collect()
            return self._arena.used_bytes - sum(chunk.nbytes for chunk in self._settling)

    def hold(self, blob: EncodedChunk, instead_of: Placed | None = None) -> Placed:
        """A copy of the chunk; if there is no room for both, then in place of `instead_of`, which is released by that.

        Raises
        ------
        TierFullError : no free range is so large; nothing has changed.
        TierUnavailableError : the slab is closed or the device fails; `instead_of` may be released.
        """
        places: dict[str, Place] = {}
        nbytes = 0
        for name, tensor in blob.tensors.items():
            if name in blob.layered or not self._layered_only:
                places[name] = Place(nbytes, tensor.dtype, tensor.shape)
                nbytes += aligned(tensor.nbytes)
        nbytes = max(nbytes, aligned(1))
        buffer, offset = self._reserve(nbytes, instead_of)
        chunk = Placed(blob, places, offset, nbytes)
        try:
            with self._device_errors("copy to"):
                data = buffer[offset : offset + nbytes]
                copy([(place.of(data), blob.tensors[name].detach()) for name, place in places.items()])
                rest = {name: tensor for name, tensor in blob.tensors.items() if name not in places}
                chunk.rest = on_cpu(EncodedChunk(blob.codec, rest, blob.meta, blob.layered, leased=True), unleased=True)
        except BaseException:
            self.release(chunk)
            raise
        return chunk

    def read(self, chunk: Placed) -> EncodedChunk | None:
        """The chunk, whose tensors are views of the buffer for as long as they live; None if it is released."""
        with self._lock:
            self._collect()
            if chunk.released or self._buffer is None:
                return None
            chunk.readings += 1
            chunk.lent += 1
            reading = Reading(self._buffer, chunk, self._ended)
        with self._device_errors("read from"):
            data = reading.storage()
            tensors = {name: place.of(data) for name, place in chunk.places.items()}
        rest = chunk.rest
        return EncodedChunk(rest.codec, {**tensors, **rest.tensors}, rest.meta, rest.layered, leased=True)

    def release(self, chunk: Placed) -> None:
        """Its range is free as soon as nobody reads it. Releasing again does nothing."""
        with self._lock:
            self._collect()
            if chunk.released:
                return
            chunk.released = True
            if chunk.readings:
                self._leaving.add(chunk)
            else:
                self._vacate(chunk)

    def check(self, held: Iterable[Placed]) -> list[str]:
        """What is inconsistent if the tier holds just these chunks, in words."""
        with self._lock:
            self._collect()
            known = {chunk.offset: chunk.nbytes for chunk in (*held, *self._leaving, *self._settling)}
            problems = self._arena.check()
            if known != self._arena.taken:
                problems.append(f"{len(self._arena.taken)} ranges are taken, {len(known)} of them or others known")
            return [f"tier {self._name!r}: {problem}" for problem in problems]

    def close(self) -> None:
        """Lets go of the buffer; readings keep it as long as they last."""
        with self._lock:
            self._buffer = None

    def _reserve(self, nbytes: int, instead_of: Placed | None) -> tuple[Tensor, int]:
        """The buffer, and the offset of a range in it that is the caller's."""
        with self._lock:
            buffer = self._expect_open()
            offset = self._allocate(nbytes, instead_of)
        if offset is None and self._wait is not None:
            with self._waiting:  # who comes second finds what the first has waited for
                self._settle(self._wait, instead_of)
                with self._lock:
                    offset = self._allocate(nbytes, instead_of)
        if offset is None:
            with self._lock:
                leaving_bytes = sum(chunk.nbytes for chunk in self._leaving)
                raise TierFullError(
                    f"tier {self._name!r}: {nbytes} bytes do not fit, {self._arena.used_bytes} of "
                    f"{self._arena.capacity_bytes} are used, {leaving_bytes} of them by readers of chunks that are no "
                    f"longer here; the largest gap is {self._arena.largest_free_bytes}",
                    needed_bytes=nbytes,
                )
        return buffer, offset

    def _allocate(self, nbytes: int, instead_of: Placed | None) -> int | None:
        self._collect()
        offset = self._arena.allocate(nbytes)
        if offset is not None or instead_of is None or instead_of.released or instead_of.readings:
            return offset
        if self._is_settled(instead_of):
            offset = self._arena.exchange(instead_of.offset, nbytes)
            instead_of.released = offset is not None
        return offset

    def _settle(self, wait: Callable[[], None], instead_of: Placed | None) -> None:
        """Waits for the devices, so that what nobody was reading when this began can be written again."""
        with self._lock:
            self._collect()
            idle = [instead_of] if instead_of is not None and not instead_of.readings else []
            seen = [(chunk, chunk.lent) for chunk in (*self._settling, *idle) if not self._is_settled(chunk)]
        if not seen:
            return
        with self._device_errors("wait for"):
            wait()
        with self._lock:
            for chunk, lent in seen:
                chunk.settled = lent
            ready = [chunk for chunk in self._settling if self._is_settled(chunk)]
            self._settling = [chunk for chunk in self._settling if not self._is_settled(chunk)]
            for chunk in ready:
                self._arena.release(chunk.offset)

    def _collect(self) -> None:
        """Takes note of readings that are over."""
        while self._ended:
            chunk = self._ended.popleft()
            chunk.readings -= 1
            if chunk.released and not chunk.readings:
                self._leaving.discard(chunk)
                self._vacate(chunk)

    def _vacate(self, chunk: Placed) -> None:
        if self._is_settled(chunk):
            self._arena.release(chunk.offset)
        else:
            self._settling.append(chunk)

    def _is_settled(self, chunk: Placed) -> bool:
        return self._wait is None or chunk.lent == chunk.settled

    def _expect_open(self) -> Tensor:
        if self._buffer is None:
            raise TierUnavailableError(f"tier {self._name!r} is closed")
        return self._buffer

    @contextmanager
    def _device_errors(self, verb: str) -> Iterator[None]:
        """The one place where what torch says of a device becomes what a tier says."""
        try:
            yield
        except RuntimeError as exc:
            raise TierUnavailableError(f"tier {self._name!r} cannot {verb} its device: {exc}") from exc
