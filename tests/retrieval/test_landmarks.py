import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvloom.errors import CodecError
from kvloom.retrieval.growable import GrowableTensor
from kvloom.retrieval.kernels.ops import landmark_scores
from kvloom.retrieval.landmarks import LandmarkIndex
from kvloom.retrieval.selector import LayerShape, Selector
from kvloom.testing import SHAPE, SelectorContract, make_context, recovered_mass


class TestLandmarkIndex(SelectorContract):
    mass = 0.6

    def make_selector(self, shape: LayerShape, start: int = 0) -> Selector:
        return LandmarkIndex(shape, start=start)


def means_of(keys: Tensor, start: int = 0, end: int | None = None) -> Tensor:
    """Landmarks one by one."""
    end = keys.shape[1] if end is None else end
    runs = [range(max(start, a), min(end, a + 8)) for a in range(start // 8 * 8, end, 8)]
    return torch.stack([keys[:, list(run)].mean(1) for run in runs], 1)


def test_scores_are_inner_products_with_the_means() -> None:
    keys, values, queries = make_context(40)
    index = LandmarkIndex(SHAPE, dtype=torch.float32)
    index.add(keys, values)
    landmarks = index.export(0, 40)["landmarks.means"]
    torch.testing.assert_close(landmarks, means_of(keys))
    scores = landmark_scores(queries, landmarks, scale=0.5)
    for head in range(4):
        torch.testing.assert_close(scores[head], means_of(keys)[head // 2] @ queries[head] * 0.5)


@pytest.mark.parametrize(("start", "tokens"), [(0, 160), (5, 160), (16, 77), (3, 12)])
def test_it_chooses_the_best_runs(start: int, tokens: int) -> None:
    """Without outliers: what a loop over runs would choose, whole runs but the last one chosen."""
    keys, values, queries = make_context(start + tokens, seed=start)
    index = LandmarkIndex(SHAPE, start=start, outlier_chunks=0, dtype=torch.float32)
    index.add(keys[:, start:], values[:, start:])
    weights = (queries.view(2, 2, -1) @ means_of(keys, start).mT * SHAPE.scale).softmax(-1).amax(1)
    for budget in (4, 11, 24, tokens - 1):
        ids = index.select(queries, start + tokens, budget).ids
        assert ids.shape[1] == min(budget, tokens)
        for head in range(2):
            expected: list[int] = []
            for run in weights[head].argsort(descending=True).tolist():
                first = (start // 8 + run) * 8
                expected += [i for i in range(first, first + 8) if start <= i < start + tokens]
            assert ids[head].tolist() == sorted(expected[:budget])


def test_the_softmax_of_each_query_head_comes_first() -> None:
    """A head with large scores does not drown one with small ones."""
    shape = LayerShape(1, 2, 2, 1.0)
    keys = torch.zeros(1, 40, 2)
    keys[0, 8:16, 0], keys[0, 24:32, 1] = 1.0, 1.0
    keys[0, 16:24, 0] = 0.9
    index = LandmarkIndex(shape, outlier_chunks=0)
    index.add(keys, keys)
    ids = index.select(torch.tensor([[100.0, 0.0], [0.0, 4.0]]), 40, 16).ids
    assert ids.tolist() == [[*range(8, 16), *range(24, 32)]]


class TestOutliers:
    @staticmethod
    def with_one_that_disagrees(run: int = 5) -> Tensor:
        """Of 20 runs of equal keys, in one a member points the other way."""
        keys = torch.ones(2, 160, 32) + 0.01 * torch.randn(2, 160, 32, generator=torch.Generator().manual_seed(0))
        keys[:, run * 8 + 3] *= -1.0
        return keys

    def test_a_run_whose_keys_disagree_is_always_chosen(self) -> None:
        keys = self.with_one_that_disagrees()
        for queries in (torch.ones(4, 32), -torch.ones(4, 32), torch.zeros(4, 32)):
            index = LandmarkIndex(SHAPE, outlier_chunks=1)
            index.add(keys, keys)
            ids = index.select(queries, 160, 64).ids
            assert all(set(range(40, 48)) <= set(row) for row in ids.tolist())
            assert ids.shape == (2, 64)  # it is part of the budget

    def test_it_takes_no_part_in_the_softmax(self) -> None:
        """The outlier's landmark would take nearly all of one head's weight, and that head's other runs none."""
        shape = LayerShape(1, 2, 2, 1.0)
        keys = torch.zeros(1, 64, 2)
        keys[0, :8, 0] = 60.0
        keys[0, 3, 0] = -60.0
        keys[0, 16:24, 0] = 3.0
        keys[0, 32:40, 1], keys[0, 40:48, 1] = 1.0, 1.0
        index = LandmarkIndex(shape, outlier_chunks=1, outlier_ratio=0.5)
        index.add(keys, keys)
        ids = index.select(torch.tensor([[1.0, 0.0], [0.0, 0.1]]), 64, 16).ids
        assert ids.tolist() == [[*range(8), *range(16, 24)]]

    def test_they_take_no_more_than_their_share_of_the_budget(self) -> None:
        keys, values, _ = make_context(800)
        index = LandmarkIndex(SHAPE, outlier_chunks=48)
        index.add(keys, values)
        assert index.outliers(16).shape == (2, 0)
        assert index.outliers(64).shape == (2, 1)
        assert index.outliers(304 * 8).shape == (2, 48)
        cosines = index.export(0, 800)["landmarks.cosines"]
        assert torch.equal(cosines.gather(1, index.outliers(400)), cosines.sort(1).values[:, :7])

    def test_scores_are_the_least_cosine_with_the_mean(self) -> None:
        keys, values, _ = make_context(80)
        index = LandmarkIndex(SHAPE)
        index.add(keys, values)
        runs = keys.view(2, 10, 8, 32)
        expected = torch.cosine_similarity(runs, runs.mean(2, keepdim=True), dim=-1).amin(2)
        torch.testing.assert_close(index.export(0, 80)["landmarks.cosines"], expected)

    def test_all_runs_may_be_outliers(self) -> None:
        """Then the query has no say, and the least agreeing ones come first."""
        keys, values, queries = make_context(160)
        index = LandmarkIndex(SHAPE, outlier_chunks=1000, outlier_ratio=1.0)
        index.add(keys, values)
        worst = index.export(0, 160)["landmarks.cosines"].argsort(1)[:, :6]
        for asked in (queries, -queries):
            ids = index.select(asked, 160, 48).ids
            assert torch.equal(ids[:, ::8] // 8, worst.sort(1).values)
        assert index.select(queries, 160, 160).ids.tolist() == [list(range(160))] * 2

    def test_keys_of_nothing_are_no_problem(self) -> None:
        index = LandmarkIndex(SHAPE)
        index.add(torch.zeros(2, 64, 32), torch.zeros(2, 64, 32))
        ids = index.select(torch.ones(4, 32), 64, 24).ids
        assert all(len(set(row)) == 24 for row in ids.tolist())


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=8), st.integers(0, 20), st.integers(0, 3))
def test_append_is_bulk(sizes: list[int], start: int, outliers: int) -> None:
    """To the last bit, for every way to cut a context into pieces, behind any number of sinks."""
    tokens = sum(sizes)
    keys, values, _ = make_context(start + tokens)
    keys, values = keys[:, start:], values[:, start:]
    bulk, pieces = (LandmarkIndex(SHAPE, start=start, outlier_chunks=outliers) for _ in range(2))
    bulk.add(keys, values)
    for k, v in zip(keys.split(sizes, 1), values.split(sizes, 1), strict=True):
        pieces.add(k, v)
    ours, theirs = (dict(index.export(start, start + tokens)) for index in (pieces, bulk))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert torch.equal(pieces.outliers(10**6), bulk.outliers(10**6))
    assert pieces.held_bytes == bulk.held_bytes


class TestTravelling:
    def test_outliers_are_ranked_over_what_came_together(self) -> None:
        keys = TestOutliers.with_one_that_disagrees(run=13)
        index, again = LandmarkIndex(SHAPE, outlier_chunks=1), LandmarkIndex(SHAPE, outlier_chunks=1)
        index.add(keys, keys)
        for a, b in ((0, 40), (40, 160)):
            again.restore(index.export(a, b), b - a)
        assert again.outliers(1000).tolist() == [[13], [13]]

    def test_bounds_within_a_run_are_refused(self) -> None:
        keys, values, _ = make_context(50)
        index = LandmarkIndex(SHAPE)
        index.add(keys, values)
        for bounds in ((0, 12), (4, 16), (16, 8), (0, 58)):
            with pytest.raises(ValueError, match="expected bounds"):
                index.export(*bounds)
        with pytest.raises(ValueError, match="end within a run"):
            index.restore(index.export(0, 8), 8)

    @pytest.mark.parametrize("name", ["landmarks.means", "landmarks.cosines", "landmarks.tail"])
    def test_other_tensors_are_refused(self, name: str) -> None:
        keys, values, _ = make_context(45)
        index = LandmarkIndex(SHAPE)
        index.add(keys, values)
        parts = dict(index.export(0, 45))
        for bad in (None, parts[name][:, :-1], parts[name].double(), parts[name] * torch.nan):
            again = LandmarkIndex(SHAPE)
            with pytest.raises(CodecError, match=name):
                again.restore({k: v for k, v in (parts | {name: bad}).items() if v is not None}, 45)
            assert len(again) == 0


def test_pinned_sinks_leave_little_to_outliers() -> None:
    """ShadowKV's first outlier is the sink's run (table 10): not pinned it must be found, pinned it need not."""
    keys, values, queries = make_context(400)
    queries = 0.2 * queries
    keys[:, 0] = 9.0 * queries.view(2, 2, 32).mean(1) / queries.norm(dim=1).mean() ** 2 / SHAPE.scale
    keys[:, 1:8] -= 1.5 * keys[:, :1]

    def mass(start: int, outliers: int) -> float:
        index = LandmarkIndex(SHAPE, start=start, outlier_chunks=outliers)
        index.add(keys[:, start:], values[:, start:])
        budget = 64 - start
        ids = index.select(queries, 400, budget).ids
        return recovered_mass(queries, keys, torch.cat((torch.arange(start).expand(2, -1), ids), 1))

    assert mass(0, 0) < 0.3 < 0.6 < mass(0, 1)
    assert mass(8, 0) > mass(0, 1) - 0.02


class TestArguments:
    @pytest.mark.parametrize(
        "wrong",
        [{"chunk_tokens": 0}, {"outlier_chunks": -1}, {"start": -1}, {"outlier_ratio": 1.5}, {"outlier_ratio": -0.1}],
    )
    def test_bad_ones_are_refused(self, wrong: dict) -> None:
        with pytest.raises(ValueError, match=next(iter(wrong))):
            LandmarkIndex(SHAPE, **wrong)

    def test_landmarks_that_do_not_fit_their_dtype_are_refused(self) -> None:
        index = LandmarkIndex(SHAPE)
        with pytest.raises(ValueError, match=r"leave the range of torch\.float16"):
            index.add(torch.full((2, 8, 32), 1e5), torch.zeros(2, 8, 32))
        wide = LandmarkIndex(SHAPE, dtype=torch.bfloat16)
        wide.add(torch.full((2, 8, 32), 1e5), torch.zeros(2, 8, 32))
        assert len(wide) == 8

    def test_a_pair_of_bytes_for_each_channel_of_a_run(self) -> None:
        keys, values, queries = make_context(800)
        index = LandmarkIndex(SHAPE, outlier_chunks=0)
        index.add(keys, values)
        assert index.select(queries, 800, 64).read_bytes == 2 * 100 * 32 * 2
        assert index.held_bytes == 2 * 100 * (32 * 2 + 4)


class TestGrowableTensor:
    @given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(0, 1))
    def test_they_are_what_was_added(self, sizes: list[int], dim: int) -> None:
        whole = torch.arange(3.0 * sum(sizes)).view((sum(sizes), 3) if dim == 0 else (3, sum(sizes)))
        rows = GrowableTensor(dim)
        for piece in whole.split(sizes, dim):
            rows.add(piece)
        assert torch.equal(rows.all, whole)
        assert len(rows) == sum(sizes)
        assert rows.nbytes == whole.nbytes

    def test_a_view_keeps_what_it_saw(self) -> None:
        rows = GrowableTensor()
        rows.add(torch.tensor([1, 2]))
        seen = rows.all
        for value in range(3, 40):
            rows.add(torch.tensor([value]))
        assert seen.tolist() == [1, 2]
        assert rows.all.tolist() == list(range(1, 40))

    def test_nothing_has_no_shape(self) -> None:
        with pytest.raises(ValueError, match="no tensor was added"):
            _ = GrowableTensor().all
        assert GrowableTensor().nbytes == len(GrowableTensor()) == 0
