"""How the service fared in the last minutes, for the dashboard: a moment every two seconds."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from ..kvstore.stats import StoreStats

_INTERVAL_S = 2.0
_REMEMBERED = 90


@dataclass(frozen=True, slots=True)
class Moment:
    """`filled` is the used share of each tier that has a capacity; the rest are counts since the service started."""

    at_s: float
    filled: dict[str, float]
    lookups: int
    hits: int
    evictions: int
    demotions: int


class RecentMoments:
    """The last three minutes. Every method may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._moments: deque[Moment] = deque(maxlen=_REMEMBERED)

    def note(self, stats: Callable[[], StoreStats], now_s: float) -> None:
        """Takes a moment if it is time for one. `now_s`: Unix time."""
        with self._lock:
            if self._moments and 0 <= now_s - self._moments[-1].at_s < _INTERVAL_S:
                return
        found = stats()
        filled = {tier.name: tier.used_bytes / tier.capacity_bytes for tier in found.tiers if tier.capacity_bytes}
        moment = Moment(
            round(now_s, 3),
            {name: round(min(ratio, 1.0), 4) for name, ratio in filled.items()},
            found.lookups,
            found.hits,
            sum(tier.evictions for tier in found.tiers),
            sum(tier.demotions for tier in found.tiers),
        )
        with self._lock:
            self._moments.append(moment)

    def all(self) -> list[Moment]:
        with self._lock:
            return list(self._moments)
