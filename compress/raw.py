"""The codec that stores keys and values as they are, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..core import EncodedChunk, KVChunk, KVSpec
from ..errors import CodecError, SpecMismatchError
from .envelope import checked_positions, cpu_copy, read_meta, seal

_LAYERED = frozenset({"keys", "values"})


@dataclass(frozen=True)
class RawCodec:
    """Lossless and bit-exact; the reference that every other codec is measured against."""

    name: ClassVar[str] = "raw"
    is_lossless: ClassVar[bool] = True
    value_names: ClassVar[frozenset[str]] = frozenset({"values"})

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
        spec, first_layer, _ = read_meta(blob, self.name, _LAYERED)
        token_ids, where, keys, values = (blob.tensors[n] for n in ("token_ids", "positions", "keys", "values"))
        try:
            chunk = KVChunk(spec, token_ids, where, keys, values, first_layer)
        except SpecMismatchError as exc:
            raise CodecError(f"raw chunk contradicts its spec: {exc}") from exc
        if positions is None:
            return chunk
        placed = checked_positions(positions, len(chunk))
        moved = spec.shift(keys, placed - where, first_layer)
        return KVChunk(spec, token_ids, placed, moved, values, first_layer)

    def encode_values(self, spec: KVSpec, values: Tensor, first_layer: int) -> dict[str, Tensor]:
        """See `EncodesValues`."""
        return {"values": cpu_copy(values)}

    def decode_values(
        self,
        spec: KVSpec,
        tensors: Mapping[str, Tensor],
        first_layer: int,
        tokens: int,
        parameters: Mapping[str, Any],
    ) -> Tensor:
        """See `EncodesValues`."""
        values = tensors["values"]
        shape = (len(values), spec.num_kv_heads, tokens, spec.value_dim)
        if values.dtype != spec.dtype or values.shape != shape:
            raise CodecError(f"values are {values.dtype} {list(values.shape)}; expected {spec.dtype} {list(shape)}")
        return values
