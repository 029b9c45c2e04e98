import dataclasses
import math

import pytest
import torch
from torch import Tensor

from kvloom.bench.retrieval.key_bytes import key_bytes
from kvloom.compress.gram import GramMatrix
from kvloom.core import RopeSpec
from kvloom.errors import CodecError
from kvloom.retrieval.cascade import KeySource
from kvloom.retrieval.factor.factor import FactorIndex
from kvloom.retrieval.factor.key_factor import KeyFactor
from kvloom.retrieval.kernels.ops import rebuild_keys
from kvloom.retrieval.selector import LayerShape, LearnsFromQueries, Selector
from kvloom.testing import SHAPE, SelectorContract, make_context, recovered_mass
from kvloom.testing.selector import ROPE


class OfFactor(SelectorContract):
    bits = 16
    mass = 0.7

    def make_selector(self, shape: LayerShape, start: int = 0) -> Selector:
        return FactorIndex(shape, start=start, rank=24, row_bits=self.bits)

    def ready(self, selector: Selector) -> Selector:
        selector.build()
        return selector


class TestFactorIndex(OfFactor):
    pass


class TestFactorIndexOfFourBits(OfFactor):
    bits = 4


class TestBeforeItIsBuilt(OfFactor):
    mass = 0.85  # it is exact

    def ready(self, selector: Selector) -> Selector:
        return selector


def low_rank(tokens: int, rank: int = 6, *, noise: float = 0.01, seed: int = 0) -> Tensor:
    """Keys `[2, T, 32]` after rotation that lie near `rank` directions of 64 before it, behind position 0."""
    random = torch.Generator().manual_seed(seed)
    directions = torch.randn(rank, 64, generator=torch.Generator().manual_seed(99))
    plain = torch.randn(tokens, rank, generator=random) @ directions + noise * torch.randn(tokens, 64, generator=random)
    return ROPE.shift(plain.view(tokens, 2, 32).transpose(0, 1), torch.arange(tokens))


