"""Any codec's chunk made smaller without a bit changed: bytes by their place in the number, then zstd."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

try:
    import zstandard
except ImportError as exc:
    raise ImportError("the lossless codec needs zstandard; install it with `pip install kvloom[compress]`") from exc

from ..core import Codec, EncodedChunk, KVChunk
from ..errors import CodecError
from .nested import Streamed, open_nested, seal_nested
from .raw import RawCodec
from .streams import STREAM_LAYERED, STREAM_NAMES, pack_streams, unpack_streams

_LARGEST_RATIO = 1 << 15  # four bytes of zstd stand for a block of 128 KiB at most
_LARGEST_WINDOW_BYTES = 1 << 27


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
        if not 1 <= self.level <= 22:
            raise ValueError(f"level is {self.level}; expected 1 to 22")

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
        streamed = {name: Streamed(inner.tensors[name].dtype, tuple(inner.tensors[name].shape[1:])) for name in names}
        return seal_nested(self, chunk, inner, streamed, pack_streams(streams), STREAM_LAYERED)

    def decode(self, blob: EncodedChunk, positions: Tensor | None = None) -> KVChunk:
        """What the inner codec decodes.

        Raises
        ------
        CodecError : `blob` is not this codec's or the inner one's, or a stream is not what the chunk says of it; no
            stream makes it allocate more than 32,768 times the stream's own bytes.
        SpecMismatchError : `positions` are not one int64 for each token.
        """
        nested = open_nested(blob, self.name, STREAM_NAMES)
        layers = nested.envelope.num_layers
        count = sum(tensor.dtype.itemsize for tensor in nested.streamed.values())
        streams = [iter(layer) for layer in unpack_streams(blob, layers, count)]
        tensors = {name: _read_tensor(streamed, streams) for name, streamed in sorted(nested.streamed.items())}
        return self.inner.decode(nested.with_streamed(tensors), positions)


def _planes(tensor: Tensor) -> list[bytes]:
    """First bytes of all numbers, then second bytes, and so on."""
    numbers = tensor.reshape(-1).view(torch.uint8).reshape(-1, tensor.dtype.itemsize)
    return [plane.tobytes() for plane in numbers.numpy().T]


def _read_tensor(streamed: Streamed, streams: list[Iterator[memoryview]]) -> Tensor:
    """`[L, ...]`; takes the next streams of each layer."""
    planes = [[_decompress(next(layer), streamed.numel) for _ in range(streamed.dtype.itemsize)] for layer in streams]
    numbers = np.empty((len(streams), streamed.numel, streamed.dtype.itemsize), np.uint8)
    for layer, parts in enumerate(planes):
        for place, part in enumerate(parts):
            numbers[layer, :, place] = np.frombuffer(part, np.uint8)
    return torch.from_numpy(numbers).reshape(-1).view(streamed.dtype).reshape(len(streams), *streamed.shape)


def _decompress(stream: memoryview, expected_bytes: int) -> bytes:
    try:
        said_bytes = zstandard.get_frame_parameters(stream).content_size
        if said_bytes != expected_bytes or expected_bytes > _LARGEST_RATIO * len(stream):
            raise CodecError(f"zstd stream of {len(stream)} bytes says {said_bytes}; expected {expected_bytes}")
        zstd = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW_BYTES)
        data = zstd.decompress(stream, max_output_size=expected_bytes, allow_extra_data=False)
    except zstandard.ZstdError as exc:
        raise CodecError(f"zstd stream of {len(stream)} bytes cannot be read: {exc}") from exc
    if len(data) != expected_bytes:
        raise CodecError(f"zstd stream gave {len(data)} bytes; expected {expected_bytes}")
    return data
