"""How long a thread waits for tiers."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext


class Patience(threading.local):
    """Until when the calling thread waits for tiers, all its calls together; shared by the lanes of a store."""

    until_s = math.inf

    def left_s(self) -> float:
        return self.until_s - time.monotonic()

    def within(self, timeout_s: float | None) -> AbstractContextManager[None]:
        """Not longer than `timeout_s` from now, nor than was said before; None changes nothing.

        Raises
        ------
        ValueError : `timeout_s` is negative or no number.
        """
        if timeout_s is not None and not timeout_s >= 0:
            raise ValueError(f"timeout_s is {timeout_s}; expected seconds, 0 or more, or None")
        return nullcontext() if timeout_s is None else self._until(time.monotonic() + timeout_s)

    @contextmanager
    def _until(self, until_s: float) -> Iterator[None]:
        before_s = self.until_s
        self.until_s = min(before_s, until_s)
        try:
            yield
        finally:
            self.until_s = before_s
