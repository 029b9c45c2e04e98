"""Low-rank keys of one layer: a row of few numbers for each token, and the keys of chosen tokens rebuilt from them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...compress.gram import GramMatrix
from ...compress.kernels.ops import pack_bits, packed_bytes
from ...errors import CodecError
from ..growable import GrowableTensor
from ..kernels.ops import numbers_of, rebuild_keys
from ..selector import LayerShape

PIECE_TOKENS = 4096  # projected or scored at once
_FIT_TOKENS = 16384  # that a column's range is fitted to
_CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)  # shares of a column's reach that its codes may cover
_PARTS = ("factor.basis", "factor.columns", "factor.rows", "factor.exact_at", "factor.exact")


class KeyFactor:
    """`keys ~ A [T, r] @ basis^T`, before rotation, all heads side by side (ShadowKV, arXiv 2410.21465, 4.1).

    A token's row is its key projected onto the basis, in float16 or in integers with a scale and a centre for each
    column. Tokens whose rebuilt key has a relative error above `max_residual` are kept exact as well, so any number of
    tokens can be appended.

    Deviations: eigenvectors of a Gram matrix instead of an SVD, which could not be appended to; integers; exact tokens,
    where the paper keeps generated ones all exact.

    Parameters
    ----------
    basis : `[M, r]` orthonormal columns, M = H D; stored in float16.
    columns : `[2, r]` float32, scale and centre of each column's codes, which are signed; None if `row_bits` is 16.
    row_bits : 16, 8 or 4 bits of a number of a row.
    start : position of the first token.
    """

    def __init__(
        self,
        shape: LayerShape,
        basis: Tensor,
        columns: Tensor | None = None,
        *,
        start: int = 0,
        row_bits: int = 16,
        max_residual: float = 0.5,
    ) -> None:
        if row_bits not in (16, 8, 4):
            raise ValueError(f"row_bits is {row_bits}; expected 16, 8 or 4")
        if basis.ndim != 2 or len(basis) != shape.kv_heads * shape.head_dim:
            raise ValueError(f"basis is {list(basis.shape)}; expected [{shape.kv_heads * shape.head_dim}, r]")
        rank = basis.shape[1]
        if (columns is None) != (row_bits == 16) or (columns is not None and columns.shape != (2, rank)):
            has = None if columns is None else list(columns.shape)
            raise ValueError(f"columns are {has}; rows of {row_bits} bits and rank {rank} have others")
        self.shape, self.start, self.row_bits, self.max_residual = shape, start, row_bits, max_residual
        self.basis, self.columns, self.rank = basis.half(), columns, rank
        self._rows, self._exact_at, self._exact = GrowableTensor(), GrowableTensor(), GrowableTensor(1)
        self._exact_at.add(torch.empty(0, dtype=torch.int64))
        self._norms = torch.zeros(2, dtype=torch.float64)  # squared, of the errors and of the keys

    @classmethod
    def fit(
        cls,
        shape: LayerShape,
        keys: Tensor,
        *,
        rank: int,
        start: int = 0,
        row_bits: int = 16,
        max_residual: float = 0.5,
        gram: GramMatrix | None = None,
    ) -> KeyFactor:
        """Fits a basis to keys `[H, T, D]` after rotation, T at least 1, from position `start` on, and adds the keys.

        Parameters
        ----------
        rank : columns of the basis, at most M.
        gram : Gram matrix of these keys, or of more of the context, if it is known already.
        """
        shape.check_keys(keys)
        if not keys.shape[1]:
            raise ValueError("keys hold no token; a basis needs some")
        bounds = [(a, min(a + PIECE_TOKENS, keys.shape[1])) for a in range(0, keys.shape[1], PIECE_TOKENS)]
        if gram is None:
            grams = (
                GramMatrix.from_keys(_unrotated(shape, keys[:, a:b], torch.arange(start + a, start + b)))
                for a, b in bounds
            )
            gram = sum(grams, next(grams))
        basis, columns = gram.basis(rank=rank).half(), None
        if row_bits != 16:
            step = max(1, keys.shape[1] // _FIT_TOKENS)
            positions = torch.arange(start, start + keys.shape[1], step)
            columns = _fit_columns(_unrotated(shape, keys[:, ::step], positions), basis.float(), row_bits, max_residual)
        factor = cls(shape, basis, columns, start=start, row_bits=row_bits, max_residual=max_residual)
        factor.add(keys)
        return factor

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def rows_bytes(self) -> int:
        """Bytes of the rows and of their columns' scales."""
        return self._rows.nbytes + (0 if self.columns is None else self.columns.nbytes)

    @property
    def exact_bytes(self) -> int:
        """Bytes of the tokens that are kept exact."""
        return self._exact.nbytes + self._exact_at.nbytes

    @property
    def held_bytes(self) -> int:
        return self.rows_bytes + self.basis.nbytes + self.exact_bytes

    @property
    def error_ratio(self) -> float:
        """Squared norm of the errors of all added keys over that of the keys: 0 to 1."""
        errors, norms = self._norms.tolist()
        return errors / norms if norms else 0.0

    @property
    def exact_tokens(self) -> Tensor:
        """Positions of the tokens kept exact, ascending."""
        return self._exact_at.all + self.start

    @property
    def exact_keys(self) -> Tensor:
        """Keys of the tokens kept exact, `[H, N, D]`."""
        return (
            self._exact.all if len(self._exact) else self.basis.new_empty(self.shape.kv_heads, 0, self.shape.head_dim)
        )

    def add(self, keys: Tensor) -> None:
        """Adds the next tokens, `[H, T, D]` after rotation, in the dtype of those before."""
        self.shape.check_keys(keys)
        for piece in keys.split(PIECE_TOKENS, 1):
            end = self.start + len(self)
            self._take(piece, _unrotated(self.shape, piece, torch.arange(end, end + piece.shape[1])))

    def rows(self, first: int, stop: int) -> Tensor:
        """Rows of the tokens `[first, stop)`, counted from `start`: `[stop - first, r]` float32."""
        return self._read(self._rows.all[first:stop])

    def keys_at(self, ids: Tensor) -> Tensor:
        """Keys of positions `[H, K]` after rotation, `[H, K, D]` float32: rebuilt, or exact; those of -1 are undefined.

        Raises `ValueError` for positions that are not covered.
        """
        if ids.ndim != 2 or len(ids) != self.shape.kv_heads:
            raise ValueError(f"ids are {list(ids.shape)}; expected [{self.shape.kv_heads}, K]")
        if not ids.numel():
            return torch.empty(*ids.shape, self.shape.head_dim)
        end = self.start + len(self)
        if bool(((ids >= end) | ((ids < self.start) & (ids != -1))).any()):
            raise ValueError(f"ids lie in {int(ids.min())}..{int(ids.max())}; expected {self.start}..{end - 1}, or -1")
        places = torch.where(ids < 0, 0, ids - self.start)
        rope, angles = self.shape.rope, {}
        if rope is not None:
            angles = dict(zip(("cos", "sin"), rope.cos_sin(places.flatten() + self.start), strict=True))
        basis, scale, bias = self.by_head().float(), None, None
        if self.columns is not None:
            scale, bias = self.columns[0], self.columns[1] @ basis
        rows = self._rows.all[places.flatten()]  # each its own, so that angles are made for these alone
        keys = rebuild_keys(
            rows,
            basis,
            torch.arange(len(rows)).view(ids.shape),
            scale=scale,
            bias=bias,
            interleaved=rope is not None and rope.interleaved,
            **angles,
        )
        exact_at = self._exact_at.all
        if len(exact_at):
            slots = torch.searchsorted(exact_at, places).clamp(max=len(exact_at) - 1)
            exact = self._exact.all.gather(1, slots[..., None].expand_as(keys)).float()
            keys = torch.where((exact_at[slots] == places)[..., None], exact, keys)
        return keys

    def by_head(self) -> Tensor:
        """The basis of each head's keys, `[H, r, D]`."""
        return self.basis.view(self.shape.kv_heads, self.shape.head_dim, -1).mT

    def state(self) -> dict[str, Tensor]:
        """All tensors; see `from_state`."""
        columns = torch.empty(2, 0) if self.columns is None else self.columns
        parts = (self.basis, columns, self._rows.all, self._exact_at.all, self.exact_keys)
        return dict(zip(_PARTS, parts, strict=True))

    @classmethod
    def from_state(
        cls, shape: LayerShape, parts: Mapping[str, Tensor], *, start: int = 0, max_residual: float = 0.5
    ) -> KeyFactor:
        """The factor that gave `state`. Raises `CodecError` for other tensors."""
        missing = [name for name in _PARTS if name not in parts]
        if missing:
            raise CodecError(f"{', '.join(missing)} of a key factor are missing; expected {', '.join(_PARTS)}")
        basis, columns, rows, exact_at, exact = tensors = [parts[name] for name in _PARTS]
        if [part.ndim for part in tensors] != [2, 2, 2, 1, 3] or any(part.is_complex() for part in tensors):
            raise CodecError(f"key factor has parts {[list(part.shape) for part in tensors]}; expected others")
        rank, tokens, exact_tokens = basis.shape[1], rows.shape[0], exact_at.shape[0]
        kinds = {torch.float16: (16, rank), torch.int8: (8, rank), torch.uint8: (4, packed_bytes(rank, 4))}
        bits, width = kinds.get(rows.dtype, (0, 0))
        try:
            found = cls(
                shape,
                basis,
                columns if columns.numel() else None,
                start=start,
                row_bits=bits,
                max_residual=max_residual,
            )
        except ValueError as exc:
            raise CodecError(f"key factor: {exc}") from exc
        fits = (
            (basis.dtype, columns.dtype, exact.is_floating_point()) == (torch.float16, torch.float32, True)
            and rows.shape[1] == width
            and exact_at.dtype == torch.int64
            and exact.shape == (shape.kv_heads, exact_tokens, shape.head_dim)
            and bool((exact_at.diff() > 0).all())
            and (not exact_tokens or 0 <= int(exact_at[0]) <= int(exact_at[-1]) < tokens)
            and all(bool(part.isfinite().all()) for part in tensors)
        )
        if not fits:
            raise CodecError("key factor contradicts itself; index these tokens anew")
        found._rows.add(rows)
        found._exact_at.add(exact_at)
        if len(exact_at):
            found._exact.add(exact)
        return found

    def _take(self, keys: Tensor, plain: Tensor) -> None:
        basis = self.basis.float()
        rows = self._write(plain @ basis)
        errors, norms = (self._read(rows) @ basis.T - plain).norm(dim=1), plain.norm(dim=1)
        exact = ~(errors <= self.max_residual * norms)  # a row that float16 cannot hold makes NaN, which compares false
        if bool(exact.any()):
            self._exact_at.add(exact.nonzero().flatten() + len(self))
            self._exact.add(keys[:, exact])
            rows[exact] = 0
            errors = errors[~exact]
        self._norms += torch.stack([errors.double().square().sum(), norms.double().square().sum()])
        self._rows.add(rows)

    def _write(self, rows: Tensor) -> Tensor:
        if self.columns is None:
            return rows.half()
        scale, centre = self.columns
        half = 1 << (self.row_bits - 1)
        codes = ((rows - centre) / scale).round().clamp(-half, half - 1)
        return codes.to(torch.int8) if self.row_bits == 8 else pack_bits((codes + half).to(torch.uint8), 4)

    def _read(self, stored: Tensor) -> Tensor:
        numbers = numbers_of(stored, self.rank)
        return numbers if self.columns is None else numbers * self.columns[0] + self.columns[1]


