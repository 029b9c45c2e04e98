"""Tensors that travel with a chunk without being part of it: put in behind every codec, taken out before it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ...compress.envelope import cpu_copy
from ...core import Codec, EncodedChunk, KVChunk
from ...errors import CodecError, SpecMismatchError

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


def decode(blob: EncodedChunk, own_decode: Callable[[EncodedChunk], KVChunk]) -> KVChunk:
    """What `own_decode` makes of the codec's own tensors, with the extras, which share memory with `blob`.

    Raises
    ------
    CodecError : the extras contradict the chunk; and as `own_decode` does.
    """
    extras = {name.removeprefix(_PREFIX): t for name, t in blob.tensors.items() if name.startswith(_PREFIX)}
    if not extras:
        return own_decode(blob)
    own = {name: t for name, t in blob.tensors.items() if not name.startswith(_PREFIX)}
    chunk = own_decode(EncodedChunk(blob.codec, own, blob.meta, blob.layered & own.keys(), blob.leased))
    layered = frozenset(name.removeprefix(_PREFIX) for name in blob.layered - own.keys())
    try:
        return replace(chunk, extras=extras, layered_extras=layered)
    except SpecMismatchError as exc:
        raise CodecError(f"{blob.codec} chunk contradicts its extras: {exc}") from exc
