"""KVQuant's codec against its contract, its algebra, its bytes and damaged chunks."""

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvloom.calibration.model_profile import Profile
from kvloom.compress.kernels.ops import pack_bits
from kvloom.compress.nuq import dequantise as dequantise_module
from kvloom.compress.nuq.codes import Codes, Grid, RotaryAngles
from kvloom.compress.nuq.dequantise import dequantise, dequantise_slowly
from kvloom.compress.nuq.nuq import NuqCodec
from kvloom.compress.nuq.nuq_fit import fit_layer
from kvloom.compress.nuq.outliers import channel_bytes, outliers_per_token, pack_channels, unpack_channels
from kvloom.compress.values import EncodesValues
from kvloom.core import EncodedChunk, KVChunk, KVSpec, RopeSpec
from kvloom.errors import CodecError, SpecMismatchError
from kvloom.kvstore.format import from_bytes, to_buffers
from kvloom.testing import SPEC, CodecContract, make_chunk, make_key, same_bits, same_blob, same_chunk
from kvloom.testing.codec import SPECS


def make_profile(spec: KVSpec = SPEC, *, bits: Sequence[int] = (1, 2, 3, 4, 5, 6, 7, 8), tokens: int = 400) -> Profile:
    """Fitted to normal numbers, as `make_chunk` draws them; rotation does not change their distribution."""
    random = torch.Generator().manual_seed(1)
    layers = []
    for _ in range(spec.num_layers):
        keys = torch.randn(tokens, spec.num_kv_heads * spec.head_dim, generator=random)
        values = torch.randn(tokens, spec.num_kv_heads * spec.value_dim, generator=random)
        layers.append(
            fit_layer(keys, torch.ones_like(keys), values, torch.ones_like(values), heads=spec.num_kv_heads, bits=bits)
        )
    return Profile(spec, {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]})


PROFILE = make_profile()
PROFILES = {spec: make_profile(spec, bits=(4,)) for spec in SPECS}


class TestNuqCodec(CodecContract):
    tolerance = 0.12

    def make_codec(self, spec: KVSpec) -> NuqCodec:
        return NuqCodec(PROFILES[spec])

    def test_values_stand_alone(self, codec: NuqCodec) -> None:
        assert isinstance(codec, EncodesValues)
        chunk = make_chunk(7, start=11)
        alone, blob = codec.encode_values(SPEC, chunk.values, 0), codec.encode(chunk)
        assert alone.keys() == codec.value_names and codec.value_names <= blob.layered
        assert all(same_bits(alone[name], blob.tensors[name]) for name in alone)
        parameters = {"bits": 4, "outlier_ratio": 0.01, "q_norm": False, "profile": codec.profile.fingerprint}
        decoded = codec.decode_values(SPEC, alone, 0, 5, parameters)
        assert same_bits(decoded, codec.decode(blob).values)
        part = {name: tensor[1:] for name, tensor in alone.items()}
        assert same_bits(codec.decode_values(SPEC, part, 1, 5, parameters), decoded[1:])
        for wrong, first_layer, tokens in ((alone, 1, 5), (alone, 0, 4), (part, 3, 5), ({}, 0, 5)):
            with pytest.raises(CodecError):
                codec.decode_values(SPEC, wrong, first_layer, tokens, parameters)


def relative_error(found: Tensor, true: Tensor) -> float:
    return float((found.float() - true.float()).norm() / true.float().norm())


def test_error_vanishes_as_bits_grow() -> None:
    chunk, errors = make_chunk(1, tokens=64, start=100), []
    for bits in range(1, 9):
        codec = NuqCodec(PROFILE, bits=bits, outlier_ratio=0.1)
        decoded = codec.decode(codec.encode(chunk))
        errors.append((relative_error(decoded.keys, chunk.keys), relative_error(decoded.values, chunk.values)))
    # A bit more halves the step, but not what lies beyond the last level.
    assert all(b < 0.85 * a for before, after in itertools.pairwise(errors) for a, b in zip(before, after, strict=True))
    assert max(errors[3]) < 0.1 and max(errors[7]) < 0.02


