"""Low-rank keys: their contract, algebra, sizes and what is kept exact."""

import hashlib
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvloom.calibration.model_profile import Profile
from kvloom.compress.gram import GramMatrix
from kvloom.compress.lowrank import LowRankCodec, fit_layer
from kvloom.compress.raw import RawCodec
from kvloom.core import ChunkKey, EncodedChunk, KVChunk, KVSpec, RopeSpec
from kvloom.errors import CodecError, SpecMismatchError
from kvloom.kvstore.format import from_bytes, to_bytes
from kvloom.testing import ROPE, SPEC, CodecContract, make_chunk, same_bits, same_blob, same_chunk

KEY = ChunkKey(bytes(32))


def low_rank_chunk(*, tokens: int, rank: int, spec: KVSpec = SPEC, seed: int = 0, start: int = 100) -> KVChunk:
    """Keys before rotation lie in `rank` dimensions, the same for each seed."""
    plane = torch.Generator().manual_seed(99)
    basis = torch.randn(spec.num_layers, rank, spec.num_kv_heads * spec.head_dim, generator=plane)
    random = torch.Generator().manual_seed(seed)
    keys = torch.randn(spec.num_layers, tokens, rank, generator=random) @ basis
    keys = keys.unflatten(-1, (spec.num_kv_heads, spec.head_dim)).transpose(1, 2)
    positions = torch.arange(start, start + tokens)
    if spec.rope is not None:
        keys = spec.rope.shift(keys, positions)
    chunk = make_chunk(seed, tokens=tokens, spec=spec)
    return KVChunk(spec, chunk.token_ids, positions, keys.to(spec.dtype).contiguous(), chunk.values)


def profile_of(chunk: KVChunk, rank: int = 256) -> Profile:
    rope, spec = chunk.spec.rope, chunk.spec
    keys = chunk.keys.float() if rope is None else rope.shift(chunk.keys.float(), -chunk.positions)
    layers = [fit_layer(GramMatrix.from_keys(layer.transpose(0, 1).flatten(1)), rank=rank) for layer in keys]
    return Profile(spec, {"lowrank.basis": torch.stack([layer["lowrank.basis"] for layer in layers])})


def error_ratio(found: Tensor, true: Tensor) -> float:
    return float((found.float() - true.float()).norm() / true.float().norm())


class TestLowRankCodec(CodecContract):
    tolerance = 8e-3

    def make_codec(self, spec: KVSpec) -> LowRankCodec:
        return LowRankCodec()


class TestOfTokensThatAreAllExact(CodecContract):
    tolerance = 4e-3

    def make_codec(self, spec: KVSpec) -> LowRankCodec:
        return LowRankCodec(rank=1, factor_bits=4, max_residual=0.0)


class TestInIntegers(CodecContract):
    tolerance = 0.12

    def make_codec(self, spec: KVSpec) -> LowRankCodec:
        return LowRankCodec(factor_bits=4)


class TestWithASharedBasis(CodecContract):
    tolerance = 4e-3

    @pytest.fixture
    def chunk(self) -> KVChunk:
        return make_chunk(7, tokens=6, start=11)

    def make_codec(self, spec: KVSpec) -> LowRankCodec:
        return LowRankCodec(factor_bits=8, profile=profile_of(make_chunk(3, tokens=100)))


@settings(max_examples=40)
@given(
    tokens=st.integers(0, 40),
    heads=st.integers(1, 3),
    half=st.integers(1, 5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    interleaved=st.booleans(),
    bits=st.sampled_from([None, 8]),
)
def test_full_rank_reproduces(
    tokens: int, heads: int, half: int, dtype: torch.dtype, interleaved: bool, bits: int | None
) -> None:
    rope = RopeSpec(tuple(100.0 ** -(i / half) for i in range(half)), interleaved=interleaved)
    spec = KVSpec("any@1", 2, heads, 2 * half, dtype, rope)
    chunk = make_chunk(tokens, tokens=tokens, spec=spec, start=9)
    codec = LowRankCodec(rank=None, factor_bits=bits)
    blob = codec.encode(chunk)
    assert blob.tensors["keys.basis"].shape[1] == min(tokens, 2 * heads * half)
    assert same_blob(from_bytes(KEY, to_bytes(KEY, blob)), blob)
    decoded = codec.decode(blob)
    assert same_bits(decoded.values, chunk.values)
    if tokens:
        assert error_ratio(decoded.keys, chunk.keys) < (0.01 if bits else 0.005)


def test_own_basis_holds_long_chunks_of_low_rank() -> None:
    chunk = low_rank_chunk(tokens=200, rank=3)
    blob = LowRankCodec(rank=3).encode(chunk)
    assert blob.tensors["keys.factor"].shape == (3, 200, 3) and blob.tensors["keys.exact_at"].shape == (3, 0)
    assert error_ratio(LowRankCodec().decode(blob).keys, chunk.keys) < 1e-3
    by_energy = LowRankCodec(rank=None, energy=0.999999).encode(chunk)
    assert by_energy.tensors["keys.factor"].shape == (3, 200, 3)
    rotated = LowRankCodec(rank=3).encode(replace(chunk, spec=replace(SPEC, rope=None)))
    assert rotated.tensors["keys.exact_at"].shape[1] > 20  # after rotation the keys are of no low rank


def test_shared_basis_stores_coordinates_alone() -> None:
    codec = LowRankCodec(rank=8, energy=0.99999, profile=profile_of(low_rank_chunk(tokens=300, rank=3, seed=1)))
    chunk = low_rank_chunk(tokens=20, rank=3, seed=2)
    blob = codec.encode(chunk)
    assert "keys.basis" not in blob.tensors and blob.tensors["keys.factor"].shape == (3, 20, 3)
    assert error_ratio(codec.decode(blob).keys, chunk.keys) < 1e-3


def test_appending_to_a_shared_basis_equals_bulk() -> None:
    codec = LowRankCodec(rank=3, profile=profile_of(low_rank_chunk(tokens=300, rank=3, seed=1)))
    chunk = low_rank_chunk(tokens=20, rank=3, seed=2)
    parts = [
        KVChunk(
            SPEC, *(t[at] for t in (chunk.token_ids, chunk.positions)), chunk.keys[:, :, at], chunk.values[:, :, at]
        )
        for at in (slice(0, 1), slice(1, 13), slice(13, 20))
    ]
    decoded = torch.cat([codec.decode(codec.encode(part)).keys for part in parts], 2)
    torch.testing.assert_close(decoded, codec.decode(codec.encode(chunk)).keys, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38, 1e5])
