"""Codebooks of one layer: codes of keys, and tables of scores for queries."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ...calibration.model_profile import Profile
from ...core import KVSpec, RopeSpec, rotate_pairs
from ...errors import SpecMismatchError
from .vq_fit import MAX_CENTROIDS, check_bands, mean_rotations, nearest

_SHORT_CENTROIDS = 1 << 12  # up to here two codes take three bytes


@dataclass(frozen=True)
class Codebook:
    """Centroids of one layer's keys, one set for each KV head, and the metric in which keys choose among them.

    Attributes
    ----------
    centroids : `[H, C, D]` float32, in the coordinates of keys.
    factor : `[H, D, D]` float32, T of the metric: the squared distance of k and c is `|k T - c T|^2`.
    bands : of distances in tokens, ascending. Keys are coded before rotation, and queries are rotated by the mean
        rotation of the band of a key's distance. A band reaches from its low end to that of the next one; nearer keys
        belong to the first, farther ones to the last. None codes keys after rotation, for comparison.
    """

    centroids: Tensor
    factor: Tensor
    bands: tuple[tuple[int, int], ...] | None

    def __post_init__(self) -> None:
        if self.bands is not None:
            check_bands(self.bands)
        heads, count, dim = self.centroids.shape if self.centroids.ndim == 3 else (0, 0, 0)
        if not 1 <= count <= MAX_CENTROIDS or self.factor.shape != (heads, dim, dim):
            raise SpecMismatchError(
                f"centroids are {list(self.centroids.shape)} and the factor {list(self.factor.shape)}; expected "
                f"[H, C, D] and [H, D, D] with 1 to {MAX_CENTROIDS} centroids"
            )

    @classmethod
    def from_profile(cls, profile: Profile, layer: int, *, spec: KVSpec | None = None) -> Codebook:
        """The codebook of a layer that `kvloom calibrate` made.

        Parameters
        ----------
        spec : of the keys, to check that they are of the same model.

        Raises
        ------
        CodecError : the profile has no codebooks.
        SpecMismatchError : it is of another model than `spec`.
        """
        if spec is not None:
            profile.check_serves(spec)
        bands = tuple((int(low), int(high)) for low, high in profile["vq.bands"][layer])
        return cls(profile["vq.centroids"][layer].float(), profile["vq.factor"][layer].float(), bands)

    def __len__(self) -> int:
        return self.centroids.shape[1]

    @property
    def code_bits(self) -> int:
        return 12 if len(self) <= _SHORT_CENTROIDS else 16

    @cached_property
    def _transformed(self) -> Tensor:
        return self.centroids @ self.factor

    @cached_property
    def fingerprint(self) -> Tensor:
        """16 bytes, uint8, that identify the codebook; codes are only valid with the codebook that made them."""
        digest = hashlib.blake2b(f"kvloom Codebook 1 {self.bands}\0".encode(), digest_size=16)
        for tensor in (self.centroids, self.factor):
            digest.update(f"{list(tensor.shape)}\0".encode())
            digest.update(tensor.contiguous().cpu().numpy().tobytes())
        return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)

    def codes(self, keys: Tensor) -> Tensor:
        """Codes (nearest centroids) `[H, T]` int64 of keys `[H, T, D]`, before rotation unless `bands` is None."""
        points = keys.float() @ self.factor
        return torch.stack([nearest(p, c) for p, c in zip(points, self._transformed, strict=True)])

    def tables(self, queries: Tensor, rope: RopeSpec | None, used: Sequence[int]) -> Tensor:
        """Inner products of queries, rotated for each of the bands `used`, with the centroids of their KV head.

        Parameters
        ----------
        queries : `[Hq, D]`, before rotation unless `bands` is None.
        rope : None if there is no rotation, and so no difference between bands.

        Returns
        -------
        Tensor : `[len(used), Hq, C]` float32.
        """
        heads, _, dim = self.centroids.shape
        rotated = queries.float()[:, None].expand(-1, len(used), -1)
        if rope is not None and self.bands is not None:
            cos, sin = mean_rotations(rope, [self.bands[band] for band in used])
            rotated = rotate_pairs(rotated, cos, sin, rope.interleaved)
        of_head = rotated.reshape(heads, -1, dim) @ self.centroids.mT
        return of_head.view(len(queries), len(used), -1).transpose(0, 1).contiguous()