def test_error_vanishes_as_outliers_grow() -> None:
    chunk, errors = make_chunk(1, tokens=64, start=100), []
    for outlier_ratio in (0.0, 0.1, 0.3, 0.6, 1.0):
        codec = NuqCodec(PROFILE, bits=2, outlier_ratio=outlier_ratio)
        decoded = codec.decode(codec.encode(chunk))
        errors.append((relative_error(decoded.keys, chunk.keys), relative_error(decoded.values, chunk.values)))
    assert all(b < a for before, after in itertools.pairwise(errors) for a, b in zip(before, after, strict=True))
    assert errors[-1][0] < 1e-6 and errors[-1][1] == 0.0


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.model_id)
def test_all_outliers_is_the_identity(spec: KVSpec) -> None:
    chunk = make_chunk(2, tokens=9, spec=spec, start=40)
    codec = NuqCodec(PROFILES[spec], outlier_ratio=1.0)
    decoded = codec.decode(codec.encode(chunk))
    assert same_bits(decoded.values, chunk.values)
    if spec.rope is None:
        assert same_bits(decoded.keys, chunk.keys)
    else:
        step = torch.finfo(spec.dtype).eps
        assert bool(
            ((decoded.keys - chunk.keys).float().abs() <= 4 * step * chunk.keys.float().abs().amax(-1)[..., None]).all()
        )


def test_outliers_go_where_errors_are_largest() -> None:
    chunk = make_chunk(3, tokens=20, start=5)
    chunk.values[1, 1, 7, 3] = 50.0
    codec = NuqCodec(PROFILE, bits=2)
    found = codec.decode(codec.encode(chunk))
    assert found.values[1, 1, 7, 3] == 50.0
    others = torch.ones_like(found.values, dtype=torch.bool)
    others[1, 1, 7, 3] = False
    plain = codec.decode(codec.encode(make_chunk(3, tokens=20, start=5)))
    assert float((found.values - plain.values)[others].abs().max()) < 2.0


@pytest.mark.slow
@given(st.lists(st.integers(0, 6), min_size=1, max_size=4), st.sampled_from([1, 3, 4]), st.integers(0, 99))
def test_token_by_token_is_bulk(parts: list[int], bits: int, seed: int) -> None:
    chunk = make_chunk(seed, tokens=sum(parts), start=0)
    if len(chunk):
        chunk.keys[0, 0, -1, 0] = float("nan")
    codec = NuqCodec(PROFILE, bits=bits, sink_tokens=2)
    whole, start, encoded = codec.encode(chunk), 0, []
    for tokens in parts:
        run = slice(start, start + tokens)
        halves = chunk.keys[:, :, run], chunk.values[:, :, run]
        encoded.append(codec.encode(KVChunk(SPEC, chunk.token_ids[run], chunk.positions[run], *halves)))
        start += tokens
    start = 0
    for tokens, blob in zip(parts, encoded, strict=True):
        for half in ("keys", "values"):
            blob.tensors[f"{half}.exact_tokens"].add_(start)
        start += tokens
    for name, tensor in whole.tensors.items():
        along = 0 if name not in whole.layered else 2 if name.endswith((".codes", ".exact")) else 1
        assert same_bits(torch.cat([blob.tensors[name] for blob in encoded], along), tensor), name


def test_layers_encode_alone() -> None:
    chunk, codec = make_chunk(4, start=9), NuqCodec(PROFILE, bits=3)
    alone = KVChunk(SPEC, chunk.token_ids, chunk.positions, chunk.keys[1:2], chunk.values[1:2], first_layer=1)
    assert same_blob(codec.encode(alone), codec.encode(chunk).layers(1, 2))
    nothing = KVChunk(SPEC, chunk.token_ids, chunk.positions, chunk.keys[:0], chunk.values[:0], first_layer=2)
    assert same_chunk(codec.decode(codec.encode(nothing)), nothing)


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens: int) -> None:
    chunk, codec = make_chunk(5, tokens=tokens, start=3), NuqCodec(PROFILE)
    decoded = codec.decode(codec.encode(chunk))
    assert decoded.keys.shape == chunk.keys.shape and torch.allclose(decoded.values, chunk.values, atol=0.5)


