import pytest
import torch
from torch import Tensor

from kvloom.errors import CodecError
from kvloom.retrieval.attention import PartialAttention, empty_attention
from kvloom.retrieval.cascade import CascadeSelector, ExactKeys, KeySource
from kvloom.retrieval.exact import ExactSelector, RandomSelector
from kvloom.retrieval.factor.factor import FactorIndex
from kvloom.retrieval.landmarks import LandmarkIndex
from kvloom.retrieval.registry import selector_by_name
from kvloom.retrieval.selector import KeepsState, LayerShape, Selection, Selector
from kvloom.retrieval.settings import Retrieval
from kvloom.testing import SHAPE, SelectorContract, make_context, recovered_mass


class TestLandmarksThenExactKeys(SelectorContract):
    mass = 0.8

    def make_selector(self, shape: LayerShape, start: int = 0) -> Selector:
        return CascadeSelector(
            shape, LandmarkIndex(shape, start=start), ExactKeys(shape, start=start), candidate_ratio=0.3
        )


class TestFactorThenItsKeys(SelectorContract):
    """One index in both roles, and a cascade of a cascade."""

    mass = 0.8

    def make_selector(self, shape: LayerShape, start: int = 0) -> Selector:
        factor = FactorIndex(shape, start=start, rank=40)
        by_blocks = CascadeSelector(shape, factor, factor, candidate_ratio=0.3)
        return CascadeSelector(shape, by_blocks, ExactKeys(shape, start=start), candidate_ratio=0.2)

    def ready(self, selector: Selector) -> Selector:
        selector.build()
        return selector


class TestByName(SelectorContract):
    mass = 0.8

    def make_selector(self, shape: LayerShape, start: int = 0) -> Selector:
        return selector_by_name("landmarks+factor", shape, 0, start=start, parameters={"rank": 40})

    def ready(self, selector: Selector) -> Selector:
        selector.build()
        return selector

    @pytest.mark.parametrize("pooling", ["max", "sum"])
    def test_each_parameter_reaches_its_stage(self, pooling: str) -> None:
        parameters = {"candidate_ratio": 0.5, "rank": 9, "row_bits": 8, "chunk_tokens": 4, "outlier_chunks": 0}
        selector = Retrieval("landmarks+factor", pooling=pooling, parameters=parameters).selector(SHAPE, 0)
        coarse = LandmarkIndex(SHAPE, start=16, chunk_tokens=4, outlier_chunks=0, pooling=pooling)
        fine = FactorIndex(SHAPE, start=16, rank=9, row_bits=8)
        expected = CascadeSelector(SHAPE, coarse, fine, candidate_ratio=0.5, pooling=pooling)
        keys, values, queries = make_context(500)
        for each in (selector, expected):
            each.add(keys[:, 16:], values[:, 16:])
            each.build()
        assert selector.name == "landmarks+factor"
        assert torch.equal(selector.select(queries, 500, 40).ids, expected.select(queries, 500, 40).ids)

    def test_an_unknown_parameter_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"landmarks\+factor does not take .*'beam'"):
            selector_by_name("landmarks+factor", SHAPE, 0, parameters={"beam": 3})

    def test_its_state_is_that_of_the_factor(self) -> None:
        selector, keys, values, queries = self.filled(300)
        again = self.make_selector(SHAPE)
        again.add(keys, values)
        assert isinstance(again, KeepsState)
        again.restore_state({name: t.clone() for name, t in selector.state().items()})
        assert again.fine.factor is not None
        assert torch.equal(again.select(queries, 300, 20).ids, selector.select(queries, 300, 20).ids)
        with pytest.raises(CodecError):
            again.restore_state({"1.factor.basis": torch.zeros(3)})


