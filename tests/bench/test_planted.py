import json

import pytest
import torch

from kvloom.bench.retrieval.graph_speed import Point, model_figures, planted_figures, prefill_s, scan_at
from kvloom.bench.retrieval.planted import mahalanobis_gap, planted
from kvloom.retrieval.roargraph.key_graph import GraphSettings


class TestPlanted:
    def test_queries_lie_far_from_keys_and_keys_like_keys_do_not(self) -> None:
        far, near = mahalanobis_gap(planted(4096))
        assert far > 5 * near
        far, near = mahalanobis_gap(planted(4096, asking="like keys"))
        assert far == pytest.approx(near, rel=0.2)

    def test_attention_is_concentrated_on_other_keys_for_each_query(self) -> None:
        context = planted(16384, queries=32)
        weights = (context.queries.flatten(0, 1).float() @ context.keys[0].float().T * context.shape.scale).softmax(1)
        best = weights.topk(300, dim=1)
        assert float(best.values.sum(1).mean()) >= 0.95
        fixed = weights.mean(0).topk(300).indices
        assert float(weights[:, fixed].sum(1).mean()) < 0.85
        assert len(best.indices[:, :100].unique()) > 20 * 100

    def test_keys_have_a_low_rank_before_rotation_and_a_higher_one_after(self) -> None:
        context = planted(8192, kv_heads=4, group=1)

        def rest(keys: torch.Tensor) -> float:
            joined = keys.float().transpose(0, 1).flatten(1)
            spectrum = torch.linalg.svdvals(joined - joined.mean(0)).square()
            return float(spectrum[140:].sum() / spectrum.sum())

        assert rest(context.unrotated()) < 0.05
        assert rest(context.keys) > 0.2

    def test_the_same_seed_plants_the_same(self) -> None:
        one, two, other = planted(1000), planted(1000), planted(1000, seed=1)
        for name in ("keys", "values", "train_queries", "queries"):
            assert torch.equal(getattr(one, name), getattr(two, name))
            assert not torch.equal(getattr(one, name), getattr(other, name))
            assert getattr(one, name).isfinite().all()

    def test_shapes(self) -> None:
        context = planted(1000, kv_heads=2, group=3, queries=5, stride=10)
        assert context.keys.shape == context.values.shape == (2, 1000, 128)
        assert context.train_queries.shape == (6, 100, 128)
        assert context.queries.shape == (6, 5, 128)
        assert context.train_positions.tolist() == list(range(9, 1000, 10))
        assert context.positions.tolist() == list(range(1000, 1005))
        with pytest.raises(ValueError, match="tokens 3, stride 5"):
            planted(3)


class TestFigures:
    @pytest.mark.slow
    def test_the_graph_compares_fewer_keys_than_the_others_where_queries_lie_far(self) -> None:
        figures = planted_figures(8192, queries=8, settings=GraphSettings(exact_beams=0))
        scan = figures["scan"]
        assert 0 < scan["graph"] < min(scan["ivf"] or 1.0, scan["hnsw"] or 1.0)  # type: ignore[index]
        assert figures["bytes_per_token_layer_8b"] < 1000  # type: ignore[operator]
        assert figures["points"]["graph"][-1]["recall"] >= 0.95  # type: ignore[index]
        json.dumps(figures)

    def test_figures_of_a_model(self) -> None:
        context = planted(2048, queries=64, kv_heads=2)
        keys = torch.cat((context.keys, context.keys[:, -64:]), 1)
        queries = torch.cat((context.train_queries.repeat_interleave(5, 1), context.queries), 1)
        rows = model_figures(
            [(queries, keys[:, : queries.shape[1]])], window_tokens=128, queries=16, ways=("graph", "ivf")
        )
        assert [(row["layer"], row["head"]) for row in rows] == [(0, 0), (0, 1)]
        assert all(0 < row[f"{way}_scan"] <= 1 for row in rows for way in ("graph", "ivf"))  # type: ignore[operator]

    def test_between_two_settings_the_scan_is_in_proportion(self) -> None:
        points = [Point(1, 0.8, 0.9, 0.1, 0.0), Point(2, 0.9, 0.9, 0.2, 0.0), Point(3, 1.0, 0.9, 0.6, 0.0)]
        assert scan_at(points, 0.95) == pytest.approx(0.4)
        assert scan_at(points, 0.5) == 0.1
        assert scan_at(points[:2], 0.95) is None

    def test_dense_attention_is_extrapolated_quadratically(self) -> None:
        once = prefill_s(256, query_heads=1, sample_tokens=256)
        assert prefill_s(25600, query_heads=2, sample_tokens=256) > 1000 * once
