"""Group commit: writers that come together share one sync."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future

from ....core import ChunkKey
from .index import Place


class Round:
    """What one sync makes durable.

    Attributes
    ----------
    written : chunks in the journal that are not durable yet.
    freed : places to be given back once it is durable that they are no longer needed.
    done : set when the sync is over.
    """

    def __init__(self) -> None:
        self.written: list[tuple[ChunkKey, Place]] = []
        self.freed: list[Place] = []
        self.nbytes = 0
        self.done: Future[None] = Future()


class GroupCommit:
    """Runs rounds one after another; what was written before a round began is part of it.

    A thread of its own, which lives only while something is not durable, begins a round `interval_s` after the first
    write. If that fails, the next `expect_sound` or `flush` raises the error.

    Parameters
    ----------
    sync : makes a round durable, or raises.
    """

    def __init__(self, sync: Callable[[Round], None], interval_s: float) -> None:
        self._sync = sync
        self._interval_s = interval_s
        self._turn = threading.Condition()  # of the next
        self._running = False  # whether anybody runs a round
        self._lock = threading.Lock()  # of everything below
        self._round = Round()
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._failure: BaseException | None = None

    def join(self, written: tuple[ChunkKey, Place] | None, freed: Place | None, *, in_background: bool) -> Round:
        """Adds what is in the journal by now to the open round, which is returned."""
        with self._lock:
            opened = self._round
            if written is not None:
                opened.written.append(written)
                opened.nbytes += written[1].nbytes
            if freed is not None:
                opened.freed.append(freed)
                opened.nbytes += freed.nbytes
            if in_background and self._thread is None and not self._stopping.is_set():
                self._thread = threading.Thread(target=self._run_rounds, name="kvloom-commit", daemon=True)
                self._thread.start()
            return opened

    def wait(self, opened: Round) -> None:
        """Returns when the round is durable, and runs it if nobody does; raises what it raised."""
        with self._turn:
            # who only waits to hear that a round is done must not wait for the next one
            self._turn.wait_for(lambda: opened.done.done() or not self._running)
            runs = not opened.done.done()
            if runs:
                self._running = True
        if runs:
            try:
                self._run_round()
            finally:
                with self._turn:
                    self._running = False
                    self._turn.notify_all()
        opened.done.result()

    def flush(self) -> None:
        """What was joined before is durable; raises the error of the background, or of this sync."""
        with self._lock:
            opened = self._round
        self.wait(opened)
        self.expect_sound()

    def expect_sound(self) -> None:
        """Raises the error that a round in the background ended with, once."""
        with self._lock:
            failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    @property
    def has_freed(self) -> bool:
        """Whether a sync would give space back."""
        with self._lock:
            return bool(self._round.freed)

    def close(self) -> None:
        """Ends the thread; what is not durable then stays so."""
        self._stopping.set()
        with self._lock:
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _run_round(self) -> None:
        with self._lock:
            opened, self._round = self._round, Round()
        if not opened.written and not opened.freed:
            opened.done.set_result(None)
            return
        try:
            self._sync(opened)
        except BaseException as exc:
            opened.done.set_exception(exc)
            if not isinstance(exc, Exception):
                raise
        else:
            opened.done.set_result(None)

    def _run_rounds(self) -> None:
        while True:
            self._stopping.wait(self._interval_s)
            with self._lock:
                opened = self._round
                if self._stopping.is_set() or not (opened.written or opened.freed):
                    self._thread = None
                    return
            try:
                self.wait(opened)
            except BaseException as exc:  # noqa: BLE001  raised by the next call instead, whatever it is
                with self._lock:
                    self._failure = exc
