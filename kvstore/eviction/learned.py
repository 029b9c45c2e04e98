"""The default eviction policy: chunks are worth what is known of the reuse of chunks like them."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ...core import ChunkKey
from .lru import Chains

Floats: TypeAlias = NDArray[np.float64]

_USES = 3  # from here on, uses are not told apart
_AGES = 80  # the last age bucket begins at a million uses of the tier
_EPOCH_USES = 512  # how finely the ages of waiting chunks are known when the history is summed up
_FIRST_FIT_USES, _FIT_USES = 1024, 16384  # when densities are computed first, and how rarely at last
_KEPT_HISTORY = 0.9  # of the history at each time: the last 160,000 uses count, so that habits may change
_PRIOR_CHUNKS = 32.0  # a kind of which little is known is taken for an ordinary one
_LASTING_CHUNKS = 8.0  # of each kind are taken never to return, lest a few old ones that did make all old ones dear
_GHOSTS_PER_CHUNK = 4


def age_bucket(uses: int) -> int:
    """Ages that are treated alike: exact below 8, then four buckets a doubling."""
    if uses < 4:
        return uses
    octave = uses.bit_length() - 1
    return min(4 * (octave - 1) + ((uses >> (octave - 2)) & 3), _AGES - 1)


_AGE_BUCKETS = tuple(map(age_bucket, range(1 << 14)))  # of most ages, looked up
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


@dataclass(slots=True, eq=False)
class _Record:
    """What is known of a chunk, held or evicted; `place` among the leaves, or -1."""

    key: ChunkKey
    used_at: int
    uses: int = 1
    continued: bool = False
    kind: int = 0
    place: int = -1


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
        self._leaves: list[_Record] = []
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
            record = _Record(key, self._clock)
            self._await(record)
        else:
            self._used(record)
        self._held[key] = record
        self._chains.add(key, after)
        self._update_leaf(record)
        if parent is not None:
            self._update_leaf(parent)
        if self._clock >= self._fit_at:
            self._fit()

    def touch(self, key: ChunkKey) -> None:
        self._used(self._held[key])

    def remove(self, key: ChunkKey, *, evicted: bool = False) -> None:
        record = self._held.pop(key)
        after = self._chains.remove(key)
        self._update_leaf(record)
        if after in self._held:
            self._update_leaf(self._held[after])
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
            draw, leaves, count = self._random.random, self._leaves, len(self._leaves)
            sample = [leaves[int(draw() * count)] for _ in range(self._samples)]
            worst: _Record | None = min(sample, key=self._rank)
            if worst is not None and not may_go(worst.key):  # rarely, so that one question is enough
                worst = self._worst(sample, may_go)
            if worst is not None:
                return worst.key
        worst = self._worst(self._leaves, may_go) or self._worst(self._held.values(), may_go)
        return None if worst is None else worst.key

    def _worst(self, records: Iterable[_Record], may_go: Callable[[ChunkKey], bool]) -> _Record | None:
        return min((record for record in records if may_go(record.key)), key=self._rank, default=None)

    def _rank(self, record: _Record) -> tuple[float, int]:
        age = self._clock - record.used_at
        bucket = _AGE_BUCKETS[age] if age < len(_AGE_BUCKETS) else age_bucket(age)
        return self._density[record.kind][bucket], record.used_at

    def _used(self, record: _Record) -> None:
        self._clock += 1
        self._forget(record)
        self._hits[record.kind, age_bucket(self._clock - record.used_at)] += 1
        record.used_at = self._clock
        record.uses += 1
        self._await(record)

    def _await(self, record: _Record) -> None:
        record.kind = 2 * min(record.uses, _USES) - 2 + record.continued
        self._waiting[record.kind, record.used_at // _EPOCH_USES] += 1

    def _forget(self, record: _Record) -> None:
        slot = record.kind, record.used_at // _EPOCH_USES
        self._waiting[slot] -= 1
        if not self._waiting[slot]:
            del self._waiting[slot]

    def _update_leaf(self, record: _Record) -> None:
        is_leaf, listed = record.key in self._held and self._chains.is_leaf(record.key), record.place >= 0
        if is_leaf and not listed:
            record.place = len(self._leaves)
            self._leaves.append(record)
        elif listed and not is_leaf:
            last = self._leaves.pop()
            if last is not record:
                self._leaves[record.place] = last
                last.place = record.place
            record.place = -1

    def _fit(self) -> None:
        """Densities anew; old history fades."""
        ends = self._ends.copy()
        for (kind, epoch), count in self._waiting.items():
            ends[kind, age_bucket(max(0, self._clock - epoch * _EPOCH_USES))] += count
        all_hits, all_ends = self._hits.sum(0), ends.sum(0)
        weight = _PRIOR_CHUNKS / max(1.0, float(all_hits.sum() + all_ends.sum()))
        ends += weight * all_ends
        ends[:, -1] += _LASTING_CHUNKS
        self._density = hit_density(self._hits + weight * all_hits, ends).tolist()
        self._hits *= _KEPT_HISTORY
        self._ends *= _KEPT_HISTORY
        self._fit_at = self._clock + min(self._clock, _FIT_USES)
