"""Rotary positions in codecs: keys are rotated back to position 0 for encoding, and to their positions by decoding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core import KVSpec, RopeSpec
from .envelope import Envelope


def unrotated(spec: KVSpec, keys: Tensor, positions: Tensor) -> Tensor:
    """Keys `[..., T, D]` of tokens at `positions` (`[T]`), as they were before rotation, in float32."""
    keys = keys.detach().float()
    return keys if spec.rope is None else spec.rope.shift(keys, -positions)


@dataclass(frozen=True, slots=True)
class KeyRotation:
    """How far the keys of a chunk are rotated while they are decoded.

    Attributes
    ----------
    coded : `[T]` int64, positions by which keys from codes are rotated.
    exact : `[T]` int64, positions by which keys that were kept exact are rotated.
    """

    rope: RopeSpec
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
        return cls(envelope.spec.rope, offsets if rotated else placed, offsets)

    def cos_sin(self, tokens: int, device: torch.device) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """`RopeSpec.cos_sin` for the codes of the first `tokens` tokens; None if these need no rotation."""
        coded = self.coded[:tokens]
        return self.rope.cos_sin(coded.to(device)) if bool(coded.any()) else (None, None)