def test_wild_tokens_are_exact_and_harm_no_other(value: float, shared: bool) -> None:
    chunk = low_rank_chunk(tokens=40, rank=3)
    profile = profile_of(low_rank_chunk(tokens=300, rank=3, seed=1)) if shared else None
    chunk.keys[1, 0, 7, 2] = value
    chunk.keys[2, 1, 9, 0] = value
    codec = LowRankCodec(rank=3, factor_bits=8, profile=profile)
    decoded = codec.decode(codec.encode(chunk))
    assert same_bits(decoded.keys[1, :, 7], chunk.keys[1, :, 7]) and same_bits(
        decoded.keys[2, :, 9], chunk.keys[2, :, 9]
    )
    others = torch.tensor([t for t in range(40) if t not in (7, 9)])
    assert error_ratio(decoded.keys[:, :, others], chunk.keys[:, :, others]) < 0.01


def test_sinks_and_strangers_are_exact() -> None:
    chunk = low_rank_chunk(tokens=30, rank=3, start=2)
    stranger = make_chunk(5, tokens=1).keys[:, :, 0] * 5
    chunk.keys[:, :, 20] = stranger
    codec = LowRankCodec(rank=3, sink_tokens=4, profile=profile_of(low_rank_chunk(tokens=300, rank=3, seed=1)))
    blob = codec.encode(chunk)
    assert blob.tensors["keys.exact_at"].tolist() == [[0, 1, 20]] * 3
    decoded = codec.decode(blob)
    assert same_bits(decoded.keys[:, :, [0, 1, 20]], chunk.keys[:, :, [0, 1, 20]])
    moved = codec.decode(blob, chunk.positions + 77)
    torch.testing.assert_close(moved.keys[:, :, 20], ROPE.shift(chunk.keys, 77)[:, :, 20])
    assert error_ratio(decoded.keys, chunk.keys) < 1e-3
    lax = replace(codec, max_residual=None).encode(chunk)
    assert lax.tensors["keys.exact_at"].tolist() == [[0, 1]] * 3


def test_every_token_within_the_residual() -> None:
    chunk = make_chunk(1, tokens=50, start=10)
    for bound in (0.0, 0.05, 0.5, 0.8):
        codec = LowRankCodec(rank=6, max_residual=bound)
        found = codec.decode(codec.encode(chunk)).keys
        ratios = (found - chunk.keys).norm(dim=(1, 3)) / chunk.keys.norm(dim=(1, 3))
        assert float(ratios.max()) <= bound + 1e-5
        assert bool((ratios > 0.05).any()) == (bound >= 0.5)


def test_keys_take_a_twentieth_in_an_8b_model() -> None:
    spec = KVSpec("8b@1", 32, 8, 128, torch.float16, None, v_head_dim=0)
    random = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(1024, 160, generator=random))[0]
    profile = Profile(spec, {"lowrank.basis": basis.half().expand(32, -1, -1)})
    for start in (0, 256):
        keys = torch.randn(32, 256, 160, generator=random) @ basis.T
        keys = keys.unflatten(-1, (8, 128)).transpose(1, 2).half()
        positions = torch.arange(start, start + 256)
        chunk = KVChunk(spec, positions, positions, keys, keys[..., :0])
        codec = LowRankCodec(rank=160, factor_bits=4, profile=profile)
        blob = codec.encode(chunk)
        assert keys.nbytes / len(to_bytes(KEY, blob)) >= 20
        assert error_ratio(codec.decode(blob).keys, keys) < 0.15


