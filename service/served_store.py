"""The store of the service, whose tiers and quotas may change while it serves."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

from ..core import NOTHING, ChunkInfo, ChunkKey, EncodedChunk, Entry, Tier
from ..kvstore.placement.catalog import PlacementChange
from ..kvstore.placement.quota import Quota
from ..kvstore.stats import StoreStats, TierStats
from ..kvstore.store import KVStore

_CAPABILITIES = ("get_layers", "may_stall", "cached", "changes", "find", "recheck_s", "counts", "check", "flush")
_STATE = {"name", "used_bytes", "capacity_bytes", "chunks", "held_bytes", "namespace_bytes"}
COUNTERS = tuple(field.name for field in fields(TierStats) if field.name not in _STATE)


class _KeptOpen:
    """A tier that stays open when a store that used it closes. Its optional capabilities are those of the tier."""

    def __init__(self, tier: Tier) -> None:
        self._tier = tier
        self.name = tier.name
        self.capacity_bytes = tier.capacity_bytes

    @property
    def used_bytes(self) -> int:
        return self._tier.used_bytes

    def get(self, key: ChunkKey) -> EncodedChunk | None:
        return self._tier.get(key)

    def put(self, key: ChunkKey, blob: EncodedChunk, info: ChunkInfo = NOTHING) -> int | None:
        return self._tier.put(key, blob, info)

    def delete(self, key: ChunkKey) -> bool:
        return self._tier.delete(key)

    def __contains__(self, key: object) -> bool:
        return key in self._tier

    def entries(self) -> list[Entry]:
        return self._tier.entries()

    def close(self) -> None:
        """Leaves the tier open."""


def kept_open(tier: Tier) -> Tier:
    """The tier, but closing it does nothing. A class is made for it: protocols are recognised by what a class has."""

    def forward(name: str) -> property:
        return property(lambda self: getattr(self._tier, name))

    found = {name: forward(name) for name in _CAPABILITIES if hasattr(tier, name)}
    made: Tier = type("KeptOpenTier", (_KeptOpen,), found)(tier)
    return made


class ServedStore:
    """A `KVStore` that is replaced when its tiers or quotas change; no chunk leaves a tier by that.

    What policies have learned of the order of eviction begins anew then. Every method may be called from any thread.

    Parameters
    ----------
    tiers : fastest first; owned by this object.
    """

    def __init__(self, tiers: Sequence[Tier], *, quotas: Mapping[str, Quota], timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._changing = threading.Lock()
        self._condition = threading.Condition()  # of what follows
        self._users = 0
        self._blocked = False
        self._tiers = list(tiers)
        self._quotas = dict(quotas)
        self._store = self._open()
        self._former: list[StoreStats] = []
        self.generation = 0

    @property
    def tiers(self) -> tuple[Tier, ...]:
        return tuple(self._tiers)

    @contextmanager
    def use(self) -> Iterator[KVStore]:
        """The store, which is not replaced meanwhile. For calls of the store, not for transfers to clients."""
        with self._condition:
            self._condition.wait_for(lambda: not self._blocked)
            self._users += 1
            store = self._store
        try:
            yield store
        finally:
            self._leave()

    def get_at_hand(self, key: ChunkKey) -> EncodedChunk | None:
        """As `KVStore.get_at_hand`; None also while the store is being replaced."""
        with self._use_now() as store:
            return None if store is None else store.get_at_hand(key)

    def locate_at_hand(self, keys: Sequence[ChunkKey]) -> tuple[str, ...] | None:
        """As `KVStore.locate_at_hand`; None also while the store is being replaced."""
        with self._use_now() as store:
            return None if store is None else store.locate_at_hand(keys)

    def replace(self, tiers: Sequence[Tier] | None = None, quotas: Mapping[str, Quota] | None = None) -> None:
        """Goes on with other tiers or quotas. Closes tiers that are no longer among them, after their chunks moved on.

        Raises
        ------
        ValueError : the store refuses them; nothing has changed.
        """
        with self._changing:
            old_tiers, old_quotas = self._tiers, self._quotas
            new_tiers = old_tiers if tiers is None else list(tiers)
            gone = [tier for tier in old_tiers if tier not in new_tiers]
            with self._condition:
                self._blocked = True
                self._condition.wait_for(lambda: not self._users)
                try:
                    self._tiers, self._quotas = new_tiers, old_quotas if quotas is None else dict(quotas)
                    try:
                        store = self._open()
                    except ValueError:
                        self._tiers, self._quotas = old_tiers, old_quotas
                        raise
                    former, self._store = self._store, store
                    self._former.append(former.stats())
                    self.generation += 1
                    former.close()
                finally:
                    self._blocked = False
                    self._condition.notify_all()
            for tier in gone:
                self._hand_over(tier)
                tier.close()

    def take_changes(self) -> list[PlacementChange]:
        """What entered or left tiers since the last call, in order."""
        with self.use() as store:
            return store.take_placement_changes()

    def stats(self) -> StoreStats:
        """Counts since the service started, over all its stores."""
        with self.use() as store:
            now, former = store.stats(), list(self._former)
        for old in former:
            now = _added(now, old)
        return now

    def close(self) -> None:
        with self._changing:
            self._store.close()
            for tier in reversed(self._tiers):
                tier.close()

    @contextmanager
    def _use_now(self) -> Iterator[KVStore | None]:
        """As `use`, but gives None rather than wait."""
        store: KVStore | None = None
        if not self._blocked and self._condition.acquire(blocking=False):
            try:
                if not self._blocked:
                    self._users += 1
                    store = self._store
            finally:
                self._condition.release()
        try:
            yield store
        finally:
            if store is not None:
                self._leave()

    def _leave(self) -> None:
        with self._condition:
            self._users -= 1
            self._condition.notify_all()

    def _open(self) -> KVStore:
        store = KVStore([kept_open(tier) for tier in self._tiers], quotas=self._quotas, timeout_s=self._timeout_s)
        store.take_placement_changes()  # they are noted from the first call on
        return store

    def _hand_over(self, tier: Tier) -> None:
        """What only a detached tier holds is put into the others, as far as they take it within the time of a drain."""
        until_s = time.monotonic() + self._timeout_s
        for entry in tier.entries():
            if time.monotonic() > until_s:
                return
            with self.use() as store:
                blob = tier.get(entry.key) if entry.key not in store else None
                if blob is not None:
                    store.put_encoded(entry.key, blob, entry.info)


def _added(now: StoreStats, old: StoreStats) -> StoreStats:
    before = {tier.name: tier for tier in old.tiers}
    tiers = tuple(_added_tier(tier, before[tier.name]) if tier.name in before else tier for tier in now.tiers)
    sums: dict[str, Any] = {
        name: getattr(now, name) + getattr(old, name)
        for name in ("lookups", "writes", "overdue_pins", "background_errors", "refused_prefetches", "uncertified_uses")
    }
    for name in ("misses", "puts"):
        one, other = getattr(now, name), getattr(old, name)
        sums[name] = {key: one.get(key, 0) + other.get(key, 0) for key in {*one, *other}}
    return replace(now, tiers=tiers, **sums)


def _added_tier(now: TierStats, old: TierStats) -> TierStats:
    """`arrivals` of what was there already are not counted again."""
    sums = {name: getattr(now, name) + getattr(old, name) for name in COUNTERS}
    sums["arrivals"] -= old.chunks
    sums["added_bytes"] -= old.held_bytes
    return replace(now, **sums)
