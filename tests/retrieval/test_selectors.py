import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvloom.bench.retrieval.flat_index import FlatIndex
from kvloom.core import GrowableIndex
from kvloom.retrieval.attention import attend, attend_at, attend_selected, empty_attention, merge
from kvloom.retrieval.exact import ExactSelector, RandomSelector
from kvloom.retrieval.per_head import PerHeadSelector, search_with_cost
from kvloom.retrieval.selector import LayerShape, Selection, Selector, choose, pooled, top_ids
from kvloom.testing import SHAPE, SelectorContract, make_context


class TestExactSelector(SelectorContract):
    mass = 0.85

    def make_selector(self, shape: LayerShape, start: int = 0) -> Selector:
        return ExactSelector(shape, start=start)


class TestRandomSelector(SelectorContract):
    mass = 0.0

    def make_selector(self, shape: LayerShape, start: int = 0) -> Selector:
        return RandomSelector(shape, start=start)

    def test_adding_in_pieces_is_adding_at_once(self) -> None:
        pytest.skip("each draw is another")


class TestPerHeadSelector(SelectorContract):
    mass = 0.85

    def make_selector(self, shape: LayerShape, start: int = 0) -> Selector:
        return PerHeadSelector(shape, FlatIndex, name="flat", start=start)


class TestShareOfABudget:
    def test_each_query_head_searches_for_its_share(self) -> None:
        keys, values, queries = make_context(300)
        selector = PerHeadSelector(SHAPE, FlatIndex, name="flat", query_ratio=0.5)
        selector.add(keys, values)
        grouped = queries.view(2, 2, -1)
        for row, of_group, of_head in zip(selector.select(queries, 300, 20).ids, grouped, keys, strict=True):
            best = (of_group @ of_head.T).topk(10, dim=1).indices.unique()
            assert sorted(i for i in row.tolist() if i >= 0) == best.tolist()

    def test_a_share_that_is_none_is_refused(self) -> None:
        with pytest.raises(ValueError, match="query_ratio 0"):
            PerHeadSelector(SHAPE, FlatIndex, name="flat", query_ratio=0)

    def test_an_index_that_does_not_count_compared_all(self) -> None:
        index = FlatIndex(4)
        index.add(torch.ones(7, 4))
        found = search_with_cost(index, torch.ones(2, 4), 3)
        assert (found.compared_keys, found.read_bytes) == (7, 7 * 16)


class TestFlatIndex:
    def test_scores_are_the_inner_products_of_the_ids(self) -> None:
        random = torch.Generator().manual_seed(1)
        keys, queries = torch.randn(100, 8, generator=random), torch.randn(5, 8, generator=random)
        index = FlatIndex(8)
        index.add(keys[:30])
        index.add(keys[30:])
        assert isinstance(index, GrowableIndex)
        scores, ids = index.search(queries, 10)
        torch.testing.assert_close(scores, (queries[:, None] * keys[ids]).sum(-1))
        assert torch.equal(scores, scores.sort(descending=True).values)
        torch.testing.assert_close(scores, (queries @ keys.T).sort(descending=True).values[:, :10])

    def test_what_is_not_there_is_padded(self) -> None:
        index = FlatIndex(4)
        assert index.search(torch.ones(2, 4), 3)[1].tolist() == [[-1] * 3] * 2
        index.add(torch.ones(2, 4))
        scores, ids = index.search(torch.ones(1, 4), 3)
        assert ids[0, 2] == -1
        assert scores[0].tolist() == [4.0, 4.0, -math.inf]