class TestCascade:
    def test_candidates_of_all_are_the_exact_choice(self) -> None:
        keys, values, queries = make_context(400)
        cascade = CascadeSelector(SHAPE, LandmarkIndex(SHAPE), ExactKeys(SHAPE), candidate_ratio=1.0)
        exact = ExactSelector(SHAPE)
        for each in (cascade, exact):
            each.add(keys, values)
        for budget in (1, 30, 399):
            assert torch.equal(cascade.select(queries, 400, budget).ids, exact.select(queries, 400, budget).ids)

    def test_it_chooses_among_candidates_alone_and_better(self) -> None:
        better = []
        for seed in range(4):
            keys, values, queries = make_context(800, seed=seed)
            coarse = LandmarkIndex(SHAPE)
            cascade = CascadeSelector(SHAPE, coarse, ExactKeys(SHAPE), candidate_ratio=0.12)
            cascade.add(keys, values)
            assert len(cascade) == len(coarse) == 800
            ids, candidates = cascade.select(queries, 800, 24).ids, coarse.select(queries, 800, 96).ids
            assert all(set(a) <= set(b) for a, b in zip(ids.tolist(), candidates.tolist(), strict=True))
            better.append(
                recovered_mass(queries, keys, ids) - recovered_mass(queries, keys, coarse.select(queries, 800, 24).ids)
            )
        assert min(better) > 0

    def test_it_charges_both_stages(self) -> None:
        keys, values, queries = make_context(800)
        coarse = LandmarkIndex(SHAPE)
        cascade = CascadeSelector(SHAPE, coarse, ExactKeys(SHAPE), candidate_ratio=0.12)
        cascade.add(keys.half(), values)
        selection = cascade.select(queries, 800, 24)
        assert selection.read_bytes == coarse.select(queries, 800, 96).read_bytes + 2 * 96 * 32 * 2
        assert selection.compared_keys == 2 * 96
        assert cascade.held_bytes == coarse.held_bytes
        assert cascade.name == "landmarks+exact"

    def test_pads_and_an_estimate_of_the_rest_pass_through(self) -> None:
        class Sparse:
            """A selector that finds 3 and 5 tokens, and estimates the rest."""

            name, start, held_bytes = "sparse", 0, 0

            def __len__(self) -> int:
                return 100

            def add(self, keys: Tensor, values: Tensor) -> None: ...

            def select(self, queries: Tensor, position: int, budget: int) -> Selection:
                ids = torch.tensor([[4, 9, 2, -1, -1], [30, 20, 10, 60, 70]])
                return Selection(ids, 7, 0, rest)

        def rest(_: Tensor) -> PartialAttention:
            return empty_attention(4, 32)

        keys, values, queries = make_context(100)
        cascade = CascadeSelector(SHAPE, Sparse(), ExactKeys(SHAPE))
        cascade.add(keys, values)
        selection = cascade.select(queries, 100, 4)
        assert selection.ids[0].tolist() == [2, 4, 9, -1]
        kept = selection.ids[1].tolist()
        assert sorted(kept) == kept
        assert set(kept) < {10, 20, 30, 60, 70}
        assert selection.rest is rest
        assert selection.read_bytes == 7 + 8 * 32 * 4

    def test_a_share_of_nothing_is_refused(self) -> None:
        for ratio in (0.0, 1.1):
            with pytest.raises(ValueError, match="candidate_ratio"):
                CascadeSelector(SHAPE, RandomSelector(SHAPE), ExactKeys(SHAPE), candidate_ratio=ratio)

    def test_exact_keys_are_keys_as_they_came(self) -> None:
        keys, values, _ = make_context(50)
        source = ExactKeys(SHAPE, start=100)
        assert isinstance(source, KeySource)
        source.add(keys.bfloat16(), values)
        found = source.keys_at(torch.tensor([[100, 149], [103, -1]]))
        assert torch.equal(found[0], keys[0, [0, 49]].bfloat16())
        assert torch.equal(found[1, 0], keys[1, 3].bfloat16())
        assert source.token_bytes == 64