class TestKeyFactor:
    @pytest.mark.parametrize(("bits", "error"), [(16, 1e-3), (8, 0.02), (4, 0.25)])
    def test_all_columns_rebuild_the_keys(self, bits: int, error: float) -> None:
        keys, _, _ = make_context(300)
        factor = KeyFactor.fit(SHAPE, keys, rank=64, row_bits=bits)
        assert factor.rank == 64
        rebuilt = factor.keys_at(torch.arange(300).expand(2, -1))
        found = float((rebuilt - keys).norm() / keys.norm())
        assert 0 < found < error
        assert math.sqrt(factor.error_ratio) == pytest.approx(found, rel=0.02)

    def test_few_columns_do_for_keys_of_low_rank(self) -> None:
        keys = low_rank(400)
        ids = torch.stack([torch.randperm(400)[:50], torch.randperm(400)[:50]])
        expected = keys.gather(1, ids[..., None].expand(-1, -1, 32))
        for rank, most in ((6, 0.01), (5, 0.6)):
            rebuilt = KeyFactor.fit(SHAPE, keys, rank=rank, max_residual=2.0).keys_at(ids)
            assert float((rebuilt - expected).norm() / expected.norm()) < most
        assert KeyFactor.fit(SHAPE, keys, rank=5).error_ratio > 100 * KeyFactor.fit(SHAPE, keys, rank=6).error_ratio

    def test_the_error_is_that_of_the_best_basis(self) -> None:
        """What the Gram matrix says is lost by directions left out."""
        keys, _, _ = make_context(500)
        plain = ROPE.shift(keys, -torch.arange(500)).transpose(0, 1).flatten(1)
        energies, _ = GramMatrix.from_keys(plain).spectrum()
        for rank in (4, 16, 40):
            lost = float(energies[rank:].sum() / energies.sum())
            assert KeyFactor.fit(SHAPE, keys, rank=rank, max_residual=2.0).error_ratio == pytest.approx(lost, rel=1e-3)

    def test_keys_before_rotation_have_the_lower_rank(self) -> None:
        keys = low_rank(400)
        unturned = LayerShape(2, 2, 32, SHAPE.scale)
        after = KeyFactor.fit(unturned, keys, rank=6, max_residual=2.0)
        assert after.error_ratio > 0.2 > 0.001 > KeyFactor.fit(SHAPE, keys, rank=6).error_ratio

    @pytest.mark.parametrize("bits", [16, 8, 4])
    def test_tokens_can_be_appended(self, bits: int) -> None:
        keys = low_rank(500)
        bulk = KeyFactor.fit(SHAPE, keys[:, :300], rank=6, row_bits=bits)
        pieces = KeyFactor.fit(SHAPE, keys[:, :300], rank=6, row_bits=bits)
        bulk.add(keys[:, 300:])
        for a, b in ((300, 301), (301, 301), (301, 420), (420, 500)):
            pieces.add(keys[:, a:b])
        ids = torch.arange(500).expand(2, -1)
        assert len(pieces) == 500
        torch.testing.assert_close(pieces.keys_at(ids), bulk.keys_at(ids))
        late = pieces.keys_at(ids[:, 300:])
        assert float((late - keys[:, 300:]).norm() / keys[:, 300:].norm()) < (0.2 if bits == 4 else 0.05)
        assert len(pieces.exact_tokens) < 5

    @pytest.mark.parametrize("bits", [16, 4])
    def test_tokens_that_leave_the_basis_stay_exact(self, bits: int) -> None:
        keys = low_rank(500)
        strange = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(5))
        factor = KeyFactor.fit(SHAPE, keys, rank=6, row_bits=bits)
        before = factor.exact_tokens.tolist()
        factor.add(torch.cat((keys[:, :3], strange, keys[:, :3]), 1))
        added = [at for at in factor.exact_tokens.tolist() if at not in before]
        assert set(range(503, 510)) <= set(added)
        rebuilt = factor.keys_at(torch.arange(503, 510).expand(2, -1))
        assert torch.equal(rebuilt, strange)

    def test_a_key_that_no_row_can_hold_stays_exact(self) -> None:
        keys = low_rank(100)
        keys[:, 40] *= 1e5
        factor = KeyFactor.fit(SHAPE, keys, rank=6)
        assert 40 in factor.exact_tokens.tolist()
        assert torch.equal(factor.keys_at(torch.tensor([[40], [40]])), keys[:, 40:41])
        assert bool(factor.rows(0, 100).isfinite().all())

    def test_a_few_long_keys_do_not_coarsen_all_codes(self) -> None:
        keys = low_rank(2000)
        keys[:, ::500] *= 6.0
        factor = KeyFactor.fit(SHAPE, keys, rank=6, row_bits=4)
        ids = torch.arange(1, 400).expand(2, -1)
        lost = float((factor.keys_at(ids) - keys[:, 1:400]).norm() / keys[:, 1:400].norm())
        assert lost < 0.2

    def test_a_basis_of_sums_is_that_of_all(self) -> None:
        keys = low_rank(300)
        plain = ROPE.shift(keys, -torch.arange(300)).transpose(0, 1).flatten(1)
        gram = GramMatrix.from_keys(plain[:100]) + GramMatrix.from_keys(plain[100:])
        ids = torch.arange(100).expand(2, -1)
        of_sums = KeyFactor.fit(SHAPE, keys[:, :100], rank=6, gram=gram)
        torch.testing.assert_close(
            of_sums.keys_at(ids), KeyFactor.fit(SHAPE, keys, rank=6).keys_at(ids), atol=2e-2, rtol=2e-2
        )

    def test_positions_count_from_the_start(self) -> None:
        keys = low_rank(200)
        factor = KeyFactor.fit(SHAPE, keys[:, 30:], rank=6, start=30)
        torch.testing.assert_close(
            factor.keys_at(torch.tensor([[30, 150], [199, 31]])),
            torch.stack([keys[0, [30, 150]], keys[1, [199, 31]]]),
            atol=0.1,
            rtol=0.02,
        )
        for wrong in ([[29], [40]], [[40], [200]], [[-2], [40]]):
            with pytest.raises(ValueError, match=r"expected 30\.\.199, or -1"):
                factor.keys_at(torch.tensor(wrong))
        assert factor.keys_at(torch.full((2, 3), -1)).shape == (2, 3, 32)
        assert factor.keys_at(torch.empty(2, 0, dtype=torch.int64)).shape == (2, 0, 32)

    @pytest.mark.parametrize("bits", [16, 8, 4])
    def test_it_survives_being_stored(self, bits: int) -> None:
        keys = low_rank(200)
        keys[:, 9] = torch.randn(2, 32)
        factor = KeyFactor.fit(SHAPE, keys, rank=6, start=8, row_bits=bits)
        again = KeyFactor.from_state(SHAPE, {k: v.clone() for k, v in factor.state().items()}, start=8)
        ids = torch.arange(8, 208).expand(2, -1)
        assert again.row_bits == bits
        assert len(again.exact_tokens)
        assert torch.equal(again.keys_at(ids), factor.keys_at(ids))
        for name, part in factor.state().items():
            bad = part[..., :-1] if name != "factor.columns" else torch.ones(2, 5)
            for wrong in (bad, part[0], part.to(torch.complex64)):
                with pytest.raises(CodecError):
                    KeyFactor.from_state(SHAPE, dict(factor.state()) | {name: wrong})

    def test_bad_arguments_are_refused(self) -> None:
        keys = low_rank(50)
        with pytest.raises(ValueError, match="row_bits is 5"):
            KeyFactor.fit(SHAPE, keys, rank=6, row_bits=5)
        with pytest.raises(ValueError, match="hold no token"):
            KeyFactor.fit(SHAPE, keys[:, :0], rank=6)
        with pytest.raises(ValueError, match="not finite"):
            KeyFactor.fit(SHAPE, keys * torch.nan, rank=6)
        with pytest.raises(ValueError, match=r"basis is \[32, 6\]"):
            KeyFactor(SHAPE, torch.zeros(32, 6))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rebuilding_is_a_product_then_a_turn(interleaved: bool) -> None:
    random = torch.Generator().manual_seed(3)
    rope = RopeSpec(ROPE.inv_freq, interleaved=interleaved)
    factor, basis = torch.randn(30, 5, generator=random), torch.randn(2, 5, 32, generator=random)
    ids, scale = torch.tensor([[4, 29, -1], [0, 7, 7]]), torch.rand(5, generator=random)
    bias = torch.randn(2, 32, generator=random)
    cos, sin = rope.cos_sin(torch.arange(30))
    found = rebuild_keys(factor, basis, ids, scale=scale, bias=bias, cos=cos, sin=sin, interleaved=interleaved)
    for head, row in enumerate(ids.tolist()):
        for place, token in enumerate(row):
            expected = torch.zeros(32)
            if token >= 0:
                expected = rope.shift(((factor[token] * scale) @ basis[head] + bias[head])[None], token)[0]
            torch.testing.assert_close(found[head, place], expected)


