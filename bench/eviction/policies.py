"""Eviction policies that are measured, not shipped: `kvloom simulate` has them by name, beside those of the store."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from types import MappingProxyType

from ...core import ChunkKey
from ...kvstore.eviction.lru import Chains, RankedKeys
from ...kvstore.eviction.policy import POLICIES, EvictionPolicy

_MOST_USES = 3


class S3FIFO:
    """Lets a chunk into the main queue only if it is used again soon; one-shot chunks pass through a tenth of the tier.

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
        self._costs: dict[ChunkKey, float] = {}
        self._uses: Counter[ChunkKey] = Counter()
        self._queue = RankedKeys()

    def __contains__(self, key: object) -> bool:
        return key in self._costs

    def priority(self, key: ChunkKey) -> float:
        """What it was given at its last use; the lowest goes."""
        return self._queue.rank(key)

    def add(self, key: ChunkKey, nbytes: int, after: ChunkKey | None = None, recompute_s: float | None = None) -> None:
        self._costs[key] = 1.0 if recompute_s is None or nbytes < 1 else self._relative_cost(recompute_s, nbytes)
        self.touch(key)

    def touch(self, key: ChunkKey) -> None:
        self._uses[key] += 1
        self._queue.put(key, self._floor + self._uses[key] * self._costs[key])

    def remove(self, key: ChunkKey, *, evicted: bool = False) -> None:
        if evicted:
            self._floor = max(self._floor, self._queue.rank(key))
        self._queue.remove(key)
        del self._costs[key], self._uses[key]

    def victim(self, may_go: Callable[[ChunkKey], bool]) -> ChunkKey | None:
        return self._queue.first(may_go)

    def _relative_cost(self, recompute_s: float, nbytes: int) -> float:
        self._measured_s += recompute_s
        self._measured_bytes += nbytes
        return recompute_s / nbytes * self._measured_bytes / self._measured_s if self._measured_s else 1.0


class PGDSF:
    """GDSF by leaves: of the chunks that no held chunk continues, the one of lowest priority goes.

    If no leaf may go, the chunk of lowest priority that may is evicted all the same.

    Notes
    -----
    Jin et al., RAGCache: efficient knowledge caching for retrieval-augmented generation, arXiv 2404.12457. Deviation:
    costs are those of `GDSF`.
    """

    def __init__(self) -> None:
        self._all = GDSF()
        self._chains = Chains()
        self._leaves = RankedKeys()

    def add(self, key: ChunkKey, nbytes: int, after: ChunkKey | None = None, recompute_s: float | None = None) -> None:
        if key not in self._all:
            self._chains.add(key, after)
            if after is not None and after in self._leaves:
                self._leaves.remove(after)
        self._all.add(key, nbytes, after, recompute_s)
        self._rank(key)

    def touch(self, key: ChunkKey) -> None:
        self._all.touch(key)
        self._rank(key)

    def remove(self, key: ChunkKey, *, evicted: bool = False) -> None:
        self._all.remove(key, evicted=evicted)
        if key in self._leaves:
            self._leaves.remove(key)
        after = self._chains.remove(key)
        if after is not None and after in self._all:
            self._rank(after)

    def victim(self, may_go: Callable[[ChunkKey], bool]) -> ChunkKey | None:
        return self._leaves.first(may_go) or self._all.victim(may_go)

    def _rank(self, key: ChunkKey) -> None:
        if self._chains.is_leaf(key):
            self._leaves.put(key, self._all.priority(key))


class PrefixARC:
    """ARC by leaves: balances chunks that were used once against those used again, by which of them it misses.

    Two lists by last use, of chunks used once and of others. The leaf that goes comes from the first while that holds
    more than its share. Keys of evicted chunks are remembered, as many as chunks are held: the share grows when a chunk
    returns that the first list gave up too early, and shrinks for one of the second.

    Notes
    -----
    Megiddo & Modha, ARC: a self-tuning, low overhead replacement cache, FAST 2003. Deviations: only leaves go, and what
    is remembered is bounded for each list by the chunks held now.
    """

    def __init__(self) -> None:
        self._clock = 0
        self._once_share = 0.0  # chunks
        self._chains = Chains()
        self._used_at: tuple[dict[ChunkKey, int], dict[ChunkKey, int]] = ({}, {})  # once, again
        self._leaves = (RankedKeys(), RankedKeys())
        self._ghosts: tuple[OrderedDict[ChunkKey, None], OrderedDict[ChunkKey, None]] = (OrderedDict(), OrderedDict())

    def add(self, key: ChunkKey, nbytes: int, after: ChunkKey | None = None, recompute_s: float | None = None) -> None:
        if key in self._used_at[0] or key in self._used_at[1]:
            self.touch(key)
            return
        self._chains.add(key, after)
        for leaves in self._leaves:
            if after is not None and after in leaves:
                leaves.remove(after)
        once, again = map(len, self._ghosts)
        if key in self._ghosts[0]:
            self._once_share = min(self._once_share + max(1.0, again / once), self._held + 1)
        elif key in self._ghosts[1]:
            self._once_share = max(self._once_share - max(1.0, once / again), 0.0)
        is_known = key in self._ghosts[0] or key in self._ghosts[1]
        for ghosts in self._ghosts:
            ghosts.pop(key, None)
        self._use(key, int(is_known))

    def touch(self, key: ChunkKey) -> None:
        which = self._list_of(key)
        del self._used_at[which][key]
        if key in self._leaves[which]:
            self._leaves[which].remove(key)
        self._use(key, 1)

    def remove(self, key: ChunkKey, *, evicted: bool = False) -> None:
        which = self._list_of(key)
        del self._used_at[which][key]
        if key in self._leaves[which]:
            self._leaves[which].remove(key)
        after = self._chains.remove(key)
        if after is not None and self._chains.is_leaf(after):
            for used_at, leaves in zip(self._used_at, self._leaves, strict=True):
                if after in used_at:
                    leaves.put(after, used_at[after])
        if evicted:
            self._ghosts[which][key] = None
        for ghosts in self._ghosts:
            while len(ghosts) > self._held + 1:
                ghosts.popitem(last=False)

    def victim(self, may_go: Callable[[ChunkKey], bool]) -> ChunkKey | None:
        first = 0 if len(self._used_at[0]) > self._once_share else 1
        for which in (first, 1 - first):
            leaf = self._leaves[which].first(may_go)
            if leaf is not None:
                return leaf
        used_at = self._used_at[0] | self._used_at[1]
        return min(filter(may_go, used_at), key=used_at.__getitem__, default=None)

    @property
    def _held(self) -> int:
        return len(self._used_at[0]) + len(self._used_at[1])

    def _list_of(self, key: ChunkKey) -> int:
        return 0 if key in self._used_at[0] else 1

    def _use(self, key: ChunkKey, which: int) -> None:
        self._clock += 1
        self._used_at[which][key] = self._clock
        if self._chains.is_leaf(key):
            self._leaves[which].put(key, self._clock)


SIMULATED_POLICIES: Mapping[str, Callable[[], EvictionPolicy]] = MappingProxyType(
    {**POLICIES, "s3-fifo": S3FIFO, "gdsf": GDSF, "pgdsf": PGDSF, "prefix-arc": PrefixARC}
)
"""Policies by name."""
