"""`kvloom bench service` at its smallest size."""

from pathlib import Path

import pytest

from kvloom.bench.service.load import LoadResult
from kvloom.bench.service.run import run


@pytest.mark.slow
def test_the_service_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # without LMCache, whose processes take long to start
    result = run(quick=True)
    assert {"shm_get_vs_copy", "shm_put_vs_copy", "http_get_vs_socket", "http_put_vs_socket"} <= result.metrics.keys()
    assert {"match_256_p99_s", "load_memory_growth", "load_gb_s"} <= result.metrics.keys()
    both = {"http_get_vs_socket", "http_put_vs_socket", "match_256_p99_s", "bare_256_p99_s", "load_gb_s"}
    assert {f"{name}_2_workers" for name in both} <= result.metrics.keys()
    assert result.metrics["acknowledged_lost"].value == 0 and result.metrics["errors_under_load"].value == 0
    loads = [row for row in result.rows if row["what"] == "load"]
    assert [row["durability"] for row in loads] == ["batch", "sync", "batch"]
    assert [row["workers"] for row in loads] == [1, 1, 2]
    assert all(4 <= int(str(row["acknowledged"])) <= 16 for row in loads)  # four clients with four keys each
    assert [row for row in result.rows if row["what"] == "memory"]
    assert '"bench": "service"' in result.to_json()


def test_an_interpreter_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no interpreter"):
        run(quick=True, lmcache_python=tmp_path / "python")


@pytest.mark.parametrize(("grows", "growth"), [(0, 1.0), (1, 187 / 137)])
def test_memory_that_grows_is_seen(grows: int, growth: float) -> None:
    """The first quarter, in which tiers fill, does not count."""
    rss = [(float(second), 100 + (grows * second) if second >= 25 else second) for second in range(100)]
    load = LoadResult("batch", 1, 1, 100.0, 1, [], [0.1, 0.2], [], rss, 1, 0)
    assert load.growth == pytest.approx(growth, abs=0.02)
    assert load.match_quantile(0.99) == 0.2
