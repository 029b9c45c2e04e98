"""Two engines at once on one folder on disk: each finds what the other computes, and answers as if it were alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip(
    "vllm", reason="stock vLLM is not installed here; `make test-engines` runs this in its own environment"
)

from .support.engines import CHUNK, make_model
from .support.peer import TEXTS

ROOT = Path(__file__).resolve().parent.parent.parent
pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]


def test_two_engines_on_one_store(tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    peers = []
    for number in (0, 1):
        with (tmp_path / f"log.{number}").open("w") as log:
            command = [sys.executable, "-m", "tests.engines.support.peer", str(tmp_path), str(number)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            peers.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=ROOT))
    try:
        codes = [peer.wait(500) for peer in peers]
    finally:
        for peer in peers:
            peer.kill()
    assert codes == [0, 0], (tmp_path / f"log.{codes.index(next(c for c in codes if c))}").read_text()[-3000:]
    told = [json.loads((tmp_path / f"told.{number}.json").read_text()) for number in (0, 1)]
    assert told[0]["plain"][: len(TEXTS)] == told[1]["plain"][: len(TEXTS)]
    for number, peer in enumerate(told):
        assert peer["computed"] == [True, True]
        assert peer["fused"] == [True, "yes", "yes"], "documents that the other has stored, too"
        assert peer["rounds"] == [True, True]
        assert peer["failed"] is False
        others = TEXTS[1 - number :: 2]
        assert peer["loaded_from_the_other"] == sum(len(text) // CHUNK * CHUNK for text in others)
