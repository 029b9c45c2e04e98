"""What a Prometheus server would scrape."""

from dataclasses import fields

import pytest

pytest.importorskip("prometheus_client", reason="metrics need the extra `metrics`")

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from kvloom import HostTier, KVStore
from kvloom.compress.raw import RawCodec
from kvloom.connectors.serving.metrics import StoreCollector
from kvloom.kvstore.stats import TierStats
from kvloom.testing import make_chunk, make_key

CHUNK_BYTES = RawCodec().encode(make_chunk(0)).nbytes


def scrape(registry: CollectorRegistry) -> dict[tuple[str, ...], float]:
    families = text_string_to_metric_families(generate_latest(registry).decode())
    samples = [sample for family in families for sample in family.samples]
    return {(s.name, *(value for _, value in sorted(s.labels.items()))): s.value for s in samples}


def test_scrape_says_what_stats_say() -> None:
    registry = CollectorRegistry()
    with KVStore([HostTier(2 * CHUNK_BYTES, name="fast"), HostTier(None, name="slow")]) as store:
        registry.register(StoreCollector(store))
        before = scrape(registry)
        assert before["kvloom_lookups_total",] == 0 and before["kvloom_tier_hits_total", "slow"] == 0
        for number in range(3):
            store.put(make_key(number), make_chunk(number), namespace="tenant é" if number else "")
        with store.pinned([make_key(1)]):
            for number in (0, 1, 2, 3):
                store.get(make_key(number))
            found = scrape(registry)
            stats = store.stats()
        assert found["kvloom_lookups_total",] == stats.lookups == 4
        assert found["kvloom_misses_total", "absent"] == 1 and found["kvloom_puts_total", "stored"] == 3
        assert found["kvloom_pinned",] == 1
        for tier in stats.tiers:
            for field in fields(TierStats):
                value = getattr(tier, field.name)
                if isinstance(value, int):
                    suffix = "" if field.name in ("used_bytes", "capacity_bytes", "chunks", "held_bytes") else "_total"
                    assert found[f"kvloom_tier_{field.name}{suffix}", tier.name] == value
        assert found["kvloom_tier_evictions_total", "fast"] > 0
        assert found["kvloom_namespace_bytes", "tenant é", "slow"] == 2 * CHUNK_BYTES
        assert ("kvloom_tier_capacity_bytes", "slow") not in found
        hits = sum(found["kvloom_tier_hits_total", tier.name] for tier in stats.tiers)
        assert hits + found["kvloom_misses_total", "absent"] == found["kvloom_lookups_total",]


def test_two_stores_in_one_registry() -> None:
    registry = CollectorRegistry()
    with KVStore([HostTier(None)]) as a, KVStore([HostTier(None)]) as b:
        registry.register(StoreCollector(a, prefix="a"))
        registry.register(StoreCollector(b, prefix="b"))
        a.get(make_key(1))
        found = scrape(registry)
        assert found["a_lookups_total",] == 1 and found["b_lookups_total",] == 0
