"""What a codec can do beyond `core.Codec`, and the store asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias, runtime_checkable

from torch import Tensor

from ..core import EncodedChunk, KVChunk

Allocator: TypeAlias = Callable[[int], Tensor]
"""Returns `[nbytes]` uint8 on the cpu, of any content, at a multiple of 64 bytes."""


@runtime_checkable
class DecodesInto(Protocol):
    """Optional capability of a codec: the caller gives the memory for what is decoded; it may have been used before.

    The first touch of fresh memory can take longer than all decoding.
    """

    def decode_into(self, blob: EncodedChunk, positions: Tensor | None, allocate: Allocator) -> KVChunk:
        """As `Codec.decode`."""
        ...
