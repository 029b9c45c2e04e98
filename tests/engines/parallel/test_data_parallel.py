"""Data parallelism: its ranks are engines of their own on one folder, and each finds what the other has stored."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip(
    "vllm", reason="stock vLLM is not installed here; `make test-engines` runs this in its own environment"
)

from ..support.engines import CHUNK, make_model
from .data_ranks import TEXTS

ROOT = Path(__file__).resolve().parents[3]
pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="vLLM wants a core for each rank")
def test_each_rank_finds_what_the_other_has_stored(tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    command = [sys.executable, "-m", "tests.engines.parallel.data_ranks", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads((tmp_path / "told.json").read_text())
    assert told["computed"] == told["found"] == told["plain"]
    assert told["plain"][0] != told["plain"][1]
    assert told["loaded"] == [{"disk": len(text) // CHUNK * CHUNK} for text in TEXTS]
