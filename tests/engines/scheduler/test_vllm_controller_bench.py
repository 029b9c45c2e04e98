"""`kvloom bench controller` at its smallest, with real engines."""

import json
from pathlib import Path

import pytest

pytest.importorskip(
    "vllm", reason="stock vLLM is not installed here; `make test-engines` runs this in its own environment"
)

from kvloom.bench.controller import run as controller

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]


def test_a_quick_run(tmp_path: Path) -> None:
    whole = json.loads(controller.run(quick=True, folder=tmp_path).to_json())
    cells = [row for row in whole["rows"] if "decisions" in row]
    sizes = controller.QUICK_SIZES
    assert len(cells) == 3 * len(sizes.lengths) * len(sizes.requests)
    assert all(sum(row["decisions"].values()) == row["requests"] * sizes.rounds.most for row in cells)
    assert {target["metric"] for target in whole["targets"]} <= set(whole["metrics"])
    told = {row["situation"]: row for row in whole["rows"] if "situation" in row}
    for what in (
        "a store of another model",
        "a prompt stored for a second",
        "never stored, host",
        "never stored, disk",
        "never stored, slow disk",
    ):
        assert told[what]["right"], told[what]
    assert "evicted" in told["evicted prompts among others"]["told"]
    # Times of so small a model on a busy machine say nothing: what is decided by them is not asked for.
    assert not list(tmp_path.iterdir()), "stores and models are removed"