def test_sinks_are_exact_wherever_they_go() -> None:
    chunk, codec = make_chunk(6, tokens=8, start=0), NuqCodec(PROFILE, bits=2, sink_tokens=3)
    blob = codec.encode(chunk)
    assert blob.tensors["keys.exact"].shape == (3, 2, 3, 8)
    decoded = codec.decode(blob)
    assert same_bits(decoded.keys[:, :, :3], chunk.keys[:, :, :3])
    assert same_bits(decoded.values[:, :, :3], chunk.values[:, :, :3])
    assert not torch.equal(decoded.keys[:, :, 3:], chunk.keys[:, :, 3:])
    assert SPEC.rope is not None
    moved = codec.decode(blob, chunk.positions + 70)
    assert same_bits(moved.keys[:, :, :3], SPEC.rope.shift(chunk.keys, 70)[:, :, :3])
    later = codec.encode(make_chunk(6, tokens=8, start=2)).tensors
    assert later["keys.exact_tokens"].tolist() == [[0]] * 3
    assert codec.encode(make_chunk(6, tokens=8, start=3)).tensors["keys.exact"].numel() == 0


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("half", ["keys", "values"])
def test_numbers_that_are_not_finite_stay(half: str, number: float) -> None:
    codec, plain = NuqCodec(PROFILE), make_chunk(8, tokens=8, start=5)
    chunk = make_chunk(8, tokens=8, start=5)
    getattr(chunk, half)[1, 1, 4, 2] = number
    decoded, undisturbed = codec.decode(codec.encode(chunk)), codec.decode(codec.encode(plain))
    others = [0, 1, 2, 3, 5, 6, 7]
    for name in ("keys", "values"):
        assert same_bits(getattr(decoded, name)[:, :, others], getattr(undisturbed, name)[:, :, others])
    assert same_bits(getattr(decoded, half)[:, :, 4], getattr(chunk, half)[:, :, 4])


@pytest.mark.parametrize(
    ("dtype", "size", "clipped_limit"),
    [(torch.float16, 6e4, 1.0), (torch.bfloat16, 1e35, 0.1), (torch.float32, 3e38, 0.1)],
)
def test_numbers_too_large_for_outliers_and_ranges_stay(dtype: torch.dtype, size: float, clipped_limit: float) -> None:
    spec = replace(SPEC, dtype=dtype)
    chunk = make_chunk(9, tokens=6, spec=spec, start=5)
    chunk.keys[0, 0, 3] = size
    chunk.values[2, :, 4] = size * torch.linspace(-1, 1, 8)
    codec = NuqCodec(PROFILE, clipped_limit=clipped_limit)
    decoded = codec.decode(codec.encode(chunk))
    assert bool(decoded.keys.isfinite().all()) and bool(decoded.values.isfinite().all())
    assert same_bits(decoded.keys[:, :, 3], chunk.keys[:, :, 3])
    assert relative_error(decoded.values[2, :, 4] / size, chunk.values[2, :, 4] / size) < 0.1


def test_tokens_unlike_the_calibration_are_kept_exact() -> None:
    chunk, codec = make_chunk(10, tokens=40, start=5), NuqCodec(PROFILE, clipped_limit=0.2)
    assert float(codec.clipped_ratio(chunk).mean()) < 0.05
    assert codec.encode(chunk).tensors["keys.exact"].numel() == 0
    chunk.keys[:, :, 7:9] *= 20
    assert float(codec.clipped_ratio(chunk)[7:9].min()) > 0.5
    blob = codec.encode(chunk)
    assert blob.tensors["keys.exact_tokens"].tolist() == [[7, 8]] * 3
    assert same_bits(codec.decode(blob).keys[:, :, 7:9], chunk.keys[:, :, 7:9])


def test_decodes_by_the_chunks_parameters() -> None:
    chunk = make_chunk(11, start=5)
    made_with = NuqCodec(PROFILE, bits=3, outlier_ratio=0.2, q_norm=True)
    blob = made_with.encode(chunk)
    assert same_chunk(NuqCodec(PROFILE, bits=4).decode(blob), made_with.decode(blob))


