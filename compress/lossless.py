"""Makes any codec's chunk smaller without a changed bit: bytes grouped by their place in a number, then zstd."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import ClassVar, TypeAlias

import numpy as np
import torch
from torch import Tensor

try:
    import zstandard
except ImportError as exc:
    raise ImportError("the lossless codec needs zstandard; install it with `pip install kvloom[compress]`") from exc

from ..core import Codec, EncodedChunk, KVChunk
from ..errors import CodecError
from .envelope import Envelope, open_envelope, seal
from .raw import RawCodec
from .streams import STREAM_LAYERED, STREAM_NAMES, pack_streams, unpack_streams
from .zstd import check_level, decompress

_PREFIX = "inner."  # of the inner codec's tensors without a layer dimension, which are kept
_COMMON = ("token_ids", "positions")
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.int64, torch.float32, torch.int32, torch.bfloat16, torch.float16, torch.int16),
        *(torch.float8_e4m3fn, torch.int8, torch.uint8, torch.bool),
    )
}

Streamed: TypeAlias = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Dtype, and shape of one layer, of each tensor that lies in streams."""


@dataclass(frozen=True)
class LosslessCodec:
    """Layered tensors of the inner codec as zstd frames, one for each layer and place of a byte in its number.

    The sign and exponent bytes of keys and values are much alike, their mantissa bytes are noise: apart, the former
    shrink. Layers can be read alone; tensors without a layer dimension are kept as they are.

    Attributes
    ----------
    inner : makes the chunk; lossless together with it.
    level : of zstd, 1 (fast) to 22 (small).
    """

    inner: Codec = field(default_factory=RawCodec)
    level: int = 3

    name: ClassVar[str] = "lossless"

    def __post_init__(self) -> None:
        check_level(self.level)

    @property
    def is_lossless(self) -> bool:
        return self.inner.is_lossless

    def encode(self, chunk: KVChunk) -> EncodedChunk:
        """The inner codec's chunk, compressed."""
        inner = self.inner.encode(chunk)
        zstd = zstandard.ZstdCompressor(level=self.level)
        names = sorted(inner.layered)
        streams = [
            [zstd.compress(plane) for name in names for plane in _planes(inner.tensors[name][layer])]
            for layer in range(len(chunk.keys))
        ]
        kept = {_PREFIX + name: t for name, t in inner.tensors.items() if name not in (*names, *_COMMON)}
        sealed = seal(self, chunk, {**pack_streams(streams), **kept}, STREAM_LAYERED)
        described = {
            "codec": inner.codec,
            "meta": {name: text for name, text in inner.meta.items() if name not in ("spec", "first_layer")},
            "streamed": {
                name: [str(inner.tensors[name].dtype).removeprefix("torch."), list(inner.tensors[name].shape[1:])]
                for name in names
            },
        }
        meta = {**sealed.meta, "inner": json.dumps(described, sort_keys=True, separators=(",", ":"))}
        return EncodedChunk(sealed.codec, sealed.tensors, meta, sealed.layered)

    def decode(self, blob: EncodedChunk, positions: Tensor | None = None) -> KVChunk:
        """What the inner codec decodes.

        Raises
        ------
        CodecError : `blob` is not this codec's or the inner one's, or a stream is not what the chunk says of it; no
            stream makes it allocate more than 32,768 times the stream's own bytes.
        SpecMismatchError : `positions` are not one int64 for each token.
        """
        kept = {name for name in blob.tensors if name.startswith(_PREFIX)}
        envelope = open_envelope(blob, self.name, kept | STREAM_NAMES)
        codec, meta, streamed = _read_description(blob)
        tensors = {name.removeprefix(_PREFIX): blob.tensors[name] for name in kept}
        tensors |= {name: blob.tensors[name] for name in _COMMON}
        if twice := streamed.keys() & tensors.keys():
            raise CodecError(f"lossless chunk holds {sorted(twice)} twice: as they are, and in streams")
        tensors |= _read_streamed(blob, envelope, streamed)
        meta |= {"spec": blob.meta["spec"], "first_layer": blob.meta["first_layer"]}
        return self.inner.decode(EncodedChunk(codec, tensors, meta, frozenset(streamed)), positions)


def _read_description(blob: EncodedChunk) -> tuple[str, dict[str, str], Streamed]:
    """Codec and text of the inner chunk, and dtype and shape of one layer of each streamed tensor."""
    try:
        described = json.loads(blob.meta["inner"])
        streamed = {name: (_DTYPES[dtype], tuple(shape)) for name, (dtype, shape) in described["streamed"].items()}
        meta = {str(name): str(text) for name, text in described["meta"].items()}
        codec = str(described["codec"])
    except (LookupError, TypeError, ValueError, AttributeError) as exc:
        raise CodecError(f"lossless chunk does not say what is inside it: {exc!r}") from exc
    for name, (_, shape) in streamed.items():
        if not all(type(n) is int and n >= 0 for n in shape):
            raise CodecError(f"lossless chunk says that {name} has shape {shape}; expected integers of at least 0")
    return codec, meta, streamed


def _read_streamed(blob: EncodedChunk, envelope: Envelope, streamed: Streamed) -> dict[str, Tensor]:
    count = sum(dtype.itemsize for dtype, _ in streamed.values())
    streams = [iter(layer) for layer in unpack_streams(blob, envelope.num_layers, count)]
    return {name: _read_tensor(dtype, shape, streams) for name, (dtype, shape) in sorted(streamed.items())}


def _planes(tensor: Tensor) -> list[bytes]:
    """First bytes of all numbers, then second bytes, and so on."""
    numbers = tensor.reshape(-1).view(torch.uint8).reshape(-1, tensor.dtype.itemsize)
    return [plane.tobytes() for plane in numbers.numpy().T]


def _read_tensor(dtype: torch.dtype, shape: tuple[int, ...], streams: list[Iterator[memoryview]]) -> Tensor:
    """`[L, *shape]`; takes the next streams of each layer."""
    numel = prod(shape)
    planes = [[decompress(next(layer), numel) for _ in range(dtype.itemsize)] for layer in streams]
    numbers = np.empty((len(streams), numel, dtype.itemsize), np.uint8)
    for layer, parts in enumerate(planes):
        for place, part in enumerate(parts):
            numbers[layer, :, place] = np.frombuffer(part, np.uint8)
    return torch.from_numpy(numbers).reshape(-1).view(dtype).reshape(len(streams), *shape)