class TestScores:
    @staticmethod
    def built(keys: Tensor, **how: object) -> FactorIndex:
        index = FactorIndex(SHAPE, rank=64, max_residual=2.0, **how)
        index.add(keys)
        index.build()
        return index

    def test_blocks_of_one_token_are_exact(self) -> None:
        keys, _, queries = make_context(150)
        index = self.built(keys, block_tokens=1)
        scores = index.scores_by(index.factor, queries, 150)
        torch.testing.assert_close(scores, (queries.view(2, 2, 32) @ keys.mT).flatten(0, 1), atol=0.05, rtol=0.01)

    @pytest.mark.parametrize("offset", [0, 40])
    def test_a_constant_offset_is_windowed_rope(self, offset: int) -> None:
        keys, _, queries = make_context(150)
        index = self.built(keys, offset_tokens=offset)
        plain_keys = ROPE.shift(keys, -torch.arange(150))
        turned = ROPE.shift(queries[:, None], offset - 150)[:, 0]
        expected = (turned.view(2, 2, 32) @ plain_keys.mT).flatten(0, 1)
        torch.testing.assert_close(index.scores_by(index.factor, queries, 150), expected, atol=0.05, rtol=0.01)

    def test_a_block_has_the_mean_of_its_distances(self) -> None:
        """Damped rotation to the middle is the mean rotation over the block."""
        keys, _, queries = make_context(128)
        index = self.built(keys, block_tokens=32)
        plain_keys = ROPE.shift(keys, -torch.arange(128))
        plain = ROPE.shift(queries[:, None], -128)[:, 0]
        expected = torch.empty(4, 128)
        for block in range(4):
            within = torch.arange(block * 32, (block + 1) * 32)
            turned = torch.stack([_turned_by(plain, 128 - float(at)) for at in within]).mean(0)
            of_block = plain_keys[:, block * 32 : block * 32 + 32]
            expected[:, block * 32 : block * 32 + 32] = (turned.view(2, 2, 32) @ of_block.mT).flatten(0, 1)
        torch.testing.assert_close(index.scores_by(index.factor, queries, 128), expected, atol=0.05, rtol=0.02)

    def test_blocks_choose_better_than_one_distance(self) -> None:
        blocks, constant = [], []
        for seed in range(4):
            keys, _, queries = make_context(600, seed=seed)
            for index, masses in (
                (self.built(keys, block_tokens=16), blocks),
                (self.built(keys, offset_tokens=256), constant),
            ):
                masses.append(recovered_mass(queries, keys, index.select(queries, 600, 48).ids))
        assert sum(blocks) > sum(constant)

    def test_exact_tokens_have_exact_scores(self) -> None:
        keys = low_rank(300)
        keys[:, 100] = torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
        index = FactorIndex(SHAPE, rank=6, start=0)
        index.add(keys)
        index.build()
        assert 100 in index.factor.exact_tokens.tolist()
        queries = torch.randn(4, 32, generator=torch.Generator().manual_seed(2))
        scores = index.scores_by(index.factor, queries, 300)
        torch.testing.assert_close(scores[:, 100], (queries.view(2, 2, 32) @ keys[:, 100, :, None]).flatten())

    def test_without_rotation_there_is_nothing_to_approximate(self) -> None:
        shape = LayerShape(2, 2, 32, SHAPE.scale)
        keys, _, queries = make_context(150, shape=shape)
        index = FactorIndex(shape, rank=64)
        index.add(keys)
        index.build()
        scores = index.scores_by(index.factor, queries, 150)
        torch.testing.assert_close(scores, (queries.view(2, 2, 32) @ keys.mT).flatten(0, 1), atol=0.05, rtol=0.01)