def test_q_norm_scales_levels() -> None:
    chunk = make_chunk(12, start=5)
    tensors = dict(PROFILE.tensors)
    for half in ("keys", "values"):
        tensors[f"nuq.{half}.q_norm.4"] = torch.tensor([[1.0, 0.0], [2.0, 0.5], [1.0, 0.0]])
    codec = NuqCodec(Profile(SPEC, dict(tensors)), outlier_ratio=0.0, q_norm=True)
    for half in ("keys", "values"):
        tensors[f"nuq.{half}.levels.4"] = tensors[f"nuq.{half}.levels.4"] * torch.tensor([1.0, 2.0, 1.0])[:, None, None]
        tensors[f"nuq.{half}.levels.4"][1] += 0.5
    spelt_out = NuqCodec(Profile(SPEC, tensors), outlier_ratio=0.0)
    assert torch.equal(codec.decode(codec.encode(chunk)).keys, spelt_out.decode(spelt_out.encode(chunk)).keys)


def test_refuses_another_model_and_missing_tables() -> None:
    codec = NuqCodec(PROFILE)
    other = replace(SPEC, model_id="other@1")
    with pytest.raises(SpecMismatchError, match="calibrate"):
        codec.encode(make_chunk(1, spec=other))
    with pytest.raises(SpecMismatchError, match="calibrate"):
        codec.encode_values(other, make_chunk(1).values, 0)
    few = Profile(SPEC, {name: tensor for name, tensor in PROFILE.tensors.items() if not name.endswith(".3")})
    with pytest.raises(CodecError, match="calibrate"):
        NuqCodec(few, bits=3).encode(make_chunk(1))
    blob = codec.encode(make_chunk(1))
    with pytest.raises(CodecError, match="profile"):
        NuqCodec(few).decode(blob)


