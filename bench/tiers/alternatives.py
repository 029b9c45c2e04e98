"""Stores to compare with: what a person would reach for instead, each set up as well as it can be.

All hold the same tensors in the same form (safetensors) under the same keys. A put is atomic for readers. `get` copies
into the caller's buffers, so that a store that only maps memory pays for reading it, and none pays for a copy that its
user could do without. None of them verifies what it reads, except kvloom.
"""

from __future__ import annotations

import json
import os
import sqlite3
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Protocol, TypeAlias

import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from ...core import ChunkKey, EncodedChunk
from ...evaluation.environment import usable
from ...kvstore.tiers.disk.tier import DiskTier
from ..harness.samples import copy_into, present

Tensors: TypeAlias = Mapping[str, Tensor]

MAP_BYTES = 1 << 40  # address space that LMDB may map; takes no memory
PAGE_BYTES = 1 << 16  # SQLite's largest page: best for large values
_DTYPES = {"BF16": torch.bfloat16, "I64": torch.int64}


class Store(Protocol):
    """Opened by `(folder, sync_each=...)`, in a folder that is there, on what an earlier one left."""

    def put(self, key: ChunkKey, tensors: Tensors) -> None:
        """Afterwards `get` finds it; with `sync_each` it has reached the device, too."""
        ...

    def sync(self) -> None:
        """Everything put so far has reached the device."""
        ...

    def get(self, key: ChunkKey, targets: Tensors) -> None:
        """Fills the caller's buffers; an error of some kind if the chunk is not there."""
        ...

    def close(self) -> None: ...


class KVLoom:
    """The disk tier alone, with every read verified. `batch` with a flush at the end, or `sync`."""

    def __init__(self, folder: Path, *, sync_each: bool) -> None:
        self._tier = DiskTier(folder / "tier", durability="sync" if sync_each else "batch")

    def put(self, key: ChunkKey, tensors: Tensors) -> None:
        self._tier.put(key, EncodedChunk("raw", tensors, {}, frozenset({"keys", "values"})))

    def sync(self) -> None:
        self._tier.flush()

    def get(self, key: ChunkKey, targets: Tensors) -> None:
        copy_into(targets, present(self._tier.get(key)).tensors)

    def close(self) -> None:
        self._tier.close()


class SafetensorsFiles:
    """One safetensors file for each chunk, written aside and renamed; read through a memory map."""

    def __init__(self, folder: Path, *, sync_each: bool) -> None:
        self._folder, self._sync_each = folder, sync_each
        self._unsynced: list[Path] = []

    def put(self, key: ChunkKey, tensors: Tensors) -> None:
        path, aside = self._folder / key.hex(), self._folder / f"{key.hex()}.new"
        save_file(dict(tensors), aside)
        if self._sync_each:
            _fsync(aside)
        else:
            self._unsynced.append(path)
        aside.rename(path)
        if self._sync_each:
            _fsync(self._folder)

    def sync(self) -> None:
        for path in self._unsynced:
            _fsync(path)
        self._unsynced.clear()
        _fsync(self._folder)

    def get(self, key: ChunkKey, targets: Tensors) -> None:
        copy_into(targets, load_file(self._folder / key.hex()))

    def close(self) -> None:
        """Nothing is open."""


class Lmdb:
    """LMDB, a transaction for each put; read out of the map without a copy in between."""

    def __init__(self, folder: Path, *, sync_each: bool) -> None:
        import lmdb

        self._env = lmdb.open(str(folder), map_size=MAP_BYTES, sync=sync_each, metasync=sync_each)

    def put(self, key: ChunkKey, tensors: Tensors) -> None:
        with self._env.begin(write=True) as transaction:
            transaction.put(key, save(dict(tensors)))

    def sync(self) -> None:
        self._env.sync(True)

    def get(self, key: ChunkKey, targets: Tensors) -> None:
        with self._env.begin(buffers=True) as transaction:
            copy_into(targets, tensors_in(present(transaction.get(key))))

    def close(self) -> None:
        self._env.close()


class Sqlite:
    """SQLite with a write-ahead log; `synchronous` FULL syncs it with every put, NORMAL at a checkpoint at the end."""

    def __init__(self, folder: Path, *, sync_each: bool) -> None:
        self._database = sqlite3.connect(folder / "chunks.sqlite", isolation_level=None)
        self._database.execute(f"PRAGMA page_size = {PAGE_BYTES}")
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute(f"PRAGMA mmap_size = {MAP_BYTES}")  # cut to what the library allows
        self._database.execute(f"PRAGMA synchronous = {'FULL' if sync_each else 'NORMAL'}")
        self._database.execute("CREATE TABLE IF NOT EXISTS chunks (key BLOB PRIMARY KEY, data BLOB)")

    def put(self, key: ChunkKey, tensors: Tensors) -> None:
        self._database.execute("INSERT OR REPLACE INTO chunks VALUES (?, ?)", (key, save(dict(tensors))))

    def sync(self) -> None:
        self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def get(self, key: ChunkKey, targets: Tensors) -> None:
        (data,) = present(self._database.execute("SELECT data FROM chunks WHERE key = ?", (key,)).fetchone())
        copy_into(targets, tensors_in(data))

    def close(self) -> None:
        self._database.close()


KVLOOM = "kvloom DiskTier"
LMDB = "LMDB"
STORES: Mapping[str, Callable[..., Store]] = MappingProxyType(
    {KVLOOM: KVLoom, "file per chunk (safetensors)": SafetensorsFiles, LMDB: Lmdb, "SQLite": Sqlite}
)


def installed_stores() -> dict[str, Callable[..., Store]]:
    """Those of `STORES` that can be opened here."""
    return {name: store for name, store in STORES.items() if name != LMDB or usable("lmdb")}


def tensors_in(data: bytes | memoryview) -> dict[str, Tensor]:
    """Tensors in a safetensors container, without a copy: valid as long as `data` is, and not to be written to."""
    start = 8 + int.from_bytes(data[:8], "little")
    fields = json.loads(bytes(data[8:start]))
    tensors = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a buffer that cannot be written to, and is not
        for name, entry in fields.items():
            begin, end = entry["data_offsets"]
            dtype = _DTYPES[entry["dtype"]]
            flat = torch.frombuffer(data, dtype=dtype, count=(end - begin) // dtype.itemsize, offset=start + begin)
            tensors[name] = flat.view(entry["shape"])
    return tensors


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
