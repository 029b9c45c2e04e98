"""A store's counters for Prometheus.

    from prometheus_client import REGISTRY, start_http_server
    REGISTRY.register(StoreCollector(store))
    start_http_server(9400)

Nothing is counted twice: every scrape reads `KVStore.stats()`, whose numbers add up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from types import MappingProxyType
from typing import Protocol

try:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
    from prometheus_client.registry import Collector
except ImportError as exc:
    raise ImportError("metrics need prometheus_client: pip install 'kvloom[metrics]'") from exc

from ...kvstore.stats import StoreStats, TierStats

_TIER_GAUGES = MappingProxyType(
    {
        "used_bytes": "Bytes that the tier says are used.",
        "capacity_bytes": "Bytes that the tier may use; absent if there is no limit.",
        "chunks": "Chunks in the tier.",
        "held_bytes": "Bytes of the chunks in the tier, by the books of the store.",
    }
)
_NOT_COUNTERS = {*_TIER_GAUGES, "name", "namespace_bytes"}
_TIER_COUNTERS = tuple(field.name for field in fields(TierStats) if field.name not in _NOT_COUNTERS)
_STORE_GAUGES = MappingProxyType({"pinned": "Different chunks that are pinned now."})
_STORE_LABELLED = MappingProxyType({"misses": "reason", "puts": "outcome"})
_STORE_COUNTERS = tuple(
    field.name for field in fields(StoreStats) if field.name not in {"tiers", *_STORE_GAUGES, *_STORE_LABELLED}
)


class HasStats(Protocol):
    """A store, or what stands for one."""

    def stats(self) -> StoreStats: ...


class StoreCollector(Collector):
    """Gives `stats()` of a store at every scrape.

    Names are those of `StoreStats` and `TierStats`, where their meaning is said: `kvloom_lookups_total`,
    `kvloom_misses_total{reason}`, `kvloom_tier_hits_total{tier}`, `kvloom_tier_used_bytes{tier}`,
    `kvloom_namespace_bytes{tier,namespace}`, ... A store that is closed while it is registered gives its last counts.

    Parameters
    ----------
    store : read only; the caller closes it.
    prefix : of all names.
    """

    def __init__(self, store: HasStats, *, prefix: str = "kvloom") -> None:
        self._store = store
        self._prefix = prefix

    def collect(self) -> Iterator[Metric]:
        stats = self._store.stats()
        for name in _STORE_COUNTERS:
            yield CounterMetricFamily(f"{self._prefix}_{name}", f"StoreStats.{name}", value=getattr(stats, name))
        for name, label in _STORE_LABELLED.items():
            counter = CounterMetricFamily(f"{self._prefix}_{name}", f"StoreStats.{name}, by {label}", labels=[label])
            for key, count in getattr(stats, name).items():
                counter.add_metric([key], count)
            yield counter
        for name, text in _STORE_GAUGES.items():
            yield GaugeMetricFamily(f"{self._prefix}_{name}", text, value=getattr(stats, name))
        for name in _TIER_COUNTERS:
            counter = CounterMetricFamily(f"{self._prefix}_tier_{name}", f"TierStats.{name}", labels=["tier"])
            for tier in stats.tiers:
                counter.add_metric([tier.name], getattr(tier, name))
            yield counter
        for name, text in _TIER_GAUGES.items():
            gauge = GaugeMetricFamily(f"{self._prefix}_tier_{name}", text, labels=["tier"])
            for tier in stats.tiers:
                if getattr(tier, name) is not None:
                    gauge.add_metric([tier.name], getattr(tier, name))
            yield gauge
        namespaces = GaugeMetricFamily(
            f"{self._prefix}_namespace_bytes", "Bytes of a namespace's chunks.", labels=["tier", "namespace"]
        )
        for tier in stats.tiers:
            for namespace, nbytes in tier.namespace_bytes.items():
                namespaces.add_metric([tier.name, namespace], nbytes)
        yield namespaces
