"""What the tests of several lossy codecs share: chunks of hostile numbers, spoiled blobs, digests."""

import hashlib
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from kvloom.calibration.codec_form import parameters_of
from kvloom.compress.values import EncodesValues
from kvloom.core import Codec, EncodedChunk, KVChunk, KVSpec, RopeSpec
from kvloom.errors import CodecError
from kvloom.testing import SPEC, make_chunk, same_bits

PLAIN = replace(SPEC, rope=None)
INTERLEAVED = replace(SPEC, rope=RopeSpec(SPEC.rope.inv_freq, interleaved=True))
SPEC_8B = KVSpec("8b@1", 32, 8, 128, torch.float16, RopeSpec(inv_freq=tuple(500000.0 ** -(i / 64) for i in range(64))))


def digest(blob: EncodedChunk) -> str:
    """16 hex digits over every tensor of a chunk."""
    state = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(blob.tensors.items()):
        state.update(f"{name} {tensor.dtype} {list(tensor.shape)} {name in blob.layered}\0".encode())
        state.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def with_meta(blob: EncodedChunk, **meta: str) -> EncodedChunk:
    return EncodedChunk(blob.codec, blob.tensors, {**blob.meta, **meta}, blob.layered)


def with_tensors(blob: EncodedChunk, **tensors: Tensor) -> EncodedChunk:
    return EncodedChunk(blob.codec, {**blob.tensors, **tensors}, blob.meta, blob.layered)


def spoiled(blob: EncodedChunk) -> Iterator[tuple[str, EncodedChunk]]:
    """The blob with each tensor cut in each dimension, and in another dtype; each with a name."""
    for name, tensor in blob.tensors.items():
        other = torch.int16 if tensor.dtype == torch.uint8 else torch.uint8
        yield f"{name} in {other}", with_tensors(blob, **{name: tensor.float().to(other)})
        for dim in range(tensor.ndim):
            if tensor.shape[dim]:
                yield f"{name} cut in {dim}", with_tensors(blob, **{name: tensor.narrow(dim, 1, tensor.shape[dim] - 1)})


def accepted(codec: Codec, blob: EncodedChunk) -> list[str]:
    """Which of the spoiled blobs are decoded; anything but `CodecError` is let through."""
    found = []
    for name, bad in spoiled(blob):
        try:
            codec.decode(bad)
        except CodecError:
            continue
        found.append(name)
    return found


def with_strange_tokens(chunk: KVChunk) -> KVChunk:
    """NaN, infinities and huge numbers in keys of tokens 1 and 4, and in values of tokens 2 and 4."""
    huge = 60000.0
    chunk.keys[0, 0, 1, 3] = torch.nan
    chunk.keys[-1, -1, 4, 0] = -torch.inf
    chunk.keys[-1, 0, 4, 1] = huge
    if chunk.values.numel():
        chunk.values[1, 0, 2, 0] = torch.inf
        chunk.values[0, -1, 4, 2] = -huge
    return chunk


def assert_strange_tokens_are_exact(codec: Codec, spec: KVSpec) -> None:
    """They are kept bit for bit, and the other tokens are about as good as without them."""
    chunk, true = (make_chunk(3, tokens=8, spec=spec, start=5) for _ in range(2))
    chunk = with_strange_tokens(chunk)
    decoded, clean = codec.decode(codec.encode(chunk)), codec.decode(codec.encode(true))
    assert same_bits(decoded.keys[:, :, [1, 4]], chunk.keys[:, :, [1, 4]])
    assert same_bits(decoded.values[:, :, [2, 4]], chunk.values[:, :, [2, 4]])
    for name, others in (("keys", [0, 2, 3, 5, 6, 7]), ("values", [0, 1, 3, 5, 6, 7])):
        found, plain, exact = (getattr(x, name)[:, :, others].float() for x in (decoded, clean, true))
        assert bool(found.isfinite().all())
        assert (found - exact).norm() <= 1.5 * (plain - exact).norm()
    moved = codec.decode(codec.encode(chunk), chunk.positions + 3)
    assert bool(moved.keys[:, :, [0, 2, 3, 5, 6, 7]].isfinite().all()) and not bool(moved.keys.isfinite().all())


def assert_values_stand_alone(codec: Codec) -> None:
    """`EncodesValues`: the half that other codecs join makes the same tensors and numbers as the whole."""
    assert isinstance(codec, EncodesValues)
    chunk = make_chunk(4, tokens=9)
    chunk.keys.requires_grad_()
    chunk.values.requires_grad_()
    blob, whole = codec.encode(chunk), codec.decode(codec.encode(chunk)).values
    alone = codec.encode_values(chunk.spec, chunk.values, 0)
    assert alone.keys() == codec.value_names and codec.value_names <= blob.layered
    assert not any(tensor.requires_grad for tensor in blob.tensors.values())
    for name, tensor in alone.items():
        assert name.startswith("values") and same_bits(tensor, blob.tensors[name])
    parameters = {"codec": codec.name} | parameters_of(codec)
    assert same_bits(codec.decode_values(chunk.spec, alone, 0, 9, parameters), whole)
    part = {name: tensor[1:2] for name, tensor in alone.items()}
    assert same_bits(codec.decode_values(chunk.spec, part, 1, 9, parameters), whole[1:2])
