"""LMCache's storage manager, driven over pipes: one JSON object a line in and out. Runs in LMCache's own environment.

    python -m kvloom.bench.tiers.lmcache_peer FOLDER POOL_BYTES THREADS

    {"do": "put", "where": "disk", "size_bytes": N, "count": n}   store n chunks; the seconds it took
    {"do": "get", "where": "disk", "copy": true}                  read them; into the caller's buffers, or references
    {"do": "drop_host"}                                           forget them in memory, keep them on disk
    {"do": "clear"}                                               forget them altogether

Every answer is `{"seconds": ...}` or `{"error": ...}`; the first line, before any question, is `{"version": ...}`.
`where` is `host` or `disk`.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable

import torch
from lmcache.utils import CacheEngineKey
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.memory_management import MemoryFormat

from ..harness.lmcache_process import GIB, HIDDEN, LAYERS, serve, storage_manager

BACKENDS = {"host": "LocalCPUBackend", "disk": "LocalDiskBackend"}
POLL_S = 0.0001
DRAIN_S = 60.0


class Peer:
    """Chunks of random bytes in LMCache, and how long it takes for them.

    Parameters
    ----------
    folder : of its disk backend.
    pool_bytes : of the memory that its host backend takes when it starts.
    """

    def __init__(self, folder: str, pool_bytes: int) -> None:
        config = LMCacheEngineConfig.from_defaults(
            chunk_size=256,
            local_cpu=True,
            max_local_cpu_size=pool_bytes / GIB,
            local_disk=folder,
            max_local_disk_size=64.0,
        )
        self._manager = storage_manager(config)
        self._disk = self._manager.storage_backends[BACKENDS["disk"]]
        self._sources: list[torch.Tensor] = []
        self._targets: list[torch.Tensor] = []
        self._keys: list[CacheEngineKey] = []
        self._numbers = iter(range(sys.maxsize))

    def put(self, where: str, size_bytes: int, count: int) -> float:
        """Seconds from the caller's tensors until all chunks are stored; not synced, which LMCache never does."""
        self._prepare(size_bytes, count)
        self._keys = [CacheEngineKey("bench", 1, 0, next(self._numbers), torch.bfloat16) for _ in range(count)]
        shape = self._sources[0].shape
        location = None if where == "disk" else BACKENDS[where]  # None: in memory and on disk, as its engine does
        start = time.perf_counter()
        objects = self._manager.batched_allocate(shape, torch.bfloat16, count, MemoryFormat.KV_2LTD)
        for source, stored in zip(self._sources, objects, strict=True):
            stored.tensor.copy_(source)
        self._manager.batched_put(self._keys, objects, location=location)
        if where == "disk":
            self._drain(start + DRAIN_S)
        return time.perf_counter() - start

    def get(self, where: str, copy: bool) -> float:
        """Seconds until the caller has all chunks of the last put; then they are compared with what was put."""
        start = time.perf_counter()
        found = self._manager.batched_get(self._keys, location=BACKENDS[where])
        if copy:
            for target, stored in zip(self._targets, found, strict=True):
                target.copy_(stored.tensor)
        spent = time.perf_counter() - start
        order = list(range(len(found)))
        for i in random.Random(0).sample(order, min(4, len(order))):
            given = self._targets[i] if copy else found[i].tensor
            if not torch.equal(given.view(torch.uint8), self._sources[i].view(torch.uint8)):
                raise RuntimeError(f"LMCache gave back other bytes from {where} than were put")
        for stored in found:
            stored.ref_count_down()
        return spent

    def drop_host(self) -> float:
        """Forgets the chunks in memory, so that they come from disk."""
        self._manager.batched_remove(self._keys, [BACKENDS["host"]])
        return 0.0

    def clear(self) -> float:
        """Forgets the chunks everywhere."""
        self._manager.batched_remove(self._keys)
        self._keys = []
        return 0.0

    def close(self) -> None:
        self._manager.close()

    def _prepare(self, size_bytes: int, count: int) -> None:
        tokens = size_bytes // (2 * LAYERS * HIDDEN * 2)
        shape = torch.Size([2, LAYERS, tokens, HIDDEN])
        if len(self._sources) == count and self._sources[0].shape == shape:
            return
        generator = torch.Generator().manual_seed(0)
        words = shape.numel() // 4
        self._sources = [
            torch.randint(-(1 << 62), 1 << 62, (words,), generator=generator).view(torch.bfloat16).view(shape)
            for _ in range(count)
        ]
        self._targets = [torch.zeros_like(source) for source in self._sources]

    def _drain(self, deadline: float) -> None:
        """Returns once its threads have written everything. `exists_in_put_tasks` would cost them more than writing."""
        for key in self._keys:
            while not self._disk.contains(key):
                if time.perf_counter() > deadline:
                    raise RuntimeError(f"LMCache has not written a chunk after {DRAIN_S:.0f} s")
                time.sleep(POLL_S)


def start(folder: str, pool_bytes: str) -> tuple[dict[str, Callable[..., float]], Callable[[], None]]:
    peer = Peer(folder, int(pool_bytes))
    return {"put": peer.put, "get": peer.get, "drop_host": peer.drop_host, "clear": peer.clear}, peer.close


if __name__ == "__main__":
    serve(start)
