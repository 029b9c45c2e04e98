"""Gram matrices are additive, and bases and factors that come from them are those of the singular values."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvloom.compress.gram import GramMatrix, factorize, rank_for
from kvloom.errors import CodecError


def keys_of_rank(tokens: int, channels: int, rank: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, rank, generator=random) @ torch.randn(rank, channels, generator=random)


@given(parts=st.lists(st.integers(0, 40), min_size=1, max_size=5), channels=st.integers(1, 20), seed=st.integers(0, 9))
def test_append_equals_bulk_in_any_order(parts: list[int], channels: int, seed: int) -> None:
    keys = torch.randn(sum(parts), channels, generator=torch.Generator().manual_seed(seed))
    bulk = GramMatrix.from_keys(keys)
    pieces = [GramMatrix.from_keys(piece) for piece in keys.split(parts)]
    for ordered in (pieces, pieces[::-1]):
        total = ordered[0]
        for piece in ordered[1:]:
            total = total + piece
        assert total.tokens == bulk.tokens == len(keys)
        torch.testing.assert_close(total.matrix, bulk.matrix, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bulk.matrix, keys.double().T @ keys.double(), rtol=1e-5, atol=1e-5)


def test_long_runs_are_summed_in_double() -> None:
    keys = torch.full((40_000, 2), 1.0)
    keys[:, 1] = 1e-3
    total = GramMatrix.from_keys(keys).matrix
    assert total[0, 0] == 40_000 and abs(float(total[1, 1]) / 0.04 - 1) < 1e-5


def test_basis_is_the_singular_vectors() -> None:
    keys = keys_of_rank(300, 24, 24, seed=3) * torch.linspace(3, 0.1, 24)
    _, values, directions = torch.linalg.svd(keys, full_matrices=False)
    energies, found = GramMatrix.from_keys(keys).spectrum()
    torch.testing.assert_close(energies.sqrt().float(), values, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.T @ found, torch.eye(24), rtol=1e-5, atol=1e-5)
    basis = GramMatrix.from_keys(keys).basis(rank=5)
    assert basis.shape == (24, 5)
    assert float((basis.T @ directions[:5].T).square().sum()) == pytest.approx(5, abs=1e-3)


def test_rank_by_energy() -> None:
    energies = torch.tensor([8.0, 4.0, 2.0, 2.0])
    assert [rank_for(energies, energy=share) for share in (0.1, 0.5, 0.51, 0.75, 0.875, 0.9, 1.0)] == [
        1,
        1,
        2,
        2,
        3,
        4,
        4,
    ]
    assert rank_for(energies, rank=2, energy=1.0) == 2 and rank_for(energies, rank=9) == 4
    assert rank_for(energies, energy=0.75, total=20.0) == 4 and rank_for(energies, energy=0.5, total=16.0) == 1
    assert rank_for(energies, energy=0.9, total=32.0) == 4  # never reached: all
    assert rank_for(torch.zeros(3), energy=0.9) == 1 and rank_for(torch.zeros(0), energy=0.9) == 0


@pytest.mark.parametrize("tokens", [7, 24, 100])
def test_factors_are_the_best_of_their_rank(tokens: int) -> None:
    keys = keys_of_rank(tokens, 24, 24, seed=1)
    values = torch.linalg.svdvals(keys)
    for rank in (1, 5, min(tokens, 24)):
        factor, basis = factorize(keys, rank=rank)
        assert factor.shape == (tokens, rank) and basis.shape == (rank, 24)
        torch.testing.assert_close(factor.T @ factor, torch.eye(rank), rtol=1e-3, atol=1e-3)
        error = (factor @ basis - keys).square().sum()
        assert float(error) == pytest.approx(float(values[rank:].square().sum()), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize(("tokens", "channels"), [(9, 16), (16, 16), (50, 16), (0, 16), (1, 16), (5, 1), (3, 0)])
def test_full_rank_reproduces(tokens: int, channels: int) -> None:
    keys = torch.randn(tokens, channels, generator=torch.Generator().manual_seed(2))
    factor, basis = factorize(keys)
    assert factor.shape[1] == min(tokens, channels)
    torch.testing.assert_close(factor @ basis, keys, rtol=1e-4, atol=1e-4)


def test_more_directions_than_the_keys_have() -> None:
    keys = keys_of_rank(60, 16, 2)
    factor, basis = factorize(keys, rank=10)
    assert bool(factor.isfinite().all())
    torch.testing.assert_close(factor @ basis, keys, rtol=1e-4, atol=1e-4)
    assert factorize(keys, energy=0.99999)[0].shape[1] == 2
    assert bool((factorize(torch.zeros(20, 4), rank=3)[0] == 0).all())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("tokens", [3, 30])
def test_refuses_what_is_not_finite(value: float, tokens: int) -> None:
    keys = torch.ones(tokens, 8)
    keys[2, 3] = value
    with pytest.raises(CodecError, match="not finite"):
        factorize(keys, rank=2)
