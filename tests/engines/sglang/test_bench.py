"""`kvloom bench sglang` at its smallest size."""

from pathlib import Path

import pytest

pytest.importorskip(
    "sglang", reason="stock SGLang is not installed here; `make test-engines` runs this in its own environment"
)

from kvloom.bench.sglang.run import run

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]


def test_the_smallest_run(tmp_path: Path) -> None:
    result = run(quick=True, folder=tmp_path)
    assert result.metrics["wrong_tokens"].value == 0 and result.metrics["missed_hits"].value == 0
    assert result.metrics["storage_hit_warm_s"].value > 0
    assert {row["backend"] for row in result.rows} == {"kvloom", "HiCache file"}
