"""Chunks copied into one buffer, and lent to readers without a copy.

A reader's tensors may outlive the chunk's stay in the tier. What is lent is therefore a storage of its own over the
chunk's range, which keeps a `Lease` alive. A range is written again only after its last lease is gone, and after
devices have done what was queued until then, since a kernel or a copy may still read it.

    chunk       its range is owned by                     until
    writing     the thread that copies                    the tier has the chunk (`keep`), or the copy fails (`abandon`)
    held        the tier                                  `release`, or another chunk takes its place
    leaving     the leases                                the last one is gone
    settling    the slab                                  the devices have done what was queued (`_settle`)

The registry of chunks that own a range is the truth. All else follows from it, and from what the tier has in its table:
if an exception cuts a change short, it is made anew.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...core import EncodedChunk
from ...errors import TierFullError, TierUnavailableError
from ..encoding.copies import copy, on_cpu
from ..guard.locks import LockGuard
from .arena import Arena, aligned


class SlabSlot(NamedTuple):
    """Where a tensor begins in the range of its chunk, and what it is."""

    offset: int
    dtype: torch.dtype
    shape: torch.Size

    def view(self, data: Tensor) -> Tensor:
        """The tensor itself, as a view of the range's bytes."""
        nbytes = self.shape.numel() * self.dtype.itemsize
        return data[self.offset : self.offset + nbytes].view(self.dtype).view(self.shape)


@dataclass(slots=True, eq=False)
class SlabChunk:
    """A chunk in a slab, and the range of the buffer that it owns.

    Attributes
    ----------
    rest : the chunk without the tensors that are in `slots`.
    nbytes : of the range that begins at `offset`.
    released : the tier holds it no longer, or another chunk took its place.
    leases : references to the leases that are not over; each removes itself.
    lent : a number that grows when the chunk is lent, if devices may read it.
    settled : what `lent` was when the devices were last waited for, while no lease was left.
    """

    rest: EncodedChunk
    slots: Mapping[str, SlabSlot]
    offset: int
    nbytes: int
    released: bool = False
    leases: set[weakref.ref[Lease]] = field(default_factory=set)
    lent: int = 0
    settled: int = 0

    @property
    def is_settled(self) -> bool:
        return self.settled == self.lent


