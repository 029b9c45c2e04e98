"""One tier: what is read, written and removed there, and the catalog that follows in the same step.

Errors of tiers end here or in `Placement`: they are counted and logged, at most once a minute for each tier, and turned
into "not found", or into a `TierError` for a caller that wanted to write.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from typing import Literal, TypeAlias

from ...core import ChunkInfo, ChunkKey, EncodedChunk, Entry, Tier
from ...errors import (
    ChunkCorruptError,
    ChunkUnreachableError,
    CodecError,
    TierError,
    TierFullError,
    TierNoSpaceError,
    TierReadOnlyError,
    TierTimeoutError,
    TierUnavailableError,
)
from ..capabilities import ChecksItself, FindsChunks, ReadsLayers, ReportsChanges
from ..guard.deadline import Deadline, DeadlineLock
from ..guard.guarded_tier import GuardedTier
from ..guard.locks import release_owned
from .catalog import Catalog, Removal
from .finder import Finder
from .tier_state import Residency

Fault: TypeAlias = Literal["expired", "corrupt", "timeout", "unavailable"]

_LOG = logging.getLogger("kvloom.kvstore")
_STRIPES = 64
_CHANGES_S = 1.0  # how long a call waits for what other processes did; what comes later is heeded when it comes
_LOG_INTERVAL_S = 60.0


class TierIO:
    """Reads, writes and removes chunks of one tier, and keeps the catalog in step. Every method from any thread.

    Writing or removing a chunk, in the tier and in the catalog, is one step under the key's lock, which 1/64 of all
    keys share. It is taken before the catalog's lock, and no thread takes two of them; I/O runs outside the catalog's
    lock. What other processes do to a shared tier is under no lock of ours: where it crosses our own writing of the
    same chunk, the catalog may err until the chunk is read, which sets it right.

    A chunk whose writing or removal an exception has interrupted is removed by the next call that comes by.

    Parameters
    ----------
    index : of the tier, 0 for the fastest.
    tier : a tier that may stall is a `GuardedTier`; it tells this object what it does on its own.
    deadline : of the calling thread.
    clock : seconds, monotonic; for how often warnings are logged.

    Attributes
    ----------
    finder : what asks the tier for chunks that others have put; None for a tier that cannot be asked.
    """

    def __init__(
        self,
        index: int,
        tier: Tier,
        catalog: Catalog,
        deadline: Deadline,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.index = index
        self.tier = tier
        self.state = catalog.states[index]
        self._catalog = catalog
        self._guard = tier if isinstance(tier, GuardedTier) else None
        if self._guard is not None:
            self._guard.on_recovery = self._recovered
            self._guard.on_removal = lambda key: catalog.remove(self.state, key, "given_up")
        watched = tier if self._guard is None else self._guard.tier
        self._layer_reader = tier if isinstance(tier, ReadsLayers) else None
        self._shared = watched if isinstance(watched, ReportsChanges) else None
        self.finder = (
            Finder(tier, watched, self.state, catalog, self.failed, clock) if isinstance(watched, FindsChunks) else None
        )
        self._clock = clock
        locks = [threading.RLock() for _ in range(_STRIPES)]
        self._owned = (*locks, collecting := threading.RLock())
        self._locks: list[AbstractContextManager[object]] = [
            lock if self._guard is None else DeadlineLock(tier.name, lock, deadline, self._guard.timeout_s)
            for lock in locks
        ]
        self._collecting = collecting  # guards the next two
        self._changes: deque[Entry | ChunkKey] = deque()  # collected, and not applied yet
        self._lost_changes = False
        self._interrupted: set[ChunkKey] = set()
        self._logged_at_s: dict[str, float] = {}

    # ---------------------------------------------------------------------------------------------------- reading

    def read(
        self, key: ChunkKey, layers: tuple[int, int] | None = None, *, is_use: bool = True
    ) -> tuple[EncodedChunk | None, Fault | None, float | None]:
        """What the tier holds, or why it cannot be read; and what computing the chunk took.

        All None if it has nothing. `is_use`: the tier's policy is told.
        """
        found = self._catalog.read(self.state, key, is_use=is_use)
        if (found is None or found == "expired") and self._shared is not None:
            self.follow_changes()  # others may have put it; what they removed, the tier says
            found = self._catalog.read(self.state, key, is_use=is_use)
        if found is None and self.finder is not None and self.finder.look_for([key]):
            found = self._catalog.read(self.state, key, is_use=is_use)
        if found is None:
            return None, None, None
        try:
            if found == "expired":
                self.remove(key, "expirations")
                return None, "expired", None
            blob = self.tier.get(key) if layers is None else self._get_layers(key, *layers)
            if blob is None:
                with self._locked(key):
                    if key not in self.tier:  # rather than evicted and put again since
                        self._catalog.remove(self.state, key, "departures")
        except ChunkCorruptError as exc:
            self.discard(key, exc)
            return None, "corrupt", None
        except ChunkUnreachableError as exc:
            self.warn(exc)
            self._catalog.count(self.state, unreachable=1)
            self._catalog.remove(self.state, key, "departures")
            if self.finder is not None:
                self.finder.forget(key)
            return None, "unavailable", None
        except TierError as exc:
            self.failed(exc)
            if found == "expired":
                return None, "expired", None
            return None, "timeout" if isinstance(exc, TierTimeoutError) else "unavailable", None
        return blob, None, found.info.recompute_s

    def _get_layers(self, key: ChunkKey, start: int, stop: int) -> EncodedChunk | None:
        if self._layer_reader is not None:
            blob = self._layer_reader.get_layers(key, start, stop)
        else:
            blob = self.tier.get(key)
            blob = None if blob is None else blob.layers(start, stop)
        if blob is not None and any(len(blob.tensors[name]) != stop - start for name in blob.layered):
            raise ValueError(f"layers are [{start}, {stop}); chunk {key.hex()} has fewer")
        return blob

    # ---------------------------------------------------------------------------------------------------- writing

    def write(self, key: ChunkKey, blob: EncodedChunk, info: ChunkInfo, **counts: int) -> None:
        """Put into the tier, and count `counts` for it; raises `TierError`."""
        with self._locked(key):
            try:
                taken_bytes = self.tier.put(key, blob, info)
                if taken_bytes is None:
                    self.state.reports_sizes = False
                    taken_bytes = blob.nbytes
                counts |= {"puts": 1, "bytes_written": blob.nbytes}
                self._catalog.enter(self.state, key, taken_bytes, info, **counts)
                self._interrupted.discard(key)
            except TierError as exc:
                if isinstance(exc, TierTimeoutError) and exc.begun:  # the guard sees to it that the chunk goes
                    self._catalog.remove(self.state, key, "given_up")
                elif isinstance(exc, TierNoSpaceError):  # which the capacity of the tier was to prevent
                    self._catalog.count(self.state, no_space=1)
                    self.warn(exc)
                raise
            except BaseException:
                self._interrupted.add(key)
                raise

    def remove(self, key: ChunkKey, why: Removal) -> Residency | None:
        """Delete from the tier, unless `Catalog.remove` says that it may not go; what this call has deleted.

        The chunk leaves the catalog first: a later pin does not count on this copy.

        Raises
        ------
        TierError : the tier holds it still, or may hold it until it answers.
        """
        with self._locked(key):
            try:
                residency = self._catalog.remove(self.state, key, why)
                if residency is not None:
                    self._delete(key, residency, why)
                elif key in self.doubtful():
                    raise TierUnavailableError(f"tier {self.tier.name!r} may still hold the chunk until it answers")
            except TierError:
                raise
            except BaseException:
                self._interrupted.add(key)
                raise
        return residency

    def _delete(self, key: ChunkKey, residency: Residency, why: Removal) -> None:
        try:
            self.tier.delete(key)
        except TierError as exc:
            if isinstance(exc, TierTimeoutError) and exc.begun:
                self._catalog.give_up(self.state, key, why)
            else:
                self._catalog.restore(self.state, key, residency, why)
            raise

    def discard(self, key: ChunkKey, exc: CodecError) -> None:
        """Remove a chunk that cannot be given back as it was, count it and warn."""
        self.warn(exc)
        try:
            self.remove(key, "corruptions" if isinstance(exc, ChunkCorruptError) else "undecodable")
        except TierError as refusal:
            self.failed(refusal)

    # ----------------------------------------------------------------------------------------------- keeping step

    def doubtful(self) -> frozenset[ChunkKey]:
        """Chunks that the tier may hold until it answers, although the catalog does not."""
        return frozenset() if self._guard is None else self._guard.doubtful()

    @property
    def may_have_changes(self) -> bool:
        """False if `follow_changes` has nothing to do."""
        return self._shared is not None or bool(self._interrupted)

    def has_changes(self) -> bool:
        """Whether `follow_changes` has something to read or to remove, as far as can be told without waiting."""
        if self._interrupted:
            return True
        return self._shared is not None and self.state.is_available and self._has_foreign_changes()

    def follow_changes(self, *, timeout_s: float | None = _CHANGES_S) -> None:
        """Enter into the catalog what other processes did to the tier, and what interrupted calls have left.

        A thread that finds another one at it goes on with the catalog as it is, rather than wait behind a slow tier.
        """
        if self._interrupted:
            self._remove_interrupted()
        if self._shared is None or not self.state.is_available or not self._has_foreign_changes():
            return
        try:
            if self._guard is None:
                self._collect(self.tier)
            else:
                self._guard.call(self._collect, is_brief=True, timeout_s=timeout_s)
        except TierError as exc:
            self.failed(exc)

    def check(self) -> list[str]:
        """What is inconsistent within the tier, and between it and the catalog, in words."""
        self.follow_changes(timeout_s=None)
        doubtful = self.doubtful() | self._interrupted  # before the tier is asked: some may be settled then
        try:
            problems = self.tier.check() if isinstance(self.tier, ChecksItself) else []
            entries = self.tier.entries()
        except TierError as exc:
            return [f"tier {self.tier.name!r} cannot be checked: {exc}"]
        return problems + self.state.check(entries, doubtful)

    def close(self) -> None:
        """Close the tier; one that does not answer is closed when it does."""
        try:
            self.tier.close()
        except TierTimeoutError as exc:
            self.failed(exc)

    def recover(self) -> None:
        """For a thread that an exception has taken out of a call: release what it holds."""
        release_owned(*self._owned)
        if self._guard is not None:
            self._guard.recover()

    def _has_foreign_changes(self) -> bool:
        return bool(self._changes or self._lost_changes) or self._guard is None or self._guard.has_changes()

    def _collect(self, tier: Tier) -> None:
        """Runs where the tier is called, to its end also if the caller gives up: a tier reports a change only once."""
        if self._shared is None or not self._collecting.acquire(blocking=False):
            return
        try:
            if self._lost_changes:
                self._changes.extend(self._differences(tier))
            self._lost_changes = True  # if an exception comes between the next steps
            try:
                self._changes.extend(self._shared.changes())
            except TierError:
                self._lost_changes = False
                raise
            self._lost_changes = False
            while self._changes:
                change = self._changes[0]
                if isinstance(change, Entry):
                    self._catalog.enter(self.state, change.key, change.nbytes, change.info, arrivals=1)
                elif change not in tier:  # rather than put again, here, since it was removed
                    self._catalog.remove(self.state, change, "departures")
                self._changes.popleft()
        finally:
            self._collecting.release()

    def _differences(self, tier: Tier) -> list[Entry | ChunkKey]:
        """What the catalog has missed, by what the tier holds."""
        entries, known = {entry.key: entry for entry in tier.entries()}, set(self.state.residencies)
        return [entry for key, entry in entries.items() if key not in known] + [*(known - entries.keys())]

    def _remove_interrupted(self) -> None:
        try:
            for key in tuple(self._interrupted - self.doubtful()) if self.state.is_available else ():
                with self._locked(key):
                    if key in self._interrupted:
                        with suppress(TierReadOnlyError):  # then nothing was written either
                            self.tier.delete(key)
                            self._catalog.remove(self.state, key, "given_up")
                        self._interrupted.discard(key)
        except TierError as exc:
            self.failed(exc)

    def _locked(self, key: ChunkKey) -> AbstractContextManager[object]:
        return self._locks[key[-1] % _STRIPES]

    # ----------------------------------------------------------------------------------------------------- errors

    def refused(self, key: ChunkKey, exc: TierError) -> None:
        """The tier has not taken the chunk."""
        if isinstance(exc, TierFullError | TierReadOnlyError):
            self._catalog.reject(self.state, key)
        else:
            self.failed(exc)

    def failed(self, exc: TierError) -> None:
        """The tier has not done something else, or has failed."""
        if isinstance(exc, TierReadOnlyError):
            return  # as it was asked to be
        self._catalog.count(self.state, **{"timeouts" if isinstance(exc, TierTimeoutError) else "errors": 1})
        self.warn(exc)

    def warn(self, exc: Exception) -> None:
        if self._is_due("warning"):
            # as text: whoever keeps the record must not keep what the traceback refers to, open files among it
            text = str(exc)
            _LOG.warning("tier %r: %s (its further warnings are held back for a minute)", self.tier.name, text)

    def _recovered(self, down_s: float) -> None:
        """The tier was down, and answers again."""
        self._catalog.count(self.state, recoveries=1)
        if self._is_due("recovery"):
            _LOG.warning("tier %r answers again, after %.1f s", self.tier.name, down_s)

    def _is_due(self, what: str) -> bool:
        now_s = self._clock()
        is_due = now_s - self._logged_at_s.get(what, -_LOG_INTERVAL_S) >= _LOG_INTERVAL_S
        if is_due:
            self._logged_at_s[what] = now_s
        return is_due