def _unrotated(shape: LayerShape, keys: Tensor, positions: Tensor) -> Tensor:
    """`[H, T, D]` after rotation as `[T, M]` float32 before it."""
    wide = keys.float()
    if shape.rope is not None:
        wide = shape.rope.shift(wide, -positions)
    return wide.transpose(0, 1).flatten(1)


def _fit_columns(sample: Tensor, basis: Tensor, bits: int, max_residual: float) -> Tensor:
    """Scale and centre of each column's codes, `[2, r]`: the range around the mean with the least squared error.

    Over the full range of 100,000 tokens, a few of them would set the step for all. Tokens that are kept exact do not
    count.
    """
    rows = sample @ basis
    served = (rows @ basis.T - sample).norm(dim=1) <= max_residual * sample.norm(dim=1)
    rows = rows[served] if bool(served.any()) else rows
    mean, steps = rows.mean(0), (1 << bits) - 1
    centred = rows - mean
    reach = centred.abs().amax(0).clamp(min=1e-12)
    best, least = reach, torch.full_like(reach, torch.inf)
    for clip in _CLIPS:
        covered = clip * reach
        scale = 2 * covered / steps
        read = ((centred + covered) / scale).round().clamp(0, steps) * scale - covered
        error = (read - centred).square().sum(0)
        best, least = torch.where(error < least, covered, best), torch.minimum(error, least)
    scale = 2 * best / steps
    return torch.stack([scale, mean + scale / 2])  # there is one code more below the centre than above it