def _turned_by(queries: Tensor, angle_tokens: float) -> Tensor:
    angles = torch.tensor(ROPE.inv_freq) * angle_tokens
    a, b = queries.chunk(2, -1)
    return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), -1)


class TestIndex:
    def test_it_is_what_others_ask_for(self) -> None:
        index = FactorIndex(SHAPE)
        assert isinstance(index, LearnsFromQueries)
        assert isinstance(index, KeySource)
        assert index.rank == 10  # 160 of 1024, of 64 channels

    def test_tokens_added_later_are_found(self) -> None:
        keys, values, queries = make_context(600)
        index = FactorIndex(SHAPE, rank=24)
        index.add(keys[:, :400], values[:, :400])
        index.build()
        index.build()
        index.add(keys[:, 400:], values[:, 400:])
        assert len(index) == 600
        ids = index.select(queries, 600, 48).ids
        assert int(ids.max()) >= 400
        assert recovered_mass(queries, keys, ids) > 0.6

    def test_it_keeps_the_keys_until_it_is_built(self) -> None:
        keys, values, queries = make_context(100)
        index = FactorIndex(SHAPE, start=0)
        with pytest.raises(ValueError, match="call build first"):
            index.state()
        index.build()
        index.add(keys, values)
        assert index.factor is None
        ids = torch.tensor([[3, 99], [0, 50]])
        assert torch.equal(index.keys_at(ids), torch.stack([keys[0, [3, 99]], keys[1, [0, 50]]]))
        assert index.select(queries, 100, 10).compared_keys == 200

    def test_it_resumes(self) -> None:
        keys, values, queries = make_context(300)
        index, again = FactorIndex(SHAPE, rank=24, row_bits=4), FactorIndex(SHAPE, rank=24, row_bits=4)
        index.add(keys, values)
        index.build()
        again.restore_state(index.state())
        for each in (index, again):
            each.add(keys[:, :20], values[:, :20])
        assert torch.equal(again.select(queries, 320, 40).ids, index.select(queries, 320, 40).ids)


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"row_bits": 3}, {"block_tokens": 0}, {"start": -1}])
def test_bad_arguments_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        FactorIndex(SHAPE, **wrong)


def test_bytes_are_those_of_tensors() -> None:
    keys = low_rank(256)
    for bits, row in ((16, 12), (8, 6), (4, 4)):
        factor = KeyFactor.fit(SHAPE, keys, rank=6, row_bits=bits)
        account = key_bytes(factor, pinned_tokens=10, outlier_tokens=16, buffer_tokens=32, index_bytes=77)
        assert account.rows == 256 * row + (0 if bits == 16 else 2 * 6 * 4)
        assert account.basis == 64 * 6 * 2
        assert account.exact == len(factor.exact_tokens) * (64 * 4 + 8)
        assert account.dense == (256 + 10) * 64 * 2
        assert (account.pinned, account.buffer, account.index) == (26 * 128, 4096, 77)
        parts = account.rows + account.basis + account.exact + 26 * 128 + 4096 + 77
        assert account.ratio == 266 * 128 / parts
        assert factor.held_bytes == account.rows + account.basis + account.exact


@pytest.mark.parametrize(("bits", "least"), [(16, 6.26), (4, 20.0)])
def test_an_8b_layer_of_128k_tokens_is_as_much_smaller_as_promised(bits: int, least: float) -> None:
    """From a factor of some tokens: rows are all alike, and the rest does not grow."""
    shape = LayerShape(8, 4, 128, 128**-0.5)
    random = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 2048, 160, generator=random) @ torch.randn(8, 160, 128, generator=random)
    some = key_bytes(KeyFactor.fit(shape, keys, rank=160, row_bits=bits), pinned_tokens=160)
    assert some.exact == 0
    whole = dataclasses.replace(some, rows=(some.rows // 2048) * (131072 - 160), dense=131072 * 2048)
    assert whole.ratio >= least
    assert some.ratio < whole.ratio
