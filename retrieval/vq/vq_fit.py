"""Codebooks of keys before rotation, fitted to the error of scores, not of keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...core import RopeSpec, rotate_pairs
from ...errors import CodecError

if TYPE_CHECKING:
    from ...calibration.layer_sample import LayerSample

CENTROIDS = 4096  # A2ATS: codes of 12 bits
NEAREST_BAND_TOKENS = 64  # width of the first band of distances, which a window of A2ATS's size covers anyway
BANDS_PER_DOUBLING = 3  # of the distance; each is a table of scores for every query, but reads nothing more
LONGEST_TOKENS = 1 << 17  # of a context; what lies farther back falls into the last band
RIDGE = 1e-2  # share of the mean eigenvalue that directions without queries count
MAX_CENTROIDS = 1 << 16

_KEYS_A_CENTROID = 8  # at least; with fewer a codebook learns the sample by heart
_ITERATIONS = 25
_PIECE_TOKENS = 1024  # whose distances to all centroids are in memory at once


def distance_bands(
    longest_tokens: int = LONGEST_TOKENS, *, per_doubling: int = BANDS_PER_DOUBLING
) -> list[tuple[int, int]]:
    """Bands `[low, high)` of distances in tokens that grow geometrically, up to a context's length or beyond."""
    bands, steps = [(0, NEAREST_BAND_TOKENS)], 0
    while bands[-1][1] < longest_tokens:
        steps += 1
        bands.append((bands[-1][1], round(NEAREST_BAND_TOKENS * 2 ** (steps / per_doubling))))
    return bands


def fit_layer(
    sample: LayerSample,
    *,
    centroids: int = CENTROIDS,
    bands: Sequence[tuple[int, int]] | None = None,
    query_aware: bool = True,
    ridge: float = RIDGE,
    seed: int = 0,
) -> dict[str, Tensor]:
    """The tensors that `VqIndex` needs for one layer, by name, without the layer dimension.

    A2ATS (arXiv 2502.12665, section 3; sizes from its released code): one codebook for each KV head over whole keys
    before rotation. The score of a far key is `q R_b k^T` with a constant b, so its mean squared error over queries is
    `(k - c) H (k - c)^T`, H the second moment of `q R_b` pooled over the group: k-means on `k T` with `H = T T^T`.

    Deviations: bands of distances instead of one constant, and the mean rotation of each instead of one in it, which
    damps the channels that rotate within the band; one constant b is the single band `(b, b + 1)`. T is kept in float64
    until the keys are transformed, and regularised by a share of its trace, not by an absolute number. Centroids are
    means of keys as they are, so that nothing is ever multiplied by the inverse of T.

    Parameters
    ----------
    centroids : at most; halved until a centroid has at least 8 keys of the sample.
    bands : of distances in tokens, see `mean_rotations`; None for `distance_bands`.
    query_aware : otherwise H is the identity: plain k-means.
    ridge : share of the mean eigenvalue of H that is added to all of them.

    Returns
    -------
    `vq.centroids` `[H, C, D]` float16, `vq.factor` `[H, D, D]` float32 (T), `vq.bands` `[B, 2]` int64.

    Raises
    ------
    ValueError : a number is out of range.
    CodecError : the sample is empty, its keys or queries are not finite, or too large for float16.
    """
    if not 1 <= centroids <= MAX_CENTROIDS:
        raise ValueError(f"{centroids} centroids; expected 1 to {MAX_CENTROIDS}")
    bands = distance_bands() if bands is None else bands
    check_bands(bands)
    keys = torch.cat((sample.keys, sample.further_keys)).transpose(0, 1)
    while centroids > 1 and centroids * _KEYS_A_CENTROID > keys.shape[1]:
        centroids //= 2
    rope, found = sample.spec.rope_of(sample.layer), []
    for of_head, moment in zip(keys, sample.query_moments, strict=True):
        far = moment if rope is None else banded_moment(moment, rope, bands)
        found.append(fit_codebook(of_head, far if query_aware else None, centroids=centroids, ridge=ridge, seed=seed))
    books, factors = (torch.stack(parts) for parts in zip(*found, strict=True))
    half = books.half()
    if not bool(half.isfinite().all()):
        raise CodecError(f"centroids reach {float(books.abs().max()):.3g}; float16 ends at 65504")
    return {"vq.centroids": half, "vq.factor": factors, "vq.bands": torch.tensor(bands)}


