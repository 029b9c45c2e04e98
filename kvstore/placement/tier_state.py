"""One tier: the way to it, and what is known of it: which chunks are there, whose they are, and which goes first."""

from __future__ import annotations

import heapq
import math
import threading
from collections import Counter, deque
from collections.abc import Callable, Container, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeVar

from ...core import ChunkInfo, ChunkKey, Entry, Tier
from ..capabilities import HoldsChunks, ReadsCached, ReportsChanges
from ..eviction.admission import AdmissionPolicy
from ..eviction.policy import EvictionPolicy
from ..guard.lane import Lane
from ..stats import TierStats
from .quota import Quota

T = TypeVar("T")

_STRIPES = 64


@dataclass(slots=True)
class Held:
    """A chunk in the books of a level: what it takes there, and how often it was read there."""

    nbytes: int
    info: ChunkInfo
    reads: int = 0

    @property
    def expires_at_s(self) -> float:
        """Infinite for never."""
        return math.inf if self.info.expires_at_s is None else self.info.expires_at_s


class Room:
    """The chunks of one tier that share a quota, and the policy that orders them.

    Every namespace with a quota has a room, all others share one. So the chunk to evict is found without looking at
    those of rooms that need not give any.
    """

    def __init__(self, policy: EvictionPolicy, quota: Quota, capacity_bytes: int | None) -> None:
        self.policy = policy
        self.reserve_bytes, self.limit_bytes = 0, math.inf
        if capacity_bytes is not None:
            self.reserve_bytes = math.ceil(quota.reserve_ratio * capacity_bytes)
            if quota.limit_ratio < 1:  # otherwise the tier itself is the limit
                self.limit_bytes = math.floor(quota.limit_ratio * capacity_bytes)
        self.used_bytes = 0

    @property
    def spare_bytes(self) -> int:
        """What it holds beyond its reserve."""
        return self.used_bytes - self.reserve_bytes

    @property
    def is_over(self) -> bool:
        return self.used_bytes > self.limit_bytes