def test_blobs_say_how_they_were_made() -> None:
    profile = profile_of(make_chunk(3, tokens=100))
    chunk = make_chunk(7, tokens=30, start=10)
    made = LowRankCodec(rank=5, factor_bits=4, profile=profile)
    other = LowRankCodec(rank=9, factor_bits=None, sink_tokens=0, profile=profile)
    assert same_chunk(other.decode(made.encode(chunk)), made.decode(made.encode(chunk)))
    own = LowRankCodec(rank=5)
    assert same_chunk(other.decode(own.encode(chunk)), own.decode(own.encode(chunk)))


def test_needs_the_profile_it_was_made_with() -> None:
    chunk = make_chunk(7)
    profile = profile_of(make_chunk(3, tokens=100))
    blob = LowRankCodec(profile=profile).encode(chunk)
    with pytest.raises(CodecError, match="no basis of its own"):
        LowRankCodec().decode(blob)
    with pytest.raises(CodecError, match="was encoded with the profile"):
        LowRankCodec(profile=profile_of(make_chunk(4, tokens=100))).decode(blob)
    with pytest.raises(SpecMismatchError, match="made for"):
        LowRankCodec(profile=profile).encode(make_chunk(7, spec=replace(SPEC, model_id="other@1")))
    with pytest.raises(CodecError, match="kvloom calibrate"):
        LowRankCodec(profile=Profile(SPEC, {})).encode(chunk)
    with pytest.raises(CodecError, match="expected"):
        LowRankCodec(profile=Profile(SPEC, {"lowrank.basis": torch.zeros(3, 8, 4)})).encode(chunk)


def test_refuses_parts_that_contradict() -> None:
    for codec in (LowRankCodec(), LowRankCodec(factor_bits=4)):
        blob = codec.encode(make_chunk(7, tokens=6))
        for name in blob.tensors.keys() - {"token_ids", "positions"}:
            whole = blob.tensors[name]
            for wrong in (whole[:, :-1], whole[..., :-1], whole.double()):
                if wrong.shape == whole.shape and wrong.dtype == whole.dtype:
                    continue
                cut = EncodedChunk(blob.codec, {**blob.tensors, name: wrong.contiguous()}, blob.meta, blob.layered)
                with pytest.raises(CodecError):
                    codec.decode(cut)
            some = {n: t for n, t in blob.tensors.items() if n != name}
            with pytest.raises(CodecError):
                codec.decode(EncodedChunk(blob.codec, some, blob.meta, blob.layered - {name}))


@pytest.mark.parametrize(
    "change",
    [
        {"factor_bits": 8},
        {"factor_bits": 4.0},
        {"factor_bits": None},
        {"factor_bits": "4"},
        {"profile": "0" * 64},
        {"values": {"codec": "other"}},
        {"values": None},
    ],
)
def test_refuses_parameters_that_contradict(change: dict[str, object]) -> None:
    codec = LowRankCodec(factor_bits=4)
    blob = codec.encode(make_chunk(7))
    parameters = json.loads(blob.meta["parameters"]) | change
    with pytest.raises(CodecError):
        codec.decode(
            EncodedChunk(blob.codec, blob.tensors, blob.meta | {"parameters": json.dumps(parameters)}, blob.layered)
        )


@pytest.mark.parametrize("at", [-1, 5, 2**31 - 1])
def test_refuses_exact_tokens_beyond_the_chunk(at: int) -> None:
    codec = LowRankCodec()
    blob = codec.encode(make_chunk(7))
    wrong = blob.tensors["keys.exact_at"].clone()
    wrong[1, 0] = at
    with pytest.raises(CodecError, match="exact tokens"):
        codec.decode(EncodedChunk(blob.codec, {**blob.tensors, "keys.exact_at": wrong}, blob.meta, blob.layered))


@pytest.mark.parametrize("wrong", [{"factor_bits": 3}, {"rank": 0}, {"energy": 0.0}, {"energy": 1.5}])
def test_refuses_wrong_parameters(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        LowRankCodec(**wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="EncodesValues"):
        LowRankCodec(values="raw")  # type: ignore[arg-type]


def test_stored_form_is_fixed() -> None:
    basis = torch.eye(16)[:, :4].expand(3, -1, -1).contiguous()
    keys = (torch.arange(3 * 2 * 6 * 8).reshape(3, 2, 6, 8) * 37 % 101 - 50) / 16
    spec = replace(SPEC, rope=None)
    chunk = KVChunk(spec, torch.arange(6), torch.arange(2, 8), keys, -keys)
    codec = LowRankCodec(RawCodec(), rank=4, factor_bits=4, profile=Profile(spec, {"lowrank.basis": basis}))
    blob = codec.encode(chunk)
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(blob.tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode() + tensor.numpy().tobytes())
    assert digest.hexdigest() == "514c89df049d2d68"
