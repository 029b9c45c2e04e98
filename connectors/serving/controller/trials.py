"""When what is thought slower is tried all the same, to learn what it costs by now."""

from __future__ import annotations

from collections.abc import Callable

SLACK_RATIO = 0.02
"""Times that differ by no more count as equal."""
PATIENCE = 100.0
"""Seconds without an observation for each second that a probe takes, or that a trial may lose."""
_TRIAL_S = 300.0  # least time without an observation before a trial


class Trials:
    """One trial in a while, so that learning takes about 1 % of the time at most.

    Parameters
    ----------
    clock : monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._tried_s = float("-inf")  # when the last one began

    def is_due(self, age_s: float, loss_s: float) -> bool:
        """Whether what was not observed for `age_s` is tried, though that is expected to lose `loss_s` seconds."""
        since_s = min(age_s, self._clock() - self._tried_s)
        return since_s >= max(_TRIAL_S, PATIENCE * loss_s)

    def begin(self) -> None:
        """One is carried out: others are not for a while."""
        self._tried_s = self._clock()