class Level:
    """A tier, the way to it, and its books. The books are guarded by the lock of `Books`, and change in one step.

    Attributes
    ----------
    lane : the way to the tier if it may stall; given once, by `Clerk`.
    keys : chunks in the tier, least recently written first.
    leaving : keys that a thread is about to evict, so that another thread picks another victim.
    inserts : chunks that are on their way into the tier.
    shared : the tier, if other processes write to it too.
    collecting : held while changes of other processes are collected and applied, so that this is done in order.
    news : such changes that were collected and are not yet applied; guarded by `collecting`.
    says_sizes : every `put` so far has said what the chunk takes; otherwise it is taken for the bytes of its tensors.
    """

    def __init__(
        self,
        tier: Tier,
        policy: Callable[[], EvictionPolicy],
        admission: AdmissionPolicy,
        quotas: Mapping[str, Quota],
    ) -> None:
        self.tier = tier
        self.lane: Lane | None = None
        self._stripes = [threading.Lock() for _ in range(_STRIPES)]
        self.admission = admission
        self.keys: dict[ChunkKey, Held] = {}
        self.leaving: set[ChunkKey] = set()
        self.inserts = 0
        self.shared = tier if isinstance(tier, ReportsChanges) else None
        self._cached = tier.cached if isinstance(tier, ReadsCached) else None
        self.collecting = threading.Lock()
        self.news: deque[Entry | ChunkKey] = deque()
        self.says_sizes = True
        self.counts: Counter[str] = Counter()
        self._common = Room(policy(), Quota(), tier.capacity_bytes)
        self._rooms = {name: Room(policy(), quota, tier.capacity_bytes) for name, quota in quotas.items()}
        self._namespace_bytes: Counter[str] = Counter()
        self._expiring: list[tuple[float, ChunkKey]] = []  # a heap, with chunks that are gone or written anew

    @property
    def answers(self) -> bool:
        """False while the tier is left alone, so that what it holds cannot be had."""
        return self.lane is None or not self.lane.refuses

    def call(self, operation: Callable[[Tier], T], *, writes: ChunkKey | None = None, is_brief: bool = False) -> T:
        """Every call of the tier that may wait for a device; see `Lane.run`."""
        if self.lane is None:
            return operation(self.tier)
        return self.lane.run(operation, writes=writes, is_brief=is_brief)

    def call_at_once(self, operation: Callable[[HoldsChunks], T]) -> T | None:
        """What reading gives if it need not wait; None if it must, or has nothing.

        A call through the lane wakes up another thread, which takes longer than to read a megabyte of the page cache.
        """
        if self._cached is None or self.lane is None or self.lane.refuses:
            return None
        try:
            return operation(self._cached)
        except BlockingIOError:
            return None

    @property
    def has_changes(self) -> bool:
        """Whether other processes may have changed what the tier holds."""
        return bool(self.news) or self._cached is None or self._cached.has_changes()

    def stripe(self, key: ChunkKey) -> AbstractContextManager[object]:
        """A lock that 1/64 of all keys share; see `Clerk`."""
        lock = self._stripes[key[-1] % _STRIPES]
        return lock if self.lane is None else self.lane.hold(lock)

    def doubtful(self) -> frozenset[ChunkKey]:
        """Chunks that the tier may hold until it answers, although they are in no books."""
        return frozenset() if self.lane is None else self.lane.doubtful()

    def close(self) -> None:
        self.tier.close() if self.lane is None else self.lane.close()

    def room(self, namespace: str) -> Room:
        """The quota of `team` is that of `team/...` too, as far as those have none of their own."""
        found = self._rooms.get(namespace)
        return self._rooms.get(namespace.partition("/")[0], self._common) if found is None else found

    def most_bytes(self, namespace: str) -> float:
        """What a chunk may take at most, if all others could go."""
        capacity_bytes = self.tier.capacity_bytes
        limit_bytes = self.room(namespace).limit_bytes
        return limit_bytes if capacity_bytes is None else min(capacity_bytes, limit_bytes)

    @property
    def held_bytes(self) -> int:
        return self._common.used_bytes + sum(room.used_bytes for room in self._rooms.values())

    def add(self, key: ChunkKey, nbytes: int, info: ChunkInfo) -> Held | None:
        """Enters a chunk that was written; what was in its place."""
        old = self.keys.pop(key, None)
        room = self.room(info.namespace)
        if old is not None:
            self._account(old, -1)
            if self.room(old.info.namespace) is not room:
                self.room(old.info.namespace).policy.remove(key)
        held = Held(nbytes, info, 0 if old is None else old.reads)
        self.keys[key] = held
        self._account(held, 1)
        room.policy.add(key, nbytes, info.after, info.recompute_s)
        if info.expires_at_s is not None:
            heapq.heappush(self._expiring, (info.expires_at_s, key))
            if len(self._expiring) > 2 * len(self.keys) + 64:
                self._expiring = [(h.expires_at_s, k) for k, h in self.keys.items() if h.info.expires_at_s is not None]
                heapq.heapify(self._expiring)
        return old

    def drop(self, key: ChunkKey, *, evicted: bool = False) -> Held | None:
        """Strikes a chunk out; what it was."""
        held = self.keys.pop(key, None)
        if held is not None:
            self._account(held, -1)
            self.room(held.info.namespace).policy.remove(key, evicted=evicted)
        return held

    def touch(self, key: ChunkKey) -> None:
        """Notes that a chunk was read."""
        held = self.keys[key]
        held.reads += 1
        self.room(held.info.namespace).policy.touch(key)

    def has(self, key: ChunkKey, now_s: float) -> bool:
        """Whether the chunk is there, unexpired."""
        held = self.keys.get(key)
        return held is not None and held.expires_at_s > now_s

    def excess_bytes(self, key: ChunkKey, nbytes: int, namespace: str) -> float:
        """By how much its room would exceed its limit, if `key` took `nbytes`; 0 or less if not at all."""
        room, old = self.room(namespace), self.keys.get(key)
        replaced_bytes = old.nbytes if old is not None and self.room(old.info.namespace) is room else 0
        return room.used_bytes - replaced_bytes + nbytes - room.limit_bytes

    def expired(self, now_s: float) -> ChunkKey | None:
        """A chunk whose time is over; it is named once."""
        while self._expiring and self._expiring[0][0] <= now_s:
            expires_at_s, key = heapq.heappop(self._expiring)
            held = self.keys.get(key)
            if held is not None and held.expires_at_s == expires_at_s:
                return key
        return None

    def victim(self, key: ChunkKey, info: ChunkInfo, pinned: Container[ChunkKey], *, own_room: bool) -> ChunkKey | None:
        """The chunk to evict for `key`; None if none may go.

        It comes from the room that exceeds its reserve most, and never takes another room than that of `key` below its
        reserve: of such a room only the chunk that its policy names is considered. What `key` continues goes only if
        nothing else can, as what another thread is about to evict.

        Parameters
        ----------
        own_room : only the room of `key` gives: it is at its limit.
        """
        own = self.room(info.namespace)
        rooms = [own] if own_room else sorted((self._common, *self._rooms.values()), key=_spare_bytes, reverse=True)

        def may_go(other: ChunkKey) -> bool:
            return other not in self.leaving and other not in (key, info.after) and other not in pinned

        for room in rooms:
            if room is own or room.spare_bytes > 0:
                victim = room.policy.victim(may_go)
                if victim is not None and (room is own or self._can_spare(room, victim)):
                    return victim
        for other in (*self.leaving, info.after):
            if other is None or other not in self.keys or other == key or other in pinned:
                continue
            room = self.room(self.keys[other].info.namespace)
            gives = other in self.leaving or self._can_spare(room, other)
            if room is own or (gives and not own_room):
                return other
        return None

    def stats(self) -> TierStats:
        tier, by_namespace = self.tier, dict(self._namespace_bytes)
        return TierStats(
            tier.name,
            tier.used_bytes,
            tier.capacity_bytes,
            len(self.keys),
            sum(by_namespace.values()),
            by_namespace,
            **self.counts,
        )

    def check(self, held_by_tier: Iterable[Entry], doubtful: frozenset[ChunkKey]) -> list[str]:
        """What is inconsistent between the books and what the tier holds, in words."""
        tier = self.tier
        entries = {entry.key: entry.nbytes for entry in held_by_tier}
        stray = (entries.keys() ^ self.keys.keys()) - doubtful
        problems = [f"the store disagrees about chunk {key.hex()}" for key in stray]
        if self.says_sizes:
            problems += [
                f"chunk {key.hex()} takes {entries[key]} bytes, {held.nbytes} are in the books"
                for key, held in self.keys.items()
                if entries.get(key, held.nbytes) != held.nbytes
            ]
        in_namespaces: Counter[str] = Counter()
        in_rooms = dict.fromkeys((self._common, *self._rooms.values()), 0)
        for held in self.keys.values():
            in_namespaces[held.info.namespace] += held.nbytes
            in_rooms[self.room(held.info.namespace)] += held.nbytes
        if +in_namespaces != +self._namespace_bytes or any(room.used_bytes != n for room, n in in_rooms.items()):
            problems.append(f"namespaces take {dict(in_namespaces)} bytes, {dict(self._namespace_bytes)} are accounted")
        if tier.capacity_bytes is not None and tier.used_bytes > tier.capacity_bytes:
            problems.append(f"{tier.used_bytes} bytes of {tier.capacity_bytes} are used")
        return [f"tier {tier.name!r}: {problem}" for problem in problems]

    def _can_spare(self, room: Room, key: ChunkKey) -> bool:
        going = sum(
            self.keys[other].nbytes
            for other in self.leaving
            if other in self.keys and self.room(self.keys[other].info.namespace) is room
        )
        return self.keys[key].nbytes <= room.spare_bytes - going

    def _account(self, held: Held, sign: int) -> None:
        namespace = held.info.namespace
        self.room(namespace).used_bytes += sign * held.nbytes
        self._namespace_bytes[namespace] += sign * held.nbytes
        if not self._namespace_bytes[namespace]:
            del self._namespace_bytes[namespace]


def _spare_bytes(room: Room) -> int:
    return room.spare_bytes
