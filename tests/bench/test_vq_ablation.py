"""Codebooks before and after rotation, for scores and for keys, on the bundled model."""

import pytest

from kvloom.bench.retrieval.methods import TEXT
from kvloom.bench.retrieval.vq_ablation import STRINGS, vq_ablation, vq_table
from kvloom.evaluation.models import load_model


@pytest.mark.slow
def test_what_each_choice_is_worth() -> None:
    found = vq_ablation(*load_model(None), tokens=512, contexts=1, sequences=4, learned_tokens=512)
    recall = {(q.rotation, q.metric, q.text): q.recall for q in found}
    assert len(recall) == 8 and {q.text for q in found} == {TEXT, STRINGS}
    for text in (TEXT, STRINGS):
        # one token of 476 is chosen; of so few, which way is best is not yet to be seen
        assert min(recall[way, metric, text] for way in ("before", "after") for metric in ("scores", "keys")) > 0.05
        assert len({recall[way, metric, text] for way in ("before", "after") for metric in ("scores", "keys")}) > 1
    for quality in found:
        assert 0 < quality.mass <= quality.exact_mass + 1e-6 and 0 <= quality.recall <= 1
    table = vq_table(found)
    assert len(table.rows) == 8 and table.rows[0][0] == TEXT and "512 tokens" in table.caption
