"""The KV4 codec (QServe): per head and token, with SmoothAttention."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvloom.calibration.model_profile import Profile
from kvloom.compress.kv4 import Kv4Codec, fit_smoothing
from kvloom.core import KVChunk, KVSpec, RopeSpec
from kvloom.errors import CodecError, SpecMismatchError
from kvloom.testing import SPEC, CodecContract, make_chunk, same_bits, same_chunk
from kvloom.testing.codec import SPECS

from ..support.coding import (
    INTERLEAVED,
    PLAIN,
    SPEC_8B,
    accepted,
    assert_strange_tokens_are_exact,
    assert_values_stand_alone,
    digest,
    with_meta,
)


def make_profile(spec: KVSpec = SPEC, seed: int = 1) -> Profile:
    """Factors from 0.5 to 4, equal in pairs."""
    half = torch.rand(
        spec.num_layers, spec.num_kv_heads, spec.head_dim // 2, generator=torch.Generator().manual_seed(seed)
    )
    factors = (half * 3.5 + 0.5).repeat(1, 1, 2)
    return Profile(spec, {"smooth.keys": factors})


class TestKv4(CodecContract):
    tolerance = 0.12

    def make_codec(self, spec: KVSpec) -> Kv4Codec:
        return Kv4Codec()


class TestKv8(CodecContract):
    tolerance = 0.01

    def make_codec(self, spec: KVSpec) -> Kv4Codec:
        return Kv4Codec(8)


class TestKv4BeforeRotation(CodecContract):
    tolerance = 0.12

    def make_codec(self, spec: KVSpec) -> Kv4Codec:
        return Kv4Codec(rotated=False)


class TestSmoothed(CodecContract):
    tolerance = 0.15

    @pytest.fixture
    def chunk(self) -> KVChunk:
        return make_chunk(7, tokens=6, start=11)  # of the model that the profile is made for

    def make_codec(self, spec: KVSpec) -> Kv4Codec:
        return Kv4Codec(profile=make_profile())


@given(
    bits=st.sampled_from([4, 8]),
    smoothed=st.booleans(),
    rotated=st.booleans(),
    tokens=st.integers(0, 9),
    offset=st.sampled_from([0.0, 5.0]),
    seed=st.integers(0, 99),
)
def test_error_is_at_most_half_a_step(
    bits: int, smoothed: bool, rotated: bool, tokens: int, offset: float, seed: int
) -> None:
    """Half of the stored step times the factor of the channel; where keys are rotated, of the pair's greater one."""
    chunk = make_chunk(seed, tokens=tokens, start=seed)
    chunk = KVChunk(SPEC, chunk.token_ids, chunk.positions, chunk.keys + offset, chunk.values - offset)
    profile = make_profile() if smoothed else None
    codec = Kv4Codec(bits, profile, rotated)
    blob = codec.encode(chunk)
    decoded = codec.decode(blob)
    top = 2**bits - 1
    factors = torch.ones(3, 2, 8) if profile is None else profile["smooth.keys"]
    coded = chunk.keys if rotated else SPEC.rope.shift(chunk.keys, -chunk.positions)
    for name, found, true, plain, factor in (
        ("keys", decoded.keys, chunk.keys, coded / factors[:, :, None], factors[:, :, None]),
        ("values", decoded.values, chunk.values, chunk.values, torch.ones(())),
    ):
        scale = blob.tensors[f"{name}_scale"].float()
        if tokens:
            spread = plain.amax(-1, keepdim=True) - plain.amin(-1, keepdim=True)
            assert bool((scale <= spread / top * 1.002 + 0.01 / top).all())  # rounded to float16, no wider
        bound = scale / 2 * factor
        if name == "keys" and not rotated:
            bound = bound * 2**0.5
        assert bool(((found - true).abs() <= bound * 1.0001 + 1e-5).all())


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_fitted_factors(interleaved: bool, alpha: float) -> None:
    keys = torch.randn(40, 3, 6, generator=torch.Generator().manual_seed(1))
    keys[:, 1, 2] *= 50
    keys[:, 2] = 0.0
    factors = fit_smoothing(keys, alpha, interleaved=interleaved)
    assert factors.shape == (3, 6) and factors.dtype == torch.float32
    for h in range(2):
        for d in range(6):
            partner = (d ^ 1) if interleaved else (d + 3) % 6
            largest = max(keys[:, h, d].abs().max().item(), keys[:, h, partner].abs().max().item())
            assert factors[h, d].item() == pytest.approx(largest**alpha, rel=1e-5)
    assert torch.equal(factors[2], torch.ones(6))


