"""Benches of a pretrained model, at their smallest size, on the bundled one in its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvloom.bench.codecs.pretrained import run
from kvloom.evaluation.environment import BUNDLED_MODEL


@pytest.mark.slow
def test_codecs_on_a_model_of_a_folder(tmp_path: Path) -> None:
    result = run(BUNDLED_MODEL, device="cpu", quick=True, questions=1, processes=2)
    found = {name: metric.value for name, metric in result.metrics.items()}
    assert found["calibrate_cpu_s"] > 0
    assert 3 < found["real_bytes_ratio_nuq4"] < 4 < found["real_bytes_ratio_nuq3"]
    assert abs(found["real_ppl_increase_int8"]) < abs(found["real_ppl_increase_KIVI_2_bits"])
    result.write(tmp_path / "codecs.json")
    table = json.loads((tmp_path / "codecs.json").read_text())["tables"][0]
    assert all(len(row) == len(table["columns"]) for row in table["rows"])
