"""Entropy coding: codes come back bit for bit, in fewer bits, and no stream is believed."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvloom.calibration.model_profile import Profile
from kvloom.compress.entropy import EntropyCodec, fit_entropy
from kvloom.compress.envelope import expect_tensor, open_envelope, seal
from kvloom.compress.kernels.ops import pack_bits, packed_bytes, unpack_bits
from kvloom.compress.lossless import LosslessCodec
from kvloom.compress.lowrank import LowRankCodec
from kvloom.compress.predictor import CodeMoments, Predictor, fit_prediction, to_frequencies
from kvloom.compress.raw import RawCodec
from kvloom.compress.streams import STREAM_NAMES, pack_streams, unpack_streams
from kvloom.core import ChunkKey, EncodedChunk, KVChunk, KVSpec
from kvloom.errors import CodecError, SpecMismatchError
from kvloom.kvstore.format import from_bytes, to_bytes
from kvloom.testing import ROPE, SPEC, CodecContract, make_chunk, same_bits, same_blob, same_chunk

KEY = ChunkKey(bytes(32))


@dataclass(frozen=True)
class RoundedCodec:
    """Keys and values in steps of their largest entry, rotated as they are: the simplest codec that packs codes."""

    bits: int = 4

    name: ClassVar[str] = "rounded"
    is_lossless: ClassVar[bool] = False

    def encode(self, chunk: KVChunk) -> EncodedChunk:
        tensors = {}
        for half, tensor in (("keys", chunk.keys.float()), ("values", chunk.values.float())):
            peak = tensor.abs().amax((1, 2, 3)) if tensor.numel() else torch.zeros(len(tensor))
            steps = (1 << self.bits) - 1
            codes = ((tensor / peak.clamp(min=1e-9)[:, None, None, None] + 1) / 2 * steps).round().to(torch.uint8)
            tensors |= {f"{half}.codes": pack_bits(codes, self.bits).contiguous(), f"{half}.peak": peak}
        return seal(self, chunk, tensors, tensors.keys())

    def decode(self, blob: EncodedChunk, positions: Tensor | None = None) -> KVChunk:
        names = [f"{half}.{part}" for half in ("keys", "values") for part in ("codes", "peak")]
        envelope = open_envelope(blob, self.name, names)
        spec, placed, bits = envelope.spec, envelope.placed(positions), envelope.parameters["bits"]
        halves = []
        for half, dim in (("keys", spec.head_dim), ("values", spec.value_dim)):
            shape = (envelope.num_layers, spec.num_kv_heads, envelope.tokens)
            packed = expect_tensor(blob, f"{half}.codes", torch.uint8, (*shape, packed_bytes(dim, bits)))
            peak = expect_tensor(blob, f"{half}.peak", torch.float32, shape[:1])
            numbers = unpack_bits(packed, bits, dim).float() / ((1 << bits) - 1) * 2 - 1
            halves.append(numbers * peak[:, None, None, None])
        keys = halves[0] if spec.rope is None else spec.rope.shift(halves[0], placed - envelope.positions)
        keys, values = keys.to(spec.dtype), halves[1].to(spec.dtype)
        return KVChunk(spec, envelope.token_ids, placed, keys, values, envelope.first_layer)

    def packed_codes(self, blob: EncodedChunk) -> Mapping[str, tuple[int, int]]:
        spec = KVSpec.from_json(blob.meta["spec"])
        return {"keys.codes": (self.bits, spec.head_dim), "values.codes": (self.bits, spec.value_dim)}


def alike_chunk(seed: int, *, tokens: int = 64, spec: KVSpec = SPEC) -> KVChunk:
    """Channels that tell of one another."""
    chunk = make_chunk(seed, tokens=tokens, spec=spec)
    mix = torch.Generator().manual_seed(77)
    for tensor in (chunk.keys, chunk.values):
        rows = tensor.transpose(1, 2).flatten(2)
        width = rows.shape[-1]
        blend = torch.randn(width // 4, width, generator=mix)
        mixed = rows[..., : width // 4].float() @ blend + 0.2 * rows.float()
        tensor.copy_(mixed.unflatten(-1, tensor.shape[1::2]).transpose(1, 2).to(tensor.dtype))
    return chunk


def profile_for(inner: RoundedCodec | LowRankCodec, spec: KVSpec = SPEC) -> Profile:
    return Profile(spec, fit_entropy(inner, [alike_chunk(seed, tokens=200, spec=spec) for seed in range(100, 106)]))


@pytest.fixture(scope="module")
def profile() -> Profile:
    return profile_for(RoundedCodec())


class TestWithTablesOfItsOwn(CodecContract):
    tolerance = 0.2

    @pytest.fixture
    def codec(self) -> EntropyCodec:
        return EntropyCodec(RoundedCodec())


class TestWithTablesOfTheModel(CodecContract):
    tolerance = 0.2

    @pytest.fixture
    def chunk(self) -> KVChunk:
        return make_chunk(7, tokens=6, start=11)

    @pytest.fixture
    def codec(self, profile: Profile) -> EntropyCodec:
        return EntropyCodec(RoundedCodec(), profile)


class TestLosslessOverEntropyOverLowRank(CodecContract):
    tolerance = 0.12

    @pytest.fixture
    def codec(self) -> LosslessCodec:
        return LosslessCodec(EntropyCodec(LowRankCodec(factor_bits=4)))


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, 70),
    heads=st.integers(1, 3),
    dims=st.tuples(st.integers(1, 5), st.integers(0, 9)),
    bits=st.integers(1, 8),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_codes_come_back(tokens: int, heads: int, dims: tuple[int, int], bits: int, dtype: torch.dtype) -> None:
    spec = KVSpec("any@1", 2, heads, 2 * dims[0], dtype, None, v_head_dim=dims[1])
    chunk, inner = make_chunk(tokens, tokens=tokens, spec=spec), RoundedCodec(bits)
    codec = EntropyCodec(inner)
    blob = codec.encode(chunk)
    stored = from_bytes(KEY, to_bytes(KEY, blob))
    assert same_blob(stored, blob)
    assert same_chunk(codec.decode(stored), inner.decode(inner.encode(chunk)))
    part = codec.decode(stored.layers(1, 2))
    assert part.first_layer == 1 and same_bits(part.keys, codec.decode(blob).keys[1:2])


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("heads", [1, 9])
def test_codes_come_back_with_the_models_tables(bits: int, heads: int) -> None:
    spec = replace(SPEC, num_kv_heads=heads)  # 9 heads: 72 channels, more than a block
    inner = RoundedCodec(bits)
    codec = EntropyCodec(inner, profile_for(inner, spec))
    for tokens in (0, 1, 33, 300):
        for chunk in (alike_chunk(1, tokens=tokens, spec=spec), make_chunk(2, tokens=tokens, spec=spec)):
            blob = codec.encode(chunk)
            assert not any(name.startswith("frequencies") for name in blob.tensors)
            assert same_chunk(codec.decode(blob), inner.decode(inner.encode(chunk)))
            part = codec.decode(blob.layers(1, 2))
            assert same_bits(part.keys, codec.decode(blob).keys[1:2])


def test_a_layer_of_a_chunk_can_be_encoded_alone(profile: Profile) -> None:
    codec, chunk = EntropyCodec(RoundedCodec(), profile), alike_chunk(1)
    part = KVChunk(SPEC, chunk.token_ids, chunk.positions, chunk.keys[1:2], chunk.values[1:2], 1)
    assert same_bits(codec.decode(codec.encode(part)).keys, codec.decode(codec.encode(chunk)).keys[1:2])


def test_predicted_codes_take_fewer_bits(profile: Profile) -> None:
    chunk, inner = alike_chunk(5, tokens=256), RoundedCodec()
    plain_bytes = inner.encode(chunk).nbytes
    own_bytes = EntropyCodec(inner).encode(chunk).nbytes
    model_bytes = EntropyCodec(inner, profile).encode(chunk).nbytes
    assert model_bytes < 0.85 * own_bytes < 0.85 * plain_bytes


def test_length_is_near_the_entropy() -> None:
    shares = np.array([0.5, 0.25, 0.125, 0.125])
    codes = np.random.default_rng(0).choice(4, (8, 20_000), p=shares).astype(np.uint8)
    frequencies = to_frequencies(torch.tensor(shares * 1000)).reshape(1, 1, 4)
    tables = Predictor.of(None, torch.zeros(8, dtype=torch.int32), torch.zeros(8, dtype=torch.uint8), frequencies)
    stream = tables.encode(codes)
    entropy_bytes = 1.75 * codes.size / 8
    assert 0.99 * entropy_bytes < len(stream) < 1.015 * entropy_bytes
    assert np.array_equal(tables.decode(memoryview(stream), 20_000), codes)


@pytest.mark.parametrize(
    "wrong",
    [
        {"classes": torch.tensor([0, -1])},
        {"classes": torch.tensor([0.0, 0.0])},
        {"weights": torch.zeros(2, 2)},
        {"frequencies": torch.zeros(1, 0, 4, dtype=torch.int16)},
    ],
    ids=["negative class", "class in float", "weights in float", "no bins"],
)
def test_tables_that_would_lead_astray_are_refused(wrong: dict[str, torch.Tensor]) -> None:
    tables = {
        "weights": torch.zeros(2, 2, dtype=torch.int16),
        "bias": torch.zeros(2, dtype=torch.int32),
        "classes": torch.zeros(2, dtype=torch.uint8),
        "frequencies": torch.full((1, 1, 4), 1024, dtype=torch.int16),
    }
    assert Predictor.of(**tables).bins == 1
    with pytest.raises(CodecError):
        Predictor.of(**(tables | wrong))


def test_prediction_is_the_least_squares_one() -> None:
    codes = torch.randint(0, 16, (5, 4000), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    codes[3] = (codes[0] + codes[1]) // 2
    fitted = fit_prediction(CodeMoments.of(codes[:, :1500], 4) + CodeMoments.of(codes[:, 1500:], 4), bits=4)
    numbers = (2 * codes.double() - 15).T
    known = torch.cat([numbers[:, :3], torch.ones(len(numbers), 1)], 1)
    solution = torch.linalg.lstsq(known, numbers[:, 3:4]).solution[:, 0]
    unit = 32 / 30 * 4096
    assert (fitted["weights"][3, :3].double() / unit - solution[:3]).abs().max() < 1e-3
    assert abs(float(fitted["bias"][3]) / unit - 15 - float(solution[3])) < 0.01
    assert bool((fitted["weights"].triu() == 0).all())
    assert fitted["classes"][3] < fitted["classes"][2]


@given(counts=st.lists(st.integers(0, 10**9), min_size=2, max_size=256))
def test_no_code_is_impossible(counts: list[int]) -> None:
    shares = to_frequencies(torch.tensor(counts)).long()
    assert int(shares.min()) >= 1 and int(shares.sum()) == 4096
    if max(counts):
        assert abs(float(shares[0]) / 4096 - counts[0] / sum(counts)) < len(counts) / 4096 + 1e-3


def test_strange_chunks_cost_bits_but_come_back(profile: Profile) -> None:
    codec, inner = EntropyCodec(RoundedCodec(), profile), RoundedCodec()
    chunk = make_chunk(1, tokens=100)
    chunk.keys[:, :, ::2] = 9.0
    chunk.keys[:, :, 1::2] = -9.0
    blob = codec.encode(chunk)
    assert same_chunk(codec.decode(blob), inner.decode(inner.encode(chunk)))


def test_lowrank_factors_are_codes_too() -> None:
    inner = LowRankCodec(rank=6, factor_bits=4, max_residual=None)
    chunk = alike_chunk(5, tokens=300)
    codec = EntropyCodec(inner)
    blob = codec.encode(chunk)
    assert "inner.keys.factor" not in blob.tensors and "inner.values" in blob.tensors
    assert same_chunk(codec.decode(blob), inner.decode(inner.encode(chunk)))
    assert blob.nbytes < inner.encode(chunk).nbytes


def test_needs_the_profile_it_was_made_with(profile: Profile) -> None:
    blob = EntropyCodec(RoundedCodec(), profile).encode(alike_chunk(1))
    with pytest.raises(CodecError, match="was encoded with the profile"):
        EntropyCodec(RoundedCodec()).decode(blob)
    with pytest.raises(CodecError, match="was encoded with the profile"):
        EntropyCodec(RoundedCodec(), Profile(SPEC, {"other": torch.zeros(3)})).decode(blob)
    with pytest.raises(SpecMismatchError, match="made for"):
        EntropyCodec(RoundedCodec(), profile).encode(make_chunk(1, spec=replace(SPEC, model_id="other@1")))
    own = EntropyCodec(RoundedCodec(3), profile).encode(alike_chunk(1))  # no tables for 3 bits
    assert "frequencies.keys.codes" in own.tensors
    assert same_chunk(EntropyCodec(RoundedCodec(3)).decode(own), EntropyCodec(RoundedCodec(), profile).decode(own))


def test_refuses_an_inner_codec_without_codes() -> None:
    with pytest.raises(TypeError, match="PacksCodes"):
        EntropyCodec(RawCodec())


def with_first_stream(blob: EncodedChunk, stream: bytes) -> EncodedChunk:
    streams = [[bytes(part) for part in layer] for layer in unpack_streams(blob, 3, 2)]
    streams[0][0] = stream
    return EncodedChunk(blob.codec, {**blob.tensors, **pack_streams(streams)}, blob.meta, blob.layered)


@pytest.mark.parametrize("own", [True, False])
def test_refuses_damaged_streams(profile: Profile, own: bool) -> None:
    codec = EntropyCodec(RoundedCodec(), None if own else profile)
    blob = codec.encode(alike_chunk(1))
    stream = bytes(unpack_streams(blob, 3, 2)[0][0])
    for wrong in (b"", stream[:-1], stream[:-2], stream[2:], stream + b"xy", stream[:3], bytes(len(stream))):
        with pytest.raises(CodecError, match="entropy stream"):
            codec.decode(with_first_stream(blob, wrong))
    for at in range(0, len(stream), 7):
        flipped = bytearray(stream)
        flipped[at] ^= 0x10
        with pytest.raises(CodecError, match="entropy stream"):
            codec.decode(with_first_stream(blob, bytes(flipped)))


def test_refuses_parts_that_contradict() -> None:
    codec = EntropyCodec(RoundedCodec())
    blob = codec.encode(alike_chunk(1))
    for name in STREAM_NAMES | {"frequencies.keys.codes", "inner.keys.peak"}:
        whole = blob.tensors[name]
        for wrong in (whole[..., :-1].contiguous(), whole.double(), whole + 1):
            if whole.numel():
                with pytest.raises(CodecError):
                    codec.decode(EncodedChunk(blob.codec, {**blob.tensors, name: wrong}, blob.meta, blob.layered))
                if name == "inner.keys.peak":
                    break
        rest = {n: t for n, t in blob.tensors.items() if n != name}
        with pytest.raises(CodecError):
            codec.decode(EncodedChunk(blob.codec, rest, blob.meta, blob.layered - {name}))


@pytest.mark.parametrize(
    "fields",
    [
        ["uint8", [2, 64, 4], 4, 1 << 40],
        ["uint8", [2, 64, 4], 0, 8],
        ["uint8", [2, 64, 4], 9, 8],
        ["uint8", [1 << 40, 64, 4], 4, 8],
        ["uint8", [2, 63, 4], 4, 8],
        ["uint8", [64], 4, 8],
        ["int64", [2, 64, 4], 4, 8],
        ["uint8", [2, 64, 4], 4],
    ],
)
def test_refuses_descriptions_that_lie(fields: list[object], profile: Profile) -> None:
    for codec in (EntropyCodec(RoundedCodec()), EntropyCodec(RoundedCodec(), profile)):
        blob = codec.encode(alike_chunk(1))
        inner = json.loads(blob.meta["inner"])
        inner["streamed"]["keys.codes"] = fields
        with pytest.raises(CodecError):
            codec.decode(EncodedChunk(blob.codec, blob.tensors, blob.meta | {"inner": json.dumps(inner)}, blob.layered))


@pytest.mark.parametrize("table", ["weights", "bias", "frequencies", "classes"])
def test_refuses_tables_that_contradict(profile: Profile, table: str) -> None:
    name = f"entropy.rounded4.keys.codes.{table}"
    wrong = {"weights": 1 << 14, "bias": 1 << 25, "frequencies": 0, "classes": 99}[table]
    tables = {**profile.tensors, name: torch.full_like(profile[name], wrong)}
    codec = EntropyCodec(RoundedCodec(8), Profile(SPEC, tables))
    chunk = alike_chunk(1)
    assert same_chunk(codec.decode(codec.encode(chunk)), RoundedCodec(8).decode(RoundedCodec(8).encode(chunk)))
    if table == "weights":
        spec = replace(SPEC, num_kv_heads=9)
        wide = profile_for(RoundedCodec(), spec)
        tables = {**wide.tensors, name: torch.full_like(wide[name], wrong)}
        with pytest.raises(CodecError, match="reach"):
            EntropyCodec(RoundedCodec(), Profile(spec, tables)).encode(alike_chunk(1, spec=spec))
        return
    with pytest.raises(CodecError, match=r"reach|frequencies"):
        EntropyCodec(RoundedCodec(), Profile(SPEC, tables)).encode(chunk)


def test_stored_form_is_fixed() -> None:
    keys = (torch.arange(3 * 2 * 6 * 8).reshape(3, 2, 6, 8) * 37 % 101 - 50) / 16
    chunk = KVChunk(SPEC, torch.arange(6), torch.arange(2, 8), keys, -keys)
    weights = torch.full((16, 16), 900, dtype=torch.int16).tril(-1)
    share = torch.tensor([200] * 12 + [424] * 4, dtype=torch.int16)
    tables = {
        "weights": weights,
        "bias": torch.arange(16, dtype=torch.int32) * 3000,
        "classes": (torch.arange(16) % 2).to(torch.uint8),
        "frequencies": torch.stack([torch.stack([share, share.flip(0)])] * 2),
    }
    names = [f"entropy.rounded4.{half}.codes.{table}" for half in ("keys", "values") for table in tables]
    profile = Profile(
        SPEC,
        {
            name: tables[name.rsplit(".")[-1]].expand(3, *tables[name.rsplit(".")[-1]].shape).contiguous()
            for name in names
        },
    )
    assert SPEC.rope == ROPE
    codec = EntropyCodec(RoundedCodec(), profile)
    blob = codec.encode(chunk)
    assert same_chunk(codec.decode(blob), RoundedCodec().decode(RoundedCodec().encode(chunk)))
    digest = hashlib.blake2b(blob.meta["inner"].encode(), digest_size=8)
    for name, tensor in sorted(blob.tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode() + tensor.numpy().tobytes())
    assert digest.hexdigest() == "7ceb85e2d8535c2d"
