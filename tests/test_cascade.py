import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvloom.retrieval.attention import attend, nothing
from kvloom.retrieval.cascade import CascadeSelector, ExactKeys, KeySource
from kvloom.retrieval.factor import FactorIndex
from kvloom.retrieval.flat import ExactSelector, RandomSelector
from kvloom.retrieval.landmarks import LandmarkIndex
from kvloom.retrieval.resident import ResidentSet
from kvloom.retrieval.selector import LayerShape, Selection, Selector

from .retrieval_contracts import SHAPE, SelectorContract, context, recovered_mass


class TestLandmarksThenExactKeys(SelectorContract):
    mass = 0.8

    def make(self, shape: LayerShape, start: int = 0) -> Selector:
        return CascadeSelector(
            shape, LandmarkIndex(shape, start=start), ExactKeys(shape, start=start), candidate_ratio=0.3
        )


class TestFactorThenItsKeys(SelectorContract):
    """One index in both roles, and a cascade of a cascade."""

    mass = 0.8

    def make(self, shape: LayerShape, start: int = 0) -> Selector:
        factor = FactorIndex(shape, start=start, rank=40)
        by_blocks = CascadeSelector(shape, factor, factor, candidate_ratio=0.3)
        return CascadeSelector(shape, by_blocks, ExactKeys(shape, start=start), candidate_ratio=0.2)

    def ready(self, selector: Selector) -> Selector:
        selector.build()
        return selector


class TestCascade:
    def test_candidates_of_all_are_the_exact_choice(self) -> None:
        keys, values, queries = context(400)
        cascade = CascadeSelector(SHAPE, LandmarkIndex(SHAPE), ExactKeys(SHAPE), candidate_ratio=1.0)
        exact = ExactSelector(SHAPE)
        for each in (cascade, exact):
            each.add(keys, values)
        for budget in (1, 30, 399):
            assert torch.equal(cascade.select(queries, 400, budget).ids, exact.select(queries, 400, budget).ids)

    def test_it_chooses_among_candidates_alone_and_better(self) -> None:
        better = []
        for seed in range(4):
            keys, values, queries = context(800, seed=seed)
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
        keys, values, queries = context(800)
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

        rest = nothing(4, 32)
        keys, values, queries = context(100)
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
        keys, values, _ = context(50)
        source = ExactKeys(SHAPE, start=100)
        assert isinstance(source, KeySource)
        source.add(keys.bfloat16(), values)
        found = source.keys_at(torch.tensor([[100, 149], [103, -1]]))
        assert torch.equal(found[0], keys[0, [0, 49]].bfloat16())
        assert torch.equal(found[1, 0], keys[1, 3].bfloat16())
        assert source.token_bytes == 64


def rows_of(ids: Tensor, dim: int = 3) -> tuple[Tensor, Tensor]:
    """Keys and values that name their head and token; NaN where there is none."""
    head = torch.arange(len(ids))[:, None, None].expand(-1, ids.shape[1], dim)
    tokens = ids[..., None].expand(-1, -1, dim)
    keys = (1000.0 * head + tokens).masked_fill(tokens < 0, torch.nan)
    return keys, (keys / 3)[..., :2]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.sets(st.integers(0, 15), max_size=10), min_size=2, max_size=2), min_size=1, max_size=7),
    st.randoms(use_true_random=False),
)
def test_what_stays_and_what_is_fetched_is_what_a_full_fetch_gives(steps: list[list[set[int]]], random) -> None:
    """Bit for bit, for each token, over any sequence of choices; nothing is fetched that was there."""
    resident, before = ResidentSet(), [set(), set()]
    hits = misses = 0
    for step in steps:
        width = max(map(len, step))
        rows = []
        for chosen in step:
            row = [*chosen, *[-1] * (width - len(chosen))]
            random.shuffle(row)
            rows.append(row)
        fetched: list[Tensor] = []

        def fetch(ids: Tensor, fetched: list[Tensor] = fetched) -> tuple[Tensor, Tensor]:
            fetched.append(ids)
            return rows_of(ids)

        keys, values, ids = resident.update(torch.tensor(rows, dtype=torch.int64).view(2, width), fetch)
        for head, chosen in enumerate(step):
            found = ids[head].tolist()
            assert sorted(i for i in found if i >= 0) == sorted(chosen)
            is_token = ids[head] >= 0
            expected_keys, expected_values = rows_of(ids)
            assert torch.equal(keys[head, is_token], expected_keys[head, is_token])
            assert torch.equal(values[head, is_token], expected_values[head, is_token])
            asked = sorted(i for call in fetched for i in call[head].tolist() if i >= 0)
            assert asked == sorted(chosen - before[head])
            hits, misses = hits + len(chosen & before[head]), misses + len(chosen - before[head])
        assert bool(keys.isfinite().all())
        assert len(fetched) <= 1
        assert (resident.hits, resident.misses) == (hits, misses)
        before = step
    assert resident.hit_ratio == (hits / (hits + misses) if hits + misses else 0.0)


class TestResidentSet:
    def test_attention_over_it_is_attention_over_a_full_fetch(self) -> None:
        keys, values, queries = context(300)
        index, resident = ExactSelector(SHAPE), ResidentSet()
        index.add(keys, values)

        def fetch(ids: Tensor) -> tuple[Tensor, Tensor]:
            at = ids.clamp(min=0)[..., None].expand(-1, -1, 32)
            return keys.gather(1, at), values.gather(1, at)

        for step in range(6):
            asked = queries + 0.3 * step * torch.randn(queries.shape, generator=torch.Generator().manual_seed(step))
            ids = index.select(asked, 300 + step, 40 - 3 * step).ids
            full = attend(asked, *fetch(ids), scale=SHAPE.scale)
            k, v, held = resident.update(ids, fetch)
            torch.testing.assert_close(attend(asked, k, v, scale=SHAPE.scale, visible=held >= 0), full)
        assert resident.hits > resident.misses

    def test_tokens_keep_their_places(self) -> None:
        resident = ResidentSet()
        first = resident.update(torch.tensor([[5, 3, 9]]), rows_of)[2].clone()
        second = resident.update(torch.tensor([[9, 4, 5]]), rows_of)[2]
        assert (first != second).sum() == 1
        assert second[first != second].tolist() == [4]

    def test_what_was_cleared_is_fetched_again(self) -> None:
        resident = ResidentSet()
        resident.update(torch.tensor([[5, 3]]), rows_of)
        resident.clear()
        moved = resident.update(torch.tensor([[5, 3]]), lambda ids: tuple(each + 0.5 for each in rows_of(ids)))
        assert sorted(moved[0][0, :, 0].tolist()) == [3.5, 5.5]
        assert (resident.hits, resident.misses) == (0, 4)
        assert resident.held_bytes == 2 * (3 + 2) * 4

    def test_wrong_answers_and_questions_are_refused(self) -> None:
        resident = ResidentSet()
        with pytest.raises(ValueError, match="twice in a row"):
            resident.update(torch.tensor([[5, 3, 5]]), rows_of)
        with pytest.raises(ValueError, match="fetch gave"):
            resident.update(torch.tensor([[5, 3]]), lambda ids: (torch.zeros(1, 3, 4), torch.zeros(1, 2, 4)))
        resident.update(torch.tensor([[5, 3]]), rows_of)
        with pytest.raises(ValueError, match=r"ids are \[2, 1\]"):
            resident.update(torch.tensor([[5], [3]]), rows_of)
