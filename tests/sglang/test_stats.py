"""What is counted in SGLang: the line in the log, and the counters that its endpoint collects."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from kvloom.connectors.sglang.stats import COUNTERS, EngineMetrics, StatsLine
from kvloom.kvstore.stats import StoreStats
from kvloom.kvstore.store import KVStore
from kvloom.kvstore.tiers.host import HostTier

LABELS = {"model_name": "m", "tp_rank": "0", "pp_rank": "0", "dp_rank": "0"}


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def value(name: str, labels: dict[str, str] = LABELS, **more: str) -> float | None:
    return REGISTRY.get_sample_value(f"sglang:kvloom_{name}", {**labels, **more})


def stats(**misses: int) -> StoreStats:
    with KVStore([HostTier(1 << 20)]) as store:
        found = store.stats()
    return StoreStats(**{**{name: getattr(found, name) for name in found.__slots__}, "misses": misses})


def test_a_line_says_what_was_new(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kvloom")
    clock = Clock()
    line = StatsLine(clock=clock)
    counts: dict[str, float] = {"lookup_pages": 10, "hit_pages": 6, "loaded_pages.disk": 4, "loaded_pages.host": 2}
    line.say(lambda: counts)
    assert not caplog.messages, "not yet"
    clock.now_s += 61
    counts["load_seconds"] = 0.25
    line.say(lambda: counts)
    line.say(lambda: counts)
    assert caplog.messages == [
        "kvloom in the last 61 s: 6 of 10 pages found; 6 loaded (disk 4, host 2) in 0.25 s; 0 saved"
    ]
    clock.now_s += 61
    line.say(lambda: counts)
    assert len(caplog.messages) == 1, "nothing is new"
    counts |= {"saved_pages": 3, "lost_pages": 2, "errors": 1}
    clock.now_s += 70
    line.say(lambda: counts)
    assert caplog.messages[1:] == ["kvloom in the last 70 s: 0 of 0 pages found; 0 loaded; 3 saved; 2 lost; 1 errors"]


def test_counters_add_up_and_a_storage_may_be_attached_again() -> None:
    labels = {**LABELS, "tp_rank": "7"}
    clock = Clock()
    metrics = EngineMetrics(labels, clock=clock)
    assert metrics.is_due() and not metrics.is_due()
    clock.now_s += 2
    assert metrics.is_due()
    metrics.observe({"hit_pages": 3, "loaded_pages.disk": 2, "warnings": 1}, stats(corrupt=1))
    metrics.observe({"hit_pages": 5, "loaded_pages.disk": 2, "load_seconds": 0.5}, stats(corrupt=1, timeout=2))
    assert value("hit_pages_total", labels) == 5 and value("load_seconds_total", labels) == 0.5
    assert value("loaded_pages_total", labels, tier="disk") == 2
    assert value("misses_total", labels, reason="corrupt") == 1 and value("misses_total", labels, reason="timeout") == 2
    assert value("tier_used_bytes", labels, tier="host") == 0
    EngineMetrics(labels).observe({"hit_pages": 1}, stats())
    assert value("hit_pages_total", labels) == 6
    metrics.observe({"decisions.slow tier": 2, "left_pages": 7}, stats())
    assert value("decisions_total", labels, reason="slow tier") == 2 and value("left_pages_total", labels) == 7
    assert set(COUNTERS) >= {"hit_pages", "lost_pages", "errors"}


def test_processes_meet_in_files(tmp_path: Path) -> None:
    """As in SGLang: a scheduler writes, the server that answers `/metrics` collects."""
    code = (
        "from kvloom.connectors.sglang.stats import EngineMetrics\n"
        "from kvloom.kvstore.store import KVStore\n"
        "from kvloom.kvstore.tiers.host import HostTier\n"
        "import sys; metrics = EngineMetrics({'tp_rank': sys.argv[1]})\n"
        "metrics.observe({'saved_pages': 4}, KVStore([HostTier(1 << 20)]).stats())\n"
    )
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    for rank in ("0", "1"):
        subprocess.run([sys.executable, "-c", code, rank], env=environment, check=True)
    collect = (
        "from prometheus_client import CollectorRegistry, generate_latest\n"
        "from prometheus_client.multiprocess import MultiProcessCollector\n"
        "registry = CollectorRegistry(); MultiProcessCollector(registry)\n"
        "print(generate_latest(registry).decode())\n"
    )
    done = subprocess.run([sys.executable, "-c", collect], env=environment, check=True, capture_output=True, text=True)
    for rank in ("0", "1"):
        assert f'sglang:kvloom_saved_pages_total{{tp_rank="{rank}"}} 4.0' in done.stdout