def fit_codebook(
    keys: Tensor,
    moment: Tensor | None,
    *,
    centroids: int,
    ridge: float = RIDGE,
    iterations: int = _ITERATIONS,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Centroids `[C, D]` and the factor T `[D, D]` of the metric, both float32, of the keys of one head.

    Parameters
    ----------
    keys : `[N, D]` float32.
    moment : `[D, D]`, second moment of the queries that will meet these keys; None for plain k-means.
    centroids : C; more than N become N, each key its own.
    """
    import faiss

    if keys.ndim != 2 or not len(keys) or not bool(keys.isfinite().all()):
        raise CodecError(f"keys are {list(keys.shape)}; expected [N, D] with N > 0, all of them finite")
    factor = torch.eye(keys.shape[1]) if moment is None else metric_factor(moment, ridge=ridge).float()
    if centroids >= len(keys):
        return keys.float().clone(), factor
    points = keys.float() @ factor
    means = faiss.Kmeans(
        keys.shape[1],
        centroids,
        niter=iterations,
        seed=seed,
        min_points_per_centroid=1,
        max_points_per_centroid=len(keys),
    )
    means.train(points.numpy())
    codes = nearest(points, torch.from_numpy(means.centroids))
    # Centroids are means of keys, so no inverse of T is needed; one without keys is placed on another one
    counts = torch.bincount(codes, minlength=centroids)
    books = torch.zeros(centroids, keys.shape[1], dtype=torch.float64).index_add_(0, codes, keys.double())
    books /= counts.clamp(min=1)[:, None]
    books[counts == 0] = books[counts.argmax()].clone()
    return books.float(), factor


def nearest(points: Tensor, centroids: Tensor) -> Tensor:
    """`[N, D]`, `[C, D]` float32 -> the nearest centroid of each point, the first of equal ones: `[N]` int64."""
    halves = centroids.square().sum(1) / 2
    pieces = [(piece @ centroids.T - halves).argmax(1) for piece in points.split(_PIECE_TOKENS)]
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64)


def metric_factor(moment: Tensor, *, ridge: float = RIDGE) -> Tensor:
    """Lower triangular T `[D, D]` float64 with `T T^T = H / m + ridge`, H the moment and m its mean eigenvalue.

    Raises
    ------
    CodecError : the moment is not finite, or all zero.
    """
    wide = moment.double()
    mean = wide.diagonal().mean()
    if not bool(wide.isfinite().all()) or not float(mean) > 0:
        raise CodecError("the second moment of the queries is zero or not finite; leave such tokens out")
    normed = (wide + wide.T) / (2 * mean)
    factor: Tensor = torch.linalg.cholesky(normed + ridge * torch.eye(len(wide), dtype=torch.float64))
    return factor


def banded_moment(moment: Tensor, rope: RopeSpec, bands: Sequence[tuple[int, int]]) -> Tensor:
    """Second moment `[D, D]` float64 of queries rotated for each band, mean over bands; `moment` is before rotation."""
    rotated = rotate_pairs(
        torch.eye(len(moment))[:, None].expand(-1, len(bands), -1), *mean_rotations(rope, bands), rope.interleaved
    )
    by_band = rotated.double().transpose(0, 1)
    return (by_band.mT @ moment.double() @ by_band).mean(0)


def mean_rotations(rope: RopeSpec, bands: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """The mean rotation over the distances of each band: cosines and sines `[B, D / 2]` float32, for `rotate_pairs`.

    The mean of `exp(i f o)` for n distances o around their middle m is `exp(i f m) sin(n f / 2) / (n sin(f / 2))`: the
    rotation by the middle, damped the more the further a pair rotates within the band.
    """
    low, high = torch.tensor(bands, dtype=torch.float64).unbind(1)
    frequencies, count = torch.tensor(rope.inv_freq, dtype=torch.float64), (high - low)[:, None]
    middle = ((low + high - 1) / 2)[:, None] * frequencies
    step = (frequencies / 2).sin()
    left = torch.where(step == 0, 1.0, (count * frequencies / 2).sin() / (count * step))
    return (left * middle.cos()).float(), (left * middle.sin()).float()


def check_bands(bands: Sequence[tuple[int, int]]) -> None:
    """Raises `ValueError` for bands that are empty, or do not follow one another."""
    previous = 0
    for low, high in bands:
        if not previous <= low < high:
            raise ValueError(f"bands are {list(bands)}; expected distances [low, high) that ascend and do not overlap")
        previous = high
    if not bands:
        raise ValueError("bands is empty; expected at least one")
