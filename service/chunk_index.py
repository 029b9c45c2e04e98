"""Which chunks the service holds, in order of writing, and what has changed: for lists and for followers."""

from __future__ import annotations

import secrets
import threading
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

from ..core import ChunkInfo, ChunkKey
from .access.tenants import client_namespace
from .served_store import ServedStore

SIZE_STEP_BYTES = 4096
_LOGGED_CHANGES = 1 << 16


def listed_bytes(container_bytes: int) -> int:
    """What a chunk counts for in lists, whatever tier it is in: its container, in steps of 4 KiB."""
    return -(-container_bytes // SIZE_STEP_BYTES) * SIZE_STEP_BYTES


@dataclass(slots=True)
class ListedChunk:
    """A chunk of the service. `sequence` orders writes of its pool; `etag` is None until it was put or read here."""

    key: ChunkKey
    nbytes: int
    info: ChunkInfo
    sequence: int
    tiers: set[str] = field(default_factory=set)
    etag: str | None = None
    reads: int = 0

    @property
    def pool(self) -> str:
        return client_namespace(self.info.namespace)[0]


@dataclass(frozen=True, slots=True)
class Change:
    """A chunk is there from now on (or written anew), or is gone (`chunk` None)."""

    sequence: int
    key: ChunkKey
    chunk: ListedChunk | None


class _Pool:
    """Chunks and changes of one pool, numbered by themselves: nothing here tells of others, or grows with them."""

    def __init__(self) -> None:
        self.chunks: OrderedDict[ChunkKey, ListedChunk] = OrderedDict()
        self.log: deque[Change] = deque(maxlen=_LOGGED_CHANGES)
        self.sequence = 0
        self.reads: Counter[str] = Counter()  # of each namespace, since the service started


class OnMove(Protocol):
    def __call__(self, chunk: ListedChunk, tier: str, token_ids: Sequence[int], *, is_there: bool) -> None: ...


class ChunkIndex:
    """Follows a `ServedStore`. Every method may be called from any thread.

    Attributes
    ----------
    epoch : names this run of the service; sequences of another run mean nothing, and those of another pool neither.
    """

    def __init__(self, store: ServedStore) -> None:
        self.epoch = secrets.token_hex(4)
        self._store = store
        self._lock = threading.Lock()
        self._chunks: dict[ChunkKey, ListedChunk] = {}
        self._pools: defaultdict[str, _Pool] = defaultdict(_Pool)
        self._generation = store.generation
        self._arriving: dict[ChunkKey, tuple[ListedChunk, Sequence[int]]] = {}
        self._on_move: OnMove | None = None
        with self._lock:
            self._rescan()

    def sequence(self, pool: str) -> int:
        """Of the pool's last change."""
        with self._lock:
            return self._pools[pool].sequence

    def __len__(self) -> int:
        return len(self._chunks)

    def get(self, key: ChunkKey) -> ListedChunk | None:
        return self._chunks.get(key)

    def read(self, chunk: ListedChunk) -> None:
        """A client has read the chunk."""
        with self._lock:
            chunk.reads += 1
            self._pools[chunk.pool].reads[chunk.info.namespace] += 1

    def namespace_reads(self, pool: str | None) -> Counter[str]:
        """Reads by namespace as the store names it, of one pool or of all, since the service started."""
        with self._lock:
            pools = list(self._pools.values()) if pool is None else [self._pools[pool]]
            return sum((each.reads for each in pools), Counter())

    def follow(self, on_move: OnMove) -> None:
        """From now on `on_move` is told of each chunk that enters or leaves a tier, and of its tokens if it was put."""
        self._on_move = on_move

    def expect(self, key: ChunkKey, info: ChunkInfo, token_ids: Sequence[int]) -> None:
        """A put of this chunk is under way; `written` or `not_written` says what came of it."""
        with self._lock:
            before, _ = self._arriving.get(key, (None, ()))
            tiers = set() if before is None else before.tiers
            self._arriving[key] = ListedChunk(key, 0, info, 0, tiers), token_ids

    def not_written(self, key: ChunkKey) -> None:
        """A put of this chunk was refused, or failed, maybe after a tier had taken it."""
        with self._lock:
            self._catch_up()
            arriving, _ = self._arriving.pop(key, (None, ()))
            if arriving is not None and arriving.tiers and key not in self._chunks:
                self._enter(arriving)

    def written(self, key: ChunkKey, nbytes: int, info: ChunkInfo, etag: str) -> None:
        """A put of this chunk has succeeded."""
        with self._lock:
            self._catch_up()
            arriving, _ = self._arriving.pop(key, (None, ()))
            chunk = self._chunks.get(key)
            known = chunk or arriving
            tiers = set() if known is None else known.tiers
            self._enter(ListedChunk(key, nbytes, info, 0, tiers, etag, 0 if chunk is None else chunk.reads))

    def catch_up(self) -> None:
        """Follows what the store has done since the last call."""
        with self._lock:
            self._catch_up()

    def chunks(self, pool: str, *, after: int = 0, limit: int = 1000) -> list[ListedChunk]:
        """Chunks of a pool, least recently written first, of higher sequence than `after`."""
        self.catch_up()
        with self._lock:
            later = (each for each in self._pools[pool].chunks.values() if each.sequence > after and each.tiers)
            return list(islice(later, limit))

    def count(self, pool: str) -> int:
        """Chunks of a pool."""
        self.catch_up()
        with self._lock:
            return len(self._pools[pool].chunks)

    def changes(self, pool: str, after: int, *, limit: int = 1000) -> tuple[list[Change], int] | None:
        """Changes of a pool since `after`, and the sequence up to which these are all; None if they are forgotten."""
        self.catch_up()
        with self._lock:
            known = self._pools[pool]
            if after < known.sequence and (not known.log or known.log[0].sequence > after + 1):
                return None
            later = (change for change in known.log if change.sequence > after) if after < known.sequence else ()
            found = list(islice(later, limit))
            return found, found[-1].sequence if len(found) == limit else known.sequence

    def keys_in(self, namespace: str) -> list[ChunkKey]:
        """Store keys of a namespace as the store names it."""
        self.catch_up()
        with self._lock:
            found = self._pools[client_namespace(namespace)[0]].chunks.values()
            return [chunk.key for chunk in found if chunk.info.namespace == namespace]

    def _catch_up(self) -> None:
        if self._generation != self._store.generation:
            self._generation = self._store.generation
            self._rescan()
        for move in self._store.take_changes():
            arriving, token_ids = self._arriving.get(move.key, (None, ()))
            chunk = self._chunks.get(move.key) or arriving
            if chunk is None and move.entry is not None:  # of the service itself, or of another process
                chunk = ListedChunk(move.key, listed_bytes(move.entry.nbytes), move.entry.info, 0)
                self._enter(chunk)
            if chunk is None:
                continue
            if chunk is arriving and move.entry is not None:
                chunk.nbytes = listed_bytes(move.entry.nbytes)  # until `written` knows better
            if self._on_move is not None:
                self._on_move(arriving or chunk, move.tier, token_ids, is_there=move.is_there)
            if move.is_there:
                chunk.tiers.add(move.tier)
            else:
                chunk.tiers.discard(move.tier)
                if not chunk.tiers and chunk is not arriving:
                    self._gone((move.key,))

    def _enter(self, chunk: ListedChunk) -> None:
        """As the last that was written."""
        pool = self._pools[chunk.pool]
        pool.sequence += 1
        chunk.sequence = pool.sequence
        self._chunks[chunk.key] = pool.chunks[chunk.key] = chunk
        pool.chunks.move_to_end(chunk.key)
        pool.log.append(Change(pool.sequence, chunk.key, chunk))

    def _gone(self, keys: Iterable[ChunkKey]) -> None:
        for key in keys:
            chunk = self._chunks.pop(key)
            pool = self._pools[chunk.pool]
            pool.chunks.pop(key, None)
            pool.sequence += 1
            pool.log.append(Change(pool.sequence, key, None))

    def _rescan(self) -> None:
        """Compares with what the tiers list: at the start, and after tiers changed."""
        found: dict[ChunkKey, set[str]] = {}
        for tier in reversed(self._store.tiers):  # the slowest holds nearly all, in order of writing
            for entry in tier.entries():
                if entry.key not in self._chunks:
                    self._enter(ListedChunk(entry.key, listed_bytes(entry.nbytes), entry.info, 0))
                found.setdefault(entry.key, set()).add(tier.name)
        for key, chunk in self._chunks.items():
            chunk.tiers = found.get(key, set())
        self._gone([key for key, chunk in self._chunks.items() if not chunk.tiers])
