"""Capability of a codec whose values can be joined with another codec's keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from ..core import KVSpec


@runtime_checkable
class EncodesValues(Protocol):
    """Optional capability of a codec: it encodes values alone, for instance `nuq` values beside `lowrank` keys.

    The names of its tensors begin with `values`; all of them are layered.
    """

    @property
    def value_names(self) -> frozenset[str]:
        """Names of the tensors that `encode_values` makes."""
        ...

    def encode_values(self, spec: KVSpec, values: Tensor, first_layer: int) -> dict[str, Tensor]:
        """Encodes `[L, H, T, Dv]` on any device as contiguous tensors on the cpu that share no memory with it."""
        ...

    def decode_values(
        self, spec: KVSpec, tensors: Mapping[str, Tensor], first_layer: int, tokens: int, parameters: Mapping[str, Any]
    ) -> Tensor:
        """Decodes to `[L, H, T, Dv]` in the spec's dtype; `parameters` are those of the codec that encoded the chunk.

        Raises `CodecError` if the tensors are not what `encode_values` makes.
        """
        ...
