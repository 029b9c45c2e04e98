"""The grouped codec (KIVI): its error and its bytes as promised, groups that stand alone, exact where it must be."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvloom.compress.grouped import GroupedCodec
from kvloom.core import KVChunk, KVSpec, RopeSpec
from kvloom.errors import CodecError
from kvloom.kvstore.format import from_bytes, to_bytes
from kvloom.testing import SPEC, CodecContract, make_chunk, make_key, same_bits, same_blob, same_chunk
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
    with_tensors,
)


class TestInts8(CodecContract):
    tolerance = 0.01

    def make_codec(self, spec: KVSpec) -> GroupedCodec:
        return GroupedCodec(8, group_tokens=3)


class TestInts4OfTwoTokens(CodecContract):
    tolerance = 0.12

    def make_codec(self, spec: KVSpec) -> GroupedCodec:
        return GroupedCodec(4, group_tokens=2, group_channels=4)


class TestAsPublished(CodecContract):
    tolerance = 0.12

    def make_codec(self, spec: KVSpec) -> GroupedCodec:
        return GroupedCodec(4, group_tokens=2, residual_tokens=2, rotated=True)


class TestUniformPerToken(CodecContract):
    tolerance = 0.12

    def make_codec(self, spec: KVSpec) -> GroupedCodec:
        return GroupedCodec(4, key_axis="token", group_channels=None, rotated=True)


class TestTooShortForAGroup(CodecContract):
    """Every key is exact; moving them rounds once."""

    tolerance = 0.12

    def make_codec(self, spec: KVSpec) -> GroupedCodec:
        return GroupedCodec()

    def test_keys_are_exact(self, codec: GroupedCodec, chunk: KVChunk) -> None:
        assert same_bits(codec.decode(codec.encode(chunk)).keys, chunk.keys)


def steps(x: Tensor, groups: tuple[int, int, int], bits: int) -> Tensor:
    """The step of each number, slowly: the least float16 that spans its group from a float16 zero."""
    L, H, T, D = x.shape
    heads, tokens, channels = groups
    step = torch.empty(x.shape, dtype=torch.float64)
    for layer in range(L):
        for h in range(0, H, heads):
            for t in range(0, T, tokens):
                for d in range(0, D, channels):
                    at = (layer, slice(h, h + heads), slice(t, t + tokens), slice(d, d + channels))
                    low, high = x[at].min().item(), x[at].max().item()
                    zero = torch.tensor(low).half()
                    if zero.item() > low:
                        zero = torch.nextafter(zero, torch.tensor(-math.inf).half())
                    scale = torch.tensor((high - zero.item()) / (2**bits - 1), dtype=torch.float64).half()
                    if scale.item() < (high - zero.item()) / (2**bits - 1):
                        scale = torch.nextafter(scale, torch.tensor(math.inf).half())
                    step[at] = scale.double()
    return step


@given(
    bits=st.integers(2, 8),
    group_tokens=st.sampled_from([1, 2, 5]),
    group_channels=st.sampled_from([None, 2, 8, 12]),
    tokens=st.integers(0, 11),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    head_dim=st.sampled_from([4, 8, 10]),
    log_size=st.integers(-8, 3),
    offset=st.sampled_from([0.0, 1.0, -30.0]),
    strided=st.booleans(),
    seed=st.integers(0, 99),
)
def test_error_is_at_most_half_a_step(
    bits: int,
    group_tokens: int,
    group_channels: int | None,
    tokens: int,
    dtype: torch.dtype,
    head_dim: int,
    log_size: int,
    offset: float,
    strided: bool,
    seed: int,
) -> None:
    spec = KVSpec("any@1", 2, 2, head_dim, dtype, None)
    chunk = make_chunk(seed, tokens=tokens, spec=replace(spec, dtype=torch.float32))
    keys, values = (((x + offset) * 10.0**log_size).to(dtype) for x in (chunk.keys, chunk.values))
    if strided:
        keys, values = (x.transpose(0, 3).contiguous().transpose(0, 3) for x in (keys, values))
    codec = GroupedCodec(bits, group_tokens=group_tokens, group_channels=group_channels)
    decoded = codec.decode(codec.encode(KVChunk(spec, chunk.token_ids, chunk.positions, keys, values)))
    covered = tokens // group_tokens * group_tokens
    value_groups = (2, 1, head_dim) if group_channels is None else (1, 1, math.gcd(group_channels, head_dim))
    for found, true, count, groups in (
        (decoded.keys, keys, covered, (1, group_tokens, 1)),
        (decoded.values, values, tokens, value_groups),
    ):
        assert found.dtype == dtype and same_bits(found[:, :, count:], true[:, :, count:])
        found, true = found[:, :, :count].float(), true[:, :, :count].float()
        bound = steps(true, groups, bits) / 2
        rounding = torch.finfo(dtype).eps * (true.abs() + 2 * bound) + torch.finfo(dtype).tiny
        assert bool(((found - true).abs() <= bound + rounding).all())


@pytest.mark.parametrize("spec", [SPEC, INTERLEAVED])
def test_keys_are_coded_before_rotation(spec: KVSpec) -> None:
    """A channel that is constant before rotation is coded without error, wherever the chunk stood."""
    plain = make_chunk(1, tokens=1, spec=spec).keys.half().float().expand(-1, -1, 8, -1)
    positions = torch.arange(1000, 1008)
    chunk = make_chunk(2, tokens=8, spec=spec)
    keys = spec.rope.shift(plain, positions)
    chunk = KVChunk(spec, chunk.token_ids, positions, keys, chunk.values)
    codec = GroupedCodec(2, group_tokens=8)
    blob = codec.encode(chunk)
    assert torch.allclose(codec.decode(blob).keys, keys, atol=2e-3)
    assert torch.allclose(codec.decode(blob, torch.arange(8)).keys, spec.rope.shift(plain, torch.arange(8)), atol=2e-3)
    published = GroupedCodec(2, group_tokens=8, rotated=True)
    assert (published.decode(published.encode(chunk)).keys - keys).abs().max() > 0.1


@pytest.mark.parametrize("spec", [SPEC, INTERLEAVED])
@pytest.mark.parametrize("rotated", [False, True])
def test_moving_twice_is_moving_once(spec: KVSpec, rotated: bool) -> None:
    codec = GroupedCodec(4, group_tokens=4, rotated=rotated)
    blob = codec.encode(make_chunk(5, tokens=8, spec=spec, start=3))
    there = codec.decode(blob, torch.arange(700, 708))
    back = spec.rope.shift(there.keys, torch.arange(3, 11) - there.positions)
    assert torch.allclose(back, codec.decode(blob).keys, atol=1e-5)


def test_growing_by_whole_groups_keeps_the_codes() -> None:
    codec = GroupedCodec(3, group_tokens=4)
    bulk = make_chunk(6, tokens=12)
    whole = codec.encode(bulk)
    parts = []
    for start, stop in ((0, 4), (4, 12)):
        cut = slice(start, stop)
        parts.append(
            codec.encode(
                KVChunk(SPEC, bulk.token_ids[cut], bulk.positions[cut], bulk.keys[:, :, cut], bulk.values[:, :, cut])
            )
        )
    for name in ("keys", "keys_scale", "keys_zero", "values", "values_scale", "values_zero"):
        assert same_bits(torch.cat([part.tensors[name] for part in parts], 2), whole.tensors[name])


def test_residual_window_is_exact_at_the_end() -> None:
    chunk = make_chunk(7, tokens=11)
    decoded = GroupedCodec(2, group_tokens=4, residual_tokens=2).decode(
        GroupedCodec(2, group_tokens=4, residual_tokens=2).encode(chunk)
    )
    for found, true, exact in ((decoded.keys, chunk.keys, 3), (decoded.values, chunk.values, 2)):
        assert same_bits(found[:, :, -exact:], true[:, :, -exact:])
        assert not torch.equal(found[:, :, -exact - 1], true[:, :, -exact - 1])
    everything = GroupedCodec(2, group_tokens=4, residual_tokens=11)
    assert same_chunk(everything.decode(everything.encode(chunk)), chunk)


def test_reads_its_parameters_from_the_chunk() -> None:
    chunk = make_chunk(8, tokens=9)
    encoder = GroupedCodec(3, group_tokens=4, group_channels=2, residual_tokens=1, key_axis="token", rotated=True)
    blob = encoder.encode(chunk)
    assert same_chunk(GroupedCodec().decode(blob), encoder.decode(blob))
    assert not same_bits(GroupedCodec().decode(blob).keys, GroupedCodec().decode(GroupedCodec().encode(chunk)).keys)


@pytest.mark.parametrize("codec", [GroupedCodec(), GroupedCodec(4, group_tokens=2), GroupedCodec(residual_tokens=3)])
def test_values_stand_alone(codec: GroupedCodec) -> None:
    assert_values_stand_alone(codec)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.model_id)
@pytest.mark.parametrize(
    "codec",
    [GroupedCodec(4, group_tokens=4), GroupedCodec(4, group_tokens=8, rotated=True), GroupedCodec(key_axis="token")],
)
def test_strange_numbers_are_kept_exact(codec: GroupedCodec, spec: KVSpec) -> None:
    assert_strange_tokens_are_exact(codec, spec)


def test_a_group_of_nothing_but_nan() -> None:
    chunk = make_chunk(1, tokens=4)
    chunk.keys.fill_(torch.nan)
    chunk.values.fill_(torch.inf)
    codec = GroupedCodec(2, group_tokens=4)
    assert same_chunk(codec.decode(codec.encode(chunk)), chunk)


def test_the_largest_numbers_stay_finite_anywhere() -> None:
    """What is just not kept exact, in the widest steps and float16, wherever it is placed."""
    spec = replace(SPEC, dtype=torch.float16)
    signs = torch.randint(0, 2, (3, 2, 64, 8), generator=torch.Generator().manual_seed(1)) * 2 - 1
    large = (signs * 16384.0).half()
    chunk = KVChunk(spec, torch.arange(64), torch.arange(64), large, large)
    codec = GroupedCodec(2)
    for start in (0, 7, 300):
        decoded = codec.decode(codec.encode(chunk), torch.arange(start, start + 64))
        assert bool(decoded.keys.isfinite().all()) and bool(decoded.values.isfinite().all())
        assert not codec.encode(chunk).tensors["keys_exact"].numel()


@pytest.mark.parametrize(
    ("codec", "bits_a_number"),
    [
        (GroupedCodec(2), 3.0),
        (GroupedCodec(4), 5.0),
        (GroupedCodec(8), 9.0),
        (GroupedCodec(4, key_axis="token", group_channels=None), 4 + 32 / 1024),
    ],
)
def test_bytes_are_as_promised(codec: GroupedCodec, bits_a_number: float) -> None:
    """At the shape of an 8B model, 256 tokens, everything counted: two layers of its 32."""
    spec = replace(SPEC_8B, num_layers=2)
    blob = codec.encode(make_chunk(1, tokens=256, spec=spec))
    numbers = 2 * 8 * 256 * (128 + 128)
    assert blob.nbytes == numbers * bits_a_number / 8 + 2 * 8 * 256


def test_golden() -> None:
    """Stored chunks must stay readable: a change of these is a change of the format."""
    chunk = make_chunk(1, tokens=11, spec=PLAIN)
    assert digest(GroupedCodec(2, group_tokens=4).encode(chunk)) == "cd9fed0dbc4f52b4"
    small = GroupedCodec(3, group_tokens=2, group_channels=4, residual_tokens=3)
    assert digest(small.encode(chunk)) == "b33f79e6c69c18c1"
    assert digest(GroupedCodec(8, key_axis="token", group_channels=None).encode(chunk)) == "4bca0f54f8ed3013"


def test_survives_a_container() -> None:
    key, blob = make_key(1), GroupedCodec(4, group_tokens=4).encode(make_chunk(1, tokens=10))
    assert same_blob(from_bytes(key, to_bytes(key, blob)), blob)


def test_spoiled_chunks_are_refused() -> None:
    codec = GroupedCodec(2, group_tokens=4)
    assert accepted(codec, codec.encode(make_chunk(1, tokens=10))) == []


@pytest.mark.parametrize(
    "parameters",
    ['{"bits":9}', '{"bits":"4"}', '{"bits":3}', '{"group_tokens":0}', '{"colour":1}', '{"rotated":1}', "[]"],
)
def test_wrong_parameters_are_refused(parameters: str) -> None:
    blob = GroupedCodec(4, group_tokens=4).encode(make_chunk(1, tokens=10))
    with pytest.raises(CodecError):
        GroupedCodec().decode(with_meta(blob, parameters=parameters))


@pytest.mark.parametrize(
    "changed", [{"head_dim": 10**13}, {"num_kv_heads": 10**13}, {"rope": RopeSpec((1.0,))}, {"dtype": torch.int32}]
)
@pytest.mark.parametrize("tokens", [3, 8])
def test_a_forged_spec_is_refused(changed: dict[str, object], tokens: int) -> None:
    blob = GroupedCodec(4, group_tokens=4).encode(make_chunk(1, tokens=tokens))
    with pytest.raises(CodecError):
        GroupedCodec().decode(with_meta(blob, spec=replace(SPEC, **changed).to_json()))


@pytest.mark.parametrize("tokens", [[8, 9, 9], [8, 8], [9], [10, 8, 9], [-1, 8, 9]])
def test_exact_tokens_must_be_tokens(tokens: list[int]) -> None:
    codec = GroupedCodec(2, group_tokens=4)
    chunk = make_chunk(1, tokens=10)
    chunk.keys[0, 0, 5, 0] = torch.nan
    blob = codec.encode(chunk)
    rows = blob.tensors["keys_exact"]
    assert blob.tensors["keys_exact_tokens"].tolist() == [[5, 8, 9]] * 3
    with pytest.raises(CodecError):
        codec.decode(
            with_tensors(
                blob,
                keys_exact=rows[:, :, : len(tokens)],
                keys_exact_tokens=torch.tensor([tokens] * 3, dtype=torch.int32),
            )
        )


@pytest.mark.parametrize(
    "wrong",
    [
        {"bits": 1},
        {"bits": 9},
        {"group_tokens": 0},
        {"group_channels": 0},
        {"residual_tokens": -1},
        {"key_axis": "x"},
        {"bits": None},
    ],
)
def test_wrong_arguments_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        GroupedCodec(**wrong)
