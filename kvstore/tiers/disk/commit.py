"""Group commit: writers that come together share one sync."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeAlias

from ....core import ChunkKey
from ...guard.locks import LockGuard
from .index import PayloadLocation

Written: TypeAlias = tuple[ChunkKey, PayloadLocation]

_BATCH_BYTES = 256 << 20


class SyncRound:
    """What one sync makes durable.

    Attributes
    ----------
    written : chunks in the journal that are not durable yet.
    freed : locations to be given back once it is durable that they are no longer needed.
    lock : of the thread that runs the round; the others who wait for it queue here.
    error : why the sync failed.
    """

    def __init__(self) -> None:
        self.written: list[Written] = []
        self.freed: list[PayloadLocation] = []
        self.nbytes = 0
        self.lock = threading.RLock()
        self.is_done = False
        self.error: Exception | None = None


class GroupCommit:
    """Runs rounds one after another; what was written before a round began is part of it.

    A thread of its own, which lives only while something is not durable, begins a round `interval_s` after the first
    write. If that fails, the next `expect_sound` or `flush` raises the error.

    Parameters
    ----------
    sync : makes durable what was written, then gives back what was freed; or raises. A round that an exception from
        elsewhere cut short is run again.
    """

    def __init__(self, sync: Callable[[list[Written], list[PayloadLocation]], None], interval_s: float) -> None:
        self.lock = threading.RLock()  # of what follows, but for the turn
        self._sync = sync
        self._interval_s = interval_s
        self._turn = threading.RLock()  # of the thread that runs a round; taken after the lock of the round
        self._round = SyncRound()
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._failure: Exception | None = None

    def join(self, written: Written | None, freed: PayloadLocation | None, *, waits: bool = False) -> None:
        """Adds what is in the journal by now to the open round.

        Returns when that is durable, if `waits` or if 256 MiB have come together; the thread sees to it otherwise.
        """
        with self.lock:
            opened = self._round
            if freed is not None:
                opened.freed.append(freed)
                opened.nbytes += freed.nbytes
            if written is not None:
                opened.written.append(written)
                opened.nbytes += written[1].nbytes
                waits = waits or opened.nbytes > _BATCH_BYTES
            runs = self._thread is not None and self._thread.is_alive()
            if not (waits or runs or self._stopping.is_set()):
                self._thread = threading.Thread(target=self._run_rounds, name="kvloom-commit", daemon=True)
                self._thread.start()
        try:
            if waits:
                self._wait(opened)
        finally:
            del opened  # see `_wait`

    def flush(self) -> None:
        """What was joined before is durable; raises the error of the background, or of this sync."""
        self._wait(self._round)
        self.expect_sound()

    def expect_sound(self) -> None:
        """Raises the error that a round in the background ended with, once."""
        failure = self._failure
        if failure is not None:
            try:
                self._failure = None
                raise failure
            finally:
                del failure

    @property
    def has_freed(self) -> bool:
        """Whether a sync would give space back."""
        return bool(self._round.freed)

    def close(self) -> None:
        """Ends the thread; what is not durable then stays so."""
        self._stopping.set()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread() and thread.is_alive():
            thread.join()

    def _wait(self, opened: SyncRound) -> None:
        """Returns when the round is durable, and runs it if no other thread does; raises what it raised."""
        with LockGuard(opened.lock, self._turn), opened.lock:
            if not opened.is_done:
                with self._turn:
                    self._run_round(opened)
        error = opened.error
        del opened  # the traceback of the error leads to this frame, which must not lead back to the error
        if error is not None:
            try:
                raise error
            finally:
                del error

    def _run_round(self, opened: SyncRound) -> None:
        with self.lock:
            if self._round is opened:
                self._round = SyncRound()
        try:
            self._sync(opened.written, opened.freed)
        except Exception as exc:  # noqa: BLE001  raised by all who wait for the round
            opened.error = exc
        opened.is_done = True
        del opened  # see `_wait`

    def _run_rounds(self) -> None:
        while True:
            self._stopping.wait(self._interval_s)
            with self.lock:
                opened = self._round
                if self._stopping.is_set() or not (opened.written or opened.freed):
                    self._thread = None
                    return
            try:
                self._wait(opened)
            except Exception as exc:  # noqa: BLE001  raised by the next call instead, whatever it is
                self._failure = exc
            del opened  # see `_wait`
