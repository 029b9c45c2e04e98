"""KVLoomL2Adapter, which LMCache's server loads with `--l2-adapter` of type `plugin`.

    lmcache server --l1-size-gb 20 --eviction-policy LRU --l2-adapter '{"type": "plugin",
      "module_path": "kvloom.connectors.lmcache", "class_name": "KVLoomL2Adapter",
      "adapter_params": {"disk_path": "kv-cache"}}'

The interface is LMCache's own (`L2AdapterInterface` of LMCache 0.5.6 and 0.5.7rc2): tasks are submitted, descriptors
tell of finished ones. What is stored and found is an `ObjectStore`'s.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from lmcache.lmcache_native import Bitmap
from lmcache.v1.distributed.internal_api import L2StoreResult
from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface

from ...kvstore.store import KVStore
from ..serving.worker.store_setup import open_tiers
from .object_store import Buffer, ObjectStore, bytes_of
from .settings import LMCacheSettings
from .tasks import TaskQueue

_LOG = logging.getLogger("kvloom")


class KVLoomL2Adapter(L2AdapterInterface):
    """LMCache's objects in kvloom's tiers.

    Parameters
    ----------
    params : `LMCacheSettings`.
    l1_memory_desc : LMCache's memory, which is not registered anywhere here.

    Raises
    ------
    ValueError : a setting is wrong.
    TierError : a tier cannot be used.
    """

    def __init__(self, params: dict[str, Any], l1_memory_desc: Any = None) -> None:
        super().__init__()  # kvloom evicts by itself: LMCache is told no capacity
        settings = LMCacheSettings.of(params)
        self._is_remote = settings.remote_url is not None
        self._objects = ObjectStore(
            KVStore(open_tiers(settings), timeout_s=settings.load_timeout_s),
            model_id=settings.model_id or "",
            salt=settings.salt,
            load_timeout_s=settings.load_timeout_s,
        )
        self._stores: TaskQueue[L2StoreResult] = TaskQueue("store")
        self._lookups: TaskQueue[Bitmap] = TaskQueue("look-up")
        self._loads: TaskQueue[Bitmap] = TaskQueue("load")

    # ----------------------------------------------------------------------------------------------- descriptors

    def get_store_event_fd(self) -> int:
        return self._stores.event_fd

    def get_lookup_and_lock_event_fd(self) -> int:
        return self._lookups.event_fd

    def get_load_event_fd(self) -> int:
        return self._loads.event_fd

    # ----------------------------------------------------------------------------------------------------- tasks

    def submit_store_task(self, keys: list[Any], objects: list[Any]) -> int:
        return self._stores.submit(lambda: self._store(keys, objects), lambda: L2StoreResult(False, 0))

    def pop_completed_store_tasks(self) -> dict[int, L2StoreResult]:
        return self._stores.pop_all()

    def submit_lookup_and_lock_task(self, keys: list[Any], group_layout_descs: dict[int, Any]) -> int:
        return self._lookups.submit(lambda: _bits(self._objects.find_and_lock(keys)), lambda: Bitmap(len(keys)))

    def query_lookup_and_lock_result(self, task_id: int) -> Bitmap | None:
        return self._lookups.pop(task_id)

    def submit_unlock(self, keys: list[Any]) -> None:
        self._objects.unlock(keys)

    def submit_load_task(self, keys: list[Any], objects: list[Any]) -> int:
        return self._loads.submit(lambda: self._load(keys, objects), lambda: Bitmap(len(keys)))

    def query_load_result(self, task_id: int) -> Bitmap | None:
        return self._loads.pop(task_id)

    def delete(self, keys: list[Any]) -> None:
        """Remove objects, as LMCache's quotas and its HTTP interface ask for."""
        self._objects.delete(keys)
        self._tell_of_removed()

    # ---------------------------------------------------------------------------------------------------- status

    def get_memory_tags(self) -> Any:
        """What LMCache 0.5.7 and later asks: storage, on this host unless a remote tier is among the tiers."""
        from lmcache.v1.distributed.api import MemoryResidency, MemorySegment, MemoryTags

        return MemoryTags(MemorySegment.STORAGE, MemoryResidency.REMOTE if self._is_remote else MemoryResidency.LOCAL)

    def report_status(self) -> dict[str, Any]:
        """Counts since the start, and of each tier; for LMCache's `/status`."""
        stats = self._objects.store.stats()
        return {
            "is_healthy": all(queue.is_alive for queue in (self._stores, self._lookups, self._loads)),
            "type": type(self).__name__,
            "tiers": [tier.name for tier in self._objects.store.tiers],
            "misses": dict(stats.misses),
            "locked": stats.pinned,
            **self._objects.counts(),
        }

    def close(self) -> None:
        """Finish what was submitted, and close the store."""
        for queue in (self._stores, self._lookups, self._loads):
            queue.close()
        _LOG.info("kvloom is detached from LMCache: %s", dict(self._objects.counts()))
        self._objects.close()

    def _store(self, keys: Sequence[Any], objects: Sequence[Any]) -> L2StoreResult:
        saved = self._objects.save(keys, [_buffer(each) for each in objects])
        if saved.new:
            self._notify_keys_stored([keys[i] for i, _ in saved.new], [nbytes for _, nbytes in saved.new])
        self._tell_of_removed()
        return L2StoreResult(saved.is_complete, saved.nbytes)

    def _load(self, keys: Sequence[Any], objects: Sequence[Any]) -> Bitmap:
        loaded = self._objects.load(keys, [_buffer(each) for each in objects])
        if any(loaded):
            self._notify_keys_accessed([key for key, is_there in zip(keys, loaded, strict=True) if is_there])
        self._tell_of_removed()
        return _bits(loaded)

    def _tell_of_removed(self) -> None:
        if removed := self._objects.take_removed():
            self._notify_keys_deleted([name for name, _ in removed], [nbytes for _, nbytes in removed])


def _buffer(stored: Any) -> Buffer:
    """Memory and layout of a `MemoryObj`."""
    meta = stored.metadata
    kinds = zip(meta.dtypes or [meta.dtype], meta.shapes or [meta.shape], strict=True)
    layout = "; ".join(f"{str(dtype).removeprefix('torch.')} {list(shape)}" for dtype, shape in kinds)
    return Buffer(bytes_of(stored.byte_array), layout)


def _bits(flags: Sequence[bool]) -> Bitmap:
    bitmap = Bitmap(len(flags))
    for i, flag in enumerate(flags):
        if flag:
            bitmap.set(i)
    return bitmap
