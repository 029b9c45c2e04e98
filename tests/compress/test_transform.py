"""The transform codec (KVTC): shared bases, one step, packed integers."""

import hashlib
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from kvloom.calibration.layer_sample import LayerSample
from kvloom.calibration.model_profile import Profile
from kvloom.certify.method_fits import GroupFit
from kvloom.certify.profile_parts import ProfileParts
from kvloom.compress.transform.planes import FRAMES, LARGEST, pack, unpack
from kvloom.compress.transform.transform import TransformCodec
from kvloom.compress.transform.transform_fit import fit_group, group_layers
from kvloom.core import KVChunk, KVSpec
from kvloom.errors import CodecError, SpecMismatchError
from kvloom.kvstore.format import from_bytes, to_bytes
from kvloom.testing import SPEC, CodecContract, make_chunk, make_key, same_bits, same_blob
from kvloom.testing.codec import SPECS

from ..support.coding import accepted, with_meta, with_tensors


def make_profile(spec: KVSpec = SPEC, *, layers: int = 2, tokens: int = 400, seed: int = 1) -> Profile:
    """Fitted to random keys and values, in groups of two layers; every channel costs the same."""
    random = torch.Generator().manual_seed(seed)
    parts = ProfileParts(spec, {"transform": GroupFit(lambda _: layers, fit_group)})
    H, D, Dv = spec.num_kv_heads, spec.head_dim, spec.value_dim
    for layer in reversed(range(spec.num_layers)):
        keys, values = (torch.randn(tokens, H, d, generator=random) for d in (D, Dv))
        costs = torch.ones(tokens, H, D), torch.ones(tokens, H, Dv)
        parts.add(layer, LayerSample(spec, keys, values, *costs, torch.zeros(H, D, D), keys[:0]))
    return Profile(spec, parts.tensors())


class TestTransform(CodecContract):
    tolerance = 0.02

    def make_codec(self, spec: KVSpec) -> TransformCodec:
        return TransformCodec(make_profile(spec), step=0.05, sink_tokens=0)


class TestCoarseTransform(CodecContract):
    tolerance = 0.4

    def make_codec(self, spec: KVSpec) -> TransformCodec:
        return TransformCodec(make_profile(spec), step=0.8, sink_tokens=0, max_residual=1.0)


# -------------------------------------------------------------------------------------------------------- integers


@given(
    rows=st.integers(0, 6),
    columns=st.integers(0, 40),
    largest=st.sampled_from([0, 1, 2, 3, 7, 8, 127, 128, LARGEST]),
    seed=st.integers(0, 99),
)
def test_integers_come_back(rows: int, columns: int, largest: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    limits = random.choice([0, 1, 2, 7, largest], (rows, 1))
    numbers = random.integers(-limits, limits + 1, (rows, columns)).astype(np.int16)
    if numbers.size:
        numbers[0, 0] = -largest
    frames = pack(numbers, 3)
    assert len(frames) == FRAMES
    assert np.array_equal(unpack([memoryview(frame) for frame in frames], rows, columns), numbers)


def test_small_integers_share_bytes() -> None:
    """A row of -1, 0 and 1 takes log2(3) bits a number at most, and less where most are 0."""
    random = np.random.default_rng(0)
    even = random.integers(-1, 2, (50, 256)).astype(np.int16)
    rare = (random.random((50, 256)) < 0.02).astype(np.int16)
    sizes = [8 * sum(map(len, pack(rows, 9))) / rows.size for rows in (even, rare)]
    assert sizes[0] < 1.68 and sizes[1] < 0.3


def test_frames_are_not_believed() -> None:
    frames = pack(np.ones((3, 7), np.int16), 3)
    views = [memoryview(frame) for frame in frames]
    for wrong in (
        [views[1], *views[1:]],  # classes of another number of rows
        [*views[:2], views[1], *views[3:]],  # a stream where there are no numbers
        [views[0], memoryview(b"torn"), *views[2:]],
        [views[0], memoryview(pack(np.full((5, 1), 120, np.int16), 3)[4]), *views[2:]],  # a byte beyond its states
    ):
        with pytest.raises(CodecError):
            unpack(wrong, 3, 7)


# ----------------------------------------------------------------------------------------------------------- codec


def test_layers_of_a_group_share_what_they_have_in_common() -> None:
    """Layers that are copies of one another cost no more together than one: the reason for shared bases."""
    spec = replace(SPEC, num_layers=2, rope=None)
    random = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(1, 2, 64, 8, generator=random).repeat(2, 1, 1, 1) for _ in range(2))
    chunk = KVChunk(spec, torch.arange(64), torch.arange(64), keys, values)

    def bytes_with(layers: int) -> int:
        parts = ProfileParts(spec, {"transform": GroupFit(lambda _: layers, fit_group)})
        for layer in (1, 0):
            k, v = (t[layer].transpose(0, 1) for t in (keys, values))
            parts.add(
                layer, LayerSample(spec, k, v, torch.ones_like(k), torch.ones_like(v), torch.zeros(2, 8, 8), k[:0])
            )
        codec = TransformCodec(Profile(spec, parts.tensors()), step=0.1, sink_tokens=0)
        blob = codec.encode(chunk)
        assert (codec.decode(blob).keys - keys).norm() < 0.05 * keys.norm()
        return blob.tensors["codes"].numel()

    assert bytes_with(2) < 0.62 * bytes_with(1)


