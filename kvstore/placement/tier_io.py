"""One tier at a time: what is done there, and entered in its books, as one step.

Faults of tiers end here or in the stack: they are counted, logged (`faults.py`), and turned into "not found" or into a
`TierError` for who wanted to write. A tier that may stall is called through its lane (`lane.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import TypeAlias

from ...core import ChunkInfo, ChunkKey, EncodedChunk, Entry, Tier
from ...errors import ChunkCorruptError, CodecError, TierError, TierTimeoutError, TierUnavailableError
from ..capabilities import ChecksItself, HoldsChunks, MayStall, ReadsLayers, ReportsChanges
from ..guard.deadline import Patience
from ..guard.lane import Lane
from .catalog import Books, Removal
from .fault_log import Faults
from .tier_state import Held, Level

Fetch: TypeAlias = Callable[[HoldsChunks], EncodedChunk | None]

_NEWS_S = 1.0  # how long a call waits for what other processes did; what comes later is heeded when it comes


class Clerk:
    """Reads, writes and removes chunks in tiers, and keeps the books. Every method may be called from any thread.

    Writing or removing a key in a tier and in its level's books is one step under the key's stripe, a lock of the level
    that 1/64 of all keys share. Stripes are taken before the lock of the books and never within one another; I/O runs
    outside the lock of the books. What other processes do to a shared tier is under no stripe of ours: where it crosses
    our own writing of the same key, the books may err until the key is read, which sets them right.

    Parameters
    ----------
    timeout_s : longest time that a call waits for one operation of a tier that may stall; None for no limit.

    Attributes
    ----------
    patience : how long the calling thread waits for tiers, if not as long as that.
    """

    def __init__(self, books: Books, *, timeout_s: float | None = None) -> None:
        self.patience = Patience()
        self.faults = Faults(books)
        self._books = books
        self._levels = books.levels
        for level in self._levels:
            if timeout_s is not None and isinstance(level.tier, MayStall) and level.tier.may_stall:
                level.lane = Lane(
                    level.tier,
                    timeout_s,
                    patience=self.patience,
                    on_recovery=partial(self.faults.welcome, level),
                    on_removal=partial(books.strike, level, why="given_up"),
                )

    def write(self, level: Level, key: ChunkKey, blob: EncodedChunk, info: ChunkInfo) -> None:
        """Puts into one tier; raises `TierError`."""
        with level.stripe(key):
            try:
                taken_bytes = level.call(lambda tier: tier.put(key, blob, info), writes=key)
            except TierTimeoutError as exc:
                if exc.begun:  # the lane sees to it that the tier ends without the chunk
                    self._books.strike(level, key, "given_up")
                raise
            if taken_bytes is None:
                level.says_sizes = False
                taken_bytes = blob.nbytes
            self._books.enter(level, key, taken_bytes, info, puts=1, bytes_written=blob.nbytes)

    def fetch(
        self, level: Level, key: ChunkKey, fetch: Fetch, *, is_use: bool = True
    ) -> tuple[EncodedChunk | None, str | None, float | None]:
        """What one tier holds, why it cannot be read (`expired`, `corrupt`, `timeout`, `unavailable`), `recompute_s`.

        All None if it has nothing. `is_use`: the policy of the tier is told.
        """
        held = self._books.read(level, key, is_use=is_use)
        if (held is None or held == "expired") and level.shared is not None:
            self.catch_up(level)  # others may have put it; what they removed, the tier says
            held = self._books.read(level, key, is_use=is_use)
        if held is None:
            return None, None, None
        try:
            if held == "expired":
                self.remove(level, key, "expirations")
                return None, "expired", None
            blob = level.call_at_once(fetch)
            if blob is None:
                blob = level.call(fetch)
            if blob is None:
                with level.stripe(key):
                    is_there = level.call(lambda tier: key in tier, is_brief=True)
                    if not is_there:  # rather than evicted and put again since
                        self._books.strike(level, key, "departures")
        except ChunkCorruptError as exc:
            self.discard(level, key, exc)
            return None, "corrupt", None
        except TierError as exc:
            self.faults.failed(level, exc)
            if held == "expired":
                return None, "expired", None
            return None, "timeout" if isinstance(exc, TierTimeoutError) else "unavailable", None
        return blob, None, held.info.recompute_s

    def remove(self, level: Level, key: ChunkKey, why: Removal) -> Held | None:
        """Deletes from one tier, unless `Books.strike` says that it may not go; what this call has deleted.

        The key leaves the books first: who pins it later does not count on this copy.

        Raises
        ------
        TierError : the tier holds it still, or may hold it until it answers.
        """
        with level.stripe(key):
            held = self._books.strike(level, key, why)
            if held is None:
                if key in level.doubtful():
                    raise TierUnavailableError(f"tier {level.tier.name!r} may still hold the chunk until it answers")
                return None
            try:
                level.call(lambda tier: tier.delete(key), writes=key)
            except TierError as exc:
                if isinstance(exc, TierTimeoutError) and exc.begun:
                    self._books.give_up(level, key, why)
                else:
                    self._books.restore(level, key, held, why)
                raise
            return held

    def discard(self, level: Level, key: ChunkKey, exc: CodecError) -> None:
        """Removes a chunk that cannot be given back as it was, counts it and warns."""
        self.faults.warn(level, exc)
        try:
            self.remove(level, key, "corruptions" if isinstance(exc, ChunkCorruptError) else "undecodable")
        except TierError as refusal:
            self.faults.failed(level, refusal)

    def catch_up(self, *levels: Level, within_s: float | None = _NEWS_S) -> None:
        """The books follow what other processes did to shared tiers.

        Who finds another thread at it goes on with the books as they are, rather than wait behind a slow tier.
        """
        for level in levels:
            if level.shared is None or level.collecting.locked() or not level.answers or not level.has_changes:
                continue
            try:
                with self.patience.within(within_s):
                    level.call(partial(self._collect, level, level.shared), is_brief=True)
            except TierError as exc:
                self.faults.failed(level, exc)

    def check(self) -> list[str]:
        """What is inconsistent within tiers, and between them and the books, in words."""
        self.catch_up(*self._levels, within_s=None)
        problems = []
        for level in self._levels:
            doubtful = level.doubtful()  # before the tier is asked: some may be settled then
            try:
                problems += level.call(lambda tier: tier.check() if isinstance(tier, ChecksItself) else [])
                entries = level.call(lambda tier: tier.entries())
            except TierError as exc:
                problems.append(f"tier {level.tier.name!r} cannot be checked: {exc}")
            else:
                problems += level.check(entries, doubtful)
        return problems + self._books.check()

    def close(self) -> None:
        """Closes every tier; one that does not answer is closed when it does."""
        with ExitStack() as closing:
            for level in reversed(self._levels):
                closing.callback(self._close, level)

    def _close(self, level: Level) -> None:
        try:
            level.close()
        except TierTimeoutError as exc:
            self.faults.failed(level, exc)

    def _collect(self, level: Level, shared: ReportsChanges, tier: Tier) -> None:
        """Runs where the tier is called, to its end also if nobody waits for it: a tier says only once what is new."""
        if not level.collecting.acquire(blocking=False):
            return
        try:
            level.news.extend(shared.changes())
            while level.news:
                change = level.news[0]
                if isinstance(change, Entry):
                    self._books.enter(level, change.key, change.nbytes, change.info, arrivals=1)
                elif change not in tier:  # rather than put again, here, since it was removed
                    self._books.strike(level, change, "departures")
                level.news.popleft()
        finally:
            level.collecting.release()


def whole(key: ChunkKey) -> Fetch:
    return lambda tier: tier.get(key)


def some_layers(key: ChunkKey, start: int, stop: int) -> Fetch:
    """Reads layers `[start, stop)` of a chunk.

    Raises
    ------
    ValueError : the range is empty, or, when it reads, the chunk has no such layers.
    """
    if not 0 <= start < stop:
        raise ValueError(f"layers are [{start}, {stop}); expected 0 <= start < stop")

    def fetch(tier: HoldsChunks) -> EncodedChunk | None:
        if isinstance(tier, ReadsLayers):
            blob = tier.get_layers(key, start, stop)
        else:
            blob = tier.get(key)
            blob = None if blob is None else blob.layers(start, stop)
        if blob is not None and any(len(blob.tensors[name]) != stop - start for name in blob.layered):
            raise ValueError(f"layers are [{start}, {stop}); chunk {key.hex()} has fewer")
        return blob

    return fetch
