"""Eviction by last use: LRU, and LRU that spares prefixes."""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from collections.abc import Callable

from ...core import ChunkKey


class LRU:
    """Evicts the least recently used chunk."""

    def __init__(self) -> None:
        self._order: OrderedDict[ChunkKey, None] = OrderedDict()

    def add(self, key: ChunkKey, nbytes: int, after: ChunkKey | None = None, recompute_s: float | None = None) -> None:
        self._order[key] = None
        self._order.move_to_end(key)

    def touch(self, key: ChunkKey) -> None:
        self._order.move_to_end(key)

    def remove(self, key: ChunkKey, *, evicted: bool = False) -> None:
        del self._order[key]

    def victim(self, may_go: Callable[[ChunkKey], bool]) -> ChunkKey | None:
        return next(filter(may_go, self._order), None)


class PrefixLRU:
    """Evicts the least recently used leaf: a chunk that no held chunk continues. A chunk without its prefix is useless.

    If no leaf may go, the least recently used chunk that may is evicted all the same.
    """

    def __init__(self) -> None:
        self._clock = 0
        self._used_at: dict[ChunkKey, int] = {}
        self._chains = Chains()
        self._leaves = RankedKeys()

    def add(self, key: ChunkKey, nbytes: int, after: ChunkKey | None = None, recompute_s: float | None = None) -> None:
        if key not in self._used_at:
            self._chains.add(key, after)
            if after is not None and after in self._leaves:
                self._leaves.remove(after)
        self.touch(key)

    def touch(self, key: ChunkKey) -> None:
        self._clock += 1
        self._used_at[key] = self._clock
        if self._chains.is_leaf(key):
            self._leaves.put(key, self._clock)

    def remove(self, key: ChunkKey, *, evicted: bool = False) -> None:
        del self._used_at[key]
        if key in self._leaves:
            self._leaves.remove(key)
        after = self._chains.remove(key)
        if after is not None and after in self._used_at and self._chains.is_leaf(after):
            self._leaves.put(after, self._used_at[after])

    def victim(self, may_go: Callable[[ChunkKey], bool]) -> ChunkKey | None:
        leaf = self._leaves.first(may_go)
        return leaf or min(filter(may_go, self._used_at), key=self._used_at.__getitem__, default=None)


class Chains:
    """Which chunks held chunks continue; the chunks continued need not be held themselves."""

    def __init__(self) -> None:
        self._after: dict[ChunkKey, ChunkKey | None] = {}
        self._followers: Counter[ChunkKey] = Counter()

    def add(self, key: ChunkKey, after: ChunkKey | None) -> None:
        """`key` is held from now on, and continues `after`."""
        self._after[key] = after
        if after is not None:
            self._followers[after] += 1

    def remove(self, key: ChunkKey) -> ChunkKey | None:
        """`key` is held no longer; what it continued."""
        after = self._after.pop(key)
        if after is not None:
            self._followers[after] -= 1
            if not self._followers[after]:
                del self._followers[after]
        return after

    def is_leaf(self, key: ChunkKey) -> bool:
        """No held chunk continues `key`."""
        return key not in self._followers


class RankedKeys:
    """Keys by rank, lowest first, then by when they were put. A rank may change; every call is O(log n) amortised."""

    def __init__(self) -> None:
        self._puts = 0
        self._ranks: dict[ChunkKey, tuple[float, int]] = {}
        self._heap: list[tuple[float, int, ChunkKey]] = []  # with outdated entries, which are dropped when met

    def __contains__(self, key: object) -> bool:
        return key in self._ranks

    def rank(self, key: ChunkKey) -> float:
        return self._ranks[key][0]

    def put(self, key: ChunkKey, rank: float) -> None:
        self._puts += 1
        self._ranks[key] = (rank, self._puts)
        heapq.heappush(self._heap, (rank, self._puts, key))
        if len(self._heap) > 2 * len(self._ranks) + 64:
            self._heap = [(rank, puts, key) for key, (rank, puts) in self._ranks.items()]
            heapq.heapify(self._heap)

    def remove(self, key: ChunkKey) -> None:
        del self._ranks[key]

    def first(self, may_go: Callable[[ChunkKey], bool]) -> ChunkKey | None:
        kept = []
        found = None
        while self._heap and found is None:
            entry = heapq.heappop(self._heap)
            rank, puts, key = entry
            if self._ranks.get(key) == (rank, puts):
                kept.append(entry)
                found = key if may_go(key) else None
        for entry in kept:
            heapq.heappush(self._heap, entry)
        return found
