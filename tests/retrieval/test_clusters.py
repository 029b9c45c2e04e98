"""Clusters that are chosen whole, and the estimate of attention over the next best ones."""

import pytest
import torch
from torch import Tensor

from kvloom.retrieval.attention import attend, attend_at, merge
from kvloom.retrieval.selector import LayerShape, Selection, Selector
from kvloom.testing import SHAPE, SelectorContract, make_context

pytest.importorskip("faiss")
from kvloom.retrieval.clusters import ClusterIndex


def small(shape: LayerShape = SHAPE, **settings: object) -> ClusterIndex:
    sizes = {"segment_tokens": 128, "update_tokens": 32, "tokens_a_cluster": 4, **settings}
    return ClusterIndex(shape, **sizes)  # type: ignore[arg-type]


class TestClusterIndex(SelectorContract):
    mass = 0.8

    def make_selector(self, shape: LayerShape, start: int = 0) -> Selector:
        return small(shape, start=start)


class TestClusterIndexOfPaper(SelectorContract):
    """At its own sizes, where these short contexts are not clustered at all."""

    mass = 0.85

    def make_selector(self, shape: LayerShape, start: int = 0) -> Selector:
        return ClusterIndex(shape, start=start)


def members(index: ClusterIndex, head: int) -> list[list[int]]:
    """Tokens of every cluster of one KV head."""
    known = index.clusters
    return [
        known.members[head, start : start + size].tolist()
        for start, size in zip(known.starts[head].tolist(), known.sizes[head].tolist(), strict=True)
    ]


