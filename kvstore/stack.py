"""Encoded chunks in a stack of tiers, fastest first: what is where, and where it goes when a tier is full.

What goes then is for the eviction policy of the tier to say (`policy.py`).

Faults of tiers end here: they are counted, logged at most once a minute for each tier, and turned into "not found" or
into a `TierError` for who wanted to write. A tier that may stall is called through its lane (`lane.py`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Protocol, TypeAlias, TypeVar, runtime_checkable

from ..core import ChunkInfo, ChunkKey, EncodedChunk, MayStall, Tier
from ..errors import ChunkCorruptError, CodecError, TierError, TierFullError, TierTimeoutError, TierUnavailableError
from .lane import Lane, Patience
from .policy import EvictionPolicy
from .stats import TierStats

T = TypeVar("T")

logger = logging.getLogger(__name__)

Fetch: TypeAlias = Callable[[Tier], EncodedChunk | None]

_WARNING_INTERVAL_S = 60.0
_STRIPES = 64


@runtime_checkable
class ChecksItself(Protocol):
    """Optional capability of a tier: finding its own inconsistencies."""

    def check(self) -> list[str]: ...


class Level:
    """A tier and what the stack knows about it; all but the tier is guarded by the stack's lock.

    Attributes
    ----------
    policy : orders `keys` for eviction.
    keys : keys in the tier, least recently written first, each with what is remembered of the chunk.
    leaving : keys that a thread is about to evict, so that another thread picks another victim.
    lane : the way to the tier if it may stall.
    stripes : locks that 1/64 of all keys share. Writing or removing a key in the tier and in `keys` is one step under
        the key's stripe. A stripe is taken before the stack's lock and never within another.
    """

    def __init__(self, tier: Tier, policy: EvictionPolicy, lane: Lane | None) -> None:
        self.tier = tier
        self.policy = policy
        self.lane = lane
        self.stripes = [threading.Lock() for _ in range(_STRIPES)]
        self.keys: dict[ChunkKey, ChunkInfo] = {}
        self.leaving: set[ChunkKey] = set()
        self.counts: Counter[str] = Counter()
        self.warned_at_s = self.welcomed_at_s = float("-inf")
        for entry in tier.entries():
            self.add(entry.key, entry.nbytes, entry.info)

    def add(self, key: ChunkKey, nbytes: int, info: ChunkInfo) -> None:
        self.keys.pop(key, None)
        self.keys[key] = info
        self.policy.add(key, nbytes, info.after)

    def forget(self, key: ChunkKey) -> None:
        if self.keys.pop(key, None) is not None:
            self.policy.remove(key)

    def call(self, operation: Callable[[Tier], T], *, writes: ChunkKey | None = None) -> T:
        """Every call of the tier that may wait for a device; see `Lane.run`."""
        return operation(self.tier) if self.lane is None else self.lane.run(operation, writes=writes)

    def stripe(self, key: ChunkKey) -> AbstractContextManager[object]:
        lock = self.stripes[key[-1] % _STRIPES]
        return lock if self.lane is None else self.lane.hold(lock)

    def doubtful(self) -> frozenset[ChunkKey]:
        return frozenset() if self.lane is None else self.lane.doubtful()

    def close(self) -> None:
        self.tier.close() if self.lane is None else self.lane.close()


class TierStack:
    """Moves encoded chunks between tiers. Every method may be called from any thread; I/O runs outside the lock.

    Attributes
    ----------
    patience : how long the calling thread waits for tiers, if not as long as the store does.
    """

    def __init__(
        self, tiers: Sequence[Tier], policy: Callable[[], EvictionPolicy], *, timeout_s: float | None = None
    ) -> None:
        self.patience = Patience()
        self._lock = threading.Lock()
        self.levels: list[Level] = []
        for index, tier in enumerate(tiers):
            lane = None
            if timeout_s is not None and isinstance(tier, MayStall) and tier.may_stall:
                lane = Lane(tier, timeout_s, patience=self.patience, on_recovery=partial(self._welcome, index))
            self.levels.append(Level(tier, policy(), lane))
        self._pins: Counter[ChunkKey] = Counter()

    def match(self, keys: Sequence[ChunkKey]) -> int:
        """How many leading keys are in some tier."""
        with self._lock:
            for count, key in enumerate(keys):
                if not any(key in level.keys for level in self.levels):
                    return count
        return len(keys)

    def locate(self, key: ChunkKey) -> int | None:
        """Index of the fastest tier that holds the chunk."""
        with self._lock:
            return next((index for index, level in enumerate(self.levels) if key in level.keys), None)

    @contextmanager
    def pinned(self, keys: Iterable[ChunkKey]) -> Iterator[None]:
        keys = list(keys)
        with self._lock:
            self._pins.update(keys)
        try:
            yield
        finally:
            with self._lock:
                self._pins.subtract(keys)
                for key in set(keys):
                    if not self._pins[key]:
                        del self._pins[key]

    def put(self, key: ChunkKey, blob: EncodedChunk, info: ChunkInfo, *, everywhere: bool) -> None:
        """Writes to every tier, or to the first that takes the chunk; raises the last `TierError` if none does."""
        refusal: TierError | None = None
        stored = False
        try:
            for index, level in enumerate(self.levels):
                try:
                    self.insert(index, key, blob, info)
                except TierError as exc:
                    refusal = exc
                    self._refused(level, exc)
                    continue
                stored = True
                if not everywhere:
                    break
            if refusal is not None and not stored:
                raise refusal
        finally:
            refusal = None  # its traceback leads back to this frame, a cycle that would keep the chunk alive

    def promote(self, key: ChunkKey, blob: EncodedChunk) -> bool:
        """Copies a chunk to the first tier; whether that could take it."""
        try:
            self.insert(0, key, blob)
        except TierError as exc:
            self._refused(self.levels[0], exc)
            return False
        self.count(self.levels[0], promotions=1)
        return True

    def raise_to_first(self, key: ChunkKey) -> bool:
        """Promotes a chunk from where it is, if it is stored; False if the first tier has no room, though it might."""
        found_at = self.locate(key)
        for level in self.levels[1:] if found_at else ():
            blob, _ = self.fetch(level, key, whole(key))
            if blob is not None:
                capacity_bytes = self.levels[0].tier.capacity_bytes
                too_large = capacity_bytes is not None and blob.nbytes > capacity_bytes
                return self.promote(key, blob) or too_large
        return True

    def demote(self, index: int, key: ChunkKey) -> None:
        """Copies a chunk to the next tier that takes it, unless a slower tier has it already."""
        slower = range(index + 1, len(self.levels))
        with self._lock:
            if not slower or any(key in self.levels[i].keys for i in slower):
                return
        blob, _ = self.fetch(self.levels[index], key, whole(key), is_use=False)
        if blob is None:
            return
        for i in slower:
            try:
                self.insert(i, key, blob)
            except TierError as exc:
                self._refused(self.levels[i], exc)
            else:
                self.count(self.levels[index], demotions=1)
                return

    def insert(self, index: int, key: ChunkKey, blob: EncodedChunk, info: ChunkInfo | None = None) -> None:
        """Puts into one tier, evicting until the chunk fits; raises `TierError` if it cannot be done.

        If `info` is None, it is what another tier remembers of the chunk.
        """
        level = self.levels[index]
        if info is None:
            with self._lock:
                known = (other.keys.get(key) for other in self.levels)
                info = next(filter(None, known), ChunkInfo())
        capacity_bytes = level.tier.capacity_bytes
        while True:
            try:
                with level.stripe(key):
                    self._write(level, key, blob, info)
                break
            except TierFullError as exc:
                hopeless = capacity_bytes is not None and exc.needed_bytes > capacity_bytes
                if hopeless or not self._evict(index, key, info.after):
                    raise
        self.count(level, puts=1, bytes_written=blob.nbytes)

    def _write(self, level: Level, key: ChunkKey, blob: EncodedChunk, info: ChunkInfo) -> None:
        try:
            level.call(lambda tier: tier.put(key, blob, info), writes=key)
        except TierTimeoutError as exc:
            if exc.begun:  # the lane sees to it that the tier ends without the chunk
                with self._lock:
                    level.forget(key)
            raise
        with self._lock:
            level.add(key, blob.nbytes, info)

    def fetch(
        self, level: Level, key: ChunkKey, fetch: Fetch, *, is_use: bool = True
    ) -> tuple[EncodedChunk | None, str | None]:
        """What one tier holds, or why it cannot be read (`corrupt`, `timeout`, `unavailable`); (None, None) if it has
        nothing.

        `is_use`: the policy of the tier is told.
        """
        with self._lock:
            if key not in level.keys:
                return None, None
            if is_use:
                level.policy.touch(key)
        try:
            blob = level.call(fetch)
            if blob is None:
                with level.stripe(key):
                    if not level.call(lambda tier: key in tier):  # rather than evicted and put again since
                        with self._lock:
                            level.forget(key)
        except ChunkCorruptError as exc:
            self.discard(level, key, exc)
            return None, "corrupt"
        except TierError as exc:
            self._failed(level, exc)
            return None, "timeout" if isinstance(exc, TierTimeoutError) else "unavailable"
        return blob, None

    def remove(self, level: Level, key: ChunkKey, *, for_space: bool = False) -> bool:
        """Deletes from one tier, if it is for space then only what is not pinned; whether this call did it.

        The key leaves `keys` first, under the lock: who pins it later does not count on this copy.
        """
        with level.stripe(key):
            with self._lock:
                stays = key not in level.keys or (for_space and self._pins[key])
                info = None if stays else level.keys.pop(key)
            if info is None:
                if key in level.doubtful():
                    raise TierUnavailableError(f"tier {level.tier.name!r} may still hold the chunk until it answers")
                return False
            try:
                level.call(lambda tier: tier.delete(key), writes=key)
            except TierError as exc:
                gone = isinstance(exc, TierTimeoutError) and exc.begun  # as soon as the tier answers
                with self._lock:
                    if gone:
                        level.policy.remove(key)
                    else:
                        level.keys[key] = info
                raise
            with self._lock:
                level.policy.remove(key, evicted=for_space)
            return True

    def discard(self, level: Level, key: ChunkKey, exc: CodecError) -> None:
        """Removes a chunk that cannot be given back as it was, counts it and warns."""
        self.count(level, **{"corruptions" if isinstance(exc, ChunkCorruptError) else "errors": 1})
        self._warn(level, exc)
        try:
            self.remove(level, key)
        except TierError as refusal:
            self._refused(level, refusal)

    def count(self, level: Level, **counts: int) -> None:
        with self._lock:
            level.counts.update(counts)

    def stats(self) -> tuple[TierStats, ...]:
        with self._lock:
            return tuple(
                TierStats(tier.name, tier.used_bytes, tier.capacity_bytes, len(level.keys), **level.counts)
                for level in self.levels
                for tier in [level.tier]
            )

    def check(self) -> list[str]:
        problems = []
        for level in self.levels:
            tier, doubtful = level.tier, level.doubtful()  # before the tier is asked: some may be settled then
            try:
                problems += level.call(lambda tier: tier.check() if isinstance(tier, ChecksItself) else [])
                held = level.call(lambda tier: {entry.key for entry in tier.entries()})
            except TierError as exc:
                problems.append(f"tier {tier.name!r} cannot be checked: {exc}")
                continue
            stray = (held ^ level.keys.keys()) - doubtful
            problems += [f"tier {tier.name!r} and the store disagree about chunk {key.hex()}" for key in stray]
            if tier.capacity_bytes is not None and tier.used_bytes > tier.capacity_bytes:
                problems.append(f"tier {tier.name!r} uses {tier.used_bytes} bytes of {tier.capacity_bytes}")
        return problems + [f"chunk {key.hex()} has {pins} pins" for key, pins in self._pins.items() if pins < 1]

    def close(self) -> None:
        """Closes every tier; one that does not answer is closed when it does."""
        with ExitStack() as closing:
            for level in reversed(self.levels):
                closing.callback(self._close, level)

    def _close(self, level: Level) -> None:
        try:
            level.close()
        except TierTimeoutError as exc:
            self._refused(level, exc)

    def _evict(self, index: int, key: ChunkKey, after: ChunkKey | None) -> bool:
        """Makes room for `key` by removing a chunk that is not pinned, after demoting it; False if there is none.

        What `key` continues goes only if nothing else can, as what another thread is about to evict. No chunk goes
        without having been demoted because this thread was in a hurry.
        """
        level = self.levels[index]

        def may_go(other: ChunkKey) -> bool:
            return other != key and other in level.keys and not self._pins[other]

        with self._lock:
            victim = level.policy.victim(lambda other: other not in level.leaving and other != after and may_go(other))
            victim = victim or next(filter(may_go, (*level.leaving, *([] if after is None else [after]))), None)
            if victim is None:
                return False
            level.leaving.add(victim)
        try:
            self.demote(index, victim)
            if self.patience.left_s() <= 0:
                return False
            if self.remove(level, victim, for_space=True):
                self.count(level, evictions=1)
        finally:
            with self._lock:
                level.leaving.discard(victim)
        return True

    def _refused(self, level: Level, exc: TierError) -> None:
        if isinstance(exc, TierFullError):
            self.count(level, rejections=1)
        else:
            self._failed(level, exc)

    def _failed(self, level: Level, exc: TierError) -> None:
        self.count(level, **{"timeouts" if isinstance(exc, TierTimeoutError) else "errors": 1})
        self._warn(level, exc)

    def _welcome(self, index: int, down_s: float) -> None:
        level = self.levels[index]
        self.count(level, recoveries=1)
        with self._lock:
            now_s = time.monotonic()
            if now_s - level.welcomed_at_s < _WARNING_INTERVAL_S:
                return
            level.welcomed_at_s = now_s
        logger.warning("tier %r answers again, after %.1f s", level.tier.name, down_s)

    def _warn(self, level: Level, exc: Exception) -> None:
        with self._lock:
            now_s = time.monotonic()
            if now_s - level.warned_at_s < _WARNING_INTERVAL_S:
                return
            level.warned_at_s = now_s
        logger.warning("tier %r: %s (its further warnings are held back for a minute)", level.tier.name, exc)


def whole(key: ChunkKey) -> Fetch:
    return lambda tier: tier.get(key)
