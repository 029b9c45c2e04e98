"""When a tier that fails is asked again."""

from __future__ import annotations

import time
from collections.abc import Callable

_FAULTS = 3  # in a row, and the tier is down
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.1, 30.0


class CircuitBreaker:
    """Counts faults in a row, and keeps callers away from a tier that is down; needs a lock around every method.

    While the tier is down, one call at a time is admitted, the probe, after a wait that doubles with every probe that
    fails. Any call that is answered ends it.

    Parameters
    ----------
    clock : seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._faults = 0
        self._down_since_s: float | None = None
        self._retry_at_s = 0.0
        self._probe: object = None  # the call that probes

    @property
    def is_down(self) -> bool:
        return self._down_since_s is not None

    @property
    def is_open(self) -> bool:
        """Whether no call may be made now."""
        return self.is_down and (self._probe is not None or self._clock() < self._retry_at_s)

    def wait_s(self) -> float:
        """Until the next probe."""
        return max(0.0, self._retry_at_s - self._clock())

    def admit(self, call: object) -> bool:
        """Whether `call` may be made now; if the tier is down, it is the probe. It must be judged in any case."""
        if self.is_open:
            return False
        if self.is_down:
            self._probe = call
        return True

    def judge(self, call: object, *, fault: bool = False, answered: bool = False) -> float | None:
        """A call has ended: well, with a fault, or in a way that says nothing of the tier.

        Returns the seconds that the tier was down, if this call has ended that.
        """
        is_probe = call is self._probe
        if is_probe:
            self._probe = None
        if answered:
            down_since_s, self._down_since_s, self._faults = self._down_since_s, None, 0
            return None if down_since_s is None else self._clock() - down_since_s
        if fault and (is_probe or not self.is_down):  # calls from before it was down say nothing new
            self._faults += 1
            if self._faults >= _FAULTS:
                now_s = self._clock()
                self._down_since_s = now_s if self._down_since_s is None else self._down_since_s
                doublings = min(self._faults - _FAULTS, 16)
                self._retry_at_s = now_s + min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2.0**doublings)
        return None

    def retry_now(self) -> None:
        """The tier has answered a call that was given up: the next probe need not wait."""
        self._retry_at_s = min(self._retry_at_s, self._clock())