class TestClusters:
    def test_every_token_is_in_one_cluster_of_its_segment(self) -> None:
        keys, values, _ = make_context(300)
        index = small()
        index.add(keys, values)
        for head in range(2):
            found = members(index, head)
            assert sorted(t for cluster in found for t in cluster) == list(range(300))
            assert len(found) == 2 * 32 + 8 + 12  # two segments, an update, twelve tokens
            for cluster in found:
                assert cluster == sorted(cluster)
                assert len({min(t // 128, 2) for t in cluster}) <= 1
            assert [len(cluster) for cluster in found[-12:]] == [1] * 12

    def test_means_are_those_of_the_members(self) -> None:
        keys, values, _ = make_context(160)
        index = small()
        index.add(keys, values)
        known = index.clusters
        for head in range(2):
            for i, cluster in enumerate(members(index, head)):
                if cluster:
                    torch.testing.assert_close(known.keys[head, i], keys[head, cluster].mean(0))
                    torch.testing.assert_close(known.values[head, i], values[head, cluster].mean(0))

    def test_clusters_are_closer_than_chance(self) -> None:
        keys, values, _ = make_context(128)
        index = small()
        index.add(keys, values)
        known = index.clusters
        for head in range(2):
            of_token = torch.empty(128, dtype=torch.int64)
            for i, cluster in enumerate(members(index, head)):
                of_token[cluster] = i
            spread = (keys[head] - known.keys[head][of_token]).square().sum()
            assert spread < 0.4 * (keys[head] - keys[head].mean(0)).square().sum()

    def test_bytes_are_counted(self) -> None:
        keys, values, queries = make_context(128, v_dim=16)
        index = small(estimated_ratio=0.25)
        index.add(keys, values)
        assert index.held_bytes == 2 * (32 * (32 + 16 + 1) * 4 + 128 * 4)
        assert index.select(queries, 128, 16).read_bytes == 2 * (32 * (32 + 1) + 8 * 16) * 4

    def test_settings_that_make_no_sense_are_refused(self) -> None:
        for settings in ({"segment_tokens": 100}, {"update_tokens": 2}, {"tokens_a_cluster": 0}):
            with pytest.raises(ValueError, match="expected each to be no longer"):
                small(**settings)
        with pytest.raises(ValueError, match=r"estimated_ratio is 1\.5"):
            small(estimated_ratio=1.5)
        with pytest.raises(ValueError, match="values are"):
            small().add(*(t[:, :n] for t, n in zip(make_context(20)[:2], (20, 19), strict=True)))


def estimated_by_hand(
    index: ClusterIndex, keys: Tensor, values: Tensor, queries: Tensor, selection: Selection, clusters: int
) -> list[tuple[Tensor, Tensor]]:
    """The estimate for each query head, token by token: who is not chosen stands at the means of its cluster."""
    found = []
    for q in range(4):
        head = q // 2
        chosen = set(selection.ids[head].tolist())
        groups = [cluster for cluster in members(index, head) if cluster]
        pair = queries[2 * head : 2 * head + 2]
        total = torch.stack([pair @ keys[head, c].mean(0) * SHAPE.scale for c in groups], dim=1)
        sizes = torch.tensor([len(c) for c in groups])
        weights = torch.exp(total - (total + sizes.log()).logsumexp(1, keepdim=True)).sum(0)
        left = [(float(w), c) for w, c in zip(weights, groups, strict=True) if not set(c) <= chosen]
        best = sorted(left, key=lambda pair: -pair[0])[:clusters]
        mean_keys, mean_values = [], []
        for _, cluster in best:
            count = len(set(cluster) - chosen)
            mean_keys += [keys[head, cluster].mean(0)] * count
            mean_values += [values[head, cluster].mean(0)] * count
        out, lse = attend(
            queries[q : q + 1], torch.stack(mean_keys)[None], torch.stack(mean_values)[None], scale=SHAPE.scale
        )
        found.append((out[0], lse[0]))
    return found


class TestEstimate:
    @pytest.mark.parametrize("budget", [0, 1, 10, 37, 100])
    def test_it_is_of_tokens_that_were_not_chosen(self, budget: int) -> None:
        keys, values, queries = make_context(140)
        index = small(estimated_ratio=0.25)
        index.add(keys, values)
        selection = index.select(queries, 140, budget)
        assert selection.rest is not None
        out, lse = selection.rest(selection.ids)
        expected = estimated_by_hand(index, keys, values, queries, selection, round(0.25 * (32 + 12)))
        torch.testing.assert_close(out, torch.stack([e[0] for e in expected]), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(lse, torch.stack([e[1] for e in expected]), rtol=1e-4, atol=1e-5)

    def test_clusters_of_equal_keys_make_the_whole_exactly(self) -> None:
        """Where nothing is lost by the means of keys, the estimate of all clusters is the attention over them."""
        random = torch.Generator().manual_seed(1)
        topics = torch.randn(2, 16, 32, generator=random)
        keys, values = topics.repeat_interleave(8, 1), torch.randn(2, 128, 8, generator=random)
        queries = torch.randn(4, 32, generator=random)
        index = small(estimated_ratio=1.0)
        index.add(keys, values)
        whole = attend(queries, keys, values, scale=SHAPE.scale)
        for budget in (0, 8, 64):
            selection = index.select(queries, 128, budget)
            assert selection.rest is not None
            parts = [attend_at(queries, keys, values, selection.ids, scale=SHAPE.scale), selection.rest(selection.ids)]
            out, lse = merge(parts)
            torch.testing.assert_close(lse, whole[1])
            if not budget:  # otherwise values of a cluster chosen in part are estimated by its mean
                torch.testing.assert_close(out, whole[0])

    def test_its_weight_is_a_lower_bound(self) -> None:
        keys, values, queries = make_context(256)
        index = small(estimated_ratio=1.0)
        index.add(keys, values)
        everything = attend(queries, keys, values, scale=SHAPE.scale)[1]
        selection = index.select(queries, 256, 0)
        assert selection.rest is not None
        lse = selection.rest(selection.ids)[1]
        assert bool((lse <= everything + 1e-5).all())
        assert bool((lse > everything - 2.5).all())

    def test_it_brings_the_output_nearer(self) -> None:
        with_it, without = [], []
        for seed in range(4):
            keys, values, queries = make_context(512, seed=seed)
            values = values + 2 * keys  # what is attended to is alike where keys are
            queries = 0.3 * queries  # diffuse
            index = small(estimated_ratio=0.5)
            index.add(keys, values)
            selection = index.select(queries, 512, 16)
            chosen = attend_at(queries, keys, values, selection.ids, scale=SHAPE.scale)
            exact = attend(queries, keys, values, scale=SHAPE.scale)[0]
            assert selection.rest is not None
            whole = merge([chosen, selection.rest(selection.ids)])[0]
            with_it.append(float((whole - exact).norm() / exact.norm()))
            without.append(float((chosen[0] - exact).norm() / exact.norm()))
        assert sum(with_it) < 0.5 * sum(without)

    def test_there_is_none_if_nobody_wants_it_or_nothing_is_left(self) -> None:
        keys, values, queries = make_context(140)
        index = small(estimated_ratio=0.0)
        index.add(keys, values)
        assert index.select(queries, 140, 16).rest is None
        index = small()
        index.add(keys, values)
        assert index.select(queries, 140, 140).rest is None
        assert small().select(queries, 0, 4).rest is None

    def test_a_cluster_larger_than_the_budget_is_chosen_in_part(self) -> None:
        keys = torch.ones(2, 64, 32) + 1e-3 * make_context(64)[0]
        index = small(segment_tokens=64, update_tokens=64, tokens_a_cluster=64, estimated_ratio=1.0)
        values = torch.arange(64.0).expand(2, -1)[..., None]
        index.add(keys, values)
        selection = index.select(torch.ones(4, 32), 64, 10)
        assert selection.ids.tolist() == [list(range(54, 64))] * 2
        assert selection.rest is not None
        mean_score = float(keys[0].mean(0).sum()) * SHAPE.scale
        assert float(selection.rest(selection.ids)[1][0]) == pytest.approx(
            mean_score + torch.tensor(54.0).log().item(), abs=1e-4
        )
        assert float(selection.rest(selection.ids)[0][0, 0]) == pytest.approx(31.5)
