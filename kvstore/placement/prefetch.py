"""Chunks that are brought to the first tier before they are asked for."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Literal, TypeAlias

from ...core import ChunkKey
from ..guard.worker_pool import Workers
from .tier_stack import TierStack

Outcome: TypeAlias = Literal["finished", "late", "cancelled", "full", "refused", "failed"]

_QUEUED_PREFETCHES = 256


class Prefetch:
    """Chunks on their way to the first tier, in order; pinned while it is at work on them."""

    def __init__(
        self, stack: TierStack, keys: list[ChunkKey], until_s: float, on_end: Callable[[Outcome], None]
    ) -> None:
        self._stack = stack
        self._keys = keys
        self._until_s = until_s
        self._on_end = on_end
        self._lock = threading.Lock()  # of what follows
        self._begun = False
        self._cancelled = False
        self._outcome: Outcome | None = None
        self._error: BaseException | None = None
        self._found = 0
        self._ended = threading.Event()

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
        """Waits for the end; how many of the keys the first tier held then, however it ended.

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
        return self._ended.is_set()

    def cancel(self) -> bool:
        """Ends it, after the chunk that is under way; False if it had ended before."""
        with self._lock:
            if self._outcome is not None:
                return False
            self._cancelled = True
            waiting = not self._begun
        if waiting:
            self.end("cancelled")
        return True

    def work(self) -> None:
        """The prefetch itself, for a thread that has time."""
        with self._lock:
            if self._cancelled or self._outcome is not None:
                return
            self._begun = True
        try:
            with (
                self._stack.patience.within(max(0.0, self._until_s - time.monotonic())),
                self._stack.pinned(self._keys, None),
            ):
                outcome = self._promote()
        except BaseException as exc:  # noqa: BLE001  raised again by `result`
            self.end("failed", exc)
        else:
            self.end(outcome)

    def end(self, outcome: Outcome, error: BaseException | None = None) -> None:
        """Ends it, if nothing has yet."""
        with self._lock:
            if self._outcome is not None:
                return
            self._outcome, self._error = outcome, error
        self._found = self._stack.count_in_first(self._keys)
        self._on_end(outcome)
        self._ended.set()

    def _promote(self) -> Outcome:
        for key in self._keys:
            if self._cancelled:
                return "cancelled"
            if time.monotonic() >= self._until_s:
                return "late"
            if not self._stack.raise_to_first(key):
                return "full"
        return "finished"


class PrefetchQueue:
    """One prefetch after the other, on a thread of its own.

    Attributes
    ----------
    refused, failed : how many were.
    """

    def __init__(self, stack: TierStack) -> None:
        self.refused = 0
        self.failed = 0
        self._stack = stack
        self._workers = Workers("kvloom-prefetch", 1, queued_tasks=_QUEUED_PREFETCHES)
        self._lock = threading.Lock()  # of the counts and the set
        self._open: set[Prefetch] = set()

    def add(self, keys: list[ChunkKey], deadline_s: float | None) -> Prefetch:
        """Queues one; if too many wait, it is refused, and has ended when this returns.

        Raises
        ------
        ValueError : `deadline_s` is negative or no number.
        """
        if deadline_s is not None and not deadline_s >= 0:
            raise ValueError(f"deadline_s is {deadline_s}; expected seconds from now, 0 or more, or None")
        until_s = math.inf if deadline_s is None else time.monotonic() + deadline_s

        def on_end(outcome: Outcome) -> None:
            with self._lock:
                self.refused += outcome == "refused"
                self.failed += outcome == "failed"
                self._open.discard(prefetch)

        prefetch = Prefetch(self._stack, keys, until_s, on_end)
        with self._lock:
            self._open.add(prefetch)
        if not self._workers.submit(prefetch.work):
            prefetch.end("refused")
        return prefetch

    def close(self, timeout_s: float | None) -> None:
        """Cancels all, and waits for the chunk that is under way; None: as long as it takes."""
        with self._lock:
            unfinished = list(self._open)
        for prefetch in unfinished:
            prefetch.cancel()
        self._workers.close(timeout_s)
