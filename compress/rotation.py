"""Keys on their way into a codec and out of it: taken back to position 0, and turned to where they are asked for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core import KVSpec, RopeSpec
from .envelope import Envelope


def unrotated(spec: KVSpec, keys: Tensor, positions: Tensor) -> Tensor:
    """Keys `[..., T, D]` computed at `positions` (`[T]`) as they were before rotation, in float32."""
    keys = keys.detach().float()
    return keys if spec.rope is None else spec.rope.shift(keys, -positions)


@dataclass(frozen=True, slots=True)
class Turn:
    """How the keys of a chunk are rotated while they are decoded.

    Attributes
    ----------
    coded : `[T]` int64, positions by which those that were coded are turned.
    exact : `[T]` int64, positions by which those that were kept exact, as they came, are moved.
    """

    rope: RopeSpec
    coded: Tensor
    exact: Tensor

    @classmethod
    def to(cls, placed: Tensor, envelope: Envelope, *, rotated: bool = False) -> Turn | None:
        """To `placed`; None if keys have no rotary positions. `rotated`: they were coded after rotation."""
        if envelope.spec.rope is None:
            return None
        offsets = placed - envelope.positions
        return cls(envelope.spec.rope, offsets if rotated else placed, offsets)

    def cos_sin(self, tokens: int, device: torch.device) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """`RopeSpec.cos_sin` of the first tokens as they were coded; None if they stay as they are."""
        coded = self.coded[:tokens]
        return self.rope.cos_sin(coded.to(device)) if bool(coded.any()) else (None, None)
