"""`kvloom simulate --model`: each rule's times, from hits that the store counts and queues that the schedule makes."""

import json
from pathlib import Path

import pytest

from kvloom import cli
from kvloom.bench.schedule.run import SPEEDS

from ..support.commands import refusal

SMALL = "layers=2,kv_heads=2,head_dim=32,params=2e8"
GPU = "flops=1e12,hbm=1e11,memory=1e9,link=1e10"


def simulate(folder: Path, *arguments: str) -> dict:  # type: ignore[type-arg]
    trace = folder / "trace.jsonl"
    lines = [
        {"timestamp": 500 * i, "input_length": 1600, "output_length": 1, "hash_ids": [i % 3, 10 + i % 3, 100 + i]}
        for i in range(120)
    ]
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    common = ["simulate", str(trace), "--capacity", "50%", "--policy", "lru", "--model", SMALL, "--gpu", GPU]
    with pytest.raises(SystemExit) as ended:
        cli.main([*common, *arguments, "--json", str(folder / "found.json")])
    assert ended.value.code == 0
    found: dict = json.loads((folder / "found.json").read_text())  # type: ignore[type-arg]
    return found


def rows_of(found: dict) -> dict[tuple[str, float], dict]:  # type: ignore[type-arg]
    return {(row["rule"], row["speed"]): row for row in found["rows"] if row.get("subject") == "schedule"}


def test_a_fast_tier_is_loaded_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = simulate(tmp_path, "--tier", "host=1GB", "--engines", "1", "--report", str(tmp_path / "page.html"))
    rows = rows_of(found)
    assert rows.keys() == {(rule, speed) for rule in ("always", "never", "controller") for speed in SPEEDS}
    assert rows["never", 1.0]["loading"] == 0.0 and rows["always", 1.0]["loading"] == pytest.approx(117 / 120)
    compute_s = 0.005 + 2 * 2e8 * 1600 / 5e11 + 2 * 2 * 8 * 128 * 1600 * 1601 / 2 / 5e11
    assert rows["never", 1.0]["ttft_p50_s"] > compute_s * 0.999
    assert rows["controller", 1.0]["ttft_p50_s"] == pytest.approx(rows["always", 1.0]["ttft_p50_s"], rel=0.05)
    assert rows["controller", 1.0]["ttft_p50_s"] < 0.6 * rows["never", 1.0]["ttft_p50_s"]
    assert rows["controller", 1.0]["prompts_s_at_most"] > rows["never", 1.0]["prompts_s_at_most"]
    assert rows["never", 2.0]["ttft_p99_s"] >= rows["never", 0.5]["ttft_p99_s"]
    assert found["metrics"]["hit_ratio_lru_at_0.5"]["value"] > 0
    said = capsys.readouterr().out
    assert "load or compute" in said and "why the controller loads" in said and "prompts/s at most" in said
    assert "% of the requests" in (tmp_path / "page.html").read_text()


def test_a_slow_tier_is_left_alone(tmp_path: Path) -> None:
    rows = rows_of(simulate(tmp_path, "--tier", "disk=1GB@0.0001", "--engines", "4"))
    assert rows["always", 1.0]["ttft_p50_s"] > 1.5 * rows["never", 1.0]["ttft_p50_s"]
    assert rows["controller", 1.0]["ttft_p50_s"] == pytest.approx(rows["never", 1.0]["ttft_p50_s"], rel=0.05)
    assert rows["controller", 1.0]["loading"] < 0.3


def test_options_without_a_model_mean_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"timestamp": 0, "input_length": 5, "output_length": 5, "hash_ids": [1]}')
    for option, value in (("--gpu", "h100-80g"), ("--engines", "2"), ("--tier", "host=1GB"), ("--assume", "lanes=1")):
        said = refusal(capsys, "simulate", str(trace), option, value)
        assert "needs --model" in said and option in said
