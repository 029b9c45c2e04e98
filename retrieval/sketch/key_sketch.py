"""Sketches of keys: their coordinates in the few directions that queries read, sorted by code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...core import rotate_pairs
from ...errors import CodecError
from ..growable import GrowableTensor
from ..kernels.code_ops import code_importance
from ..kernels.ops import TILE_TOKENS, landmark_scores, tile_scores, tiled, untiled
from ..selector import LayerShape, Pooling
from ..vq.vq_fit import MAX_CENTROIDS, banded_moment, fit_codebook, mean_rotations, metric_factor, nearest

SAMPLE_KEYS = 1 << 15  # that bases and codebooks are fitted on
NEAREST_TOKENS = 64  # what is nearer is in the caller's window

_KEYS_A_CENTROID = 8  # at least; with fewer a codebook learns the sample by heart
_ITERATIONS = 8
_PIECE_TOKENS = 1 << 15
_TAIL_RATIO = 1 / 16  # of the sorted rows, from which on the tail is sorted in: 17 moves a token on average
_HALF = 65504.0
_PARTS = ("mean", "keys", "queries", "centroids", "counts", "rows", "tokens", "tail", "band")


class TokenRanges(NamedTuple):
    """Ranges of sorted rows `[first, first + count)`, R for each head; both `[H, R]` int64."""

    firsts: Tensor
    counts: Tensor


class KeySketch:
    """Keys of one layer before rotation, in r directions of each KV head, with a codebook over them.

    Let M be the second moment of queries after their mean rotation over the distances in `band`, `M = T T^T`, and U the
    r strongest directions of the covariance of `k T`. A key is stored as `(k - mean) T U`, and a query is compared as
    `q T^-T U`. Of all pairs of r numbers these lose the least of the scores' variance. The distance between two rows is
    the error of scores if one replaces the other, so plain k-means of rows gives a query-aware codebook (A2ATS, arXiv
    2502.12665, section 3).

    Rows are sorted by code, so that the candidates of a code are read as one range. Rows added later are kept unsorted
    in a tail, which is always scored as a whole, until it is a sixteenth of the sorted rows.

    Parameters
    ----------
    mean, keys, queries : `[H, D]`, `[H, D, r]`, `[H, D, r]` float32: mean key, and directions of keys and queries.
    centroids : `[H, C, r]` float16.
    band : distances `[low, high)` in tokens, over which the rotation of queries is averaged.
    start : position of the first token.
    """

    def __init__(
        self,
        shape: LayerShape,
        mean: Tensor,
        keys: Tensor,
        queries: Tensor,
        centroids: Tensor,
        band: tuple[int, int],
        *,
        start: int,
    ) -> None:
        self.shape, self.start, self.band = shape, start, band
        self.mean, self.keys, self.queries, self.centroids = mean, keys, queries, centroids
        self._mean_rotation = None if shape.rope is None else mean_rotations(shape.rope, [band])
        heads, _, self.rank = keys.shape
        self._counts = torch.zeros(heads, centroids.shape[1], dtype=torch.int64)
        self._tiles = torch.empty(heads, 0, self.rank, TILE_TOKENS, dtype=torch.float16)  # the sorted rows
        self._tokens = torch.empty(heads, 0, dtype=torch.int32)  # of each row, counted from `start`
        self._tail = GrowableTensor(1)
        self._tail.add(torch.empty(heads, 0, self.rank, dtype=torch.float16))

    @classmethod
    def fit(
        cls,
        shape: LayerShape,
        keys: Tensor,
        moments: Tensor | None,
        *,
        start: int,
        rank: int,
        centroids: int,
        band: tuple[int, int],
    ) -> KeySketch:
        """Fits directions and centroids to a sample of keys `[H, T, D]` after rotation, T > 0, and adds all keys.

        Parameters
        ----------
        moments : `[H, D, D]`, second moments of queries before rotation, pooled over groups; None for the keys' own.
        rank, centroids : at most; there are no more directions than channels, and at least 8 sampled keys a centroid.
        """
        tokens = keys.shape[1]
        random = torch.Generator().manual_seed(0)
        sample = torch.randperm(tokens, generator=random)[:SAMPLE_KEYS].sort().values
        while centroids > 1 and centroids * _KEYS_A_CENTROID > len(sample):
            centroids //= 2
        means, bases, books = [], [], []
        for h in range(shape.kv_heads):
            plain = _unrotated(shape, keys[h, sample], start + sample)
            mean = plain.mean(0)
            plain -= mean
            spread = plain.double().T @ plain.double() / len(plain)
            pair = _directions(shape, None if moments is None else moments[h], spread, min(rank, len(spread)), band)
            means.append(mean)
            bases.append(pair)
            books.append(
                fit_codebook(plain @ pair[0], None, centroids=centroids, iterations=_ITERATIONS)[0].clamp(-_HALF, _HALF)
            )
        of_keys, of_queries = (torch.stack(parts) for parts in zip(*bases, strict=True))
        found = cls(shape, torch.stack(means), of_keys, of_queries, torch.stack(books).half(), band, start=start)
        found.add(keys)
        found._sort()
        return found

    def __len__(self) -> int:
        return self.sorted_tokens + len(self._tail)

    @property
    def sorted_tokens(self) -> int:
        return self._tokens.shape[1]

    @property
    def held_bytes(self) -> int:
        bases = self.mean.nbytes + self.keys.nbytes + self.queries.nbytes + self.centroids.nbytes
        return bases + self._counts.nbytes + self._tiles.nbytes + self._tokens.nbytes + self._tail.nbytes

    def add(self, keys: Tensor) -> None:
        """Adds the next tokens' keys `[H, T, D]` after rotation; coordinates are clipped to the range of float16."""
        for piece in keys.split(_PIECE_TOKENS, 1):
            at = self.start + len(self) + torch.arange(piece.shape[1])
            rows = (_unrotated(self.shape, piece, at) - self.mean[:, None]) @ self.keys
            self._tail.add(rows.clamp_(-_HALF, _HALF).half())
        if self.sorted_tokens and len(self._tail) > _TAIL_RATIO * self.sorted_tokens:
            self._sort()

    def search(
        self, queries: Tensor, position: int, candidates: int, pooling: Pooling
    ) -> tuple[Tensor, TokenRanges, int]:
        """Scores of the `candidates` sorted tokens whose codes matter most to each KV head, and of all of the tail.

        Parameters
        ----------
        queries : `[Hq, D]` after rotation at `position`.

        Returns
        -------
        Scaled scores `[Hq, K + tail]` float32, the rows of the first K for `tokens_of`, and bytes read.
        """
        small, shift = self.coordinates(queries, position)
        scale, count = self.shape.scale, min(candidates, self.sorted_tokens)
        read = 2 * self.keys.nbytes + self.centroids.nbytes + self._counts.nbytes + self._tail.nbytes
        if count < self.sorted_tokens:
            table = landmark_scores(small, self.centroids, scale=scale)
            rows = self._latest_rows(code_importance(table, self._counts, pooling=pooling), count)
        else:
            rows = TokenRanges(
                torch.zeros(len(self.keys), 1, dtype=torch.int64), torch.full((len(self.keys), 1), count)
            )
        scores = tile_scores(small, self._tiles, rows.firsts, rows.counts, scale=scale)
        if len(self._tail):
            scores = torch.cat((scores, landmark_scores(small, self._tail.all, scale=scale)), 1)
        return scores.add_(shift[:, None] * scale), rows, read + len(self.keys) * count * 2 * self.rank

    def tokens_of(self, columns: Tensor, rows: TokenRanges) -> Tensor:
        """Tokens, counted from `start`, of columns `[H, K]` of the scores that `search` gave with these `rows`.

        Columns beyond those of the tail stand for the tokens behind it.
        """
        ends = rows.counts.cumsum(1)
        count = int(ends[0, -1])
        behind = columns - count + self.sorted_tokens
        if not count:
            return behind
        inside = columns.clamp(max=count - 1)
        number = torch.searchsorted(ends, inside, right=True)
        row = inside + (rows.firsts + rows.counts - ends).gather(1, number)
        found = self._tokens.gather(1, row)
        return torch.where(columns < count, found.long(), behind)

    def state(self) -> dict[str, Tensor]:
        """All tensors; see `from_state`."""
        band = torch.tensor(self.band)
        parts = (
            self.mean, self.keys, self.queries, self.centroids, self._counts,
            untiled(self._tiles, self.sorted_tokens).contiguous(), self._tokens, self._tail.all, band,
        )  # fmt: skip
        return dict(zip(_PARTS, parts, strict=True))

    @classmethod
    def from_state(cls, shape: LayerShape, parts: Mapping[str, Tensor], *, start: int) -> KeySketch:
        """The sketch that gave `state`. Raises `CodecError` for other tensors."""
        missing = [name for name in _PARTS if name not in parts]
        if missing:
            raise CodecError(f"{', '.join(missing)} of a key sketch are missing; expected {', '.join(_PARTS)}")
        mean, keys, queries, centroids, counts, rows, tokens, tail, band = tensors = [parts[name] for name in _PARTS]
        if [t.ndim for t in tensors] != [2, 3, 3, 3, 2, 3, 2, 3, 1] or not all(
            bool(t.isfinite().all()) for t in tensors
        ):
            raise CodecError(f"key sketch has parts {[list(t.shape) for t in tensors]}, or is not finite")
        H, D, r, C, N = shape.kv_heads, shape.head_dim, keys.shape[2], centroids.shape[1], rows.shape[1]
        dtypes = [torch.float32] * 3 + [
            torch.float16,
            torch.int64,
            torch.float16,
            torch.int32,
            torch.float16,
            torch.int64,
        ]
        shapes = [(H, D), (H, D, r), (H, D, r), (H, C, r), (H, C), (H, N, r), (H, N), (H, tail.shape[1], r), (2,)]
        fits = [t.dtype for t in tensors] == dtypes and [tuple(t.shape) for t in tensors] == shapes
        if not fits or not 0 < r <= D or not 0 < C <= MAX_CENTROIDS or not 0 <= int(band[0]) < int(band[1]):
            raise CodecError("key sketch contradicts itself; index these tokens anew")
        whole = torch.arange(N, dtype=torch.int32).expand(H, -1)
        if (
            bool((counts < 0).any())
            or bool((counts.sum(1) != N).any())
            or not torch.equal(tokens.sort(1).values, whole)
        ):
            raise CodecError("key sketch does not hold each token once; index these tokens anew")
        found = cls(shape, mean, keys, queries, centroids, (int(band[0]), int(band[1])), start=start)
        found._counts, found._tiles, found._tokens = counts, tiled(rows), tokens
        found._tail.add(tail)
        return found

    def coordinates(self, queries: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """Coordinates `[Hq, r]` of queries, and their product with the mean key `[Hq]`, without the scale."""
        far, rope = queries.float(), self.shape.rope
        if rope is not None and self._mean_rotation is not None:
            plain = rope.shift(far[:, None], -position)
            far = rotate_pairs(plain, *self._mean_rotation, rope.interleaved)[:, 0]
        grouped = far.view(len(self.mean), -1, far.shape[1])
        return (grouped @ self.queries).flatten(0, 1), (grouped @ self.mean[..., None]).flatten()

    def _latest_rows(self, importance: Tensor, count: int) -> TokenRanges:
        """`count` rows for each head, of the most important codes; of the last code only the latest tokens."""
        # numpy sorts rows of a few thousand several times as fast; which of equal codes comes first does not matter
        sizes, order = self._counts, torch.from_numpy(np.argsort(-importance.numpy(), axis=1))
        stops = sizes.cumsum(1).gather(1, order)
        sizes = sizes.gather(1, order)
        before = sizes.cumsum(1) - sizes
        taken = torch.minimum((count - before).clamp_(min=0), sizes)
        codes = int((before < count).sum(1).max())  # that some head needs
        return TokenRanges((stops - taken)[:, :codes], taken[:, :codes])

    def _sort(self) -> None:
        """Sorts the tail into the rows by code; tokens of a code ascend."""
        heads, count, width = len(self.keys), self.centroids.shape[1], self.sorted_tokens
        tail, total = self._tail.all, len(self)
        tiles = torch.empty(heads, -(-total // TILE_TOKENS), self.rank, TILE_TOKENS, dtype=torch.float16)
        tokens = torch.empty(heads, total, dtype=torch.int32)
        new = torch.arange(width, total, dtype=torch.int32)
        for h in range(heads):
            held = torch.arange(count).repeat_interleave(self._counts[h])
            codes = torch.cat((held, nearest(tail[h].float(), self.centroids[h].float())))
            order = codes.argsort(stable=True)
            rows = torch.cat((untiled(self._tiles[h : h + 1], width)[0], tail[h]))
            tiles[h] = tiled(rows[order][None])[0]
            torch.index_select(torch.cat((self._tokens[h], new)), 0, order, out=tokens[h])
            self._counts[h] = torch.bincount(codes, minlength=count)
        self._tiles, self._tokens, self._tail = tiles, tokens, GrowableTensor(1)
        self._tail.add(tail[:, :0])


def _unrotated(shape: LayerShape, keys: Tensor, positions: Tensor) -> Tensor:
    return keys.float() if shape.rope is None else shape.rope.shift(keys.float(), -positions)


def _directions(
    shape: LayerShape, moment: Tensor | None, spread: Tensor, rank: int, band: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """`T U` and `T^-T U`, `[D, r]` float32, scaled so that the strongest coordinate has unit variance."""
    moment = spread if moment is None else moment
    far = moment.double() if shape.rope is None else banded_moment(moment, shape.rope, [band])
    if not float(far.trace()) > 0:  # all keys are alike, or all queries zero: no direction is better than another
        far = torch.eye(len(spread), dtype=torch.float64)
    factor = metric_factor(far)
    energies, vectors = torch.linalg.eigh(factor.T @ spread @ factor)
    size = energies[-1].clamp(min=0).sqrt().item() or 1.0
    strongest = vectors[:, -rank:]
    of_keys = factor @ strongest / size
    of_queries = torch.linalg.solve_triangular(factor.T, strongest, upper=True) * size
    return of_keys.float(), of_queries.float()