@pytest.mark.parametrize(
    "parameters",
    [
        {"bits": 0},
        {"bits": 9},
        {"outlier_ratio": -0.1},
        {"outlier_ratio": 1.1},
        {"sink_tokens": -1},
        {"clipped_limit": 2.0},
    ],
)
def test_refuses_parameters(parameters: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        NuqCodec(PROFILE, **parameters)  # type: ignore[arg-type]


BLOB = NuqCodec(PROFILE, sink_tokens=2).encode(make_chunk(13, tokens=5, start=0))


@pytest.mark.parametrize("name", sorted(BLOB.tensors))
@pytest.mark.parametrize("dim", [0, -1])
def test_refuses_truncated_tensors(name: str, dim: int) -> None:
    tensor = BLOB.tensors[name]
    cut = {**BLOB.tensors, name: tensor.narrow(dim, 0, tensor.shape[dim] - 1)}
    with pytest.raises(CodecError):
        NuqCodec(PROFILE).decode(EncodedChunk("nuq", cut, BLOB.meta, BLOB.layered))


@pytest.mark.parametrize("name", sorted(BLOB.layered))
def test_refuses_other_dtypes(name: str) -> None:
    changed = {**BLOB.tensors, name: BLOB.tensors[name].to(torch.int64)}
    with pytest.raises(CodecError):
        NuqCodec(PROFILE).decode(EncodedChunk("nuq", changed, BLOB.meta, BLOB.layered))


@pytest.mark.parametrize(
    "change",
    [
        *({"bits": bits} for bits in (3, "4", 99, None, 0)),
        *({"outlier_ratio": ratio} for ratio in (0.5, 2, -1, None)),
        *({"profile": profile} for profile in ("0" * 64, None)),
        {"q_norm": "no"},
    ],
    ids=str,
)
def test_refuses_other_parameters(change: dict[str, object]) -> None:
    meta = {**BLOB.meta, "parameters": json.dumps(json.loads(BLOB.meta["parameters"]) | change)}
    with pytest.raises(CodecError):
        NuqCodec(PROFILE).decode(EncodedChunk("nuq", BLOB.tensors, meta, BLOB.layered))


@pytest.mark.parametrize(
    ("name", "number"),
    [("keys.channels", 16), ("values.channels", 255), ("keys.exact_tokens", 5), ("values.exact_tokens", -1)],
)
def test_refuses_numbers_beyond_what_there_is(name: str, number: int) -> None:
    damaged = BLOB.tensors[name].clone()
    damaged[0, 0] = number
    with pytest.raises(CodecError, match="nuq chunk"):
        NuqCodec(PROFILE).decode(EncodedChunk("nuq", {**BLOB.tensors, name: damaged}, BLOB.meta, BLOB.layered))


@pytest.mark.parametrize(
    "change",
    [{"rope": RopeSpec((1.0, 0.1))}, {"num_layers": 9}, {"num_kv_heads": 1, "head_dim": 16}, {"model_id": "x"}],
    ids=str,
)
def test_refuses_a_spec_that_is_not_the_profiles(change: dict[str, Any]) -> None:
    meta = {**BLOB.meta, "spec": replace(SPEC, **change).to_json(), "first_layer": "0"}
    with pytest.raises(CodecError, match="calibrate"):
        NuqCodec(PROFILE).decode(EncodedChunk("nuq", BLOB.tensors, meta, BLOB.layered))


LITERAL = KVSpec("literal@1", num_layers=1, num_kv_heads=2, head_dim=8, dtype=torch.float16, rope=None)
GOLDEN = {
    1: "4772ed93f62dc4b5069467ddb36eb18c",
    2: "839b4a25233c5fdc0dacf9668b3939a7",
    3: "2f9abd1bb7a7842ead55b04d3fd37b8d",
    4: "83dc644ccaacbe5bddf37072a10294a7",
    8: "cd0aa77e349af27c76dbe42015e6b058",
}


def literal_profile() -> Profile:
    """Numbers that every machine computes alike: small multiples of powers of two."""
    steps = torch.arange(16.0)[None]
    tensors = {"nuq.keys.low": steps * 0 - 4, "nuq.keys.high": steps * 0 + 4}
    for half in ("keys", "values"):
        tensors[f"nuq.{half}.weight"] = steps + 1
        for bits in GOLDEN:
            levels = (torch.arange(2.0**bits) + 0.5) / 2 ** (bits - 1) - 1
            tensors[f"nuq.{half}.levels.{bits}"] = (levels * levels.abs())[None, None]
            suffix = f".{bits}" if half == "keys" else ""
            tensors[f"nuq.{half}.scale{suffix}"] = 2.0 ** (steps % 3)
            tensors[f"nuq.{half}.zero{suffix}"] = (steps - 8) / 16
    return Profile(LITERAL, tensors)


def digest(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode() + tensor.numpy().tobytes())
    return found.hexdigest()


@pytest.mark.parametrize("bits", GOLDEN)
def test_golden_containers(bits: int) -> None:
    """Chunks of earlier releases must be readable: a change here needs a new codec name."""
    numbers = ((torch.arange(2 * 2 * 6 * 8) * 37) % 101 - 50) / 16
    keys, values = numbers.half().view(2, 1, 2, 6, 8)
    chunk = KVChunk(LITERAL, torch.arange(6), torch.arange(6), keys, values)
    codec = NuqCodec(literal_profile(), bits=bits, outlier_ratio=0.1)
    blob = codec.encode(chunk)
    decoded = codec.decode(blob)
    assert digest(blob.tensors | {"decoded keys": decoded.keys, "decoded values": decoded.values}) == GOLDEN[bits]


LARGE = KVSpec(
    "8b@1", num_layers=32, num_kv_heads=8, head_dim=128, dtype=torch.float16,
    rope=RopeSpec(tuple(500000.0 ** -(i / 64) for i in range(64))),
)  # fmt: skip


def large_profile() -> Profile:
    ones = torch.ones(32, 1024)
    tensors = {"nuq.keys.low": -3 * ones, "nuq.keys.high": 3 * ones}
    for half in ("keys", "values"):
        tensors |= {f"nuq.{half}.weight": ones, f"nuq.{half}.scale": ones, f"nuq.{half}.zero": 0 * ones}
        for bits in (2, 3, 4):
            tensors |= {f"nuq.{half}.scale.{bits}": 2 * ones, f"nuq.{half}.zero.{bits}": 0 * ones}
            tensors[f"nuq.{half}.levels.{bits}"] = torch.linspace(-1, 1, 2**bits).repeat(32, 1, 1)
    return Profile(LARGE, tensors)


@pytest.mark.parametrize(("bits", "least"), [(4, 3.7), (3, 4.8), (2, 6.9)])
def test_bytes_of_a_large_models_chunk(bits: int, least: float) -> None:
    """KVQuant's nominal figures, with everything counted: 256 tokens on disk, of which 4 tell the size."""
    codec, tokens = NuqCodec(large_profile(), bits=bits), 256
    blobs = [codec.encode(make_chunk(1, tokens=n, spec=LARGE, start=1000)) for n in (1, 4)]
    assert blobs[0].tensors["keys.outliers"].shape == (32, 1, 11)
    token_bytes = (blobs[1].nbytes - blobs[0].nbytes) // 3
    assert blobs[1].nbytes == 4 * token_bytes
    header_bytes = sum(len(buffer) for buffer in to_buffers(make_key(1), blobs[1])) - blobs[1].nbytes
    assert header_bytes < 16384
    assert tokens * LARGE.token_bytes >= least * (tokens * token_bytes + header_bytes + 64)


@given(st.integers(1, 40), st.sampled_from([1, 255, 256, 257, 300, 1024, 4096, 65536]), st.integers(0, 99))
def test_channels_round_trip(k: int, channels: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    indices = torch.randint(0, channels, (2, 3, k), generator=random)
    packed = pack_channels(indices, channels)
    assert packed.shape == (2, 3, channel_bytes(k, channels)) and packed.dtype == torch.uint8
    assert torch.equal(unpack_channels(packed, k, channels), indices.to(torch.int32))


def test_outlier_counts() -> None:
    assert [outliers_per_token(ratio, 1024) for ratio in (0.0, 1e-6, 0.01, 0.5, 1.0)] == [0, 1, 11, 512, 1024]
    assert outliers_per_token(0.07, 100) == 7 and outliers_per_token(0.01, 0) == 0
    assert channel_bytes(11, 1024) == 15 and channel_bytes(2, 128) == 2
    with pytest.raises(ValueError, match="65536"):
        channel_bytes(1, 65537)
    with pytest.raises(ValueError, match="outlier"):
        unpack_channels(torch.zeros(3, 4, dtype=torch.uint8), 5, 100)


def make_codes(seed: int, L: int, H: int, T: int, D: int, bits: int, ranges: bool) -> tuple[Grid, Codes]:
    random = torch.Generator().manual_seed(seed)
    levels = torch.randn(L, H, 2**bits, generator=random)
    grid = Grid(levels, torch.rand(L, H, D, generator=random), torch.randn(L, H, D, generator=random))
    k = min(3, H * D)
    codes = Codes(
        pack_bits(torch.randint(0, 2**bits, (L, H, T, D), generator=random).to(torch.uint8), bits),
        torch.rand(L, T, 2, generator=random) if ranges else None,
        pack_channels(torch.rand(L, T, H * D, generator=random).topk(k).indices, H * D),
        torch.randn(L, T, k, generator=random),
    )
    return grid, codes


def make_rotation(D: int, T: int, turning: str) -> RotaryAngles | None:
    if turning == "none" or D % 2:
        return None
    rope = RopeSpec(tuple(10000.0 ** -(2 * i / D) for i in range(D // 2)), interleaved=turning == "pairs")
    return RotaryAngles.at(torch.arange(T) * 7 + 3, rope)


@given(
    st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(0, 5), st.sampled_from([1, 8, 20, 33, 64, 128])),
    st.integers(1, 8),
    st.booleans(),
    st.sampled_from(["none", "halves", "pairs"]),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_compiled_gives_the_references_bits(
    shape: tuple[int, int, int, int], bits: int, ranges: bool, turning: str, dtype: torch.dtype
) -> None:
    kernel = pytest.importorskip("kvloom.compress.nuq.dequantise_numba").dequantise_compiled
    grid, codes = make_codes(1, *shape, bits, ranges)
    rotation = make_rotation(shape[3], shape[2], turning)
    assert same_bits(kernel(grid, codes, rotation, dtype), dequantise_slowly(grid, codes, rotation, dtype))


@pytest.mark.parametrize("D", [60, 64, 124, 128, 256])  # codes of 16 channels side by side, where there are enough
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_compiled_gives_the_references_bits_at_usual_widths(bits: int, D: int) -> None:
    kernel = pytest.importorskip("kvloom.compress.nuq.dequantise_numba").dequantise_compiled
    for dtype, turning in itertools.product(
        (torch.float16, torch.bfloat16, torch.float32), ("none", "halves", "pairs")
    ):
        grid, codes = make_codes(bits, 2, 3, 5, D, bits, ranges=turning == "none")
        rotation = make_rotation(D, 5, turning)
        assert same_bits(kernel(grid, codes, rotation, dtype), dequantise_slowly(grid, codes, rotation, dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_compiled_rounds_as_torch_does(dtype: torch.dtype) -> None:
    kernel = pytest.importorskip("kvloom.compress.nuq.dequantise_numba").dequantise_compiled
    grid, codes = make_codes(1, 1, 1, 64, 64, 4, ranges=False)
    scale = 2.0 ** torch.linspace(-30, 18, 64)  # subnormal, ordinary and too large for half precision
    grid = Grid(grid.levels, scale[None, None], torch.zeros(1, 1, 64))
    assert same_bits(kernel(grid, codes, None, dtype), dequantise_slowly(grid, codes, None, dtype))


def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("kvloom.compress.nuq.dequantise_numba")
    monkeypatch.setattr(module, "_BYTES_PER_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    grid, codes = make_codes(1, 4, 2, 5, 16, 4, ranges=True)
    found = module.dequantise_compiled(grid, codes, None, torch.float16)
    assert same_bits(found, dequantise_slowly(grid, codes, None, torch.float16))


def test_works_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    codec, chunk = NuqCodec(PROFILE), make_chunk(14, start=2)
    blob = codec.encode(chunk)
    found = codec.decode(blob)
    monkeypatch.setattr(dequantise_module, "_kernel", lambda: None)
    assert same_chunk(codec.decode(blob), found)


def test_rotation_is_that_of_the_rope() -> None:
    rows, positions = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 3, 50, 4000])
    for interleaved in (False, True):
        rope = RopeSpec(tuple(100.0 ** -(i / 4) for i in range(4)), interleaved=interleaved)
        assert torch.allclose(RotaryAngles.at(positions, rope).rotate(rows), rope.shift(rows, positions), atol=1e-6)


def test_dense_and_sparse_products_add_up() -> None:
    """A product with the decoded keys is that with the codes alone plus that with the outliers' residuals."""
    grid, codes = make_codes(2, 1, 2, 16, 8, 3, ranges=False)
    rotation = make_rotation(8, 16, "halves")
    query = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(3))
    none = Codes(codes.packed, None, codes.channels[..., :0], codes.outliers[..., :0])
    flat = dequantise(grid, none, None, torch.float32)[0].transpose(0, 1).reshape(16, 16)
    residual = torch.zeros(16, 16)
    channels = unpack_channels(codes.channels[0], 3, 16).long()
    residual.scatter_(1, channels, codes.outliers[0] - flat.gather(1, channels))
    assert rotation is not None and int(residual.count_nonzero()) == 48
    sparse = rotation.rotate(residual.view(16, 2, 8).transpose(0, 1))
    both = dequantise(grid, codes, rotation, torch.float32)[0] @ query.mT
    parts = dequantise(grid, none, rotation, torch.float32)[0] @ query.mT + sparse @ query.mT
    assert torch.allclose(both, parts, atol=1e-5)


def test_survives_the_container() -> None:
    codec, chunk = NuqCodec(PROFILE, bits=3, sink_tokens=2), make_chunk(15, start=0)
    blob = codec.encode(chunk)
    stored = from_bytes(make_key(1), b"".join(to_buffers(make_key(1), blob)))
    assert same_blob(stored, blob) and same_chunk(codec.decode(stored), codec.decode(blob))


def test_decodes_into_the_memory_it_is_given() -> None:
    pytest.importorskip("numba")
    codec, chunk, given = NuqCodec(PROFILE), make_chunk(16, start=2), []

    def memory(nbytes: int) -> Tensor:
        given.append(torch.zeros(nbytes, dtype=torch.uint8))
        return given[-1]

    blob = codec.encode(chunk)
    found = codec.decode_into(blob, None, memory)
    assert same_chunk(found, codec.decode(blob))
    assert {found.keys.data_ptr(), found.values.data_ptr()} == {one.data_ptr() for one in given}
    with pytest.raises(ValueError, match="multiple of 64"):
        codec.decode_into(blob, None, lambda nbytes: torch.zeros(nbytes + 1, dtype=torch.uint8)[1:])
