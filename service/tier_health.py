"""Whether tiers answer: judged by whether their counters of errors have grown lately."""

from __future__ import annotations

import threading

from ..kvstore.stats import TierStats

_REMEMBERED_S = 30.0


class TierHealth:
    """Every method may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._faults: dict[str, tuple[int, float]] = {}  # of each tier: faults, and when they last grew

    def is_healthy(self, tier: TierStats, now_s: float) -> bool:
        """Whether no operation of the tier has failed in the last half minute, as far as this was asked meanwhile."""
        faults = tier.errors + tier.timeouts + tier.corruptions
        with self._lock:
            known, grown_at_s = self._faults.get(tier.name, (0, float("-inf")))
            if faults > known:
                grown_at_s = now_s
            self._faults[tier.name] = faults, grown_at_s
            return now_s - grown_at_s > _REMEMBERED_S
