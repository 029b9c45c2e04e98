"""How long requests took, by route and status: as quantiles of late, and as a histogram for Prometheus."""

from __future__ import annotations

import bisect
import threading
from collections import Counter, defaultdict, deque

BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_REMEMBERED = 512


class Latencies:
    """Every method may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[tuple[str, str, int], Counter[int]] = {}
        self._sums_s: dict[tuple[str, str, int], float] = defaultdict(float)
        self._late: dict[str, deque[float]] = {}

    def observe(self, method: str, route: str, status: int, spent_s: float) -> None:
        labels = method, route, status
        with self._lock:
            self._counts.setdefault(labels, Counter())[bisect.bisect_left(BOUNDS_S, spent_s)] += 1
            self._sums_s[labels] += spent_s
            self._late.setdefault(f"{method} {route}", deque(maxlen=_REMEMBERED)).append(spent_s)

    def histograms(self) -> list[tuple[tuple[str, str, int], list[tuple[str, float]], float]]:
        """Of each method, route and status: cumulative buckets by upper bound, and the sum in seconds."""
        with self._lock:
            found = []
            for labels, counts in self._counts.items():
                total, buckets = 0, []
                for index, bound in enumerate((*BOUNDS_S, float("inf"))):
                    total += counts[index]
                    buckets.append(("+Inf" if index == len(BOUNDS_S) else repr(bound), float(total)))
                found.append((labels, buckets, float(self._sums_s[labels])))
            return found

    def quantiles(self) -> dict[str, dict[str, float]]:
        """Of each method and route: median and 99th percentile of the last requests, in seconds, and their number."""
        with self._lock:
            late = {route: sorted(times) for route, times in self._late.items() if times}
        return {
            route: {
                "p50_s": times[len(times) // 2],
                "p99_s": times[min(len(times) - 1, int(len(times) * 0.99))],
                "requests": float(len(times)),
            }
            for route, times in late.items()
        }
