"""`kvloom bench rag` at its smallest size."""

import pytest

from kvloom.bench.rag.run import run


@pytest.mark.slow
def test_a_corpus_is_measured_beside_a_plain_pipeline() -> None:
    result = run(quick=True)
    assert result.metrics["batch_equals_single"].value == 1.0
    assert result.metrics["ordering_hit_gain"].value > 0
    assert 0.3 < result.metrics["ask_tokens_reused"].value < 1.0
    assert {"ask_ttft_speedup", "ask_second_question_speedup"} <= result.metrics.keys()
    assert '"bench": "rag"' in result.to_json()
    assert len(result.tables[1].rows) == 2 and all(row[0].endswith("?") for row in result.tables[1].rows)
