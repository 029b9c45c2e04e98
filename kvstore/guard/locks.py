"""Locks and latches that no exception leaves held, wherever it is raised: Ctrl-C, or what a signal handler raises.

`with lock:` alone is not enough: the exception may arise after the last statement of the block and before `__exit__`
runs, and then the lock stays taken. So every lock of the store is an `RLock`, which knows its thread, and no thread
takes one twice. What a thread still holds when an exception has left the object is a leftover, and is released there.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

_LOOK_EVERY_S = 1.0


class LockGuard:
    """A context manager: if its block ends with an exception, it releases what this thread still holds of a lock.

    A signal handler, or another thread, may raise an exception between any two instructions. `with lock:` releases the
    lock if that happens within the block, but not if it happens between the end of the block and the release. So the
    locks of tiers are re-entrant, which know the thread that holds them, and are taken within a guard:

        with guard, lock: ...

    No code that takes these locks runs as a generator: a suspended one would release a lock at some later time.

    Parameters
    ----------
    mend : called first.
    """

    def __init__(self, *locks: threading.RLock, mend: Callable[[], None] = lambda: None) -> None:
        self._locks = locks
        self._mend = mend

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._mend()
            release_owned(*self._locks)


def is_held(lock: threading.RLock) -> bool:
    """Whether this thread holds the lock."""
    return bool(lock._is_owned())  # type: ignore[attr-defined]  # noqa: SLF001  as `threading.Condition` asks


def release_owned(*locks: threading.RLock) -> None:
    """Release those of the locks that the calling thread holds."""
    for lock in locks:
        while is_held(lock):
            lock.release()


class Latch:
    """Closed until `open` is called, then open for good. An interrupted `threading.Event` may keep its lock instead."""

    def __init__(self) -> None:
        self.is_open = False
        self._lock = threading.Lock()  # taken while the latch is closed
        self._lock.acquire()

    def open(self) -> None:
        self.is_open = True
        with suppress(RuntimeError):  # it is released already
            self._lock.release()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Whether it is open, after `timeout_s` at the latest; None: as long as it takes."""
        until_s = None if timeout_s is None else time.monotonic() + timeout_s
        while not self.is_open:
            # Not for longer at a time: a thread that was interrupted here may have taken the lock along.
            left_s = _LOOK_EVERY_S if until_s is None else min(_LOOK_EVERY_S, until_s - time.monotonic())
            if left_s <= 0:
                return False
            self._lock.acquire(timeout=left_s)
        with suppress(RuntimeError):  # for the next thread that waits
            self._lock.release()
        return True
