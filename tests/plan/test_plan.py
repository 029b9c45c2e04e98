"""`kvloom plan` end to end, its refusals, and its predictions beside measurements."""

import json
from functools import partial
from pathlib import Path

import pytest

from kvloom import cli
from kvloom.bench.plan.check import run as run_check

from ..support.commands import refusal
from ..support.patience import at_best

SMALL = "layers=2,kv_heads=2,head_dim=32,params=2e6"
GPU = "flops=1e12,hbm=1e11,memory=1e9,link=1e10"


def plan(*arguments: str) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", *arguments])
    assert ended.value.code == 0


def test_command_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.jsonl"
    requests = [[i % 7, 10 + i % 7, 100 + i] for i in range(60)]
    lines = [
        {"timestamp": 100 * i, "input_length": 1500, "output_length": 9, "hash_ids": ids}
        for i, ids in enumerate(requests)
    ]
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    plan(
        *("--model", SMALL, "--gpu", GPU, "--context", "8k", "--tier", "host=20MB", "--tier", "disk=1GB@2"),
        *("--codec", "raw,int4", "--traffic", str(trace), "--price", "gpu=3,disk=0.01", "--pool", "nodes=4,chunks=1e4"),
        *("--json", str(tmp_path / "plan.json"), "--report", str(tmp_path / "plan.html")),
    )
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["bench"] == "plan" and found["metrics"]["token_bytes"]["value"] == 2 * 2 * 64 * 2
    traffic = [row for row in found["rows"] if row["subject"] == "traffic"]
    ways = {(tuple(row["tiers"]), row["codec"]) for row in traffic}
    assert len(traffic) == 7 and (("host", "disk"), "int4") in ways and ((), "raw") in ways
    best = max(row["hit_ratio"] for row in traffic)
    assert best == pytest.approx(2 * (60 - 7) / 180)  # all but each pair's first
    assert traffic[0]["hit_ratio"] == 0.0 and traffic[0]["hourly_cost"] == 3 * traffic[0]["engines"]
    pools = [row for row in found["rows"] if row["subject"] == "pool"]
    assert {row["codec"] for row in pools} == {"raw", "int4"} and all(row["bottleneck"] for row in pools)
    single = {(row["way"], row["tier"], row["codec"]): row for row in found["rows"] if row["subject"] == "request"}
    assert single["compute", "", ""]["ttft_s"] > single["prefix", "host", "raw"]["ttft_s"]
    assert single["prefix", "disk", "int4"]["nbytes"] < single["prefix", "disk", "raw"]["nbytes"] / 2
    said = capsys.readouterr().out
    for text in ("a prompt of 8,192 tokens takes", "cost an hour", "busiest resource", "assumed", "4 machines"):
        assert text in said
    page = (tmp_path / "plan.html").read_text()
    assert page.count("<svg") == 3 and "what the figures rest on" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "llama-9b"], "no model 'llama-9b'; expected a folder with config.json"),
        (["--model", SMALL, "--gpu", "h1000"], "no GPU 'h1000'; expected here"),
        (["--model", "llama-3.1-70b", "--gpu", "h100-80g"], "give --gpus, or another GPU"),
        (["--model", SMALL, "--context", "long"], "--context is 'long'; expected a number of tokens"),
        (["--model", SMALL, "--context", "100"], "context is 100 tokens; expected a chunk and a question"),
        (["--model", SMALL, "--gpu", GPU, "--traffic", "none.jsonl"], "there is no trace none.jsonl"),
        (["--model", SMALL, "--gpu", GPU, "--traffic", "bad.jsonl"], "bad.jsonl, line 1 is not JSON"),
        (["--model", SMALL, "--gpu", GPU, "--traffic", "."], ". is not a file"),
        (["--model", SMALL, "--gpu", GPU, "--codec", "zip"], "unknown codec 'zip'"),
        (["--model", SMALL, "--gpu", GPU, "--codec", "transform"], "what transform takes depends on the model's KV"),
        (["--model", SMALL, "--tier", "host=1GB", "--tier", "host=2GB"], "tiers are host, host; expected"),
        (["--model", SMALL, "--price", "tape=1"], "there are prices of tape; expected of gpu, host, disk"),
        (["--model", SMALL, "--price", "gpu"], "--price has 'gpu'"),
        (["--model", SMALL, "--price", "gpu=-1"], "gpu of --price is -1"),
        (["--model", SMALL, "--assume", "luck=1"], "--assume has 'luck=1'"),
        (["--model", SMALL, "--policy", "fifo"], "policy is 'fifo'; expected one of default"),
        (["--model", SMALL, "--engines", "0"], "engines is 0; expected at least 1"),
        (["--model", SMALL, "--gpus", "2"], "gpus is 2; expected at least 1, and 1 for here"),
        (["--model", SMALL, "--dtype", "int8"], "dtype is 'int8'; expected one of float32"),
        (["--model", SMALL, "--gpu", GPU, "--pool", "nodes=0"], "nodes of --pool is 0"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KVLOOM_TRACEBACK", raising=False)
    (tmp_path / "bad.jsonl").write_text("{\n")
    assert message in refusal(capsys, "plan", *arguments, notes="kvloom: 7 ways")


@pytest.mark.slow
def test_predictions_beside_measurements(tmp_path: Path) -> None:
    """Times depend on what else the machine does: only a plan that is out of all proportion fails here."""
    check = partial(run_check, quick=True, folder=tmp_path)
    result = at_best(check, lambda found: found.metrics["planner_ttft_error"].value < 1.0)
    assert result.metrics["planner_hit_error"].value == 0.0
    assert result.metrics["planner_ttft_error"].value < 1.0
    assert len(result.rows) == 12 and all(0.001 < float(str(row["measured_s"])) < 60 for row in result.rows)
    assert {target.metric for target in result.targets} == {"planner_ttft_error", "planner_hit_error"}
    assert list(tmp_path.iterdir()) == []
