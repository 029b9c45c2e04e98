"""The fp8 codec: e4m3 with a scale for each layer and head."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvloom.compress.fp8 import Fp8Codec, _wide
from kvloom.core import KVChunk, KVSpec, RopeSpec
from kvloom.errors import CodecError
from kvloom.kvstore.format import from_bytes, to_bytes
from kvloom.testing import SPEC, CodecContract, make_chunk, make_key, same_bits, same_blob, same_chunk
from kvloom.testing.codec import SPECS

from ..support.coding import (
    PLAIN,
    SPEC_8B,
    accepted,
    assert_strange_tokens_are_exact,
    assert_values_stand_alone,
    digest,
    with_meta,
)


class TestFp8(CodecContract):
    tolerance = 0.04

    def make_codec(self, spec: KVSpec) -> Fp8Codec:
        return Fp8Codec()


class TestFp8AfterRotation(CodecContract):
    tolerance = 0.04

    def make_codec(self, spec: KVSpec) -> Fp8Codec:
        return Fp8Codec(rotated=True)


@given(
    tokens=st.integers(0, 9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    log_size=st.integers(-30, 3),
    head_dim=st.sampled_from([1, 7, 8]),
    seed=st.integers(0, 99),
)
def test_error_is_half_a_step_of_e4m3(tokens: int, dtype: torch.dtype, log_size: int, head_dim: int, seed: int) -> None:
    """1/16 of the number itself or, where that is less, 2 ** -10 of the scale, as they were given."""
    spec = KVSpec("any@1", 2, 2, head_dim, torch.float32, None)
    chunk = make_chunk(seed, tokens=tokens, spec=spec)
    keys, values = ((x * 10.0**log_size).to(dtype) for x in (chunk.keys, chunk.values))
    spec = replace(spec, dtype=dtype)
    decoded = Fp8Codec().decode(Fp8Codec().encode(KVChunk(spec, chunk.token_ids, chunk.positions, keys, values)))
    for found, true in ((decoded.keys, keys), (decoded.values, values)):
        assert found.dtype == dtype
        found, true = found.double(), true.double()
        if tokens:
            greatest = true.abs().amax((2, 3), keepdim=True)
            bound = torch.maximum(true.abs() / 16, greatest / 448 * 2.0**-10)
            rounding = 2 * torch.finfo(dtype).eps * true.abs() + 2 * torch.finfo(dtype).smallest_normal
            assert bool(((found - true).abs() <= bound * 1.0001 + rounding).all())


def test_every_number_of_e4m3_is_read() -> None:
    codes = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn)
    codes = codes[codes.float().isfinite()]
    assert len(codes) == 254 and same_bits(_wide(codes), codes.float())


def test_the_greatest_number_is_kept() -> None:
    """It is 448 times the scale, and 448 is a number of e4m3; no rounding of the scale makes it overflow."""
    chunk = make_chunk(1, spec=PLAIN, tokens=50)
    decoded = Fp8Codec().decode(Fp8Codec().encode(chunk))
    at = chunk.keys.abs().flatten(2).argmax(-1, keepdim=True)
    found, true = (x.flatten(2).gather(2, at) for x in (decoded.keys, chunk.keys))
    assert torch.allclose(found, true, rtol=1e-6, atol=0)


@pytest.mark.parametrize("rotated", [False, True])
def test_a_chunk_in_place_and_moved(rotated: bool) -> None:
    chunk = make_chunk(5, tokens=8, start=3)
    codec = Fp8Codec(rotated)
    blob = codec.encode(chunk)
    there = codec.decode(blob, torch.arange(700, 708))
    assert torch.allclose(
        SPEC.rope.shift(there.keys, torch.arange(3, 11) - 700 - torch.arange(8)), codec.decode(blob).keys, atol=1e-5
    )


def test_reads_its_parameters_from_the_chunk() -> None:
    chunk = make_chunk(8, tokens=9, start=4)
    for encoder, other in ((Fp8Codec(True), Fp8Codec(False)), (Fp8Codec(False), Fp8Codec(True))):
        blob = encoder.encode(chunk)
        assert same_chunk(other.decode(blob), encoder.decode(blob))
        assert (other.decode(blob).keys - chunk.keys).norm() < 0.04 * chunk.keys.norm()


def test_values_stand_alone() -> None:
    assert_values_stand_alone(Fp8Codec())


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.model_id)
@pytest.mark.parametrize("rotated", [False, True])
def test_strange_numbers_are_kept_exact(spec: KVSpec, rotated: bool) -> None:
    assert_strange_tokens_are_exact(Fp8Codec(rotated), spec)


def test_nothing_but_zeros_and_nothing_but_nan() -> None:
    for value in (0.0, torch.nan):
        chunk = make_chunk(1, tokens=4)
        chunk.keys.fill_(value)
        chunk.values.fill_(value)
        assert same_chunk(Fp8Codec().decode(Fp8Codec().encode(chunk)), chunk)


def test_bytes_are_as_promised() -> None:
    """At the shape of an 8B model, everything counted: two layers of its 32."""
    spec = replace(SPEC_8B, num_layers=2)
    blob = Fp8Codec().encode(make_chunk(1, tokens=256, spec=spec))
    assert blob.nbytes == 2 * 8 * 256 * 256 + 2 * 2 * 8 * 4 + 2 * 8 * 256


def test_golden() -> None:
    """Stored chunks must stay readable: a change of these is a change of the format."""
    assert digest(Fp8Codec().encode(make_chunk(1, tokens=11, spec=PLAIN))) == "a60c191a743aee14"


def test_survives_a_container() -> None:
    key, blob = make_key(1), Fp8Codec().encode(make_chunk(1, tokens=10))
    assert same_blob(from_bytes(key, to_bytes(key, blob)), blob)


def test_spoiled_chunks_are_refused() -> None:
    assert accepted(Fp8Codec(), Fp8Codec().encode(make_chunk(1, tokens=10))) == []


@pytest.mark.parametrize(
    "meta",
    [
        {"parameters": '{"rotated":1}'},
        {"parameters": '{"bits":8}'},
        {"spec": replace(SPEC, head_dim=10**13).to_json()},
        {"spec": replace(SPEC, rope=RopeSpec((1.0,))).to_json()},
    ],
)
def test_wrong_meta_is_refused(meta: dict[str, str]) -> None:
    with pytest.raises(CodecError):
        Fp8Codec().decode(with_meta(Fp8Codec().encode(make_chunk(1)), **meta))
