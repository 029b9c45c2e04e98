"""The codec that changes nothing: keys and values as they are, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core import EncodedChunk, KVChunk, KVSpec
from ..errors import CodecError, SpecMismatchError

_LAYERED = frozenset({"keys", "values"})
_NAMES = _LAYERED | {"token_ids", "positions"}


@dataclass(frozen=True)
class RawCodec:
    """Lossless and bit-exact; the reference that every other codec is measured against."""

    name: ClassVar[str] = "raw"

    def encode(self, chunk: KVChunk) -> EncodedChunk:
        """Contiguous cpu copies of the chunk's tensors."""
        tensors = {
            "keys": _cpu_copy(chunk.keys),
            "values": _cpu_copy(chunk.values),
            "token_ids": _cpu_copy(chunk.token_ids),
            "positions": _cpu_copy(chunk.positions),
        }
        meta = {"spec": chunk.spec.to_json(), "first_layer": str(chunk.first_layer)}
        return EncodedChunk(self.name, tensors, meta, _LAYERED)

    def decode(self, blob: EncodedChunk, positions: Tensor | None = None) -> KVChunk:
        """The chunk, at `positions` if they are given; shares memory with `blob` where nothing had to move.

        Parameters
        ----------
        positions : `[T]` int64; keys are rotated once, by the difference to where they were computed. Keys of a model
            without rotary positions stay as they are.

        Raises
        ------
        CodecError : `blob` was not made by this codec, or its parts contradict one another.
        SpecMismatchError : `positions` are not one int64 for each token.
        """
        spec, first_layer = self._read_meta(blob)
        try:
            chunk = KVChunk(spec, **_tensors(blob.tensors), first_layer=first_layer)
        except SpecMismatchError as exc:
            raise CodecError(f"raw chunk contradicts its spec: {exc}") from exc
        if positions is None:
            return chunk
        if positions.shape != chunk.positions.shape or positions.dtype != torch.int64:
            raise SpecMismatchError(
                f"positions are {positions.dtype} {list(positions.shape)}; expected torch.int64 [{len(chunk)}]"
            )
        positions = positions.cpu()
        keys = chunk.keys if spec.rope is None else spec.rope.shift(chunk.keys, positions - chunk.positions)
        return KVChunk(spec, chunk.token_ids, positions, keys, chunk.values, first_layer)

    def _read_meta(self, blob: EncodedChunk) -> tuple[KVSpec, int]:
        if blob.codec != self.name:
            raise CodecError(f"chunk was encoded by {blob.codec!r}, this is the codec {self.name!r}")
        try:
            return KVSpec.from_json(blob.meta["spec"]), int(blob.meta["first_layer"])
        except (LookupError, TypeError, ValueError, AttributeError) as exc:
            raise CodecError(f"raw chunk without a readable spec and first layer: {exc!r}") from exc


def _tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if tensors.keys() != _NAMES:
        raise CodecError(f"raw chunk holds {sorted(tensors)}; expected {sorted(_NAMES)}")
    return dict(tensors)


def _cpu_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
