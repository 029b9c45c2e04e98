"""The benchmark of tiers on other machines, at its smallest size."""

import math

import pytest

from kvloom.bench.distributed.run import KINDS, run
from kvloom.bench.harness.servers import missing_for


@pytest.mark.slow
def test_it_runs_and_nothing_is_wrong() -> None:
    result = run(quick=True)
    present = [kind for kind in KINDS if missing_for(kind) is None]
    assert result.metrics["wrong_bytes"].value == 0
    for kind in present:
        assert result.metrics[f"{kind}_put_vs_bare"].value > 0 and result.metrics[f"{kind}_get_vs_bare"].value > 0
        assert result.metrics[f"{kind}_stall_over_deadline_s"].value < 1.0
    assert math.isnan(result.metrics["longest_stall_over_deadline_s"].value) == (not present)
    assert len([note for note in result.notes if "left out" in note]) == len(KINDS) - len(present)
