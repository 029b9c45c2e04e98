"""Chunks that are brought to the first tier before they are asked for."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Literal, TypeAlias

from ...core import ChunkKey
from ..guard.locks import Latch, LockGuard, release_owned
from ..guard.worker_pool import WorkerPool
from .placement import Placement

Outcome: TypeAlias = Literal["finished", "late", "cancelled", "full", "refused", "failed"]

_QUEUED_PREFETCHES = 256


class Prefetch:
    """Chunks on their way to the first tier, in order; pinned while it is at work on them."""

    def __init__(
        self,
        placement: Placement,
        keys: list[ChunkKey],
        until_s: float,
        on_end: Callable[[Prefetch], None],
        clock: Callable[[], float],
    ) -> None:
        self._placement = placement
        self._keys = keys
        self._until_s = until_s
        self._on_end = on_end
        self._clock = clock
        self._lock = threading.RLock()  # of what follows
        self._begun = False
        self._cancelled = False
        self._outcome: Outcome | None = None
        self._error: BaseException | None = None
        self._found = 0
        self._ended = Latch()

    @property
    def outcome(self) -> Outcome | None:
        """Why it ended; None as long as it has not.

        `finished` : every key was seen to; what is not stored or cannot be read stays where it is.
        `late` : the deadline passed.
        `cancelled` : by `cancel`, or the store was closed.
        `full` : the first tier took no more without evicting what was just brought there.
        `refused` : too many prefetches were waiting already.
        `failed` : `result` raises why.
        """
        return self._outcome if self.done() else None

    def result(self, timeout_s: float | None = None) -> int:
        """Wait for the end; how many of the keys the first tier held then, however it ended.

        Raises
        ------
        TimeoutError : it has not ended within `timeout_s`.
        BaseException : it failed, of this.
        """
        if not self._ended.wait(timeout_s):
            raise TimeoutError(f"the prefetch of {len(self._keys)} chunks has not ended within {timeout_s} s")
        if self._error is not None:
            raise self._error
        return self._found

    def done(self) -> bool:
        """Whether it has ended."""
        return self._ended.is_open

    def cancel(self) -> bool:
        """End it, after the chunk that is under way; False if it had ended before."""
        try:
            with self._lock:
                if self._outcome is not None:
                    return False
                self._cancelled = True
                is_waiting = not self._begun
            if is_waiting:
                self.end("cancelled")
        except BaseException:  # the worker ends what has been cancelled and has not ended
            release_owned(self._lock)
            self._placement.recover()
            raise
        return True

    def work(self) -> None:
        """The prefetch itself, for a worker."""
        with self._lock:
            self._begun = not self._cancelled and self._outcome is None
        if not self._begun:
            self.end("cancelled")
            return
        try:
            left_s = max(0.0, self._until_s - self._clock())
            with self._placement.deadline.within(left_s), self._placement.pinned(self._keys):
                outcome = self._promote()
        except BaseException as exc:  # noqa: BLE001  raised again by `result`
            self._placement.recover()
            self.end("failed", exc)
        else:
            self.end(outcome)

    def end(self, outcome: Outcome, error: BaseException | None = None) -> None:
        """End it, if it has not ended yet; may be repeated."""
        with self._lock:
            if self._outcome is None:
                self._error, self._outcome = error, outcome
        if not self.done():
            self._found = self._placement.count_in_first(self._keys)
            self._ended.open()
        self._on_end(self)

    def _promote(self) -> Outcome:
        for key in self._keys:
            if self._cancelled:
                return "cancelled"
            if self._clock() >= self._until_s:
                return "late"
            if not self._placement.promote_stored(key):
                return "full"
        return "finished"


class PrefetchQueue:
    """One prefetch after the other, on a thread of its own.

    Parameters
    ----------
    most_queued : prefetches that may wait.
    clock : seconds, monotonic.

    Attributes
    ----------
    refused, failed : how many were.
    """

    def __init__(
        self,
        placement: Placement,
        *,
        most_queued: int = _QUEUED_PREFETCHES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.refused = 0
        self.failed = 0
        self._placement = placement
        self._clock = clock
        self._pool = WorkerPool("kvloom-prefetch", 1, queued_tasks=most_queued)
        self._lock = threading.RLock()  # of the counts and the set
        self._open: set[Prefetch] = set()

    def add(self, keys: list[ChunkKey], deadline_s: float | None) -> Prefetch:
        """Queue one; if too many wait, it is refused, and has ended when this returns.

        Raises
        ------
        ValueError : `deadline_s` is negative or no number.
        """
        if deadline_s is not None and not (isinstance(deadline_s, (int, float)) and deadline_s >= 0):
            raise ValueError(f"deadline_s is {deadline_s!r}; expected seconds from now, 0 or more, or None")
        until_s = math.inf if deadline_s is None else self._clock() + deadline_s
        prefetch = Prefetch(self._placement, keys, until_s, self._ended, self._clock)
        with self._lock:
            self._open.add(prefetch)
        if not self._pool.submit(prefetch.work):
            prefetch.end("refused")
        return prefetch

    def close(self, timeout_s: float | None) -> None:
        """Cancel all, and wait for the chunk that is under way; None: as long as it takes."""
        with self._lock:
            unfinished = list(self._open)
        for prefetch in unfinished:
            prefetch.cancel()
        self._pool.close(timeout_s)

    def recover(self) -> None:
        """For a thread that an exception has taken out of a call: release what it holds."""
        release_owned(self._lock)
        self._pool.recover()

    def _ended(self, prefetch: Prefetch) -> None:
        with LockGuard(self._lock), self._lock:
            if prefetch in self._open:
                self._open.discard(prefetch)
                self.refused += prefetch.outcome == "refused"
                self.failed += prefetch.outcome == "failed"
