"""Tensors that travel with a chunk: through every tier, codec and transcoding, verified, or the chunk is a miss."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvloom.compress.lossless import LosslessCodec
from kvloom.compress.raw import RawCodec
from kvloom.core import Codec, KVChunk
from kvloom.errors import CodecError, SpecMismatchError
from kvloom.kvstore.encoding import extras
from kvloom.kvstore.store import KVStore
from kvloom.kvstore.tiers.disk.tier import DiskTier
from kvloom.kvstore.tiers.host import HostTier
from kvloom.testing import SPEC, make_chunk, make_key, same_bits, same_chunk

from ..support.damage import flip
from ..support.lossy import CoarseCodec, TwinCodec, certify

KEY = make_key(1)
COARSE = CoarseCodec()
CERTIFICATES = [certify(COARSE, SPEC)]


def make_extras(seed: int = 0) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {
        "vq:1.codes": torch.randint(0, 256, (SPEC.num_layers, 2, 9), generator=random).to(torch.uint8),
        "graph:2.entry": torch.randint(0, 99, (7,), generator=random),
        "empty": torch.empty(0, dtype=torch.float16),
    }


LAYERED = frozenset({"vq:1.codes"})


def chunk_with_extras(seed: int = 3) -> KVChunk:
    chunk = make_chunk(seed)
    small = replace(chunk, keys=chunk.keys.clamp(-2, 2), values=chunk.values.clamp(-2, 2))
    return replace(small, extras=make_extras(seed), layered_extras=LAYERED)


def assert_extras(found: KVChunk | None, expected: dict[str, Tensor], layers: slice = slice(None)) -> None:
    assert found is not None and found.extras.keys() == expected.keys()
    assert found.layered_extras == LAYERED
    for name, tensor in expected.items():
        assert same_bits(found.extras[name], tensor[layers] if name in LAYERED else tensor), name


def opened(*tiers: object, **options: object) -> KVStore:
    return KVStore(tiers, **{"codecs": [COARSE, TwinCodec()], "certificates": CERTIFICATES, **options})


@pytest.mark.parametrize("codec", [RawCodec(), TwinCodec(), COARSE, LosslessCodec()], ids=lambda codec: codec.name)
@pytest.mark.parametrize("tier", ["host", "slab", "disk"])
def test_they_come_back_from_every_tier_in_every_form(codec: Codec, tier: str, tmp_path: Path) -> None:
    tiers = {"host": lambda: HostTier(None), "slab": lambda: HostTier(1 << 20, pinned=False), "disk": None}
    holder = DiskTier(tmp_path) if tier == "disk" else tiers[tier]()
    chunk = chunk_with_extras()
    expected = {name: tensor.clone() for name, tensor in chunk.extras.items()}
    with opened(holder, codec=codec) as store:
        store.put(KEY, chunk)
        for tensor in chunk.extras.values():
            tensor.zero_()  # the caller's memory is the caller's again
        found = store.get(KEY)
        assert_extras(found, expected)
        if codec.is_lossless:
            assert same_chunk(found, chunk)
        assert_extras(store.get(KEY, chunk.positions + 40), expected)
        for start, stop in ((0, 1), (1, 3)):
            part = store.get(KEY, layers=(start, stop))
            assert_extras(part, expected, slice(start, stop))
            assert part.first_layer == start
        assert store.check() == []


def test_they_survive_demotion_promotion_and_a_restart(tmp_path: Path) -> None:
    chunk = chunk_with_extras()
    settings = {"tier_codecs": {"disk": COARSE}}
    host = HostTier(chunk_bytes := extras.encode(RawCodec(), chunk).nbytes)
    host.put(KEY, extras.encode(RawCodec(), chunk))
    with opened(host, DiskTier(tmp_path), **settings) as store:
        store.put(make_key(2), make_chunk(2))
        assert store.stats().tiers[0].demotions == 1 and chunk_bytes > 0
    with opened(HostTier(None), DiskTier(tmp_path), **settings) as store:
        assert store.locate(KEY) == "disk"
        assert_extras(store.get(KEY), make_extras(3))
        assert store.locate(KEY) == "host"
        assert_extras(store.get(KEY), make_extras(3))


def test_transcoding_an_exact_chunk_keeps_them(tmp_path: Path) -> None:
    with opened(HostTier(None), DiskTier(tmp_path), codec=TwinCodec(), tier_codecs={"disk": RawCodec()}) as store:
        store.put(KEY, chunk_with_extras())
    with opened(HostTier(None), DiskTier(tmp_path), codec=TwinCodec()) as store:
        assert store.prefetch([KEY]).result() == 1
        found = store.get(KEY)
        assert_extras(found, make_extras(3))
        assert same_chunk(found, chunk_with_extras())


def test_a_flipped_byte_of_an_extra_is_a_miss(tmp_path: Path) -> None:
    """Containers begin with the widest numbers: the only 8-bit tensor, an extra, lies at the end."""
    with opened(DiskTier(tmp_path)) as store:
        store.put(KEY, chunk_with_extras())
    flip(tmp_path, KEY, -1)
    with opened(DiskTier(tmp_path)) as store:
        assert_extras(store.get(KEY, layers=(0, 1)), make_extras(3), slice(0, 1))  # layers are verified alone
        assert store.get(KEY) is None
        assert store.stats().tiers[0].corruptions == 1


def test_a_chunk_without_extras_is_stored_as_ever() -> None:
    blob = extras.encode(RawCodec(), make_chunk(1))
    assert blob.tensors.keys() == {"keys", "values", "token_ids", "positions"}
    assert extras.decode(blob, RawCodec().decode).extras == {}


def test_extras_that_contradict_the_chunk_are_refused() -> None:
    blob = extras.encode(RawCodec(), chunk_with_extras())
    bad = replace(blob, tensors={**blob.tensors, "extra/vq:1.codes": torch.zeros(2, 2, 9, dtype=torch.uint8)})
    with pytest.raises(CodecError, match="contradicts its extras"):
        extras.decode(bad, RawCodec().decode)


@pytest.mark.parametrize("name", ["", "a/b", "a b", "é", "x" * 101])
def test_names_are_checked(name: str) -> None:
    with pytest.raises(SpecMismatchError, match="extra is named"):
        replace(make_chunk(1), extras={name: torch.zeros(1)})


def test_layered_extras_are_checked() -> None:
    with pytest.raises(SpecMismatchError, match=r"layered_extras are \['b'\]"):
        replace(make_chunk(1), extras={"a": torch.zeros(3)}, layered_extras=frozenset("b"))
    for wrong in (torch.zeros(2), torch.tensor(1.0)):
        with pytest.raises(SpecMismatchError, match="expected 3 layers first"):
            replace(make_chunk(1), extras={"a": wrong}, layered_extras=frozenset("a"))
