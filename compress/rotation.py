"""Rotary positions in codecs: keys are rotated back to position 0 for encoding, and to their positions by decoding."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core import KVSpec, LayerRopes, RopeSpec
from .envelope import Envelope


def unrotated(spec: KVSpec, keys: Tensor, positions: Tensor, first_layer: int) -> Tensor:
    """Keys `[L, ..., T, D]` of layers from `first_layer` on, of tokens at `positions` (`[T]`), as they were before
    rotation, in float32.
    """
    return spec.shift(keys.detach().float(), -positions, first_layer)


def layer_unrotated(spec: KVSpec, layer: int, keys: Tensor, positions: Tensor) -> Tensor:
    """The same of one layer, `[..., T, D]`."""
    return unrotated(spec, keys[None], positions, layer)[0]


@dataclass(frozen=True, slots=True)
class KeyRotation:
    """How far the keys of a chunk are rotated while they are decoded.

    Attributes
    ----------
    first_layer : of the chunk, or of the part of it that is rotated.
    coded : `[T]` int64, positions by which keys from codes are rotated.
    exact : `[T]` int64, positions by which keys that were kept exact are rotated.
    """

    spec: KVSpec
    first_layer: int
    coded: Tensor
    exact: Tensor

    @classmethod
    def to(cls, placed: Tensor, envelope: Envelope, *, rotated: bool = False) -> KeyRotation | None:
        """The rotation that moves a chunk's keys to `placed` (`[T]` int64); None if the model has no rotary positions.

        Parameters
        ----------
        rotated : keys were coded after rotation.
        """
        if envelope.spec.rope is None:
            return None
        offsets = placed - envelope.positions
        return cls(envelope.spec, envelope.first_layer, offsets if rotated else placed, offsets)

    @property
    def plain(self) -> RopeSpec | None:
        """The one rotation of all layers and channels, which kernels can apply; None if there are several, or some
        channels pass.
        """
        rope = self.spec.rope
        return rope if isinstance(rope, RopeSpec) and not rope.passed_channels else None

    def fits(self, head_dim: int) -> bool:
        """Whether keys of so many channels can be rotated so."""
        rope = self.spec.rope
        ropes = set(rope.layers) if isinstance(rope, LayerRopes) else {rope}
        return all(each is None or each.head_dim == head_dim for each in ropes)

    def from_layer(self, place: int) -> KeyRotation:
        """The rotation of the chunk's layers from `place` on."""
        return replace(self, first_layer=self.first_layer + place)

    def cos_sin(self, tokens: int, device: torch.device) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """`RopeSpec.cos_sin` of the plain rotation for the codes of the first `tokens` tokens; None if there is none,
        or these need no rotation.
        """
        coded, rope = self.coded[:tokens], self.plain
        return rope.cos_sin(coded.to(device)) if rope is not None and bool(coded.any()) else (None, None)

    def turn(self, keys: Tensor, dtype: torch.dtype) -> Tensor:
        """Keys from codes `[L, H, T, D]`, float32, rotated and rounded; for rotations that are not `plain`."""
        return self.spec.shift(keys, self.coded[: keys.shape[2]], self.first_layer).to(dtype)
