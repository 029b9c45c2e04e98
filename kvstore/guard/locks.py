"""Locks and latches that survive an exception between any two bytecodes: Ctrl-C, or what a signal handler raises.

`with lock:` alone is not enough: the exception may arise after the last statement of the block and before `__exit__`
runs, and then the lock stays taken. So every lock of the store is an `RLock`, which knows its thread, and no thread
takes one twice. What a thread still owns when an exception has left the object is a leftover; `release_owned` releases
it.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress

_LOOK_EVERY_S = 1.0


def release_owned(*locks: threading.RLock) -> None:
    """Release those of the locks that the calling thread owns."""
    for lock in locks:
        with suppress(RuntimeError):  # raised as soon as this thread does not own it
            while True:
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
