"""What the store knows of one tier: which chunks are there, whose they are, and which goes first."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass

from ...core import ChunkInfo, ChunkKey, Entry, Tier
from ..capabilities import CountsItself
from ..eviction.policy import EvictionPolicy
from ..guard.guarded_tier import GuardedTier
from ..stats import TierStats
from .quota import Quota

_LEFT = (  # counts of chunks that were there and are not any more
    "replaced",
    "evictions",
    "expirations",
    "deletions",
    "corruptions",
    "undecodable",
    "departures",
    "given_up",
)


@dataclass(slots=True)
class Residency:
    """A chunk in a tier, and what it takes there."""

    nbytes: int
    info: ChunkInfo

    @property
    def expires_at_s(self) -> float:
        """Infinite for never."""
        return math.inf if self.info.expires_at_s is None else self.info.expires_at_s


class QuotaGroup:
    """The chunks of one tier that share a quota, and the policy that orders them.

    Every namespace with a quota has a group, all others share one. So the chunk to evict is found without looking at
    those of groups that need not give any.
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


class TierState:
    """The part of the catalog for one tier. Does no I/O; guarded by the lock of `Catalog`.

    Attributes
    ----------
    residencies : chunks in the tier, least recently written first. All else follows from them (`rebuild`).
    leaving : chunks that are about to be evicted, each with the thread that does it; another thread picks another
        victim.
    inserting : threads that are bringing a chunk into the tier.
    reports_sizes : every `put` so far has returned what the chunk takes; otherwise it is taken for the bytes of its
        tensors.
    counts : fields of `TierStats`.
    """

    def __init__(self, tier: Tier, make_policy: Callable[[], EvictionPolicy], quotas: Mapping[str, Quota]) -> None:
        self.tier = tier
        self.residencies: dict[ChunkKey, Residency] = {}
        self.leaving: dict[ChunkKey, int] = {}
        self.inserting: set[int] = set()
        self.reports_sizes = True
        self.counts: Counter[str] = Counter()
        self._guard = tier if isinstance(tier, GuardedTier) else None
        bare = tier if self._guard is None else self._guard.tier
        self._own_counts = bare if isinstance(bare, CountsItself) else None
        self._make_policy = make_policy
        self._quotas = quotas
        self.rebuild()

    def rebuild(self) -> None:
        """Derive everything from `residencies`: a change was interrupted. Policies begin without a history."""
        capacity_bytes = self.tier.capacity_bytes
        self._common = QuotaGroup(self._make_policy(), Quota(), capacity_bytes)
        self._groups = {
            name: QuotaGroup(self._make_policy(), quota, capacity_bytes) for name, quota in self._quotas.items()
        }
        self._namespace_bytes: Counter[str] = Counter()
        self._expiring: list[tuple[float, ChunkKey]] = []  # a heap, with chunks that are gone or written anew
        for key, residency in self.residencies.items():
            self._enter(key, residency)
        chunks = sum(self.counts[name] for name in ("arrivals", "puts")) - sum(map(self.counts.__getitem__, _LEFT))
        # What was interrupted is counted as if another process had done it.
        self.counts["arrivals"] += max(0, len(self.residencies) - chunks)
        self.counts["departures"] += max(0, chunks - len(self.residencies))
        excess_bytes = self.counts["added_bytes"] - self.counts["removed_bytes"] - self._namespace_bytes.total()
        self.counts["removed_bytes"] += max(0, excess_bytes)
        self.counts["added_bytes"] += max(0, -excess_bytes)

    @property
    def is_available(self) -> bool:
        """False while the tier is not asked, so that what it holds cannot be had."""
        return self._guard is None or self._guard.is_available

    def count(self, **counts: int) -> None:
        for name, number in counts.items():
            self.counts[name] += number

    def group(self, namespace: str) -> QuotaGroup:
        """The quota of `team` is that of `team/...` too, as far as those have none of their own."""
        found = self._groups.get(namespace)
        return self._groups.get(namespace.partition("/")[0], self._common) if found is None else found

    def most_bytes(self, namespace: str) -> float:
        """What a chunk may take at most, if all others could go."""
        capacity_bytes = self.tier.capacity_bytes
        limit_bytes = self.group(namespace).limit_bytes
        return limit_bytes if capacity_bytes is None else min(capacity_bytes, limit_bytes)

    @property
    def held_bytes(self) -> int:
        return self._common.used_bytes + sum(group.used_bytes for group in self._groups.values())

    def enter(self, key: ChunkKey, residency: Residency) -> Residency | None:
        """A chunk was written; what was in its place."""
        old = self.residencies.pop(key, None)
        if old is not None:
            self._account(old, -1)
            if self.group(old.info.namespace) is not self.group(residency.info.namespace):
                self.group(old.info.namespace).policy.remove(key)
        self.residencies[key] = residency
        self._enter(key, residency)
        return old

    def remove(self, key: ChunkKey, *, evicted: bool = False) -> Residency | None:
        """A chunk is gone; what it was."""
        residency = self.residencies.pop(key, None)
        if residency is not None:
            self._account(residency, -1)
            self.group(residency.info.namespace).policy.remove(key, evicted=evicted)
        return residency

    def touch(self, key: ChunkKey, residency: Residency) -> None:
        """A chunk was read."""
        self.group(residency.info.namespace).policy.touch(key)

    def has(self, key: ChunkKey, now_s: float) -> bool:
        """Whether the chunk is there, unexpired."""
        residency = self.residencies.get(key)
        return residency is not None and residency.expires_at_s > now_s

    def excess_bytes(self, key: ChunkKey, nbytes: int, namespace: str) -> float:
        """By how much its group would exceed its limit, if `key` took `nbytes`; 0 or less if not at all."""
        group, old = self.group(namespace), self.residencies.get(key)
        replaced_bytes = old.nbytes if old is not None and self.group(old.info.namespace) is group else 0
        return group.used_bytes - replaced_bytes + nbytes - group.limit_bytes

    def expired(self, now_s: float) -> ChunkKey | None:
        """A chunk whose time is over; it is named once."""
        while self._expiring and self._expiring[0][0] <= now_s:
            expires_at_s, key = heapq.heappop(self._expiring)
            residency = self.residencies.get(key)
            if residency is not None and residency.expires_at_s == expires_at_s:
                return key
        return None

    def victim(
        self, key: ChunkKey, info: ChunkInfo, pinned: Container[ChunkKey], *, own_group: bool
    ) -> ChunkKey | None:
        """The chunk to evict for `key`; None if none may go.

        It comes from the group that exceeds its reserve most, and never takes another group than that of `key` below
        its reserve: of such a group only the chunk that its policy names is considered. What `key` continues goes only
        if nothing else can, as what another thread is about to evict.

        Parameters
        ----------
        own_group : only the group of `key` gives: it is at its limit.
        """
        own = self.group(info.namespace)
        groups = [own] if own_group else sorted((self._common, *self._groups.values()), key=_spare_bytes, reverse=True)

        def may_go(other: ChunkKey) -> bool:
            return other not in self.leaving and other not in (key, info.after) and other not in pinned

        for group in groups:
            if group is own or group.spare_bytes > 0:
                victim = group.policy.victim(may_go)
                if victim is not None and (group is own or self._can_spare(group, victim)):
                    return victim
        for other in (*self.leaving, info.after):
            if other is None or other not in self.residencies or other == key or other in pinned:
                continue
            group = self.group(self.residencies[other].info.namespace)
            gives = other in self.leaving or self._can_spare(group, other)
            if group is own or (gives and not own_group):
                return other
        return None

    def stats(self) -> TierStats:
        tier, by_namespace = self.tier, dict(self._namespace_bytes)
        return TierStats(
            tier.name,
            tier.used_bytes,
            tier.capacity_bytes,
            len(self.residencies),
            sum(by_namespace.values()),
            by_namespace,
            **self.counts,
            **({} if self._own_counts is None else self._own_counts.counts),
        )

    def check(self, held_by_tier: Iterable[Entry], doubtful: Container[ChunkKey]) -> list[str]:
        """What is inconsistent between the catalog and what the tier holds, in words.

        `doubtful`: chunks of which it is not known whether the tier holds them.
        """
        tier = self.tier
        entries = {entry.key: entry.nbytes for entry in held_by_tier}
        stray = [key for key in entries.keys() ^ self.residencies.keys() if key not in doubtful]
        problems = [f"the catalog disagrees about chunk {key.hex()}" for key in stray]
        if self.reports_sizes:
            problems += [
                f"chunk {key.hex()} takes {entries[key]} bytes, {residency.nbytes} are in the catalog"
                for key, residency in self.residencies.items()
                if entries.get(key, residency.nbytes) != residency.nbytes
            ]
        in_namespaces: Counter[str] = Counter()
        in_groups = dict.fromkeys((self._common, *self._groups.values()), 0)
        for residency in self.residencies.values():
            in_namespaces[residency.info.namespace] += residency.nbytes
            in_groups[self.group(residency.info.namespace)] += residency.nbytes
        if +in_namespaces != +self._namespace_bytes or any(group.used_bytes != n for group, n in in_groups.items()):
            problems.append(f"namespaces take {dict(in_namespaces)} bytes, {dict(self._namespace_bytes)} are accounted")
        if tier.capacity_bytes is not None and tier.used_bytes > tier.capacity_bytes:
            problems.append(f"{tier.used_bytes} bytes of {tier.capacity_bytes} are used")
        if self.leaving or self.inserting:
            problems.append(f"{len(self.leaving)} evictions and {len(self.inserting)} insertions have not ended")
        return [f"tier {tier.name!r}: {problem}" for problem in problems]

    def _enter(self, key: ChunkKey, residency: Residency) -> None:
        info = residency.info
        self._account(residency, 1)
        self.group(info.namespace).policy.add(key, residency.nbytes, info.after, info.recompute_s)
        if info.expires_at_s is not None:
            heapq.heappush(self._expiring, (info.expires_at_s, key))
            if len(self._expiring) > 2 * len(self.residencies) + 64:
                self._expiring = [
                    (kept.expires_at_s, other)
                    for other, kept in self.residencies.items()
                    if kept.info.expires_at_s is not None
                ]
                heapq.heapify(self._expiring)

    def _can_spare(self, group: QuotaGroup, key: ChunkKey) -> bool:
        going = sum(
            self.residencies[other].nbytes
            for other in self.leaving
            if other in self.residencies and self.group(self.residencies[other].info.namespace) is group
        )
        return self.residencies[key].nbytes <= group.spare_bytes - going

    def _account(self, residency: Residency, sign: int) -> None:
        namespace = residency.info.namespace
        self.group(namespace).used_bytes += sign * residency.nbytes
        self._namespace_bytes[namespace] += sign * residency.nbytes
        if not self._namespace_bytes[namespace]:
            del self._namespace_bytes[namespace]


def _spare_bytes(group: QuotaGroup) -> int:
    return group.spare_bytes