class TestAttention:
    @given(st.lists(st.integers(0, 7), min_size=1, max_size=5), st.integers(1, 3))
    def test_parts_make_the_whole(self, sizes: list[int], group: int) -> None:
        random = torch.Generator().manual_seed(sum(sizes))
        queries = torch.randn(2 * group, 8, generator=random)
        keys, values = torch.randn(2, sum(sizes), 8, generator=random), torch.randn(2, sum(sizes), 6, generator=random)
        parts = [
            attend(queries, k, v, scale=0.3)
            for k, v in zip(keys.split(sizes, dim=1), values.split(sizes, dim=1), strict=True)
        ]
        out, lse = merge(parts)
        whole_out, whole_lse = attend(queries, keys, values, scale=0.3)
        torch.testing.assert_close(out, whole_out)
        torch.testing.assert_close(lse, whole_lse)
        if sum(sizes):
            reference = torch.nn.functional.scaled_dot_product_attention(
                queries[None, :, None], keys[None], values[None], scale=0.3, enable_gqa=True
            )
            torch.testing.assert_close(out, reference[0, :, 0])

    def test_an_empty_side_changes_nothing(self) -> None:
        keys, values, queries = make_context(20)
        part = attend(queries, keys, values, scale=0.2)
        for parts in ([part, empty_attention(4, 32)], [empty_attention(4, 32), part]):
            assert all(torch.equal(a, b) for a, b in zip(merge(parts), part, strict=True))
        out, lse = merge([empty_attention(4, 32), empty_attention(4, 32)])
        assert not out.any()
        assert bool((lse == -math.inf).all())

    def test_a_pad_is_no_token(self) -> None:
        keys, values, queries = make_context(20)
        padded = torch.tensor([[3, 5, -1, -1], [1, 2, 7, -1]])
        out, lse = attend_at(queries, keys, values, padded, scale=0.2)
        for head, ids in ((0, [3, 5]), (1, [1, 2, 7])):
            alone = attend(
                queries[2 * head : 2 * head + 2], keys[head : head + 1, ids], values[head : head + 1, ids], scale=0.2
            )
            torch.testing.assert_close((out[2 * head : 2 * head + 2], lse[2 * head : 2 * head + 2]), alone)

    def test_near_selected_and_rest_make_the_whole(self) -> None:
        keys, values, queries = make_context(40)
        near = attend(queries, keys[:, :10], values[:, :10], scale=0.2)
        rest = attend(queries, keys[:, 30:], values[:, 30:], scale=0.2)
        attend_ids = partial(attend_at, queries, keys, values, scale=0.2)
        ids = torch.arange(10, 30).expand(2, -1)
        whole = attend(queries, keys, values, scale=0.2)
        torch.testing.assert_close(attend_selected(near, Selection(ids, 0, rest=lambda _: rest), attend_ids), whole)
        without = attend(queries, keys[:, :30], values[:, :30], scale=0.2)
        torch.testing.assert_close(attend_selected(near, Selection(ids, 0), attend_ids), without)
        nothing_chosen = attend_selected(near, Selection(ids[:, :0], 0), attend_ids)
        torch.testing.assert_close(nothing_chosen, near)

    def test_heads_that_do_not_divide_are_refused(self) -> None:
        keys, values, _ = make_context(4)
        with pytest.raises(ValueError, match="3 query heads"):
            attend(torch.zeros(3, 32), keys, values, scale=1.0)


class TestChoosing:
    def test_a_selector_is_not_asked_where_the_budget_leaves_no_choice(self) -> None:
        keys, values, queries = make_context(46)
        selector = ExactSelector(SHAPE, start=6)
        selector.add(keys[:, 6:], values[:, 6:])
        for budget, expected in ((0, []), (40, list(range(6, 46))), (99, list(range(6, 46)))):
            selection = choose(selector, queries, 46, budget)
            assert selection.ids.tolist() == [expected] * 2
            assert (selection.read_bytes, selection.rest) == (0, None)
        assert torch.equal(choose(selector, queries, 46, 9).ids, selector.select(queries, 46, 9).ids)


class TestPooling:
    def test_softmax_comes_before_the_maximum(self) -> None:
        """A hot head with large scores must not drown a cold one."""
        scores = torch.tensor([[0.0, 100.0, 90.0], [3.0, 0.0, 0.0]])
        shape = LayerShape(1, 2, 4, 1.0)
        assert top_ids(pooled(scores, shape, "max"), 2).tolist() == [[0, 1]]
        assert top_ids(pooled(scores, shape, "sum"), 2).tolist() == [[0, 1]]

    def test_an_unknown_pooling_is_refused(self) -> None:
        with pytest.raises(ValueError, match="'mean'; expected one of max, sum"):
            pooled(torch.zeros(4, 3), SHAPE, "mean")  # type: ignore[arg-type]
