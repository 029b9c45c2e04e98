"""LMCache's objects in a `KVStore`, as verified bytes. Imports no LMCache; never raises what a store may raise."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ...core import ChunkKey, EncodedChunk
from ...kvstore.encoding.copies import copy
from ...kvstore.store import KVStore
from ..serving.engine_calls import EngineCalls
from ..serving.worker.threads import compute_alone
from .keys import ObjectName, object_key

T = TypeVar("T")

_CODEC = "bytes"  # of no codec here: a store passes it through
_BYTES = "object"
_LAYOUT = "layout"
_MOST_THREADS = 4  # that share the objects of one task
_LOCK_S = 300.0  # LMCache unlocks within a request; a lock that it forgets must not hold a chunk for ever


class Buffer(NamedTuple):
    """Memory of an object.

    Attributes
    ----------
    data : `[bytes]` uint8, in host memory that is LMCache's until the task ends.
    layout : precision and shape as text; only what was stored from the same is loaded.
    """

    data: Tensor
    layout: str


class Saved(NamedTuple):
    """What a call of `ObjectStore.save` did.

    Attributes
    ----------
    is_complete : every object is stored now.
    nbytes : bytes of the objects that were written.
    new : index and bytes of each object that was not announced before.
    """

    is_complete: bool
    nbytes: int
    new: tuple[tuple[int, int], ...]


class ObjectStore(EngineCalls):
    """What LMCache stores, finds, locks and loads. Every method may be called from any thread.

    A fault is logged, counted and a miss: LMCache's threads must not end with us.

    Parameters
    ----------
    store : owned, closed by `close`.
    model_id, salt : see `object_key`.
    load_timeout_s : longest time that a load may take; later objects are misses.
    threads : that share the objects of a load or a save; None: one for each processor, four at most.
    """

    def __init__(
        self,
        store: KVStore,
        *,
        model_id: str = "",
        salt: str = "",
        load_timeout_s: float = 10.0,
        threads: int | None = None,
    ) -> None:
        super().__init__("LMCache")
        count = min(_MOST_THREADS, threads or _processors())
        self._threads = ThreadPoolExecutor(count, "kvloom-lmcache", initializer=compute_alone) if count > 1 else None
        self.store = store
        self._model_id = model_id
        self._salt = salt
        self._load_timeout_s = load_timeout_s
        self._lock = threading.Lock()  # of all that follows
        # Locks of LMCache, with when they were taken, oldest first.
        self._locks: dict[ChunkKey, list[tuple[float, AbstractContextManager[None]]]] = {}
        self._announced: dict[ChunkKey, tuple[ObjectName, int]] = {}
        store.take_placement_changes()  # from now on they are noted

    def key(self, name: ObjectName) -> ChunkKey:
        """Under which an object is stored."""
        return object_key(name, model_id=self._model_id, salt=self._salt)

    def find_and_lock(self, names: Sequence[ObjectName]) -> list[bool]:
        """Which of these are stored; those are not evicted until they are unlocked, or for five minutes."""
        self._end_overdue_locks()
        found = [self.guarded("a look-up", partial(self._find, self.key(name)), False) for name in names]
        self.count({"lookups": 1, "lookup_objects": len(names), "hit_objects": sum(found)})
        return found

    def unlock(self, names: Sequence[ObjectName]) -> None:
        """Ends one lock of each."""
        for name in names:
            self.guarded("an unlock", partial(self._unlock, self.key(name)), None)

    def load(self, names: Sequence[ObjectName], buffers: Sequence[Buffer]) -> list[bool]:
        """Copy stored objects into memory; which were. The others' memory is left as it was."""
        begun_s = time.monotonic()

        def load(name: ObjectName, buffer: Buffer) -> bool:
            if time.monotonic() - begun_s > self._load_timeout_s:
                self.count({"late_objects": 1})
                return False
            return self.guarded("a load", partial(self._load, self.key(name), buffer), False)

        loaded = self._of_each(load, names, buffers)
        self.count({"loads": 1, "loaded_objects": sum(loaded), "lost_objects": len(loaded) - sum(loaded)})
        return loaded

    def save(self, names: Sequence[ObjectName], buffers: Sequence[Buffer]) -> Saved:
        """Store objects; one that is stored already is not written again."""

        def save(name: ObjectName, buffer: Buffer) -> int | None:
            return self.guarded("a store", partial(self._save, self.key(name), buffer), None)

        new, nbytes, is_complete = [], 0, True
        for i, written in enumerate(self._of_each(save, names, buffers)):
            if written is None:
                self.count({"failed_saves": 1})
                is_complete = False
                continue
            key, size = self.key(names[i]), buffers[i].data.nbytes
            nbytes += written
            with self._lock:
                if key not in self._announced:
                    self._announced[key] = names[i], size
                    new.append((i, size))
        return Saved(is_complete, nbytes, tuple(new))

    def delete(self, names: Sequence[ObjectName]) -> None:
        """Remove objects; `take_removed` tells of those that were announced."""
        for name in names:
            self.guarded("a delete", partial(self.store.delete, self.key(name)), False)
        self.count({"deletes": len(names)})

    def take_removed(self) -> list[tuple[ObjectName, int]]:
        """Announced objects, with their bytes, that are in no tier any more: evicted, deleted, expired or damaged."""

        def look() -> list[tuple[ObjectName, int]]:
            left = dict.fromkeys(each.key for each in self.store.take_placement_changes() if not each.is_there)
            with self._lock:
                candidates = [key for key in left if key in self._announced]
            gone = [key for key in candidates if key not in self.store]
            with self._lock:
                return [self._announced.pop(key) for key in gone if key in self._announced]

        return self.guarded("following evictions", look, [])

    def close(self) -> None:
        """End all locks and close the store."""
        with self._lock:
            locks, self._locks = self._locks, {}
        for each in locks.values():
            for _, pin in each:
                pin.__exit__(None, None, None)
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        self.store.close()

    def _of_each(
        self, work: Callable[[ObjectName, Buffer], T], names: Sequence[ObjectName], buffers: Sequence[Buffer]
    ) -> list[T]:
        """`work` of each object, shared among threads; returns when all have ended, so that no buffer is used later."""
        pairs = list(zip(names, buffers, strict=True))
        if self._threads is None or len(pairs) < 2:
            return [work(*pair) for pair in pairs]
        futures = [self._threads.submit(work, *pair) for pair in pairs]
        return [future.result() for future in futures]

    def _find(self, key: ChunkKey) -> bool:
        pin = self.store.pinned([key], deadline_s=_LOCK_S)
        pin.__enter__()  # before the look-up, so that what it finds stays
        is_there = False
        try:
            is_there = self.store.match([key]) == 1
        finally:
            if not is_there:
                pin.__exit__(None, None, None)
        if is_there:
            with self._lock:
                self._locks.setdefault(key, []).append((time.monotonic(), pin))
        return is_there

    def _unlock(self, key: ChunkKey) -> None:
        with self._lock:
            held = self._locks.get(key)
            if not held:
                return
            _, pin = held.pop()
            if not held:
                del self._locks[key]
        pin.__exit__(None, None, None)

    def _end_overdue_locks(self) -> None:
        before_s = time.monotonic() - _LOCK_S
        overdue = []
        with self._lock:
            for key, held in list(self._locks.items()):
                if held[0][0] >= before_s:
                    break
                overdue.append(key)
        for key in overdue:
            self._unlock(key)
        self.count({"overdue_locks": len(overdue)})

    def _load(self, key: ChunkKey, buffer: Buffer) -> bool:
        blob = self.store.get_encoded(key)
        if blob is None:
            return False
        if blob.codec != _CODEC or blob.meta.get(_LAYOUT) != buffer.layout or blob.nbytes != buffer.data.nbytes:
            # What is stored under this name has another precision or shape: it makes room for what is asked for.
            self.count({"other_layouts": 1})
            self.store.delete(key)
            return False
        copy([(buffer.data, blob.tensors[_BYTES])])
        return True

    def _save(self, key: ChunkKey, buffer: Buffer) -> int:
        if key in self.store:
            return 0
        blob = EncodedChunk(_CODEC, {_BYTES: buffer.data}, {_LAYOUT: buffer.layout}, leased=True)
        self.store.put_encoded(key, blob)
        self.count({"saved_objects": 1})
        return buffer.data.nbytes


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def bytes_of(memory: memoryview | bytes | bytearray) -> Tensor:
    """`[bytes]` uint8 that shares LMCache's memory; a copy if that is read-only, as torch knows no such tensors."""
    view = memoryview(memory)
    if not view.nbytes:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(bytearray(view) if view.readonly else view, dtype=torch.uint8)
