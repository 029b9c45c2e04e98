"""`kvloom bench service` at its smallest size."""

import pytest

from kvloom.bench.service.run import run


@pytest.mark.slow
def test_the_service_is_measured() -> None:
    result = run(quick=True)
    assert {"shm_get_vs_copy", "http_get_vs_socket", "match_256_p99_s"} <= result.metrics.keys()
    assert result.metrics["acknowledged_lost"].value == 0 and result.metrics["errors_under_load"].value == 0
    assert '"bench": "service"' in result.to_json()