@pytest.mark.parametrize("spec", [SPEC, INTERLEAVED])
def test_fitted_factors_commute_with_rotation(spec: KVSpec) -> None:
    keys = make_chunk(1, tokens=20, spec=spec).keys[0]
    factors = fit_smoothing(keys.transpose(0, 1), interleaved=spec.rope.interleaved)[:, None]
    positions = torch.arange(100, 120)
    moved_first, divided_first = spec.rope.shift(keys, positions) / factors, spec.rope.shift(keys / factors, positions)
    assert torch.allclose(moved_first, divided_first, atol=1e-5)
    wrong = fit_smoothing(keys.transpose(0, 1), interleaved=not spec.rope.interleaved)[:, None]
    assert not torch.allclose(
        spec.rope.shift(keys, positions) / wrong, spec.rope.shift(keys / wrong, positions), atol=0.01
    )


@pytest.mark.parametrize(
    "keys", [torch.zeros(0, 2, 4), torch.zeros(3, 2, 5), torch.zeros(3, 4), torch.full((3, 2, 4), torch.nan)]
)
def test_fit_refuses(keys: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="keys"):
        fit_smoothing(keys)


def test_smoothing_saves_the_small_channels_of_keys_with_outliers() -> None:
    """What it is for: one channel a hundred times the others takes all levels of its head, unless it is divided."""
    chunk = make_chunk(1, tokens=64)
    keys = chunk.keys.clone()
    keys[..., 1] *= 100
    keys[..., 5] *= 100
    chunk = KVChunk(SPEC, chunk.token_ids, chunk.positions, SPEC.rope.shift(keys, chunk.positions), chunk.values)
    factors = torch.stack([fit_smoothing(layer.transpose(0, 1)) for layer in keys])
    smooth = Kv4Codec(profile=Profile(SPEC, {"smooth.keys": factors}))
    small = [0, 2, 3, 4, 6, 7]
    errors = [
        (codec.decode(codec.encode(chunk)).keys - chunk.keys)[..., small].norm() for codec in (Kv4Codec(), smooth)
    ]
    assert errors[1] < errors[0] / 3


def test_layers_find_their_own_factors() -> None:
    codec = Kv4Codec(profile=make_profile())
    blob = codec.encode(make_chunk(2))
    for layer in range(3):
        assert same_bits(codec.decode(blob.layers(layer, layer + 1)).keys, codec.decode(blob).keys[layer : layer + 1])


def test_another_profile_is_refused() -> None:
    chunk = make_chunk(1)
    blob = Kv4Codec(profile=make_profile()).encode(chunk)
    for profile in (None, make_profile(seed=2)):
        with pytest.raises(CodecError, match="give it that one"):
            Kv4Codec(profile=profile).decode(blob)
    with pytest.raises(CodecError, match="give it that one"):
        Kv4Codec(profile=make_profile()).decode(Kv4Codec().encode(chunk))
    other = make_profile(replace(SPEC, model_id="other@1"))
    with pytest.raises(SpecMismatchError):
        Kv4Codec(profile=other).encode(chunk)


