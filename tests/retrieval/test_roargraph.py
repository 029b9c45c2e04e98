import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("numba")

from kvloom.core import GrowableIndex
from kvloom.errors import CodecError
from kvloom.retrieval.exact import ExactSelector
from kvloom.retrieval.roargraph.build_numba import connect, nearest_rows
from kvloom.retrieval.roargraph.key_graph import GraphSettings, KeyGraph
from kvloom.retrieval.roargraph.roargraph import RoarGraphIndex
from kvloom.retrieval.roargraph.search_numba import NO_EDGE, search_graph
from kvloom.retrieval.selector import LayerShape, LearnsFromQueries, Selector
from kvloom.testing import SHAPE, SelectorContract, make_context, recovered_mass

# a graph even of 300 keys, which are otherwise searched exactly
SMALL = GraphSettings(Ls=64, exact_beams=0, entries=32, merge_tokens=64)


def asked(keys: Tensor, shape: LayerShape = SHAPE, *, seed: int = 5) -> Tensor:
    """Queries `[Hq, T, D]`, each like the key of a token before it."""
    tokens = keys.shape[1]
    random = torch.Generator().manual_seed(seed)
    target = (torch.rand(tokens, generator=random) * torch.arange(1, tokens + 1)).long()
    assert shape.rope is not None
    moved = shape.rope.shift(keys[:, target], torch.arange(tokens) - target)
    return 2.5 * moved.repeat_interleave(shape.group, 0) + 0.3 * torch.randn(
        shape.query_heads, tokens, shape.head_dim, generator=random
    )


def built(tokens: int, settings: GraphSettings = SMALL, *, threads: int = 1) -> tuple[RoarGraphIndex, Tensor, Tensor]:
    keys, values, queries = make_context(tokens)
    index = RoarGraphIndex(SHAPE, settings=settings, threads=threads)
    index.add(keys, values)
    index.observe(asked(keys), torch.arange(tokens))
    index.build()
    return index, keys, queries


def reached(edges: np.ndarray, entries: np.ndarray) -> set[int]:
    numbers = edges.astype(np.int64) @ np.array([1, 1 << 8, 1 << 16])
    seen, todo = set(entries.tolist()), list(entries.tolist())
    while todo:
        for to in numbers[todo.pop()].tolist():
            if to != NO_EDGE and to not in seen:
                seen.add(to)
                todo.append(to)
    return seen


class TestUnbuilt(SelectorContract):
    """Until it has learned, and for small contexts, it is exact."""

    mass = 0.85

    def make_selector(self, shape: LayerShape, start: int = 0) -> Selector:
        return RoarGraphIndex(shape, start=start, query_ratio=1.0)


class TestBuilt(SelectorContract):
    mass = 0.8

    def make_selector(self, shape: LayerShape, start: int = 0) -> Selector:
        return RoarGraphIndex(shape, start=start, settings=SMALL)

    def ready(self, selector: Selector) -> Selector:
        assert isinstance(selector, RoarGraphIndex)
        if tokens := len(selector):
            keys = torch.stack([graph.keys for graph in selector.graphs])
            selector.observe(asked(keys), torch.arange(tokens) + selector.start)
            selector.build()
            assert selector.graphs[0].built == tokens
        return selector


