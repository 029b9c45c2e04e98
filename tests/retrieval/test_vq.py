"""Codebooks and codes: the invariants of query-aware quantisation, and an index made of it."""

import pytest
import torch
from torch import Tensor

from kvloom.calibration.model_profile import Profile
from kvloom.core import KVSpec, RopeSpec
from kvloom.errors import CodecError, SpecMismatchError
from kvloom.retrieval.kernels.code_ops import unpack_codes, vq_scores
from kvloom.retrieval.selector import LayerShape, Selector, TravelsWithChunks, pooled, top_ids
from kvloom.retrieval.vq.codebook import Codebook
from kvloom.retrieval.vq.vq import VqIndex
from kvloom.retrieval.vq.vq_fit import (
    banded_moment,
    check_bands,
    distance_bands,
    fit_codebook,
    mean_rotations,
    metric_factor,
    nearest,
)
from kvloom.testing import SHAPE, SelectorContract, make_context, recovered_mass
from kvloom.testing.selector import ROPE

pytest.importorskip("faiss")


def skewed(count: int, dim: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Keys and queries `[count, dim]` whose strong directions differ."""
    random = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(99)))[0]
    key_scales = torch.logspace(0, -1.0, dim)
    query_scales = torch.logspace(-1.5, 0.5, dim)[torch.randperm(dim, generator=torch.Generator().manual_seed(98))]
    keys = torch.randn(count, dim, generator=random) * key_scales @ turn + 0.5
    return keys, torch.randn(count, dim, generator=random) * query_scales @ turn


def score_error(queries: Tensor, keys: Tensor, centroids: Tensor, factor: Tensor) -> float:
    """Mean squared error of the scores of all pairs."""
    coded = centroids[nearest(keys @ factor, centroids @ factor)]
    return float((queries @ (keys - coded).T).square().mean())


BANDS = tuple(distance_bands(1024))


def codebook_of(keys: Tensor, *, centroids: int, bands: tuple[tuple[int, int], ...] | None = BANDS) -> Codebook:
    """Plain k-means of keys `[H, T, D]` before rotation."""
    parts = [fit_codebook(of_head, None, centroids=centroids) for of_head in keys]
    return Codebook(torch.stack([p[0] for p in parts]), torch.stack([p[1] for p in parts]), bands)


def unrotated(keys: Tensor, rope: RopeSpec = ROPE, first: int = 0) -> Tensor:
    return rope.shift(keys, -torch.arange(first, first + keys.shape[1]))


@pytest.fixture(scope="module")
def codebook() -> Codebook:
    """Of the topics of several contexts, since those of one are not those of another."""
    keys = torch.cat([unrotated(make_context(600, seed=seed)[0]) for seed in (0, 1, 2, 20, 21)], dim=1)
    return codebook_of(keys, centroids=256)


class TestVqIndex(SelectorContract):
    mass = 0.55  # what a token is worth in these contexts hangs on its exact distance; see `TestRanking` for the rest

    @pytest.fixture(autouse=True)
    def _codebook(self, codebook: Codebook) -> None:
        self.codebook = codebook

    def make_selector(self, shape: LayerShape, start: int = 0) -> Selector:
        return VqIndex(shape, self.codebook, start=start)


class TestFit:
    def test_query_aware_is_better_where_queries_look(self) -> None:
        keys, queries = skewed(4000, 16, seed=0)
        moment = queries.double().T @ queries.double() / len(queries)
        aware, plain = (fit_codebook(keys, h, centroids=64) for h in (moment, None))
        held_out = skewed(1000, 16, seed=1)
        assert score_error(held_out[1], held_out[0], *aware) < 0.8 * score_error(held_out[1], held_out[0], *plain)

    def test_no_preference_of_the_queries_is_plain_k_means(self) -> None:
        keys, _ = skewed(1000, 8, seed=2)
        (aware, factor), (plain, identity) = (
            fit_codebook(keys, h, centroids=16, ridge=0.0) for h in (3.0 * torch.eye(8), None)
        )
        torch.testing.assert_close(factor, torch.eye(8))
        assert torch.equal(identity, torch.eye(8))
        torch.testing.assert_close(aware, plain)

    def test_centroids_are_means_of_their_keys(self) -> None:
        keys, queries = skewed(1000, 8, seed=3)
        centroids, factor = fit_codebook(keys, queries.T @ queries, centroids=16)
        again = fit_codebook(keys, queries.T @ queries, centroids=16)
        assert torch.equal(centroids, again[0])
        # more rounds of k-means, written down plainly, never make it worse, and not much better
        errors, books = [], centroids
        for _ in range(3):
            codes = ((keys @ factor)[:, None] - (books @ factor)[None]).square().sum(-1).argmin(1)
            errors.append(float(((keys - books[codes]) @ factor).square().sum(1).mean()))
            books = torch.stack([keys[codes == c].mean(0) for c in range(16)])
        assert errors[0] >= errors[1] >= errors[2] > 0.8 * errors[0]

    def test_a_centroid_for_each_key_is_exact(self) -> None:
        keys, queries = skewed(50, 8, seed=4)
        centroids, factor = fit_codebook(keys, queries.T @ queries, centroids=64)
        assert torch.equal(centroids[nearest(keys @ factor, centroids @ factor)], keys)

    def test_the_metric_is_the_regularised_moment(self) -> None:
        _, queries = skewed(100, 8, seed=5)
        moment = (queries.T @ queries).double()
        factor = metric_factor(moment, ridge=0.1)
        assert torch.equal(factor, factor.tril())
        mean = moment.diagonal().mean()
        torch.testing.assert_close(factor @ factor.T, moment / mean + 0.1 * torch.eye(8).double())
        one = torch.zeros(8, 8)
        one[0, 0] = 1.0  # queries of one direction only: still a metric
        assert bool(metric_factor(one).isfinite().all())
        for broken in (torch.zeros(8, 8), torch.full((8, 8), torch.nan)):
            with pytest.raises(CodecError, match="second moment of the queries is zero or not finite"):
                metric_factor(broken)

    def test_moments_turn_as_queries_do(self) -> None:
        queries = torch.randn(30, 32, generator=torch.Generator().manual_seed(6))
        moved = torch.cat([ROPE.shift(queries, offset).double() for offset in (77, 1000)])
        turned = banded_moment(queries.double().T @ queries.double(), ROPE, [(77, 78), (1000, 1001)])
        torch.testing.assert_close(turned, moved.T @ moved / 2, rtol=1e-4, atol=1e-4)

    def test_what_cannot_be_fitted_is_refused(self) -> None:
        for keys in (torch.empty(0, 4), torch.full((3, 4), torch.inf), torch.zeros(3)):
            with pytest.raises(CodecError, match="keys are"):
                fit_codebook(keys, None, centroids=2)


class TestBands:
    @pytest.mark.parametrize("band", [(0, 1), (5, 6), (64, 128), (1024, 2048), (3, 1000)])
    def test_a_band_turns_as_its_distances_do_on_average(self, band: tuple[int, int]) -> None:
        slow = RopeSpec((1.0, 1e-3, 1e-9, 0.0))
        offsets = torch.arange(*band, dtype=torch.float64)[:, None] * torch.tensor(slow.inv_freq).double()
        cos, sin = mean_rotations(slow, [band])
        torch.testing.assert_close(cos[0], offsets.cos().mean(0).float(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(sin[0], offsets.sin().mean(0).float(), rtol=1e-5, atol=1e-6)

    def test_bands_grow_up_to_the_longest_context(self) -> None:
        assert distance_bands(200, per_doubling=1) == [(0, 64), (64, 128), (128, 256)]
        assert distance_bands(120, per_doubling=2) == [(0, 64), (64, 91), (91, 128)]
        assert len(distance_bands(1 << 17)) == 34 and distance_bands(1 << 17)[-1][1] == 1 << 17
        for bands in ([], [(0, 0)], [(5, 9), (8, 12)], [(-1, 3)]):
            with pytest.raises(ValueError, match="bands"):
                check_bands(bands)

    @pytest.mark.parametrize("position", [200, 231, 4000])
    def test_each_token_is_scored_in_its_band(self, position: int) -> None:
        keys, values, queries = make_context(201)
        bands = ((0, 64), (64, 128), (128, 256))
        book = codebook_of(unrotated(keys, first=7), centroids=201, bands=bands)  # every key is its own centroid
        index = VqIndex(SHAPE, book, start=7)
        index.add(keys, values)
        here = ROPE.shift(queries[:, None], -position)[:, 0]
        expected = torch.empty(4, 201)
        for token, place in enumerate(range(7, 208)):
            low, high = bands[max(i for i, (low, _) in enumerate(bands) if low <= max(position - place, 0))]
            mean = ROPE.shift(here[:, None].expand(-1, high - low, -1), torch.arange(low, high)).mean(1)
            key = unrotated(keys, first=7)[:, token]
            expected[:, token] = (mean.view(2, 2, -1) @ key[..., None]).flatten() * SHAPE.scale
        table, band_starts = index.score_table(queries, position)
        found = vq_scores(table, index.packed, 201, band_starts=band_starts)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    def test_bands_find_more_than_one_constant(self) -> None:
        found = []
        for bands in (tuple(distance_bands(1024)), ((300, 301),)):
            masses = []
            for seed in range(3):
                keys, values, queries = make_context(600, seed=seed)
                index = VqIndex(SHAPE, codebook_of(unrotated(keys), centroids=600, bands=bands))
                index.add(keys, values)
                masses.append(recovered_mass(queries, keys, index.select(queries, 600, 48).ids))
            found.append(sum(masses) / 3)
        assert found[0] > found[1] + 0.15


class TestRanking:
    def test_a_centroid_for_each_key_ranks_as_windowed_rotation_does(self) -> None:
        keys, values, queries = make_context(200)
        book = codebook_of(unrotated(keys), centroids=200, bands=((100, 101),))
        far = ROPE.shift(queries[:, None], 100 - 200)[:, 0].view(2, 2, 32)
        scores = (far @ unrotated(keys).mT).flatten(0, 1) * SHAPE.scale
        for budget in (1, 10, 77, 199):
            for pooling in ("max", "sum"):
                index = VqIndex(SHAPE, book, pooling=pooling)
                index.add(keys, values)
                expected = top_ids(pooled(scores, SHAPE, pooling), budget)
                assert torch.equal(index.select(queries, 200, budget).ids, expected)

    def test_without_bands_rotated_keys_are_compared_as_they_are(self) -> None:
        keys, values, queries = make_context(200)
        index = VqIndex(SHAPE, codebook_of(keys, centroids=200, bands=None))
        index.add(keys, values)
        scores = (queries.view(2, 2, 32) @ keys.mT).flatten(0, 1) * SHAPE.scale
        assert torch.equal(index.select(queries, 200, 20).ids, top_ids(pooled(scores, SHAPE), 20))

    def test_without_rotation_there_are_no_bands(self) -> None:
        shape = LayerShape(2, 2, 32, 32**-0.5)
        keys, values, queries = make_context(600, shape=shape)
        index = VqIndex(shape, codebook_of(keys, centroids=128))
        index.add(keys, values)
        ids = index.select(queries, 600, 48).ids
        assert recovered_mass(queries, keys, ids, shape) > 0.8

    def test_of_equal_codes_the_latest_are_taken(self) -> None:
        keys = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]).repeat(1, 9, 1)
        shape = LayerShape(2, 1, 2, 1.0)
        index = VqIndex(shape, Codebook(torch.eye(2).expand(2, 2, 2), torch.eye(2).expand(2, 2, 2), None), start=4)
        index.add(keys, keys)
        assert index.select(torch.ones(2, 2), 13, 3).ids.tolist() == [[10, 11, 12]] * 2
        assert index.occupancy.tolist() == [[9, 0], [0, 9]]

    def test_the_budget_is_per_kv_head(self, codebook: Codebook) -> None:
        keys, values, queries = make_context(1000, seed=3)
        index = VqIndex(SHAPE, codebook)
        index.add(keys, values)
        assert index.select(queries, 1000, 30).ids.shape == (2, 30)
        assert index.packed.nbytes == 2 * 1500

    def test_codes_of_sixteen_bits(self) -> None:
        keys, values, _ = make_context(5000)
        book = codebook_of(unrotated(keys), centroids=5000)
        index = VqIndex(SHAPE, book)
        assert book.code_bits == 16
        for a, b in ((0, 333), (333, 5000)):
            index.add(keys[:, a:b], values[:, a:b])
        assert index.packed.nbytes == 2 * 10000
        assert torch.equal(unpack_codes(index.packed, 16, 5000), torch.arange(5000).expand(2, -1))


class TestTravel:
    def test_codes_survive_repositioning(self, codebook: Codebook) -> None:
        """A chunk computed at 100 and placed at 1,000: what it stored is what its moved keys would be coded as."""
        keys, values, _ = make_context(164)
        here, there, anew = (VqIndex(SHAPE, codebook, start=start) for start in (0, 936, 936))
        here.add(keys, values)
        parts = here.export(100, 164)
        moved = ROPE.shift(keys, 900)
        for index in (there, anew):
            index.add(moved[:, 36:100], values[:, 36:100])
        there.restore(parts, 64)
        anew.add(moved[:, 100:], values[:, 100:])
        assert torch.equal(there.packed, anew.packed)

    def test_codes_of_another_codebook_are_refused(self, codebook: Codebook) -> None:
        keys, values, _ = make_context(64)
        index = VqIndex(SHAPE, codebook)
        assert isinstance(index, TravelsWithChunks)
        index.add(keys, values)
        parts = dict(index.export(0, 64))
        other = VqIndex(SHAPE, Codebook(codebook.centroids, codebook.factor, BANDS[:2]))
        for target, broken, tokens in (
            (other, parts, 64),
            (VqIndex(SHAPE, codebook), {}, 64),
            (VqIndex(SHAPE, codebook), parts, 63),
            (VqIndex(SHAPE, codebook), parts | {"vq.codes": parts["vq.codes"].long()}, 64),
            (VqIndex(SHAPE, codebook), parts | {"vq.codes": torch.full_like(parts["vq.codes"], 255)}, 64),
        ):
            with pytest.raises(CodecError):
                target.restore(broken, tokens)
            assert len(target) == 0
        with pytest.raises(ValueError, match=r"tokens \[0, 65\) are not covered"):
            index.export(0, 65)


class TestCodebook:
    def test_of_a_profile(self, codebook: Codebook) -> None:
        spec = KVSpec("m", 2, 2, 32, torch.float32, ROPE)
        tensors = {
            "vq.centroids": torch.stack([codebook.centroids, 2 * codebook.centroids]).half(),
            "vq.factor": torch.stack([codebook.factor] * 2),
            "vq.bands": torch.tensor([BANDS, (*BANDS[:-1], (813, 2000))]),
        }
        profile = Profile(spec, tensors)
        second = Codebook.from_profile(profile, 1, spec=spec)
        assert second.bands == (*BANDS[:-1], (813, 2000))
        torch.testing.assert_close(second.centroids, 2 * codebook.centroids, rtol=1e-3, atol=1e-3)
        with pytest.raises(SpecMismatchError, match="made for m"):
            Codebook.from_profile(profile, 1, spec=KVSpec("n", 2, 2, 32, torch.float32, ROPE))
        with pytest.raises(CodecError, match="kvloom calibrate"):
            Codebook.from_profile(Profile(spec, {}), 0)

    def test_of_other_heads_is_refused(self, codebook: Codebook) -> None:
        with pytest.raises(SpecMismatchError, match="2 heads of 32; expected 4 of 32"):
            VqIndex(LayerShape(4, 1, 32, 1.0), codebook)
        with pytest.raises(SpecMismatchError, match="centroids are"):
            Codebook(codebook.centroids[0], codebook.factor, BANDS)