def test_errors_go_where_they_cost_least() -> None:
    """A channel that costs 100 times as much is kept several times as exactly; some weight is shared by all."""
    spec = KVSpec("one@1", 1, 1, 8, torch.float32, None)
    random = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(2000, 1, 8, generator=random) for _ in range(2))
    cost = torch.ones(2000, 1, 8)
    cost[..., 3] = 100.0
    tables = fit_group(
        [LayerSample(spec, keys, values, cost, torch.ones_like(cost), torch.zeros(1, 8, 8), keys[:0])], 0
    )
    codec = TransformCodec(Profile(spec, tables), step=0.5, sink_tokens=0)
    rows = [t.transpose(0, 1)[None, :, :300] for t in (keys, values)]
    chunk = KVChunk(spec, torch.arange(300), torch.arange(300), *rows)
    errors = (codec.decode(codec.encode(chunk)).keys - chunk.keys)[0, 0].square().mean(0).sqrt()
    others = errors[[0, 1, 2, 4, 5, 6, 7]].mean()
    assert 0.1 * others < errors[3] < 0.2 * others


def test_a_smaller_step_takes_more_bytes_and_loses_less() -> None:
    chunk, profile = make_chunk(3, tokens=64), make_profile()
    found = []
    for step in (0.05, 0.2, 0.8):
        codec = TransformCodec(profile, step=step)
        blob = codec.encode(chunk)
        found.append((blob.tensors["codes"].numel(), -float((codec.decode(blob).keys - chunk.keys).norm())))
    for finer, coarser in pairwise(found):
        assert finer[0] > coarser[0] and finer[1] > coarser[1]


def test_sinks_and_recent_tokens_are_exact() -> None:
    chunk = make_chunk(5, tokens=12, start=2)
    codec = TransformCodec(make_profile(), step=0.5, sink_tokens=4, recent_tokens=3)
    decoded = codec.decode(codec.encode(chunk))
    for half in ("keys", "values"):
        found, true = getattr(decoded, half), getattr(chunk, half)
        kept = [bool(torch.equal(found[:, :, t], true[:, :, t])) for t in range(12)]
        assert kept == [True] * 2 + [False] * 7 + [True] * 3


def test_tokens_unlike_the_profile_are_exact() -> None:
    """Outside the basis there is nothing that could be coded: keys of rank one, and one token of another kind."""
    spec = replace(SPEC, num_layers=1, rope=None)
    random = torch.Generator().manual_seed(0)
    line = torch.randn(2, 8, generator=random)
    keys = torch.randn(100, 1, 1, generator=random) * line
    values = keys.clone()
    ones = torch.ones_like(keys)
    profile = Profile(spec, fit_group([LayerSample(spec, keys, values, ones, ones, torch.zeros(2, 8, 8), keys[:0])], 0))
    codec = TransformCodec(profile, step=0.05, sink_tokens=0)
    rows = keys[:6].transpose(0, 1)[None].clone()
    rows[:, :, 4] = torch.randn(1, 2, 8, generator=random)
    chunk = KVChunk(spec, torch.arange(6), torch.arange(6), rows, rows.clone())
    blob = codec.encode(chunk)
    assert blob.tensors["keys_exact_tokens"].tolist() == [[4]]
    assert same_bits(codec.decode(blob).keys[:, :, 4], rows[:, :, 4])


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.model_id)
def test_strange_numbers_are_kept_exact(spec: KVSpec) -> None:
    chunk, codec = make_chunk(3, tokens=8, spec=spec, start=5), TransformCodec(make_profile(spec), step=0.05)
    chunk.keys[0, 0, 1, 3] = torch.nan
    if chunk.values.numel():
        chunk.values[1, 0, 2, 0] = torch.inf
    chunk.keys[-1, -1, 4, 0] = -60000.0
    decoded = codec.decode(codec.encode(chunk))
    for token in (1, 4) if not chunk.values.numel() else (1, 2, 4):
        assert same_bits(decoded.keys[:, :, token], chunk.keys[:, :, token])
        assert same_bits(decoded.values[:, :, token], chunk.values[:, :, token])
    others = [0, 3, 5, 6, 7]
    assert (decoded.keys - chunk.keys)[:, :, others].norm() < 0.05 * chunk.keys[:, :, others].norm()