class TestGraph:
    def test_it_learns_from_queries(self) -> None:
        index, _, _ = built(600)
        assert isinstance(index, LearnsFromQueries)
        assert isinstance(index.graphs[0], GrowableIndex)
        assert index.graphs[0].built == 600

    def test_it_finds_what_exact_search_finds_with_fewer_keys(self) -> None:
        index, keys, _ = built(3000)
        queries = asked(keys, seed=9)[: SHAPE.group, -40:]
        recall, compared = [], []
        for step in queries.unbind(1):
            found = index.graphs[0].search_with_cost(step, 20)
            best = (step @ keys[0].T).topk(20).indices
            recall += [len(set(a) & set(b)) / 20 for a, b in zip(found.ids.tolist(), best.tolist(), strict=True)]
            compared.append(found.compared_keys)
        assert np.mean(recall) >= 0.9
        assert np.mean(compared) < 0.3 * 3000

    def test_scores_are_the_inner_products_of_the_ids(self) -> None:
        index, keys, queries = built(600)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            graph = KeyGraph(32, SMALL)
            graph.add(keys[0].to(dtype))
            graph.restore(index.graphs[0].state())
            scores, ids = graph.search(queries[:2], 30)
            assert bool((ids >= 0).all())
            assert torch.equal(scores, scores.sort(descending=True).values)
            torch.testing.assert_close(scores, (queries[:2, None] * keys[0].to(dtype).float()[ids]).sum(-1))
            assert graph.search_with_cost(queries[:2], 30).compared_keys < 600

    def test_every_key_is_reached(self) -> None:
        index, _, _ = built(1000)
        for graph in index.graphs:
            state = graph.state()
            assert reached(state["edges"].numpy(), state["entries"].numpy()) == set(range(1000))

    def test_what_is_not_connected_is_linked(self) -> None:
        """Two keys that lead only to one another, and a key with no edge at all."""
        edges = np.full((40, 32, 3), 255, np.uint8)
        for node in range(36):
            for slot in range(32):  # full rows, so that an edge has to be given up
                edges[node, slot] = [(node + slot + 1) % 36, 0, 0]
        edges[36, 0], edges[37, 0] = [37, 0, 0], [36, 0, 0]
        assert connect(edges, np.array([3])) == 3
        assert reached(edges, np.array([3])) == set(range(40))

    def test_a_search_in_a_chain_meets_all_and_counts_each_once(self) -> None:
        keys = np.arange(50, dtype=np.float32)
        edges = np.full((50, 32, 3), 255, np.uint8)
        for node in range(49):
            edges[node, 0] = [node + 1, 0, 0]
        scores, ids = np.empty((2, 4), np.float32), np.empty((2, 4), np.int64)
        queries = np.array([[1.0], [2.0]], np.float32)
        assert search_graph(keys, 1, edges, np.array([0, 0]), queries, scores, ids) == (50, 50)
        assert ids.tolist() == [[49, 48, 47, 46]] * 2
        assert scores.tolist() == [[49, 48, 47, 46], [98, 96, 94, 92]]

    def test_keys_behind_a_query_teach_nothing(self) -> None:
        random = np.random.default_rng(0)
        scores = random.standard_normal((6, 200)).astype(np.float32)
        limits = np.array([1, 5, 17, 60, 199, 200])
        ids, best = np.empty((6, 10), np.int32), np.empty((6, 10), np.float32)
        margin, closest = np.full(200, -np.inf, np.float32), np.full(200, -1, np.int32)
        nearest_rows(scores, limits, 0, ids, best, margin, closest)
        bars = []
        for row, limit, found in zip(scores, limits, ids, strict=True):
            order = np.argsort(-row[:limit])[:10]
            assert found.tolist() == order.tolist() + [-1] * (10 - len(order))
            bars.append(row[order[-1]])
        seen = np.where(np.arange(200) < limits[:, None], scores - np.array(bars)[:, None], -np.inf)
        assert closest.tolist() == seen.argmax(0).tolist()

    def test_threads_change_nothing(self) -> None:
        one, _, queries = built(600)
        two, _, _ = built(600, threads=2)
        assert torch.equal(one.select(queries, 600, 40).ids, two.select(queries, 600, 40).ids)

    def test_an_index_takes_less_than_a_kilobyte_a_token_and_layer_at_8_heads(self) -> None:
        index, _, _ = built(3000)
        assert index.held_bytes / 3000 / SHAPE.kv_heads * 8 < 1000


