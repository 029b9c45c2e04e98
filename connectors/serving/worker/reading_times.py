"""What loads spend on the tiers that they read, as if each ran alone. Imports no engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Watch:
    """Seconds of a load by tier, from one chunk to the next.

    Parameters
    ----------
    clock : of `ReadingTimes`.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.seconds: dict[str, float] = {}
        self.last: str | None = None
        self._clock = clock
        self._lap_s = clock()

    def lap(self, tier: str | None) -> None:
        """What was spent since the last lap belongs to this tier; to none if it is None."""
        now_s, before_s = self._clock(), self._lap_s
        self._lap_s, self.last = now_s, tier
        if tier is not None:
            self.seconds[tier] = self.seconds.get(tier, 0.0) + now_s - before_s


class ReadingTimes:
    """Watches loads that share processors, disk or network. Every method may be called from any thread.

    While `n` of them run, their clock goes slower by that factor (the virtual time of processor sharing), so that what
    all loads tell adds up to the time for which one ran at least.
    """

    def __init__(self) -> None:
        self._active = 0
        self._shared_s, self._since_s = 0.0, 0.0
        self._lock = threading.Lock()

    @contextmanager
    def watch(self) -> Iterator[Watch]:
        """Of one load, within which it runs."""
        self._clock(1)
        try:
            yield Watch(self._clock)
        finally:
            self._clock(-1)

    def _clock(self, more: int = 0) -> float:
        """The loads' time; from now on, so many more run."""
        with self._lock:
            now_s = time.monotonic()
            if self._active:
                self._shared_s += (now_s - self._since_s) / self._active
            self._since_s = now_s
            self._active += more
            return self._shared_s
