"""The benchmark of tiers on other machines, at its smallest size."""

import json
import math

import pytest

from kvloom.bench.distributed.lmcache_l2 import read_output
from kvloom.bench.distributed.run import KINDS, run
from kvloom.bench.harness.peer import PeerError, find_python
from kvloom.bench.harness.servers import missing_for


@pytest.mark.slow
def test_it_runs_and_nothing_is_wrong() -> None:
    result = run(quick=True)
    present = [kind for kind in KINDS if missing_for(kind) is None]
    assert result.metrics["wrong_bytes"].value == 0
    for kind in present:
        assert result.metrics[f"{kind}_put_vs_bare"].value > 0 and result.metrics[f"{kind}_get_vs_bare"].value > 0
        assert result.metrics[f"{kind}_stall_over_deadline_s"].value < 2.5  # 3 if it waited for the frozen server
    assert math.isnan(result.metrics["longest_stall_over_deadline_s"].value) == (not present)
    left_out = [note for note in result.notes if "left out" in note]
    has_lmcache = find_python(None) is not None
    assert len(left_out) == len(KINDS) - len(present) + (not has_lmcache)
    for what in ("store", "load"):
        assert math.isnan(result.metrics[f"lmcache_l2_{what}_vs_fs"].value) == (not has_lmcache)


def output(**load: object) -> str:
    """As `lmcache bench l2 --format json` prints."""
    operations = [
        {"operation": "Store", "total_success": 32, "duration_p50_ms": 20.0},
        {"operation": "Lookup", "total_success": 32, "duration_p50_ms": 1.0},
        {"operation": "Load", "total_success": 32, "duration_p50_ms": 10.5, **load},
    ]
    sections = {f"op_{i}": each for i, each in enumerate(operations)}
    return (
        "[Store] Running\n" + json.dumps({"metrics": {"config": {"num_keys": 8}, **sections}}, indent=1) + "\nDone.\n"
    )


def test_what_lmcache_prints_is_read() -> None:
    assert read_output(output(), 32) == {"store": 0.02, "load": 0.0105}
    with pytest.raises(PeerError, match="moved 31 of 32 by a load"):
        read_output(output(total_success=31), 32)
    with pytest.raises(PeerError, match=r"tells of \['store'\]"):
        read_output(output(operation="Else"), 32)
    with pytest.raises(PeerError, match="no JSON"):
        read_output("nothing", 32)