class Lease:
    """What a lent storage keeps alive: the buffer and the chunk."""

    __slots__ = ("__array_interface__", "__cuda_array_interface__", "__weakref__", "_buffer", "_chunk")

    def __init__(self, buffer: Tensor, chunk: SlabChunk) -> None:
        self._buffer, self._chunk = buffer, chunk

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

    limit_bytes = None  # `hold` itself refuses what does not fit

    def __init__(
        self, name: str, buffer: Tensor, *, layered_only: bool = False, wait: Callable[[], None] | None = None
    ) -> None:
        self._name = name
        self._buffer: Tensor | None = buffer  # None once closed
        self._layered_only = layered_only
        self._wait = wait
        self._lock = threading.RLock()  # of all below; within `_waiting`, never around it
        self._guard = LockGuard(self._lock, mend=self._note_interrupt)
        self._waiting = threading.RLock()
        self._waiting_guard = LockGuard(self._waiting)
        self._chunks: dict[int, SlabChunk] = {}  # that own a range, by its offset
        self._writing: dict[int, SlabChunk] = {}  # by the thread that copies
        self._arena = Arena(buffer.nbytes)
        self._leaving: set[SlabChunk] = set()
        self._settling: set[SlabChunk] = set()
        self._changing = 0  # the thread that changes the three
        self._is_torn = False  # a change of them was cut short

    def hold(self, blob: EncodedChunk, replaced: SlabChunk | None) -> SlabChunk:
        """A copy of the chunk; if there is no room for both, in place of `replaced`, which is released by that.

        The chunk is the tier's after `keep`, or goes with `abandon`.

        Raises
        ------
        TierFullError : no free range is so large; nothing has changed.
        TierUnavailableError : the slab is closed or the device fails; `replaced` may be released.
        """
        self._expect_not_within()
        slots: dict[str, SlabSlot] = {}
        nbytes = 0
        for name, tensor in blob.tensors.items():
            if name in blob.layered or not self._layered_only:
                slots[name] = SlabSlot(nbytes, tensor.dtype, tensor.shape)
                nbytes += aligned(tensor.nbytes)
        rest = {name: tensor for name, tensor in blob.tensors.items() if name not in slots}
        rest_blob = EncodedChunk(blob.codec, rest, blob.meta, blob.layered, leased=True)
        with self._device_errors("copy to"):
            buffer, chunk = self._reserve(SlabChunk(rest_blob, slots, 0, max(nbytes, aligned(1))), replaced)
            data = buffer[chunk.offset : chunk.offset + nbytes]
            copy([(slot.view(data), blob.tensors[name].detach()) for name, slot in slots.items()])
            chunk.rest = on_cpu(rest_blob, unleased=True)
        return chunk

    def keep(self) -> None:
        """The tier has the chunk that this thread was given by `hold`."""
        self._writing.pop(threading.get_ident(), None)

    def abandon(self) -> bool:
        """As `keep`, where the tier may have the chunk or not: `reconcile` will tell; False if there is none."""
        return self._writing.pop(threading.get_ident(), None) is not None

    def reconcile(self, chunks: Collection[SlabChunk]) -> None:
        """The tier holds these chunks, and no others."""
        with self._guard, self._lock:
            owned = {*chunks, *self._writing.values()}
            for chunk in [chunk for chunk in self._chunks.values() if chunk not in owned]:
                self.release(chunk)

    def read(self, chunk: SlabChunk) -> EncodedChunk | None:
        """The chunk, whose tensors are views of the buffer for as long as they live; None if it was released."""
        buffer = self._buffer
        if buffer is None:
            return None
        lease = Lease(buffer, chunk)
        chunk.leases.add(weakref.ref(lease, chunk.leases.discard))
        if chunk.released:  # asked last: from now on its range stays, see `_vacate` and `_allocate`
            return None
        if self._wait is not None:
            chunk.lent += 1
        with self._device_errors("read from"):
            data = lease.storage()
            tensors = {name: slot.view(data) for name, slot in chunk.slots.items()}
        rest = chunk.rest
        return EncodedChunk(rest.codec, {**tensors, **rest.tensors}, rest.meta, rest.layered, leased=True)

    def used_bytes(self, _: int) -> int:
        """What `hold` cannot use: chunks, and ranges of former chunks that are being read."""
        self._expect_not_within()
        with self._guard, self._lock:
            self._collect()
            return self._arena.used_bytes - sum(chunk.nbytes for chunk in self._settling)

    def release(self, chunk: SlabChunk) -> None:
        """Its range is free as soon as the last lease is gone. Releasing again does nothing."""
        self._expect_not_within()
        with self._guard, self._lock:
            self._collect()
            if not chunk.released:
                self._changing = threading.get_ident()
                chunk.released = True
                self._vacate(chunk)
                self._changing = 0

    def check(self, chunks: Collection[SlabChunk]) -> list[str]:
        """What is inconsistent if the tier holds just these chunks, in words."""
        self._expect_not_within()
        with self._guard, self._lock:
            self._collect()
            known = {chunk.offset: chunk.nbytes for chunk in (*chunks, *self._leaving, *self._settling)}
            problems = self._arena.check()
            if known != self._arena.taken:
                problems.append(f"{len(self._arena.taken)} ranges are taken, {len(known)} of them or others known")
        return problems

    def close(self) -> None:
        """Gives up the buffer; leases keep it as long as they last."""
        self._buffer = None

    def _reserve(self, chunk: SlabChunk, replaced: SlabChunk | None) -> tuple[Tensor, SlabChunk]:
        """The buffer, and the chunk with a range of its own."""
        buffer = self._expect_open()
        is_placed = self._allocate(chunk, replaced)
        if not is_placed and self._wait is not None:
            with self._waiting_guard, self._waiting:  # who comes second finds what the first has waited for
                self._settle(self._wait, replaced)
                is_placed = self._allocate(chunk, replaced)
        if not is_placed:
            leaving_bytes = sum(left.nbytes for left in tuple(self._leaving))
            raise TierFullError(
                f"tier {self._name!r}: {chunk.nbytes} bytes do not fit, {self._arena.used_bytes} of "
                f"{self._arena.capacity_bytes} are used, {leaving_bytes} of them by readers of chunks that are no "
                f"longer here; the largest gap is {self._arena.largest_free_bytes}",
                needed_bytes=chunk.nbytes,
            )
        return buffer, chunk

    def _allocate(self, chunk: SlabChunk, replaced: SlabChunk | None) -> bool:
        """Gives the chunk a range; whether there was one."""
        with self._guard, self._lock:
            self._collect()
            self._changing = threading.get_ident()
            offset = self._arena.allocate(chunk.nbytes)
            if offset is None and replaced is not None and not (replaced.released or replaced.leases):
                replaced.released = True  # first, as `read` takes no lock
                if not replaced.leases and replaced.is_settled:
                    offset = self._arena.exchange(replaced.offset, chunk.nbytes)
                if offset is None:
                    replaced.released = False
                else:
                    del self._chunks[replaced.offset]
            if offset is not None:
                chunk.offset = offset
                self._writing[threading.get_ident()] = chunk
                self._chunks[offset] = chunk
            self._changing = 0
            return offset is not None

    def _settle(self, wait: Callable[[], None], replaced: SlabChunk | None) -> None:
        """Waits for the devices, so that what was not lent when this began can be written again."""
        with self._guard, self._lock:
            self._collect()
            idle = [replaced] if replaced is not None and not replaced.leases else []
            seen = [(chunk, chunk.lent) for chunk in (*self._settling, *idle) if not chunk.is_settled]
        if not seen:
            return
        with self._device_errors("wait for"):
            wait()
        with self._guard, self._lock:
            self._changing = threading.get_ident()
            for chunk, lent in seen:
                chunk.settled = lent
            for chunk in tuple(self._settling):
                self._vacate(chunk)
            self._changing = 0

    def _collect(self) -> None:
        """Takes note of leases that are over, under the lock."""
        if self._is_torn or self._changing:  # by a thread that held the lock
            self._leaving = {chunk for chunk in self._chunks.values() if chunk.released}
            self._settling = set()
            self._arena = Arena(self._arena.capacity_bytes, {c.offset: c.nbytes for c in self._chunks.values()})
            self._is_torn, self._changing = False, 0
        over = [chunk for chunk in self._leaving if not chunk.leases]
        if over:
            self._changing = threading.get_ident()
            for chunk in over:
                self._vacate(chunk)
            self._changing = 0

    def _vacate(self, chunk: SlabChunk) -> None:
        """Gives back the range of a released chunk, or notes what it waits for."""
        self._leaving.discard(chunk)
        self._settling.discard(chunk)
        if chunk.leases:
            self._leaving.add(chunk)
        elif not chunk.is_settled:
            self._settling.add(chunk)
        else:
            del self._chunks[chunk.offset]
            self._arena.release(chunk.offset)

    def _note_interrupt(self) -> None:
        if self._changing == threading.get_ident():
            self._is_torn = True
            self._changing = 0

    def _expect_not_within(self) -> None:
        """The lock is re-entrant, what it guards is not."""
        if self._changing == threading.get_ident():
            raise RuntimeError(f"tier {self._name!r} is called from within itself, by a signal handler or a finaliser")

    def _expect_open(self) -> Tensor:
        if self._buffer is None:
            raise TierUnavailableError(f"tier {self._name!r} is closed")
        return self._buffer

    @contextmanager
    def _device_errors(self, verb: str) -> Iterator[None]:
        """Maps the errors that torch raises for a device to those of a tier."""
        try:
            yield
        except RuntimeError as exc:
            raise TierUnavailableError(f"tier {self._name!r} cannot {verb} its device: {exc}") from exc
