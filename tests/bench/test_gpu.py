"""The GPU script at its smallest size, without a GPU: every part runs, or says why it does not."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install 'kvloom[triton]'")

SCRIPT = Path(__file__).resolve().parent.parent.parent / "bench" / "gpu" / "run.py"
OPTIONAL = ("blake3", "hypothesis", "numba", "pydantic", "rich", "safetensors", "transformers", "typer", "xxhash")


def run(*arguments: object, **environment: str) -> tuple[int, dict[str, Any]]:
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    plain = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONPATH")}
    done = subprocess.run(command, env={**plain, **environment}, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


@pytest.mark.slow
def test_every_part_passes_at_the_smallest_size(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    code, result = run("--cpu", "--json", file, "--commit", "tree")
    assert code == 0 and json.loads(file.read_text()) == result
    assert (result["bench"], result["commit"], result["interpreted"]) == ("gpu", "tree", True)
    assert result["env"]["torch"] and result["env"]["triton"] and result["env"]["devices"] == []
    parts = result["parts"]
    statuses = {name: part["status"] for name, part in parts.items()}
    assert statuses == dict.fromkeys(("kernels", "copies", "codecs", "decode"), "passed") | {"cuda_tests": "skipped"}
    kernels = {row["name"].partition(",")[0] for row in parts["kernels"]["rows"]}
    assert kernels == {
        *("pack_bits", "unpack_bits", "dequantize_rotate"),
        *("landmark_scores", "tile_scores", "top_pooled", "rebuild_keys", "gather_attend"),
        *("quantized_scores", "quantized_sums"),
        *("code_counts", "vq_scores", "vq_select"),
    }
    assert all(row["ratio"] > 0 for row in parts["copies"]["rows"])
    sparse = [row for row in parts["decode"]["rows"] if "recovered_share" in row]
    assert len(sparse) == 4 and all(0.5 < row["recovered_share"] <= 1 for row in sparse)


@pytest.mark.slow
def test_what_is_not_installed_costs_its_part_alone(tmp_path: Path) -> None:
    for module in OPTIONAL:
        (tmp_path / f"{module}.py").write_text(f"raise ImportError('{module} is not installed')\n")
    code, result = run("--cpu", "--minutes", 2, PYTHONPATH=str(tmp_path))
    statuses = {name: part["status"] for name, part in result["parts"].items()}
    assert code == 0 and (statuses["kernels"], statuses["decode"], statuses["copies"]) == ("passed",) * 3
    assert statuses["codecs"] == "skipped" and "is not installed" in result["parts"]["codecs"]["why"]


@pytest.mark.slow
def test_no_time_and_no_device() -> None:
    code, result = run("--cpu", "--minutes", 0)
    assert code == 0 and {part["status"] for part in result["parts"].values()} == {"skipped"}
    if not torch.cuda.is_available():
        done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=False)
        assert done.returncode == 2 and "there is no CUDA device" in done.stderr
