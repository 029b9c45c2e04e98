"""Encoded chunks in a stack of tiers, fastest first: how they get there, and where they go when a tier is full.

What goes then is for the eviction policy of the tier to say (`policy.py`), within the quotas of namespaces
(`level.py`); what may evict others, for its admission policy (`admission.py`).

Faults of tiers end here: they are counted, logged at most once a minute for each tier, and turned into "not found" or
into a `TierError` for who wanted to write.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, TypeAlias, runtime_checkable

from ..core import ChunkInfo, ChunkKey, EncodedChunk, Tier
from ..errors import ChunkCorruptError, CodecError, TierError, TierFullError
from .books import Books, Removal
from .level import Level
from .stats import TierStats

logger = logging.getLogger(__name__)

Fetch: TypeAlias = Callable[[Tier], EncodedChunk | None]

_WARNING_INTERVAL_S = 60.0
_STRIPES = 64


@runtime_checkable
class ChecksItself(Protocol):
    """Optional capability of a tier: finding its own inconsistencies."""

    def check(self) -> list[str]: ...


class TierStack:
    """Moves encoded chunks between tiers. Every method may be called from any thread; I/O runs outside the books' lock.

    Writing or removing a key in a tier and in its level's books is one step under the key's stripe, a lock that 1/64 of
    all keys share. Stripes are taken before the lock of the books and never within one another. What other processes do
    to a shared tier is under no stripe of ours: where it crosses our own writing of the same key, the books may err
    until the key is read, which sets them right.
    """

    def __init__(self, books: Books) -> None:
        self.levels = books.levels
        self._books = books
        self._stripes = [threading.Lock() for _ in range(_STRIPES)]
        self._warnings = threading.Lock()  # of `warned_at_s`

    def match(self, keys: Sequence[ChunkKey]) -> int:
        """How many leading keys are in some tier, unexpired."""
        self._catch_up(*self.levels)
        return self._books.match(keys)

    def locate(self, key: ChunkKey) -> int | None:
        """Index of the fastest tier that holds the chunk, unexpired."""
        self._catch_up(*self.levels)
        return self._books.locate(key)

    def pinned(self, keys: Iterable[ChunkKey], deadline_s: float | None) -> AbstractContextManager[None]:
        return self._books.pinned(keys, deadline_s)

    def put(self, key: ChunkKey, blob: EncodedChunk, info: ChunkInfo, *, everywhere: bool) -> int:
        """Writes to every tier, or to the first that takes the chunk; returns how many did.

        0 if it was not admitted. Raises the last `TierError` if no tier took it and none turned it away for that.
        """
        refusal: TierError | None = None
        admitted = True
        written: list[Level] = []
        for index, level in enumerate(self.levels):
            try:
                if self.insert(index, key, blob, info):
                    written.append(level)
                    if not everywhere:
                        break
                else:
                    admitted = False
            except TierError as exc:
                refusal = exc
                self._refused(level, exc)
        if refusal is not None and admitted and not written:
            raise refusal
        for level in self.levels if written else ():
            if level not in written:
                self._remove_older(level, key, info)
        return len(written)

    def promote(self, key: ChunkKey, blob: EncodedChunk) -> None:
        """Copies a chunk to the first tier, if it can take it."""
        try:
            self.insert(0, key, blob, was_read=True)
        except TierError as exc:
            self._refused(self.levels[0], exc)
        else:
            self.count(self.levels[0], promotions=1)

    def reads(self, level: Level, key: ChunkKey) -> int:
        """How often the chunk was read in this tier."""
        held = self._books.held(level, key)
        return 0 if held is None else held.reads

    def demote(self, index: int, key: ChunkKey) -> None:
        """Copies a chunk to the next tier that takes it, unless a slower tier has it already."""
        slower = range(index + 1, len(self.levels))
        if not slower or any(self._books.held(self.levels[i], key) for i in slower):
            return
        was_read = self.reads(self.levels[index], key) > 0
        blob, _ = self.fetch(self.levels[index], key, whole(key), is_use=False)
        if blob is None:
            return
        for i in slower:
            try:
                done = self.insert(i, key, blob, was_read=was_read)
            except TierError as exc:
                self._refused(self.levels[i], exc)
            else:
                if done:
                    self.count(self.levels[index], demotions=1)
                    return

    def insert(
        self, index: int, key: ChunkKey, blob: EncodedChunk, info: ChunkInfo | None = None, *, was_read: bool = False
    ) -> bool:
        """Puts into one tier, evicting until the chunk fits; False if it may not evict others.

        Parameters
        ----------
        info : None for what another tier remembers of the chunk.
        was_read : in another tier, so that it may evict others.

        Raises
        ------
        TierError : it cannot be done.
        """
        level = self.levels[index]
        info = self._books.info(key) if info is None else info
        room = level.room(info.namespace)
        self._catch_up(level)  # so that what others wrote before counts as older
        admitted = was_read or self._books.admits(level, key, blob.nbytes)
        while True:
            refusal = self._over_limit(level, key, blob.nbytes, info)
            at_limit = refusal is not None
            if refusal is None:
                try:
                    self._write(level, key, blob, info)
                    break
                except TierFullError as exc:
                    refusal = exc
            most_bytes = room.limit_bytes if at_limit else level.tier.capacity_bytes
            if most_bytes is not None and refusal.needed_bytes > most_bytes:
                raise refusal
            if self._expire(level):
                continue
            if not admitted:
                self.count(level, not_admitted=1)
                return False
            if not self._evict(index, key, info, own_room=at_limit):
                raise refusal
        while room.is_over and self._evict(index, key, info, own_room=True):
            pass  # what the tier adds to the tensors was not known before
        return True

    def fetch(
        self, level: Level, key: ChunkKey, fetch: Fetch, *, is_use: bool = True
    ) -> tuple[EncodedChunk | None, str | None]:
        """What one tier holds, or why it cannot be read (`expired`, `corrupt`, `unavailable`).

        (None, None) if it has nothing. `is_use`: the policy of the tier is told.
        """
        self._catch_up(level)
        state = self._books.read(level, key, is_use=is_use)
        if state == "absent":
            return None, None
        try:
            if state == "expired":
                self.remove(level, key, "expirations")
                return None, "expired"
            blob = fetch(level.tier)
        except ChunkCorruptError as exc:
            self.discard(level, key, exc)
            return None, "corrupt"
        except TierError as exc:
            self._refused(level, exc)
            return None, "expired" if state == "expired" else "unavailable"
        if blob is None:
            with self._stripe(key):
                if key not in level.tier:  # rather than evicted and put again since
                    self._books.strike(level, key, "departures")
        return blob, None

    def remove(self, level: Level, key: ChunkKey, why: Removal) -> bool:
        """Deletes from one tier, unless `Books.strike` says that it may not go; whether this call did it.

        The key leaves the books first: who pins it later does not count on this copy.
        """
        with self._stripe(key):
            held = self._books.strike(level, key, why)
            if held is None:
                return False
            try:
                level.tier.delete(key)
            except TierError:
                self._books.restore(level, key, held, why)
                raise
            return True

    def discard(self, level: Level, key: ChunkKey, exc: CodecError) -> None:
        """Removes a chunk that cannot be given back as it was, counts it and warns."""
        self._warn(level, exc)
        try:
            self.remove(level, key, "corruptions" if isinstance(exc, ChunkCorruptError) else "undecodable")
        except TierError as refusal:
            self._refused(level, refusal)

    def count(self, level: Level, **counts: int) -> None:
        self._books.count(level, **counts)

    def stats(self) -> tuple[TierStats, ...]:
        return self._books.stats()

    def check(self) -> list[str]:
        self._catch_up(*self.levels)
        tiers = (level.tier for level in self.levels)
        problems = [problem for tier in tiers if isinstance(tier, ChecksItself) for problem in tier.check()]
        return problems + self._books.check()

    def close(self) -> None:
        for level in self.levels:
            level.tier.close()

    def _write(self, level: Level, key: ChunkKey, blob: EncodedChunk, info: ChunkInfo) -> None:
        with self._stripe(key):
            taken_bytes = level.tier.put(key, blob, info)
            if taken_bytes is None:
                level.says_sizes = False
                taken_bytes = blob.nbytes
            self._books.enter(level, key, taken_bytes, info, puts=1, bytes_written=blob.nbytes)

    def _over_limit(self, level: Level, key: ChunkKey, nbytes: int, info: ChunkInfo) -> TierFullError | None:
        excess_bytes = self._books.excess_bytes(level, key, nbytes, info.namespace)
        if excess_bytes <= 0:
            return None
        return TierFullError(
            f"tier {level.tier.name!r}: {nbytes} bytes exceed the limit of namespace {info.namespace!r} "
            f"by {excess_bytes}, and nothing of it can go; raise its Quota, or unpin some of its chunks",
            needed_bytes=nbytes,
        )

    def _expire(self, level: Level) -> bool:
        """Removes an expired chunk; False if there is none."""
        key = self._books.expired(level)
        if key is not None:
            self.remove(level, key, "expirations")
        return key is not None

    def _evict(self, index: int, key: ChunkKey, info: ChunkInfo, *, own_room: bool) -> bool:
        """Makes room for `key` by removing a chunk that is not pinned, after demoting it; False if there is none."""
        level = self.levels[index]
        self._catch_up(level)
        victim = self._books.choose_victim(level, key, info, own_room=own_room)
        if victim is None:
            return False
        try:
            self.demote(index, victim)
            self.remove(level, victim, "evictions")
        finally:
            self._books.let_go(level, victim)
        return True

    def _remove_older(self, level: Level, key: ChunkKey, info: ChunkInfo) -> None:
        """A copy that the last `put` did not write must not outlive the new one, nor count for another namespace."""
        held = self._books.held(level, key)
        if held is None or (held.info.expires_at_s, held.info.namespace) == (info.expires_at_s, info.namespace):
            return
        try:
            self.remove(level, key, "deletions")
        except TierError as exc:
            self._refused(level, exc)

    def _catch_up(self, *levels: Level) -> None:
        """The books follow what other processes did to shared tiers."""
        for level in levels:
            # Who finds another thread at it goes on with the books as they are, rather than wait behind a slow tier.
            if level.shared is not None and level.collecting.acquire(blocking=False):
                try:
                    self._books.apply(level, level.shared.changes())
                except TierError as exc:
                    self._refused(level, exc)
                finally:
                    level.collecting.release()

    def _refused(self, level: Level, exc: TierError) -> None:
        if isinstance(exc, TierFullError):
            self.count(level, rejections=1)
        else:
            self.count(level, errors=1)
            self._warn(level, exc)

    def _warn(self, level: Level, exc: Exception) -> None:
        with self._warnings:
            now_s = time.monotonic()
            if now_s - level.warned_at_s < _WARNING_INTERVAL_S:
                return
            level.warned_at_s = now_s
        logger.warning("tier %r: %s (its further warnings are held back for a minute)", level.tier.name, exc)

    def _stripe(self, key: ChunkKey) -> threading.Lock:
        return self._stripes[key[-1] % _STRIPES]


def whole(key: ChunkKey) -> Fetch:
    return lambda tier: tier.get(key)