@pytest.mark.parametrize(
    "factors",
    [torch.ones(3, 2, 7), torch.ones(3, 2, 8).double(), torch.zeros(3, 2, 8), torch.full((3, 2, 8), torch.inf)],
)
def test_useless_factors_are_refused(factors: torch.Tensor) -> None:
    with pytest.raises(CodecError, match="make it anew"):
        Kv4Codec(profile=Profile(SPEC, {"smooth.keys": factors})).encode(make_chunk(1))
    with pytest.raises(CodecError, match=r"no 'smooth.keys'"):
        Kv4Codec(profile=Profile(SPEC, {})).encode(make_chunk(1))


def test_reads_its_parameters_from_the_chunk() -> None:
    chunk = make_chunk(8, tokens=9)
    encoder = Kv4Codec(8, rotated=False)
    assert same_chunk(Kv4Codec().decode(encoder.encode(chunk)), encoder.decode(encoder.encode(chunk)))


@pytest.mark.parametrize("codec", [Kv4Codec(), Kv4Codec(8, make_profile())])
def test_values_stand_alone(codec: Kv4Codec) -> None:
    assert_values_stand_alone(codec)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.model_id)
@pytest.mark.parametrize("rotated", [False, True])
def test_strange_numbers_are_kept_exact(spec: KVSpec, rotated: bool) -> None:
    assert_strange_tokens_are_exact(Kv4Codec(rotated=rotated), spec)
    assert_strange_tokens_are_exact(Kv4Codec(profile=make_profile(spec), rotated=rotated), spec)


def test_keys_beyond_what_calibration_saw_stay_finite() -> None:
    """A channel that was small in calibration is large now, beside one with a large factor; float16 must suffice."""
    spec = replace(SPEC, dtype=torch.float16)
    factors = torch.ones(3, 2, 8)
    factors[..., [0, 4]], factors[..., [1, 5]] = 128.0, 2.0**-10
    codec = Kv4Codec(profile=Profile(spec, {"smooth.keys": factors}))
    chunk = make_chunk(1, tokens=6, spec=spec)
    chunk.keys[:, :, 3, 1] = 1000.0
    decoded = codec.decode(codec.encode(chunk))
    assert bool(decoded.keys.isfinite().all())
    assert same_bits(decoded.keys[:, :, 3], chunk.keys[:, :, 3])


def test_bytes_are_as_promised() -> None:
    """At the shape of an 8B model, everything counted: two layers of its 32."""
    spec = replace(SPEC_8B, num_layers=2)
    blob = Kv4Codec().encode(make_chunk(1, tokens=256, spec=spec))
    assert blob.nbytes == 2 * 8 * 256 * 256 * (4 + 32 / 128) / 8 + 2 * 8 * 256


def test_golden() -> None:
    """Stored chunks must stay readable: a change of these is a change of the format."""
    chunk = make_chunk(1, tokens=11, spec=PLAIN)
    assert digest(Kv4Codec().encode(chunk)) == "40f962e17117468f"
    assert digest(Kv4Codec(8, make_profile(PLAIN)).encode(chunk)) == "36d1b2bd4330eab6"


def test_spoiled_chunks_are_refused() -> None:
    codec = Kv4Codec()
    assert accepted(codec, codec.encode(make_chunk(1, tokens=10))) == []


@pytest.mark.parametrize(
    "meta",
    [
        {"parameters": '{"bits":3}'},
        {"parameters": '{"bits":4.0}'},
        {"parameters": '{"bits":8,"profile":null}'},
        {"parameters": '{"rotated":0}'},
        {"spec": replace(SPEC, head_dim=10**13).to_json()},
        {"spec": replace(SPEC, rope=RopeSpec((1.0,))).to_json()},
    ],
)
def test_wrong_meta_is_refused(meta: dict[str, str]) -> None:
    with pytest.raises(CodecError):
        Kv4Codec().decode(with_meta(Kv4Codec().encode(make_chunk(1)), **meta))


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="bits is 3"):
        Kv4Codec(3)
