"""Byte planes and zstd: every bit comes back, layers alone too, and no stream is believed."""

import hashlib
import json
from dataclasses import replace

import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom.compress.lossless import LosslessCodec
from kvloom.compress.lowrank import LowRankCodec
from kvloom.compress.raw import RawCodec
from kvloom.compress.streams import STREAM_LAYERED, pack_streams, unpack_streams
from kvloom.core import ChunkKey, EncodedChunk, KVChunk, KVSpec
from kvloom.errors import CodecError
from kvloom.kvstore.format import from_bytes, to_bytes
from kvloom.testing import ROPE, SPEC, CodecContract, make_chunk, same_bits, same_blob, same_chunk

KEY = ChunkKey(bytes(32))


class TestLosslessCodec(CodecContract):
    def make_codec(self, spec: KVSpec) -> LosslessCodec:
        return LosslessCodec()

    def test_is_lossless_if_the_inner_codec_is(self, codec: LosslessCodec) -> None:
        assert codec.is_lossless and not LosslessCodec(LowRankCodec()).is_lossless


class TestLosslessOverLowRank(CodecContract):
    tolerance = 8e-3

    def make_codec(self, spec: KVSpec) -> LosslessCodec:
        return LosslessCodec(LowRankCodec())


class TestLosslessOverLossless(CodecContract):
    def make_codec(self, spec: KVSpec) -> LosslessCodec:
        return LosslessCodec(LosslessCodec(level=1), level=19)


@settings(max_examples=30)
@given(
    tokens=st.integers(0, 30),
    heads=st.integers(1, 3),
    dims=st.tuples(st.integers(1, 4), st.integers(0, 9)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    level=st.integers(1, 9),
)
def test_every_bit_through_the_container(
    tokens: int, heads: int, dims: tuple[int, int], dtype: torch.dtype, level: int
) -> None:
    spec = KVSpec("any@1", 3, heads, 2 * dims[0], dtype, None, v_head_dim=dims[1])
    chunk = make_chunk(tokens, tokens=tokens, spec=spec)
    chunk.keys[:1] = float("nan")
    chunk.values[1:] = -0.0
    codec = LosslessCodec(level=level)
    blob = codec.encode(chunk)
    stored = from_bytes(KEY, to_bytes(KEY, blob))
    assert same_blob(stored, blob) and same_chunk(codec.decode(stored), chunk)
    for start, stop in ((0, 1), (1, 3), (2, 3), (1, 1)):
        part = codec.decode(stored.layers(start, stop))
        assert part.first_layer == start and same_bits(part.keys, chunk.keys[start:stop])
        assert same_bits(part.values, chunk.values[start:stop])


def test_what_is_inside_is_what_the_inner_codec_made() -> None:
    chunk = make_chunk(7, tokens=40)
    inner = LowRankCodec(rank=3, factor_bits=4)
    assert same_chunk(
        LosslessCodec(inner).decode(LosslessCodec(inner).encode(chunk)), inner.decode(inner.encode(chunk))
    )
    assert same_chunk(
        LosslessCodec(LowRankCodec()).decode(LosslessCodec(inner).encode(chunk)), inner.decode(inner.encode(chunk))
    )


def test_sixteen_bit_chunks_shrink() -> None:
    chunk = make_chunk(3, tokens=256, spec=KVSpec("8b@1", 2, 8, 128, torch.bfloat16, None))
    raw_bytes = RawCodec().encode(chunk).nbytes
    stored_bytes = LosslessCodec().encode(chunk).nbytes
    assert 1.2 < raw_bytes / stored_bytes < 2


@given(
    lengths=st.lists(st.lists(st.integers(0, 300), min_size=2, max_size=2), min_size=1, max_size=6),
    part=st.tuples(st.integers(0, 5), st.integers(1, 6)),
)
def test_streams_of_any_length(lengths: list[list[int]], part: tuple[int, int]) -> None:
    streams = [[bytes([layer + 1]) * a, bytes([layer + 101]) * b] for layer, (a, b) in enumerate(lengths)]
    tensors = pack_streams(streams)
    rows, spill = tensors["streams.rows"], tensors["streams.spill"]
    total = sum(map(sum, lengths))
    assert total == rows.numel() + spill.numel()
    start, stop = min(part[0], len(streams) - 1), min(part[1] + part[0], len(streams))
    blob = EncodedChunk("test", tensors, {"first_layer": "0"}, STREAM_LAYERED).layers(start, stop)
    found = unpack_streams(blob, stop - start, 2)
    assert [[bytes(stream) for stream in layer] for layer in found] == streams[start:stop]


def test_layers_that_shrink_well_do_not_widen_the_spill() -> None:
    lengths = [300, *range(1000, 1031), 1100, 500]
    tensors = pack_streams([[bytes([n % 251]) * n] for n in lengths])
    assert tensors["streams.rows"].shape == (34, 1000)
    assert len(tensors["streams.spill"]) == sum(range(31)) + 100 < 0.02 * sum(lengths)
    found = unpack_streams(EncodedChunk("test", tensors, {}, STREAM_LAYERED), 34, 1)
    assert [bytes(layer[0]) for layer in found] == [bytes([n % 251]) * n for n in lengths]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("streams.sizes", -1),
        ("streams.sizes", 2**62),
        ("streams.sizes", 0),
        ("streams.spill_at", -1),
        ("streams.spill_at", 2**62),
    ],
)
def test_refuses_wrong_extents(name: str, value: int) -> None:
    codec = LosslessCodec()
    chunk = make_chunk(1, tokens=50)
    chunk.keys[0] = 1.0
    blob = codec.encode(chunk)
    wrong = blob.tensors[name].clone()
    wrong.view(-1)[-1] = value
    with pytest.raises(CodecError):
        codec.decode(EncodedChunk(blob.codec, {**blob.tensors, name: wrong}, blob.meta, blob.layered))