class TestGeneratedTokens:
    def test_they_are_found_before_and_after_they_are_inserted(self) -> None:
        keys, values, _ = make_context(3000)
        index = RoarGraphIndex(SHAPE, settings=dataclasses.replace(SMALL, merge_tokens=256))
        index.add(keys[:, :2000], values[:, :2000])
        index.observe(asked(keys[:, :2000]), torch.arange(2000))
        index.build()
        late = asked(keys)
        for stop in range(2100, 3001, 100):
            for step in late[:, stop - 108 : stop - 100].unbind(1):
                index.select(step, stop, 16)
            index.add(keys[:, stop - 100 : stop], values[:, stop - 100 : stop])
            assert (stop - 2000) // 256 * 256 + 2000 == index.graphs[0].built
            exact = ExactSelector(SHAPE)
            exact.add(keys[:, :stop], values[:, :stop])
            asking = late[:, stop - 1]
            found = recovered_mass(asking, keys[:, :stop], index.select(asking, stop, 64).ids)
            assert found >= 0.9 * recovered_mass(asking, keys[:, :stop], exact.select(asking, stop, 64).ids)
        state = index.graphs[1].state()
        assert len(state["edges"]) == 2768
        assert reached(state["edges"].numpy(), state["entries"].numpy()) == set(range(2768))
        graph = index.graphs[0]
        fresh = keys[0, 2000:2768]  # each its own best neighbour, if it is linked where it belongs
        found = torch.cat([graph.search_with_cost(key, 10).ids for key in fresh.split(1)])
        best = (fresh @ keys[0].T).topk(10).indices
        shared = [len(set(a) & set(b)) / 10 for a, b in zip(found.tolist(), best.tolist(), strict=True)]
        assert np.mean(shared) >= 0.8


class TestState:
    def test_a_session_goes_on_where_it_was(self) -> None:
        index, keys, queries = built(600)
        again = RoarGraphIndex.from_state(SHAPE, index.state(), keys, settings=SMALL)
        assert again.graphs[0].built == 600
        assert torch.equal(again.select(queries, 600, 40).ids, index.select(queries, 600, 40).ids)
        assert again.select(queries, 600, 40).read_bytes == index.select(queries, 600, 40).read_bytes

    def test_a_session_without_a_graph_goes_on_too(self) -> None:
        keys, values, queries = make_context(100)
        index = RoarGraphIndex(SHAPE)
        index.add(keys, values)
        again = RoarGraphIndex.from_state(SHAPE, index.state(), keys)
        assert torch.equal(again.select(queries, 100, 40).ids, index.select(queries, 100, 40).ids)

    @pytest.mark.parametrize(
        ("name", "broken", "says"),
        [
            ("0.edges", lambda t: t[:, :31], "expected"),
            ("0.edges", lambda t: t.int(), "expected"),
            ("0.edges", lambda t: torch.full_like(t, 200), "outside"),
            ("1.edges", lambda t: torch.cat((t, t)), "there are 300 keys"),
            ("0.entries", lambda t: t + 299, "outside"),
            ("0.entries", lambda t: t - 300, "outside"),
            ("0.entries", lambda t: t[:0], "entries"),
            ("1.metric", lambda t: t * torch.nan, "expected"),
            ("1.metric", lambda t: t[:-1], "expected"),
        ],
    )
    def test_tensors_that_are_not_its_own_are_refused(self, name: str, broken, says: str) -> None:
        index, keys, _ = built(300)
        with pytest.raises(CodecError, match=says):
            RoarGraphIndex.from_state(SHAPE, {**index.state(), name: broken(index.state()[name])}, keys)
        missing = {other: t for other, t in index.state().items() if other != name}
        with pytest.raises(CodecError, match="no tensor"):
            RoarGraphIndex.from_state(SHAPE, missing, keys)

    def test_graphs_of_unequal_sizes_are_refused(self) -> None:
        index, keys, _ = built(300)
        less, _, _ = built(200)
        mixed = {name: (less if name.startswith("1") else index).state()[name] for name in index.state()}
        with pytest.raises(CodecError, match=r"\[300, 200\] keys"):
            RoarGraphIndex.from_state(SHAPE, mixed, keys)


class TestRefusals:
    def test_queries_that_teach_nothing(self) -> None:
        index = RoarGraphIndex(SHAPE)
        with pytest.raises(ValueError, match="queries are"):
            index.observe(torch.zeros(3, 5, 32), torch.arange(5))
        with pytest.raises(ValueError, match="positions are"):
            index.observe(torch.zeros(4, 5, 32), torch.arange(4))
        with pytest.raises(ValueError, match="not finite"):
            index.observe(torch.full((4, 5, 32), torch.inf), torch.arange(5))
        with pytest.raises(ValueError, match="queries are"):
            KeyGraph(8).search(torch.full((1, 8), torch.nan), 3)

    def test_settings(self) -> None:
        with pytest.raises(ValueError, match="forward is 32"):
            GraphSettings(forward=32)
        with pytest.raises(ValueError, match="Ls is 0"):
            GraphSettings(Ls=0)
