"""What loads spend on the tiers that they read, as if each ran alone. Imports no engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Watch:
    """Seconds of a load by tier, from one chunk to the next, each divided by the loads that ran at once.

    Parameters
    ----------
    active : how many loads run now, this one included.
    """

    def __init__(self, active: Callable[[], int]) -> None:
        self.seconds: dict[str, float] = {}
        self.last: str | None = None
        self._active = active
        self._beside = active()
        self._lap_s = time.monotonic()

    def lap(self, tier: str | None) -> None:
        """What was spent since the last lap belongs to this tier; to none if it is None."""
        now_s, before_s = time.monotonic(), self._lap_s
        now, before = self._active(), self._beside
        self._lap_s, self._beside, self.last = now_s, now, tier
        if tier is not None:
            self.seconds[tier] = self.seconds.get(tier, 0.0) + 2 * (now_s - before_s) / (now + before)


class ReadingTimes:
    """Watches loads that share processors, disk or network. Every method may be called from any thread."""

    def __init__(self) -> None:
        self._active = 0
        self._lock = threading.Lock()

    @contextmanager
    def watch(self) -> Iterator[Watch]:
        """Of one load, within which it runs."""
        with self._lock:
            self._active += 1
        try:
            yield Watch(lambda: self._active)
        finally:
            with self._lock:
                self._active -= 1
