"""The codec that changes nothing: keys and values as they are, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..core import EncodedChunk, KVChunk
from ..errors import CodecError, SpecMismatchError
from .envelope import cpu_copy, open_envelope, seal

_LAYERED = frozenset({"keys", "values"})


@dataclass(frozen=True)
class RawCodec:
    """Lossless and bit-exact; the reference that every other codec is measured against."""

    name: ClassVar[str] = "raw"
    is_lossless: ClassVar[bool] = True

    def encode(self, chunk: KVChunk) -> EncodedChunk:
        """The chunk's tensors themselves, leased, where they are contiguous on the cpu; otherwise copies that are."""
        tensors = {"keys": chunk.keys.detach(), "values": chunk.values.detach()}
        lent = all(t.device.type == "cpu" and t.is_contiguous() for t in tensors.values())
        if not lent:
            tensors = {name: cpu_copy(t) for name, t in tensors.items()}
        return seal(self, chunk, tensors, _LAYERED, leased=lent)

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
        envelope = open_envelope(blob, self.name, _LAYERED)
        spec, tensors = envelope.spec, blob.tensors
        try:
            chunk = KVChunk(
                spec,
                envelope.token_ids,
                envelope.positions,
                tensors["keys"],
                tensors["values"],
                first_layer=envelope.first_layer,
            )
        except SpecMismatchError as exc:
            raise CodecError(f"raw chunk contradicts its spec: {exc}") from exc
        if positions is None:
            return chunk
        positions = envelope.placed(positions)
        keys = chunk.keys if spec.rope is None else spec.rope.shift(chunk.keys, positions - chunk.positions)
        return KVChunk(spec, chunk.token_ids, positions, keys, chunk.values, chunk.first_layer)
