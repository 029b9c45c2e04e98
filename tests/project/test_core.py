"""The central types: the algebra of rotary shifts, the identity of a spec, the checks of a chunk."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvloom.core import EncodedChunk, KVChunk, KVSpec, LayerRopes, RopeSpec
from kvloom.errors import SpecMismatchError
from kvloom.testing import ROPE, SPEC, make_chunk, same_bits

OTHER_SPECS = {
    "model_id": replace(SPEC, model_id="tiny@2"),
    "num_layers": replace(SPEC, num_layers=4),
    "num_kv_heads": replace(SPEC, num_kv_heads=4),
    "head_dim": replace(SPEC, head_dim=16),
    "dtype": replace(SPEC, dtype=torch.bfloat16),
    "no rope": replace(SPEC, rope=None),
    "inv_freq": replace(SPEC, rope=replace(ROPE, inv_freq=(*ROPE.inv_freq[:-1], math.nextafter(ROPE.inv_freq[-1], 1)))),
    "attention_scaling": replace(SPEC, rope=replace(ROPE, attention_scaling=1.5)),
    "interleaved": replace(SPEC, rope=replace(ROPE, interleaved=True)),
    "passed_channels": replace(SPEC, rope=replace(ROPE, passed_channels=2)),
    "rope by layer": replace(SPEC, rope=LayerRopes((ROPE, None, replace(ROPE, interleaved=True)))),
    "v_head_dim": replace(SPEC, v_head_dim=4),
    "shard rank": replace(SPEC, shard=(0, 2)),
    "shard": replace(SPEC, shard=(1, 2)),
}


def rotate(vectors: Tensor, positions: Tensor, rope: RopeSpec) -> Tensor:
    """Rotary embedding by complex multiplication, in float64: `[T, D]`, `[T]` -> `[T, D]`."""
    half = vectors.shape[-1] // 2
    pairs = vectors.double().reshape(-1, half, 2) if rope.interleaved else vectors.double().reshape(-1, 2, half).mT
    angles = positions.double()[:, None] * torch.tensor(rope.inv_freq, dtype=torch.float64)
    turned = torch.view_as_real(
        torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles)
    )
    return (turned if rope.interleaved else turned.mT).reshape(vectors.shape)


@pytest.mark.parametrize("interleaved", [False, True])
def test_shift_is_rotation_by_the_difference(interleaved: bool) -> None:
    rope = replace(ROPE, interleaved=interleaved)
    plain = torch.randn(6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before, after = torch.tensor([0, 1, 2, 70, 71, 9000]), torch.tensor([500, 1, 0, 71, 7, 100_000])
    shifted = rope.shift(rotate(plain, before, rope).float(), after - before)
    assert torch.allclose(shifted.double(), rotate(plain, after, rope), atol=1e-6)


@given(st.integers(-100_000, 100_000), st.integers(-100_000, 100_000), st.booleans())
def test_shifts_add_up(first: int, second: int, interleaved: bool) -> None:
    rope, keys = replace(ROPE, interleaved=interleaved), make_chunk(1).keys
    twice = rope.shift(rope.shift(keys, first), second)
    assert torch.allclose(twice, rope.shift(keys, first + second), atol=2e-6)


def test_channels_that_pass_stay_bit_for_bit() -> None:
    keys = make_chunk(1).keys
    rope = RopeSpec(ROPE.inv_freq[:2], passed_channels=4)
    moved = rope.shift(keys, 17)
    assert torch.equal(moved[..., 4:], keys[..., 4:])
    assert torch.equal(moved[..., :4], RopeSpec(ROPE.inv_freq[:2]).shift(keys[..., :4], 17))
    with pytest.raises(SpecMismatchError, match="expects 7"):
        replace(rope, passed_channels=3).shift(keys, 17)


def test_each_layer_is_shifted_by_its_own_rotation() -> None:
    chunk, other = make_chunk(1), replace(ROPE, interleaved=True)
    spec = replace(SPEC, rope=LayerRopes((ROPE, None, other)))
    moved = spec.shift(chunk.keys, 17)
    assert torch.equal(moved[0], ROPE.shift(chunk.keys[0], 17)) and torch.equal(moved[1], chunk.keys[1])
    assert torch.equal(moved[2], other.shift(chunk.keys[2], 17))
    assert torch.equal(spec.shift(chunk.keys[1:], 17, 1), moved[1:])
    assert spec.shift(chunk.keys, torch.zeros(3).long()) is chunk.keys
    with pytest.raises(SpecMismatchError, match="rope has 1 layers"):
        replace(SPEC, rope=LayerRopes((None,)))


def test_shift_keeps_scores() -> None:
    """A query and its keys moved together see one another as before."""
    keys, queries = make_chunk(1).keys, make_chunk(2).keys
    scores = queries @ keys.mT
    assert torch.allclose(ROPE.shift(queries, 123) @ ROPE.shift(keys, 123).mT, scores, atol=1e-5)
    assert not torch.allclose(queries @ ROPE.shift(keys, 123).mT, scores, atol=1e-1)


def test_shift_by_nothing_returns_the_keys() -> None:
    keys = make_chunk(1).keys
    assert ROPE.shift(keys, 0) is keys and ROPE.shift(keys, torch.zeros(5, dtype=torch.int64)) is keys


def test_shift_of_one_token_leaves_the_others() -> None:
    keys = make_chunk(1).keys
    moved = ROPE.shift(keys, torch.tensor([0, 0, 3, 0, 0]))
    assert same_bits(moved[:, :, [0, 1, 3, 4]], keys[:, :, [0, 1, 3, 4]])
    assert torch.equal(moved[:, :, 2], ROPE.shift(keys, 3)[:, :, 2])


def test_shift_refuses_another_head_dim() -> None:
    with pytest.raises(SpecMismatchError, match="head dim 6"):
        ROPE.shift(torch.zeros(2, 6), 1)


@pytest.mark.parametrize("spec", [SPEC, *OTHER_SPECS.values()], ids=["itself", *OTHER_SPECS])
def test_spec_survives_json(spec: KVSpec) -> None:
    assert KVSpec.from_json(spec.to_json()) == spec
    assert KVSpec.from_json(spec.to_json()).fingerprint() == spec.fingerprint()


def test_every_field_is_in_the_fingerprint() -> None:
    fingerprints = {spec.fingerprint() for spec in (SPEC, *OTHER_SPECS.values())}
    assert len(fingerprints) == 1 + len(OTHER_SPECS) and {len(found) for found in fingerprints} == {32}


def test_fingerprint_is_stable() -> None:
    spec = KVSpec("tiny@1", 3, 2, 8, torch.float32, RopeSpec((1.0, 0.1, 0.01, 0.001)))
    assert spec.fingerprint().hex() == "a1e7f3bf1980f017060b94ecc6fc3f9127b47bd4fd3cb04cb2c28d37daa28347"


def test_token_bytes() -> None:
    assert KVSpec("llama", 32, 8, 128, torch.bfloat16, None).token_bytes == 131_072
    chunk = make_chunk(1, tokens=7)
    assert SPEC.token_bytes * 7 == chunk.keys.nbytes + chunk.values.nbytes
    assert replace(SPEC, v_head_dim=0).token_bytes * 7 == chunk.keys.nbytes


@pytest.mark.parametrize(
    "change",
    [
        {"token_ids": torch.zeros(5, dtype=torch.int32)},
        {"positions": torch.zeros(4, dtype=torch.int64)},
        {"keys": torch.zeros(3, 2, 5, 8, dtype=torch.float16)},
        {"keys": torch.zeros(3, 5, 2, 8)},
        {"values": torch.zeros(2, 2, 5, 8)},
        {"values": torch.zeros(3, 2, 5, 4)},
        {"first_layer": 1},
        {"first_layer": -1},
    ],
)
def test_chunk_must_fit_its_spec(change: dict[str, Tensor | int]) -> None:
    chunk = make_chunk(1)
    with pytest.raises(SpecMismatchError):
        replace(chunk, **change)


def test_chunk_of_some_layers() -> None:
    chunk = make_chunk(1)
    part = KVChunk(SPEC, chunk.token_ids, chunk.positions, chunk.keys[2:], chunk.values[2:], first_layer=2)
    assert len(part) == len(chunk) == 5


def test_encoded_layers_are_views() -> None:
    tensors = {"codes": torch.arange(12).view(4, 3), "scale": torch.arange(4.0)}
    blob = EncodedChunk("c", tensors, {"first_layer": "0", "a": "b"}, frozenset({"codes"}))
    part = blob.layers(1, 3)
    assert part.tensors["codes"].tolist() == [[3, 4, 5], [6, 7, 8]] and part.tensors["scale"] is tensors["scale"]
    assert part.tensors["codes"].data_ptr() == tensors["codes"][1].data_ptr()
    assert part.meta == {"first_layer": "1", "a": "b"} and part.nbytes == 48 + 16 and blob.nbytes == 96 + 16
