"""The table of policies by kind of traffic: its figures follow from its rows, and no policy is above the bound."""

import json
from pathlib import Path
from statistics import fmean

import pytest

from kvloom import cli
from kvloom.bench.eviction.families import FAMILIES, HELD_OUT
from kvloom.bench.eviction.policies import SIMULATED_POLICIES
from kvloom.bench.eviction.run import BOUND, CAPACITY_RATIOS


@pytest.mark.slow
def test_command_at_its_smallest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "eviction", "--quick", "--json", str(tmp_path / "found.json")])
    assert ended.value.code == 0
    found = json.loads((tmp_path / "found.json").read_text())
    rows = {(row["family"], row["instance"], row["capacity_ratio"], row["policy"]): row for row in found["rows"]}
    assert len(rows) == len(found["rows"]) == len(FAMILIES) * 2 * len(CAPACITY_RATIOS) * (len(SIMULATED_POLICIES) + 1)
    for (family, instance, ratio, _), row in rows.items():
        bound = rows[family, instance, ratio, BOUND]["hit_ratio"]
        assert 0 <= row["hit_ratio"] <= bound <= 1 and 0 <= row["saved_ratio"] <= 1

    def gap(family: str, instance: int, ratio: float, policy: str) -> float:
        lru, bound, own = (rows[family, instance, ratio, name]["hit_ratio"] for name in ("lru", BOUND, policy))
        return (own - lru) / (bound - lru)

    means = {
        policy: [
            fmean(gap(family, instance, ratio, policy) for ratio in CAPACITY_RATIOS)
            for family in HELD_OUT
            for instance in (0, 1)
        ]
        for policy in SIMULATED_POLICIES
    }
    metric = found["metrics"]["eviction_gap_closed_mean"]
    assert metric["value"] == pytest.approx(fmean(means["default"]))
    assert metric["baseline"] == pytest.approx(max(fmean(gaps) for name, gaps in means.items() if name != "default"))
    assert metric["low"] <= metric["value"] <= metric["high"]
    lead = found["metrics"]["eviction_gap_closed_over_best_other"]
    assert lead["baseline"] in SIMULATED_POLICIES and lead["baseline"] != "default"
    assert lead["value"] == pytest.approx(metric["value"] - metric["baseline"])
    assert {"metric": "eviction_gap_closed_mean", "sign": ">=", "bound": 0.15} in found["targets"]
    gaps, hits, seconds = found["tables"]
    assert len(gaps["rows"]) == len(FAMILIES) * (len(SIMULATED_POLICIES) - 1)
    assert [row[0] for row in hits["rows"]] == [row[0] for row in seconds["rows"]] == list(FAMILIES)
    assert hits["rows"][0][1] == f"{fmean(rows['chat', n, 0.02, 'lru']['hit_ratio'] for n in (0, 1)):.3f}"
    assert "eviction_gap_closed_mean" in capsys.readouterr().out
