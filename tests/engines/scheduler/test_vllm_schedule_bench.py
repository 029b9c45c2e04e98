"""`kvloom bench schedule` at its smallest, with real engines."""

import json
from pathlib import Path

import pytest

pytest.importorskip(
    "vllm", reason="stock vLLM is not installed here; `make test-engines` runs this in its own environment"
)

from kvloom.bench.schedule import check
from kvloom.bench.schedule.jobs import POLICIES

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]


def test_a_quick_run(tmp_path: Path) -> None:
    whole = json.loads(check.run(quick=True, folder=tmp_path).to_json())
    rows = {(row["tier"], row["way"]): row for row in whole["rows"]}
    assert rows.keys() == {(tier, way) for tier in check.TIERS for way in POLICIES}
    for (_, way), row in rows.items():
        assert sum(row["told"].values()) == sum(row["expected"].values()) == check.QUICK_SIZES.requests
        assert all(row[kind][name] > 0 for kind in ("measured", "predicted") for name in check.FIGURES)
        assert row["measured"]["makespan_s"] > row["measured"]["ttft_p99_s"] > row["measured"]["ttft_p50_s"]
        if way != "controller":  # what is decided depends on how busy the machine is
            told = {reason for reason in row["told"] if reason not in ("None", "never stored")}
            assert told == {reason for reason in row["expected"] if reason != "nothing stored"}
    # Times of so small a model on a busy machine say little; that a device is slower than memory is certain.
    assert rows["slow disk", "always"]["predicted"]["ttft_p50_s"] > rows["host", "always"]["predicted"]["ttft_p50_s"]
    assert 0 <= whole["metrics"]["schedule_error"]["value"] < 10
    assert not list(tmp_path.iterdir()), "stores and models are removed"
