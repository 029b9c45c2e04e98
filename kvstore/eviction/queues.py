"""Eviction policies that keep chunks in queues: LRU, S3-FIFO, GDSF, and LRU that spares prefixes."""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from collections.abc import Callable

from ...core import ChunkKey

_MOST_USES = 3


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


class S3FIFO:
    """Lets a chunk into the main queue only if it is used again soon: one-shot chunks pass through a tenth of the tier.

    New chunks enter the small queue. At its end, those used more than once meanwhile move to the main queue, others are
    evicted and their keys remembered in the ghost queue, as long as that is not longer than the other two. A chunk
    whose key is there enters the main queue at once. The main queue evicts in order of arrival; a chunk used meanwhile
    goes round again, up to three times.

    Notes
    -----
    Yang, Zhang, Qiu, Yue & Rashmi, FIFO queues are all you need for cache eviction, SOSP 2023, algorithm 1. Deviation:
    the small queue holds a tenth of the chunks rather than of the bytes.
    """

    def __init__(self) -> None:
        self._small: OrderedDict[ChunkKey, int] = OrderedDict()  # uses since it entered, at most 3
        self._main: OrderedDict[ChunkKey, int] = OrderedDict()
        self._ghosts: OrderedDict[ChunkKey, None] = OrderedDict()

    def add(self, key: ChunkKey, nbytes: int, after: ChunkKey | None = None, recompute_s: float | None = None) -> None:
        if key in self._small or key in self._main:
            self.touch(key)
        elif key in self._ghosts:
            del self._ghosts[key]
            self._main[key] = 0
        else:
            self._small[key] = 0

    def touch(self, key: ChunkKey) -> None:
        queue = self._small if key in self._small else self._main
        queue[key] = min(queue[key] + 1, _MOST_USES)

    def remove(self, key: ChunkKey, *, evicted: bool = False) -> None:
        queue = self._small if key in self._small else self._main
        del queue[key]
        if evicted and queue is self._small:
            self._ghosts[key] = None
        while len(self._ghosts) > len(self._small) + len(self._main) + 1:
            self._ghosts.popitem(last=False)

    def victim(self, may_go: Callable[[ChunkKey], bool]) -> ChunkKey | None:
        kept: list[tuple[OrderedDict[ChunkKey, int], ChunkKey, int]] = []
        try:
            while self._small or self._main:
                total = len(self._small) + len(self._main)
                queue = self._small if 10 * len(self._small) >= total or not self._main else self._main
                key, uses = queue.popitem(last=False)
                if queue is self._small and uses > 1:
                    self._main[key] = 0
                elif queue is self._main and uses > 0:
                    self._main[key] = uses - 1
                else:
                    kept.append((queue, key, uses))
                    if may_go(key):
                        return key
            return None
        finally:  # the victim too: it leaves by `remove`
            for queue, key, uses in reversed(kept):
                queue[key] = uses
                queue.move_to_end(key, last=False)


class GDSF:
    """Evicts the chunk of lowest priority: uses times cost over bytes, plus the last victim's priority at its last use.

    The cost is the seconds that computing the chunk took, over those of an average chunk of its bytes; where they were
    not measured, the chunk counts as average.

    Notes
    -----
    Cherkasova, Improving WWW proxies performance with greedy-dual-size-frequency caching policy, HPL-98-69R1, 1998.
    Deviation: costs are relative to the mean so far, so that chunks with and without a measured cost compare.
    """

    def __init__(self) -> None:
        self._measured_s = 0.0
        self._measured_bytes = 0
        self._floor = 0.0  # priority of the last victim
        self._worth: dict[ChunkKey, float] = {}
        self._uses: Counter[ChunkKey] = Counter()
        self._queue = _Ranked()

    def add(self, key: ChunkKey, nbytes: int, after: ChunkKey | None = None, recompute_s: float | None = None) -> None:
        self._worth[key] = 1.0 if recompute_s is None or nbytes < 1 else self._relative_cost(recompute_s, nbytes)
        self.touch(key)

    def touch(self, key: ChunkKey) -> None:
        self._uses[key] += 1
        self._queue.put(key, self._floor + self._uses[key] * self._worth[key])

    def remove(self, key: ChunkKey, *, evicted: bool = False) -> None:
        if evicted:
            self._floor = max(self._floor, self._queue.rank(key))
        self._queue.remove(key)
        del self._worth[key], self._uses[key]

    def victim(self, may_go: Callable[[ChunkKey], bool]) -> ChunkKey | None:
        return self._queue.first(may_go)

    def _relative_cost(self, recompute_s: float, nbytes: int) -> float:
        self._measured_s += recompute_s
        self._measured_bytes += nbytes
        return recompute_s / nbytes * self._measured_bytes / self._measured_s if self._measured_s else 1.0


class PrefixLRU:
    """Evicts the least recently used leaf: a chunk that no held chunk continues. A chunk without its prefix is useless.

    If no leaf may go, the least recently used chunk that may is evicted all the same.
    """

    def __init__(self) -> None:
        self._clock = 0
        self._used_at: dict[ChunkKey, int] = {}
        self._chains = Chains()
        self._leaves = _Ranked()

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


class _Ranked:
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
