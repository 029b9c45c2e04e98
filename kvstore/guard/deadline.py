"""Until when a thread waits for tiers."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

from ...errors import TierTimeoutError


class Deadline(threading.local):
    """Until when the calling thread waits for tiers, all its calls together; shared by the guarded tiers of a store.

    Attributes
    ----------
    until_s : on `clock`; infinite for no deadline.
    """

    until_s = math.inf

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock

    def now_s(self) -> float:
        return self._clock()

    def left_s(self) -> float:
        return self.until_s - self._clock()

    def clear(self) -> None:
        """No deadline: an exception has passed by what would have restored the one before."""
        self.until_s = math.inf

    def within(self, timeout_s: float | None) -> Within:
        """For `with`: the deadline is `timeout_s` from now, or earlier if it was; None changes nothing.

        Raises
        ------
        ValueError : `timeout_s` is negative or no number.
        """
        if timeout_s is None:
            return Within(self, math.inf)
        check_timeout(timeout_s)
        return Within(self, self._clock() + timeout_s)


class Within:
    """Sets a deadline and restores the one before. If an exception passes `__exit__` by, `Deadline.clear` is due."""

    __slots__ = ("_before_s", "_deadline", "_until_s")

    def __init__(self, deadline: Deadline, until_s: float) -> None:
        self._deadline = deadline
        self._before_s = deadline.until_s
        self._until_s = min(self._before_s, until_s)

    def __enter__(self) -> None:
        self._deadline.until_s = self._until_s

    def __exit__(self, *_: object) -> None:
        self._deadline.until_s = self._before_s


class DeadlineLock:
    """A lock for `with`: to wait for it, and what runs while it is held, take `timeout_s` together.

    Raises
    ------
    TierTimeoutError : another thread holds it for longer.
    """

    def __init__(self, name: str, lock: threading.RLock, deadline: Deadline, timeout_s: float) -> None:
        self._name = name
        self._lock = lock
        self._deadline = deadline
        self._timeout_s = timeout_s
        self._before_s = math.inf  # guarded by the lock

    def __enter__(self) -> None:
        left_s = min(self._timeout_s, self._deadline.left_s())
        before_s, until_s = self._deadline.until_s, self._deadline.now_s() + left_s
        if not self._lock.acquire(timeout=max(0.0, left_s)):
            raise TierTimeoutError(f"tier {self._name!r} was not asked: another call has the chunk", begun=False)
        self._before_s = before_s
        self._deadline.until_s = until_s

    def __exit__(self, *_: object) -> None:
        self._deadline.until_s = self._before_s
        self._lock.release()


def check_timeout(timeout_s: float) -> None:
    """Raises `ValueError` for what is no time to wait."""
    if not isinstance(timeout_s, (int, float)) or not timeout_s >= 0:
        raise ValueError(f"timeout_s is {timeout_s!r}; expected seconds, 0 or more, or None")
