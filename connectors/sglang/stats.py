"""What kvloom counts in SGLang: for a line in the log, and for SGLang's Prometheus endpoint.

SGLang asks its storage for figures in every step of the scheduler if it runs with `--enable-metrics`. Its endpoint
collects what each of its processes writes into files, so that counters made here appear there.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

from ...kvstore.stats import StoreStats

_LOG = logging.getLogger("kvloom")
_TIER = "loaded_pages."  # followed by the tier's name
_REASON = "decisions."  # followed by a word of `Reason`

COUNTERS = MappingProxyType(
    {
        "lookups": "Questions to the store.",
        "lookup_pages": "Pages asked about.",
        "hit_pages": "Leading pages asked about that were stored.",
        "left_pages": "Pages that were stored and were to be computed, as that is faster.",
        "loads": "Batches of pages that SGLang asked for.",
        "load_seconds": "Time that these took, summed.",
        "joined_chunks": "Pages made of those that engines of other tensor-parallel sizes have stored.",
        "lost_pages": "Pages found by a look-up that a load did not get; SGLang computes them.",
        "saved_pages": "Pages stored.",
        "failed_saves": "Batches of which not all pages were stored.",
        "renewals": "Times that everything stored before was left behind: weights updated, or cleared.",
        "errors": "Faults of kvloom itself; the log has them.",
    }
)


class StatsLine:
    """A line in the log about what was counted since the last one; none where nothing was.

    Every method may be called from any thread.

    Parameters
    ----------
    interval_s : between two lines.
    clock : seconds, monotonic.
    """

    def __init__(self, *, interval_s: float = 60.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval_s = interval_s
        self._clock = clock
        self._lock = threading.Lock()  # of what follows
        self._said_s = clock()
        self._said: Mapping[str, float] = {}

    def say(self, counts: Callable[[], Mapping[str, float]]) -> None:
        """Called with every call of the engine; a comparison of times unless a line is due."""
        now_s = self._clock()
        if now_s - self._said_s < self._interval_s:
            return
        with self._lock:
            passed_s = now_s - self._said_s
            if passed_s < self._interval_s:
                return
            self._said_s = now_s
            new = _since(self._said, found := dict(counts()))
            self._said = found
        if new:
            _LOG.info("kvloom in the last %.0f s: %s", passed_s, _text(new))


class EngineMetrics:
    """`sglang:kvloom_<name>_total` and more, with SGLang's own labels of a rank.

    `sglang:kvloom_loaded_pages_total{tier}`, `sglang:kvloom_misses_total{reason}` and, as a gauge,
    `sglang:kvloom_tier_used_bytes{tier}` have one label more.

    Parameters
    ----------
    labels : of this rank.
    interval_s : figures that SGLang asks for sooner are left for the next time.

    Raises
    ------
    ImportError : prometheus_client is not installed.
    """

    def __init__(
        self, labels: Mapping[str, str], *, interval_s: float = 1.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._labels = dict(labels)
        self._families = _families(tuple(labels))
        self._interval_s = interval_s
        self._clock = clock
        self._observed_s = float("-inf")
        self._counted: Mapping[str, float] = {}
        self._missed: Mapping[str, float] = {}

    def is_due(self) -> bool:
        """Whether `observe` is to be called now; it then is not, for `interval_s`."""
        now_s = self._clock()
        if now_s - self._observed_s < self._interval_s:
            return False
        self._observed_s = now_s
        return True

    def observe(self, counts: Mapping[str, float], store: StoreStats) -> None:
        """Add what was counted since the last call."""
        for name, count in _since(self._counted, counts).items():
            if name.startswith(_TIER):
                self._families["loaded_pages"].labels(**self._labels, tier=name.removeprefix(_TIER)).inc(count)
            elif name.startswith(_REASON):
                reason = name.removeprefix(_REASON)
                self._families["decisions"].labels(**self._labels, reason=reason).inc(count)
            elif name in COUNTERS:
                self._families[name].labels(**self._labels).inc(count)
        for reason, count in _since(self._missed, store.misses).items():
            self._families["misses"].labels(**self._labels, reason=reason).inc(count)
        for tier in store.tiers:
            self._families["tier_used_bytes"].labels(**self._labels, tier=tier.name).set(tier.used_bytes)
        self._counted, self._missed = dict(counts), dict(store.misses)


def rank_labels(storage_config: Any) -> dict[str, str]:
    """Labels as SGLang's own figures of storage have them."""
    return {
        "model_name": str(storage_config.model_name or ""),
        "tp_rank": str(storage_config.tp_rank),
        "pp_rank": str(storage_config.pp_rank),
        "dp_rank": str(storage_config.dp_rank or 0),
    }


@cache
def _families(labels: tuple[str, ...]) -> Mapping[str, Any]:
    """Made once in a process: prometheus_client refuses a name twice, and a storage may be attached again.

    Not imported above: SGLang says in the environment where its processes meet before it imports prometheus_client.
    """
    from prometheus_client import Counter, Gauge

    made: dict[str, Any] = {
        name: Counter(f"sglang:kvloom_{name}", text, labelnames=labels) for name, text in COUNTERS.items()
    }
    text = "Pages loaded, by the tier that they came from."
    made["loaded_pages"] = Counter("sglang:kvloom_loaded_pages", text, labelnames=(*labels, "tier"))
    text = "Look-ups that found something, by the reason for loading as much of it as was loaded."
    made["decisions"] = Counter("sglang:kvloom_decisions", text, labelnames=(*labels, "reason"))
    made["misses"] = Counter("sglang:kvloom_misses", "Pages not given, by reason.", labelnames=(*labels, "reason"))
    made["tier_used_bytes"] = Gauge(
        "sglang:kvloom_tier_used_bytes",
        "Bytes that a tier says are used.",
        labelnames=(*labels, "tier"),
        multiprocess_mode="mostrecent",
    )
    return made


def _since(before: Mapping[str, float], now: Mapping[str, float]) -> dict[str, float]:
    return {name: count - before.get(name, 0) for name, count in now.items() if count > before.get(name, 0)}


def _text(new: Mapping[str, float]) -> str:
    """What is found, loaded and saved always; the rest if there is any."""
    tiers = {name.removeprefix(_TIER): count for name, count in new.items() if name.startswith(_TIER)}
    where = ", ".join(f"{name} {count:.0f}" for name, count in sorted(tiers.items()))
    parts = [
        f"{new.get('hit_pages', 0):.0f} of {new.get('lookup_pages', 0):.0f} pages found",
        f"{sum(tiers.values()):.0f} loaded" + (f" ({where}) in {new.get('load_seconds', 0):.2f} s" if tiers else ""),
        f"{new.get('saved_pages', 0):.0f} saved",
    ]
    words = {"lost_pages": "lost", "failed_saves": "batches not saved", "errors": "errors", "renewals": "renewals"}
    return "; ".join([*parts, *(f"{new[name]:.0f} {word}" for name, word in words.items() if new.get(name))])
