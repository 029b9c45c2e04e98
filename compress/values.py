"""The half of a codec that can be joined with another codec's keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from ..core import KVSpec


@runtime_checkable
class EncodesValues(Protocol):
    """Optional capability of a codec: its values stand alone (`lowrank` keys with `nuq` values).

    The names of its tensors begin with `values`; all of them are layered.
    """

    @property
    def value_names(self) -> frozenset[str]:
        """Names of the tensors that `encode_values` makes."""
        ...

    def encode_values(self, spec: KVSpec, values: Tensor, first_layer: int) -> dict[str, Tensor]:
        """`[L, H, T, Dv]` on any device -> tensors by name: contiguous, on the cpu, sharing no memory with `values`."""
        ...

    def decode_values(
        self, spec: KVSpec, tensors: Mapping[str, Tensor], first_layer: int, tokens: int, parameters: Mapping[str, Any]
    ) -> Tensor:
        """The values `[L, H, T, Dv]` in the spec's dtype; `parameters` are those that the chunk was encoded with.

        Raises `CodecError` if the tensors are not what `encode_values` makes.
        """
        ...