def test_a_part_of_a_chunk_is_refused() -> None:
    chunk = make_chunk(1)
    part = KVChunk(SPEC, chunk.token_ids, chunk.positions, chunk.keys[:2], chunk.values[:2])
    with pytest.raises(CodecError, match="2 of 3 layers"):
        TransformCodec(make_profile()).encode(part)


def test_another_profile_is_refused() -> None:
    codec, chunk = TransformCodec(make_profile()), make_chunk(1)
    with pytest.raises(CodecError, match="keep profiles as long as chunks"):
        TransformCodec(make_profile(seed=2)).decode(codec.encode(chunk))
    with pytest.raises(SpecMismatchError):
        TransformCodec(make_profile(replace(SPEC, model_id="other@1"))).encode(chunk)
    with pytest.raises(CodecError, match=r"no 'transform.basis'"):
        TransformCodec(Profile(SPEC, {})).encode(chunk)
    tensors = dict(make_profile().tensors)
    for name, wrong in (("basis", tensors["transform.basis"][:2]), ("group", torch.tensor([0, 1, 0]))):
        with pytest.raises(CodecError, match="make it anew"):
            TransformCodec(Profile(SPEC, tensors | {f"transform.{name}": wrong})).encode(chunk)


def test_through_the_container() -> None:
    codec = TransformCodec(make_profile())
    blob = codec.encode(make_chunk(2, tokens=20))
    assert same_blob(from_bytes(make_key(1), to_bytes(make_key(1), blob)), blob)


def test_spoiled_chunks_are_refused() -> None:
    codec = TransformCodec(make_profile(), step=0.1, sink_tokens=2)
    blob = codec.encode(make_chunk(1, tokens=10))
    assert accepted(codec, blob) == []
    with pytest.raises(CodecError, match="frames of"):
        codec.decode(with_tensors(blob, frames=-blob.tensors["frames"]))
    for step in ("0", "-1.0", '"x"', "null", "1e9"):
        meta = blob.meta["parameters"].replace('"step":0.1', f'"step":{step}')
        with pytest.raises(CodecError, match="step"):
            codec.decode(with_meta(blob, parameters=meta))


def test_golden() -> None:
    """Stored chunks must stay readable. Not compared as bytes: another zstd may write others for the same numbers."""
    channels = SPEC.num_kv_heads * (SPEC.head_dim + SPEC.value_dim)
    tables = {
        "transform.basis": torch.eye(3 * channels).view(3, channels, -1).half(),
        "transform.mean": torch.full((3, channels), 0.5),
        "transform.weight": torch.full((3, channels), 2.0),
        "transform.group": torch.zeros(3, dtype=torch.int64),
    }
    spec = replace(SPEC, rope=None)
    blob = TransformCodec(Profile(spec, tables), step=0.25).encode(make_chunk(1, tokens=4, spec=spec))
    sizes, codes, rows = [], b"", np.zeros((3 * channels, 4), np.int16)
    rows[:7] = [
        [0, 1, -1, 0],
        [2, -2, 0, 1],
        [7, -3, 4, 0],
        [100, -127, 0, 5],
        [300, -300, 0, LARGEST],
        [1] * 4,
        [-7] * 4,
    ]
    for frame in pack(rows, 1):
        sizes.append(len(frame))
        codes += frame
    assert hashlib.blake2b(
        b"".join(map(zstandard.decompress, filter(None, pack(rows, 1)))), digest_size=8
    ).hexdigest() == ("b0009ffd32d25208")
    own = with_tensors(
        blob,
        frames=torch.tensor([sizes], dtype=torch.int32),
        codes=torch.frombuffer(bytearray(codes), dtype=torch.uint8),
    )
    own = with_tensors(
        own, **{f"{half}_exact_tokens": torch.zeros(3, 0, dtype=torch.int32) for half in ("keys", "values")}
    )
    empty = torch.zeros(3, spec.num_kv_heads, 0, spec.head_dim)
    own = with_tensors(own, keys_exact=empty, values_exact=empty)
    found = TransformCodec(Profile(spec, tables), step=3.0).decode(own).keys[0, 0]  # the chunk's own step counts
    expected = (torch.from_numpy(rows[:8].T.astype(np.float32)) + 0.1 * torch.from_numpy(np.sign(rows[:8].T))) * 0.25
    assert torch.allclose(found, expected / 2.0 + 0.5)


def test_groups_are_of_about_equal_size() -> None:
    assert [group_layers(30, 384), group_layers(32, 2048), group_layers(7, 10), group_layers(11, 10)] == [6, 4, 4, 6]
    assert group_layers(80, 100_000) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": 0.0}, "step is 0.0"),
        ({"step": float("nan")}, "step is nan"),
        ({"sink_tokens": -1}, "sink_tokens is -1"),
        ({"recent_tokens": -1}, "recent_tokens is -1"),
        ({"max_residual": 0.0}, "max_residual is 0.0"),
        ({"level": 23}, "level is 23"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransformCodec(Profile(SPEC, {}), **options)
