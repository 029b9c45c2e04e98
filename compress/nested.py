"""A codec around a codec: some of the inner one's layered tensors become byte streams, the others are kept."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ..core import Codec, EncodedChunk, KVChunk
from ..errors import CodecError
from .envelope import Envelope, open_envelope, seal

_PREFIX = "inner."
_COMMON = ("token_ids", "positions")
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.int64, torch.float32, torch.int32, torch.bfloat16, torch.float16, torch.int16),
        *(torch.float8_e4m3fn, torch.int8, torch.uint8, torch.bool),
    )
}


@dataclass(frozen=True, slots=True)
class Streamed:
    """A tensor that lies in streams, one layer of it.

    Attributes
    ----------
    shape : without the layer.
    bits : of each packed code, if it holds codes (see `entropy.PacksCodes`); otherwise 0.
    count : codes in a row of bytes.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    bits: int = 0
    count: int = 0

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True, eq=False)
class Nested:
    """The inner chunk but for the streamed tensors' bytes.

    Attributes
    ----------
    blob : inner chunk that lacks the streamed tensors.
    streamed : by name.
    """

    envelope: Envelope
    blob: EncodedChunk
    streamed: Mapping[str, Streamed]

    def with_streamed(self, tensors: Mapping[str, Tensor]) -> EncodedChunk:
        """The whole inner chunk."""
        blob = self.blob
        return EncodedChunk(blob.codec, {**blob.tensors, **tensors}, blob.meta, blob.layered | tensors.keys())


def seal_nested(
    codec: Codec,
    chunk: KVChunk,
    inner: EncodedChunk,
    streamed: Mapping[str, Streamed],
    tensors: Mapping[str, Tensor],
    layered: Collection[str],
) -> EncodedChunk:
    """The encoded chunk: `inner` without the streamed tensors, and the outer codec's own `tensors`."""
    kept = {name: t for name, t in inner.tensors.items() if name not in streamed and name not in _COMMON}
    own_layered = {*layered, *(_PREFIX + name for name in inner.layered & kept.keys())}
    sealed = seal(codec, chunk, {**tensors, **{_PREFIX + name: t for name, t in kept.items()}}, own_layered)
    described = {
        "codec": inner.codec,
        "meta": {name: text for name, text in inner.meta.items() if name not in ("spec", "first_layer")},
        "streamed": {
            name: [str(s.dtype).removeprefix("torch."), list(s.shape), s.bits, s.count] for name, s in streamed.items()
        },
    }
    meta = {**sealed.meta, "inner": json.dumps(described, sort_keys=True, separators=(",", ":"))}
    return EncodedChunk(sealed.codec, sealed.tensors, meta, sealed.layered)


def open_nested(blob: EncodedChunk, codec: str, names: Collection[str]) -> Nested:
    """What `seal_nested` made of an inner chunk.

    Parameters
    ----------
    codec : the outer codec's name.
    names : the outer codec's own tensors.

    Raises
    ------
    CodecError : another codec made it, or its parts contradict one another.
    """
    kept = {name for name in blob.tensors if name.startswith(_PREFIX)}
    envelope = open_envelope(blob, codec, kept | set(names))
    try:
        described = json.loads(blob.meta["inner"])
        streamed = {name: _read_streamed(*fields) for name, fields in described["streamed"].items()}
        meta = {str(name): str(text) for name, text in described["meta"].items()}
        inner_codec = str(described["codec"])
    except (LookupError, TypeError, ValueError, AttributeError) as exc:
        raise CodecError(f"{codec} chunk does not say what is inside it: {exc!r}") from exc
    meta |= {"spec": blob.meta["spec"], "first_layer": blob.meta["first_layer"]}
    tensors = {name.removeprefix(_PREFIX): blob.tensors[name] for name in kept}
    tensors |= {name: blob.tensors[name] for name in _COMMON}
    if twice := streamed.keys() & tensors.keys():
        raise CodecError(f"{codec} chunk holds {sorted(twice)} twice: as they are, and in streams")
    layered = frozenset(name.removeprefix(_PREFIX) for name in blob.layered & kept)
    return Nested(envelope, EncodedChunk(inner_codec, tensors, meta, layered, blob.leased), streamed)


def _read_streamed(dtype: str, shape: list[int], bits: int, count: int) -> Streamed:
    if not all(type(n) is int and n >= 0 for n in (*shape, bits, count)) or bits > 8:
        raise ValueError(f"shape {shape}, {count} codes of {bits} bits")
    return Streamed(_DTYPES[dtype], tuple(shape), bits, count)
