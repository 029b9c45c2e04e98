"""Gram matrices of keys, and the low-rank bases and factors that follow from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CodecError

_PIECE_TOKENS = 4096  # products of one piece are summed in float32, pieces in float64


@dataclass(frozen=True, slots=True, eq=False)
class GramMatrix:
    """`K^T K` of keys. Gram matrices add up, so a basis can be found over appended tokens and chunked prefills.

    ShadowKV (arXiv 2410.21465) takes the SVD of all keys instead, which cannot be appended to.

    Attributes
    ----------
    matrix : `[M, M]` float64, cpu; M = H D channels, all heads of a layer, before rotation.
    tokens : number of keys.
    """

    matrix: Tensor
    tokens: int

    @classmethod
    def from_keys(cls, keys: Tensor) -> GramMatrix:
        """The Gram matrix of keys `[T, M]`, of any floating dtype, on any device.

        Products are computed in float32 and summed in float64.

        Raises
        ------
        CodecError : a key is not finite.
        """
        channels = keys.shape[-1]
        total = torch.zeros(channels, channels, dtype=torch.float64)
        for piece in keys.split(_PIECE_TOKENS):
            wide = piece.float()
            total += (wide.T @ wide).cpu()
        if not bool(total.isfinite().all()):
            raise CodecError("keys are not finite, or too large to be squared in float32; leave such tokens out")
        return cls(total, len(keys))

    def __add__(self, other: GramMatrix) -> GramMatrix:
        """The Gram matrix of the keys of both."""
        return GramMatrix(self.matrix + other.matrix, self.tokens + other.tokens)

    def spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues `[M]` float64, descending, and their eigenvectors as the columns of `[M, M]` float32.

        The eigenvalue (energy) of a direction is the sum of the squares of the keys' coordinates along it.
        """
        energies, directions = torch.linalg.eigh(self.matrix)
        return energies.flip(0).clamp(min=0), directions.flip(1).float()

    def basis(self, *, rank: int | None = None, energy: float | None = None) -> Tensor:
        """The orthonormal directions of most energy, strongest first: `[M, r]` float32; see `rank_for`."""
        energies, directions = self.spectrum()
        return directions[:, : rank_for(energies, rank=rank, energy=energy)].contiguous()


def rank_for(
    energies: Tensor, *, rank: int | None = None, energy: float | None = None, total: float | None = None
) -> int:
    """How many directions to keep.

    Parameters
    ----------
    energies : `[N]`, of the directions in the order in which they are kept.
    rank : this many, or N if there are no more.
    energy : as many as hold this share (0 to 1) of `total`; both given: the fewer of the two.
    total : energy of the keys; None if it is the sum of `energies`.
    """
    count = len(energies) if rank is None else min(rank, len(energies))
    if energy is None:
        return count
    wanted = energy * (float(energies.sum()) if total is None else total)
    reached = torch.cumsum(energies.double(), 0) >= wanted * (1 - 1e-12)
    return min(count, int(reached.int().argmax()) + 1) if bool(reached.any()) else count


def factorize(keys: Tensor, *, rank: int | None = None, energy: float | None = None) -> tuple[Tensor, Tensor]:
    """Keys as a product of two thin matrices, the nearest in the Frobenius norm: `keys ~ A @ B`.

    Takes the eigenvectors of the smaller of `K^T K` and `K K^T` instead of ShadowKV's SVD: a single pass over the keys.
    Singular values stay in B.

    Parameters
    ----------
    keys : `[T, M]`, finite.
    rank, energy : see `rank_for`; more than `min(T, M)` is that.

    Returns
    -------
    A `[T, r]` float32 with columns of unit norm, orthogonal to rounding (a direction without energy is all zeros),
    and B `[r, M]` float32.

    Raises
    ------
    CodecError : a key is not finite.
    """
    wide = keys.float()
    tokens, channels = wide.shape
    if tokens < channels:
        factor = GramMatrix.from_keys(wide.T).basis(rank=rank, energy=energy).to(wide.device)
        return factor, factor.T @ wide
    basis = GramMatrix.from_keys(wide).basis(rank=rank, energy=energy).to(wide.device)
    coordinates = wide @ basis
    # Norms as they are, not roots of eigenvalues: those of weak directions drown in the rounding of strong ones.
    norms = coordinates.norm(dim=0)
    factor = torch.where(norms > 0, coordinates / norms, 0)
    return factor, norms[:, None] * basis.T