def test_refuses_cut_tensors() -> None:
    codec = LosslessCodec()
    blob = codec.encode(make_chunk(1))
    for name in STREAM_LAYERED | {"streams.spill"}:
        whole = blob.tensors[name]
        if not whole.numel():
            continue
        for wrong in (whole[..., :-1].contiguous(), whole.float()):
            with pytest.raises(CodecError):
                codec.decode(EncodedChunk(blob.codec, {**blob.tensors, name: wrong}, blob.meta, blob.layered))


def test_every_damaged_byte_is_refused_or_harmless() -> None:
    codec = LosslessCodec()
    chunk = make_chunk(1, tokens=3)
    blob = codec.encode(chunk)
    rows = blob.tensors["streams.rows"]
    for at in range(rows.shape[1]):
        damaged = rows.clone()
        damaged[0, at] ^= 0x55
        try:
            codec.decode(EncodedChunk(blob.codec, {**blob.tensors, "streams.rows": damaged}, blob.meta, blob.layered))
        except CodecError:
            continue  # literals carry no checksum of their own: the container's catches those


def one_stream(stream: bytes, blob: EncodedChunk) -> EncodedChunk:
    """`blob` with this as the first stream of its first layer."""
    streams = [
        [bytes(part) for part in layer] for layer in unpack_streams(blob, 3, blob.tensors["streams.sizes"].shape[1])
    ]
    streams[0][0] = stream
    return EncodedChunk(blob.codec, {**blob.tensors, **pack_streams(streams)}, blob.meta, blob.layered)


def test_refuses_streams_that_lie() -> None:
    codec = LosslessCodec()
    blob = codec.encode(make_chunk(1))
    true = zstandard.ZstdCompressor().compress(bytes(80))
    assert codec.decode(one_stream(true, blob)) is not None
    for stream in (
        b"",
        b"no zstd",
        true[:-1],
        true + b"x",
        true + true,
        zstandard.ZstdCompressor().compress(bytes(79)),
        zstandard.ZstdCompressor().compress(bytes(1 << 28)),  # a bomb: 8 KiB for 256 MiB
        zstandard.ZstdCompressor(write_content_size=False).compress(bytes(80)),
    ):
        with pytest.raises(CodecError, match="zstd"):
            codec.decode(one_stream(stream, blob))


@pytest.mark.parametrize("shape", [[1 << 40], [2, 5, 1 << 30], [-1], ["2"], 7, [2, 5, 7], [2.0, 5, 8]])
def test_refuses_shapes_that_lie(shape: object) -> None:
    codec = LosslessCodec()
    blob = codec.encode(make_chunk(1))
    inner = json.loads(blob.meta["inner"])
    inner["streamed"]["keys"][1] = shape
    with pytest.raises(CodecError):
        codec.decode(EncodedChunk(blob.codec, blob.tensors, blob.meta | {"inner": json.dumps(inner)}, blob.layered))


@pytest.mark.parametrize("inner", ["", "[]", "{}", '{"codec":"raw","meta":{},"streamed":{"keys":["float64",[]]}}'])
def test_refuses_what_does_not_say_what_is_inside(inner: str) -> None:
    codec = LosslessCodec()
    blob = codec.encode(make_chunk(1))
    with pytest.raises(CodecError, match="inside"):
        codec.decode(EncodedChunk(blob.codec, blob.tensors, blob.meta | {"inner": inner}, blob.layered))


def test_refuses_a_tensor_that_is_there_twice() -> None:
    codec = LosslessCodec()
    blob = codec.encode(make_chunk(1))
    inner = json.loads(blob.meta["inner"])
    inner["streamed"]["token_ids"] = ["int64", []]
    with pytest.raises(CodecError, match="token_ids"):
        codec.decode(EncodedChunk(blob.codec, blob.tensors, blob.meta | {"inner": json.dumps(inner)}, blob.layered))


def test_refuses_another_inner_codec() -> None:
    blob = LosslessCodec(LowRankCodec()).encode(make_chunk(1))
    with pytest.raises(CodecError, match="lowrank"):
        LosslessCodec().decode(blob)


@pytest.mark.parametrize("level", [0, 23])
def test_refuses_other_levels(level: int) -> None:
    with pytest.raises(ValueError, match="expected 1 to 22"):
        LosslessCodec(level=level)


def test_stored_form_is_fixed() -> None:
    """Streams are zstd's affair, and change with its release; what they hold, and how it is described, does not."""
    keys = (torch.arange(3 * 2 * 6 * 8).reshape(3, 2, 6, 8) * 37 % 101 - 50) / 16
    spec = replace(SPEC, rope=ROPE)
    blob = LosslessCodec().encode(KVChunk(spec, torch.arange(6), torch.arange(2, 8), keys, -keys))
    digest = hashlib.blake2b(blob.meta["inner"].encode(), digest_size=8)
    for layer in unpack_streams(blob, 3, 8):
        for stream in layer:
            digest.update(zstandard.decompress(stream))
    assert digest.hexdigest() == "1d7e330a30cb2bd6"
