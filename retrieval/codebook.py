"""Codebooks of one layer: keys to codes, queries to tables of scores; and codes packed to 12 or 16 bits."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..compress.profile import Profile
from ..compress.vq_fit import MAX_CENTROIDS, nearest
from ..core import KVSpec
from ..errors import SpecMismatchError

_SHORT_CENTROIDS = 1 << 12  # up to here two codes take three bytes


@dataclass(frozen=True)
class Codebook:
    """Centroids of one layer's keys, one set for each KV head, and the metric in which keys choose among them.

    Attributes
    ----------
    centroids : `[H, C, D]` float32, in the coordinates of keys.
    factor : `[H, D, D]` float32, T of the metric: the squared distance of k and c is `|k T - c T|^2`.
    far_offset : b of A2ATS: keys are taken before rotation, and queries as if all keys stood b tokens back. None: keys
        and queries are taken as they are, after rotation; this exists for comparison.
    """

    centroids: Tensor
    factor: Tensor
    far_offset: int | None

    def __post_init__(self) -> None:
        heads, count, dim = self.centroids.shape if self.centroids.ndim == 3 else (0, 0, 0)
        if not 1 <= count <= MAX_CENTROIDS or self.factor.shape != (heads, dim, dim):
            raise SpecMismatchError(
                f"centroids are {list(self.centroids.shape)} and the factor {list(self.factor.shape)}; expected "
                f"[H, C, D] and [H, D, D] with 1 to {MAX_CENTROIDS} centroids"
            )

    @classmethod
    def of_layer(cls, profile: Profile, layer: int, *, spec: KVSpec | None = None) -> Codebook:
        """As `kvloom calibrate` found it.

        Parameters
        ----------
        spec : of the keys it is to serve, if they might be another model's.

        Raises
        ------
        CodecError : the profile has no codebooks.
        SpecMismatchError : it is of another model than `spec`.
        """
        if spec is not None:
            profile.check_serves(spec)
        offset = int(profile["vq.offset"][layer])
        return cls(profile["vq.centroids"][layer].float(), profile["vq.factor"][layer].float(), offset)

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
        """16 bytes, uint8, that stand for every number: codes mean nothing with another codebook."""
        digest = hashlib.blake2b(f"kvloom Codebook 1 {self.far_offset}\0".encode(), digest_size=16)
        for tensor in (self.centroids, self.factor):
            digest.update(f"{list(tensor.shape)}\0".encode())
            digest.update(tensor.contiguous().cpu().numpy().tobytes())
        return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)

    def codes(self, keys: Tensor) -> Tensor:
        """The nearest centroids `[H, T]` int64 of keys `[H, T, D]`, before rotation unless `far_offset` is None."""
        points = keys.float() @ self.factor
        return torch.stack([nearest(p, c) for p, c in zip(points, self._transformed, strict=True)])

    def table(self, queries: Tensor) -> Tensor:
        """Inner products `[Hq, C]` of queries `[Hq, D]`, turned by `far_offset`, with the centroids of their group."""
        heads, _, dim = self.centroids.shape
        return (queries.float().view(heads, -1, dim) @ self.centroids.mT).flatten(0, 1)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes `[H, T]` as `[H, bytes]` uint8: little-endian 16 bits each, or two of 12 bits in three bytes.

    Codes a and b are the bytes `a & 255`, `a >> 8 | (b & 15) << 4`, `b >> 4`; the last of an odd number takes two
    bytes.
    """
    if bits == 16:
        return torch.stack((codes & 255, codes >> 8), dim=-1).to(torch.uint8).flatten(1)
    tokens = codes.shape[1]
    even = torch.nn.functional.pad(codes, (0, tokens % 2)).unflatten(1, (-1, 2))
    a, b = even.unbind(-1)
    packed = torch.stack((a & 255, a >> 8 | (b & 15) << 4, b >> 4), dim=-1).to(torch.uint8).flatten(1)
    return packed[:, : packed_bytes(tokens, bits)]


def unpack(packed: Tensor, tokens: int, bits: int) -> Tensor:
    """The first `tokens` codes `[H, tokens]` int64 of what `pack` made, or of the beginning of it."""
    wide = packed[:, : packed_bytes(tokens, bits)].long()
    if bits == 16:
        return wide[:, 0::2] | wide[:, 1::2] << 8
    triples = torch.nn.functional.pad(wide, (0, tokens % 2)).unflatten(1, (-1, 3))
    first, middle, last = triples.unbind(-1)
    return torch.stack((first | (middle & 15) << 8, middle >> 4 | last << 4), dim=-1).flatten(1)[:, :tokens]


def packed_bytes(tokens: int, bits: int) -> int:
    """Bytes that so many codes take."""
    return (tokens * bits + 7) // 8
