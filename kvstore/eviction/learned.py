"""The default eviction policy: chunks are worth what is known of the reuse of chunks like them."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ...core import ChunkKey
from .lru import Chains

Floats: TypeAlias = NDArray[np.float64]

_USES = 5  # from here on, uses are not told apart
_AGES = 80  # the last age bucket begins at a million uses of the tier
_EPOCH_USES = 512  # how finely the ages of waiting chunks are known when the history is summed up
_FIRST_FIT_USES, _FIT_USES = 1024, 16384  # when densities are computed first, and how rarely at last
_KEPT_HISTORY = 0.9  # of the history at each time: the last 160,000 uses count, so that habits may change
_PRIOR_CHUNKS = 32.0  # a kind of which little is known is taken for an ordinary one
_GHOSTS_PER_CHUNK = 4


def age_bucket(uses: int) -> int:
    """Ages that are treated alike: exact below 8, then four buckets a doubling."""
    if uses < 4:
        return uses
    octave = uses.bit_length() - 1
    return min(4 * (octave - 1) + ((uses >> (octave - 2)) & 3), _AGES - 1)


_BUCKET_STARTS = np.array([0, 1, 2, 3, *((4 + i % 4) << (i // 4) for i in range(_AGES - 4))], dtype=np.float64)
_BUCKET_WIDTHS = np.append(np.diff(_BUCKET_STARTS), _BUCKET_STARTS[-1] / 4)


def hit_density(hits: Floats, ends: Floats) -> Floats:
    """Most hits a use of the cache that a chunk can bring from each age on, if it is kept for the best time.

    Parameters
    ----------
    hits : `[kinds, ages]`, chunks that were used again at that age.
    ends : `[kinds, ages]`, chunks that were last seen at that age, unused.

    Returns
    -------
    `[kinds, ages]`, the Gittins index of keeping a chunk: the maximum over all horizons of hits until then over chunk
    time until then; 0 where nothing is known.
    """
    alive = np.cumsum((hits + ends)[:, ::-1], axis=1)[:, ::-1]
    after = np.append(alive[:, 1:], np.zeros((len(alive), 1)), axis=1)
    start = np.zeros((len(alive), 1))
    gain = np.append(start, np.cumsum(hits, axis=1), axis=1)
    time = np.append(start, np.cumsum((alive + after) / 2 * _BUCKET_WIDTHS, axis=1), axis=1)
    gains, times = gain[:, None, :] - gain[:, :, None], time[:, None, :] - time[:, :, None]
    later = np.triu(np.ones(times.shape[1:], dtype=bool), 1)
    rates = np.divide(gains, times, out=np.zeros_like(times), where=later & (times > 1e-9))
    best: Floats = rates.max(axis=2)
    return best[:, :-1]


@dataclass(slots=True)
class _Record:
    """What is known of a chunk, held or evicted."""

    used_at: int
    uses: int = 1
    continued: bool = False

    @property
    def kind(self) -> int:
        return 2 * min(self.uses, _USES) - 2 + self.continued


class HitDensity:
    """Evicts the leaf that promises the fewest hits for the space it takes, learned from this tier's own uses.

    Chunks of one kind (times used; whether another chunk ever continued it) have a common history: after how many uses
    of the tier they were used again, if at all. From it follows what a chunk of some kind and age promises. The time to
    return has a peak where a person reads an answer first, so a fresh chunk may be worth less than an older one.
    Evicted keys are remembered for a while, so that the history does not end where eviction begins. Until there is a
    history, the least recently used leaf goes.

    A victim is the worst of `samples` leaves, or of all if there are fewer. Chunks count alike whatever their size:
    what a chunk saves grows with its tokens as its bytes do.

    Parameters
    ----------
    samples : leaves that are compared at an eviction.
    seed : of the sampling; equal calls give equal victims.

    Notes
    -----
    Hit density and sampling: Beckmann, Chen & Cidon, LHD: improving cache hit rate by maximizing hit density, NSDI
    2018. Deviations: the density is that of the best time to keep a chunk (Gittins index) rather than of the time that
    eviction left it; evicted keys are followed, instead of some chunks kept on trial; only leaves are victims.
    """

    def __init__(self, *, samples: int = 64, seed: int = 0) -> None:
        self._samples = samples
        self._random = random.Random(seed)  # noqa: S311
        self._clock = 0
        self._fit_at = _FIRST_FIT_USES
        self._chains = Chains()
        self._held: dict[ChunkKey, _Record] = {}
        self._ghosts: OrderedDict[ChunkKey, _Record] = OrderedDict()
        self._leaves: list[ChunkKey] = []
        self._place: dict[ChunkKey, int] = {}
        self._waiting: Counter[tuple[int, int]] = Counter()  # records by kind and epoch of their last use
        self._hits, self._ends = np.zeros((2, 2 * _USES, _AGES))
        self._density: list[list[float]] = np.zeros((2 * _USES, _AGES)).tolist()

    def add(self, key: ChunkKey, nbytes: int, after: ChunkKey | None = None, recompute_s: float | None = None) -> None:
        parent = None if after is None else self._held.get(after) or self._ghosts.get(after)
        if parent is not None and not parent.continued:
            self._forget(parent)
            parent.continued = True
            self._await(parent)
        if key in self._held:
            self.touch(key)
            return
        record = self._ghosts.pop(key, None)
        if record is None:
            self._clock += 1
            record = _Record(self._clock)
            self._await(record)
        else:
            self._used(record)
        self._held[key] = record
        self._chains.add(key, after)
        self._update_leaf(key)
        if after is not None:
            self._update_leaf(after)
        if self._clock >= self._fit_at:
            self._fit()

    def touch(self, key: ChunkKey) -> None:
        self._used(self._held[key])

    def remove(self, key: ChunkKey, *, evicted: bool = False) -> None:
        record = self._held.pop(key)
        after = self._chains.remove(key)
        self._update_leaf(key)
        if after is not None:
            self._update_leaf(after)
        if not evicted:
            self._forget(record)
            return
        self._ghosts[key] = record
        while len(self._ghosts) > _GHOSTS_PER_CHUNK * (len(self._held) + 1):
            _, gone = self._ghosts.popitem(last=False)
            self._forget(gone)
            self._ends[gone.kind, age_bucket(self._clock - gone.used_at)] += 1

    def victim(self, may_go: Callable[[ChunkKey], bool]) -> ChunkKey | None:
        if len(self._leaves) > self._samples:
            draw, count = self._random.random, len(self._leaves)
            sample = [self._leaves[int(draw() * count)] for _ in range(self._samples)]
            worst: ChunkKey | None = min(sample, key=self._rank)
            if worst is not None and not may_go(worst):  # rarely, so that one question is enough
                worst = min(filter(may_go, sample), key=self._rank, default=None)
            if worst is not None:
                return worst
        worst = min(filter(may_go, self._leaves), key=self._rank, default=None)
        return worst or min(filter(may_go, self._held), key=self._rank, default=None)

    def _rank(self, key: ChunkKey) -> tuple[float, int]:
        record = self._held[key]
        return self._density[record.kind][age_bucket(self._clock - record.used_at)], record.used_at

    def _used(self, record: _Record) -> None:
        self._clock += 1
        self._forget(record)
        self._hits[record.kind, age_bucket(self._clock - record.used_at)] += 1
        record.used_at = self._clock
        record.uses += 1
        self._await(record)

    def _await(self, record: _Record) -> None:
        self._waiting[record.kind, record.used_at // _EPOCH_USES] += 1

    def _forget(self, record: _Record) -> None:
        slot = record.kind, record.used_at // _EPOCH_USES
        self._waiting[slot] -= 1
        if not self._waiting[slot]:
            del self._waiting[slot]

    def _update_leaf(self, key: ChunkKey) -> None:
        is_leaf, listed = key in self._held and self._chains.is_leaf(key), key in self._place
        if is_leaf and not listed:
            self._place[key] = len(self._leaves)
            self._leaves.append(key)
        elif listed and not is_leaf:
            place, last = self._place.pop(key), self._leaves.pop()
            if last != key:
                self._leaves[place] = last
                self._place[last] = place

    def _fit(self) -> None:
        """Densities anew; old history fades."""
        ends = self._ends.copy()
        for (kind, epoch), count in self._waiting.items():
            ends[kind, age_bucket(max(0, self._clock - epoch * _EPOCH_USES))] += count
        all_hits, all_ends = self._hits.sum(0), ends.sum(0)
        weight = _PRIOR_CHUNKS / max(1.0, float(all_hits.sum() + all_ends.sum()))
        self._density = hit_density(self._hits + weight * all_hits, ends + weight * all_ends).tolist()
        self._hits *= _KEPT_HISTORY
        self._ends *= _KEPT_HISTORY
        self._fit_at = self._clock + min(self._clock, _FIT_USES)
