"""Tensors that travel with a chunk without being part of it: put in behind every codec, taken out before it."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ..compress.envelope import cpu_copy
from ..core import Codec, EncodedChunk, KVChunk
from ..errors import CodecError, SpecMismatchError

_PREFIX = "extra/"  # no codec names a tensor so


def encode(codec: Codec, chunk: KVChunk) -> EncodedChunk:
    """What `codec` makes of the chunk, and its extras as they are; leased as the codec says."""
    blob = codec.encode(chunk)
    if not chunk.extras:
        return blob
    extras = {_PREFIX + name: tensor.detach() for name, tensor in chunk.extras.items()}
    if not blob.leased or not all(t.device.type == "cpu" and t.is_contiguous() for t in extras.values()):
        extras = {name: cpu_copy(tensor) for name, tensor in extras.items()}
    layered = blob.layered.union(_PREFIX + name for name in chunk.layered_extras)
    return EncodedChunk(blob.codec, {**blob.tensors, **extras}, blob.meta, layered, blob.leased)


def decode(codec: Codec, blob: EncodedChunk, positions: Tensor | None = None) -> KVChunk:
    """The chunk with its extras, which share memory with `blob`; positions and errors as for `Codec.decode`."""
    extras = {name.removeprefix(_PREFIX): t for name, t in blob.tensors.items() if name.startswith(_PREFIX)}
    if not extras:
        return codec.decode(blob, positions)
    own = {name: t for name, t in blob.tensors.items() if not name.startswith(_PREFIX)}
    chunk = codec.decode(EncodedChunk(blob.codec, own, blob.meta, blob.layered & own.keys(), blob.leased), positions)
    layered = frozenset(name.removeprefix(_PREFIX) for name in blob.layered - own.keys())
    try:
        return replace(chunk, extras=extras, layered_extras=layered)
    except SpecMismatchError as exc:
        raise CodecError(f"{blob.codec} chunk contradicts its extras: {exc}") from exc
