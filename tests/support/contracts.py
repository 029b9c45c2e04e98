"""What every implementation of a protocol must do: subclass, give the fixture, done."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvloom.core import ChunkInfo, ChunkKey, Codec, EncodedChunk, KVChunk, KVSpec, ReadsLayers, RopeSpec, Tier
from kvloom.errors import CodecError, SpecMismatchError, TierFullError, TierUnavailableError
from kvloom.kvstore.encoding.buffer_pool import Spares
from kvloom.kvstore.eviction.policy import EvictionPolicy
from kvloom.kvstore.tiers.disk.index import Index
from kvloom.kvstore.tiers.disk.records import SLOT_BYTES, Records, read_header

ROPE = RopeSpec(inv_freq=tuple(10000.0 ** -(i / 4) for i in range(4)))
SPEC = KVSpec("tiny@1", num_layers=3, num_kv_heads=2, head_dim=8, dtype=torch.float32, rope=ROPE)


def make_key(number: int) -> ChunkKey:
    return ChunkKey(number.to_bytes(32, "big"))


def make_chunk(seed: int, *, tokens: int = 5, spec: KVSpec = SPEC, start: int = 0) -> KVChunk:
    """Random keys and values; equal arguments give equal chunks."""
    random = torch.Generator().manual_seed(seed)
    shape = (spec.num_layers, spec.num_kv_heads, tokens)
    return KVChunk(
        spec,
        torch.randint(0, 1000, (tokens,), generator=random),
        torch.arange(start, start + tokens),
        torch.randn(*shape, spec.head_dim, generator=random).to(spec.dtype),
        torch.randn(*shape, spec.value_dim, generator=random).to(spec.dtype),
    )


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal dtype, shape and every bit; NaN equals itself, 0.0 is not -0.0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(t.cpu().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))


def same_chunk(a: KVChunk, b: KVChunk) -> bool:
    fields = ("token_ids", "positions", "keys", "values")
    return (
        a.spec == b.spec
        and a.first_layer == b.first_layer
        and all(same_bits(getattr(a, name), getattr(b, name)) for name in fields)
    )


def same_blob(a: EncodedChunk, b: EncodedChunk) -> bool:
    return (a.codec, a.meta, a.layered, a.tensors.keys()) == (b.codec, b.meta, b.layered, b.tensors.keys()) and all(
        same_bits(a.tensors[name], b.tensors[name]) for name in a.tensors
    )


def make_blob(seed: int, *, numbers: int = 100) -> EncodedChunk:
    """`4 * numbers` layered bytes in 4 layers, and 24 others."""
    random = torch.Generator().manual_seed(seed)
    tensors = {
        "codes": torch.randint(0, 256, (4, numbers), generator=random).to(torch.uint8),
        "scale": torch.randn(6, generator=random),
    }
    return EncodedChunk("test", tensors, {"seed": str(seed), "first_layer": "0"}, frozenset({"codes"}))


def keys_of(tier: Tier) -> list[ChunkKey]:
    return [entry.key for entry in tier.entries()]


def stored_at(folder: Path, key: ChunkKey) -> tuple[Path, int, int]:
    """Where the container of a chunk lies in a disk tier, open or not: file, offset and bytes."""
    data = memoryview((folder / "journal").read_bytes())
    index = Index()
    for _ in Records(read_header(data)[0]).read(data[SLOT_BYTES:], 1, index):
        pass
    place = index.places[key]
    return folder / "segments" / f"{place.segment:016d}.seg", place.offset, place.nbytes


def stored_bytes(folder: Path, key: ChunkKey) -> bytes:
    path, offset, nbytes = stored_at(folder, key)
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(nbytes)


def overwrite(folder: Path, key: ChunkKey, data: bytes, at: int = 0) -> None:
    """Damages the container of a chunk in place, from byte `at` on."""
    path, offset, _ = stored_at(folder, key)
    with path.open("r+b") as file:
        file.seek(offset + at)
        file.write(data)


def flip(folder: Path, key: ChunkKey, at: int, bits: int = 1) -> None:
    """Flips bits of one byte of the container of a chunk; a negative `at` counts from its end."""
    data = stored_bytes(folder, key)
    overwrite(folder, key, bytes([data[at] ^ bits]), at % len(data))


class CodecContract:
    """Give a fixture `codec`. `tolerance` is the largest relative error of a decoded layer, in the Frobenius norm."""

    tolerance = 0.0
    specs = (
        SPEC,
        KVSpec("half@1", 2, 1, 8, torch.bfloat16, ROPE),
        KVSpec("no-rope@1", 2, 2, 8, torch.float16, None),
        KVSpec("latent@1", 2, 1, 8, torch.float32, ROPE, v_head_dim=0),
    )

    @pytest.fixture(params=specs, ids=lambda spec: spec.model_id)
    def chunk(self, request: pytest.FixtureRequest) -> KVChunk:
        return make_chunk(7, tokens=6, spec=request.param, start=11)

    def assert_close(self, found: Tensor, true: Tensor) -> None:
        assert found.dtype == true.dtype and found.shape == true.shape
        if self.tolerance == 0.0:
            assert same_bits(found, true)
        for layer in range(len(true)):
            error = (found[layer].float() - true[layer].float()).norm()
            assert error <= self.tolerance * true[layer].float().norm()

    def test_is_a_codec(self, codec: Codec) -> None:
        assert isinstance(codec, Codec)

    def test_round_trip(self, codec: Codec, chunk: KVChunk) -> None:
        decoded = codec.decode(codec.encode(chunk))
        assert decoded.spec == chunk.spec and decoded.first_layer == 0
        assert torch.equal(decoded.token_ids, chunk.token_ids) and torch.equal(decoded.positions, chunk.positions)
        self.assert_close(decoded.keys, chunk.keys)
        self.assert_close(decoded.values, chunk.values)

    def test_blob_can_be_stored(self, codec: Codec, chunk: KVChunk) -> None:
        blob = codec.encode(chunk)
        assert blob.codec == codec.name and blob.layered <= blob.tensors.keys()
        for name, tensor in blob.tensors.items():
            assert tensor.device.type == "cpu" and tensor.is_contiguous()
            assert name not in blob.layered or len(tensor) == chunk.spec.num_layers

    def test_encode_does_not_alias_unless_leased(self, codec: Codec) -> None:
        chunk = make_chunk(7)
        blob = codec.encode(chunk)
        if blob.leased:
            blob = Spares().copy(blob)
        for tensor in (chunk.token_ids, chunk.positions, chunk.keys, chunk.values):
            tensor.zero_()
        true = make_chunk(7)
        decoded = codec.decode(blob)
        assert torch.equal(decoded.token_ids, true.token_ids) and torch.equal(decoded.positions, true.positions)
        self.assert_close(decoded.keys, true.keys)

    def test_encode_takes_any_strides(self, codec: Codec) -> None:
        chunk = make_chunk(7)
        strided = KVChunk(
            chunk.spec,
            chunk.token_ids.repeat_interleave(2)[::2],
            chunk.positions,
            chunk.keys.transpose(1, 2).contiguous().transpose(1, 2),
            chunk.values.transpose(0, 3).contiguous().transpose(0, 3),
        )
        assert not strided.keys.is_contiguous()
        blob = codec.encode(strided)
        assert all(tensor.is_contiguous() for tensor in blob.tensors.values())
        self.assert_close(codec.decode(blob).keys, chunk.keys)
        self.assert_close(codec.decode(codec.encode(strided)).values, chunk.values)

    def test_moves_keys_to_positions(self, codec: Codec, chunk: KVChunk) -> None:
        positions = torch.tensor([0, 3, 4, 9, 500, 501])
        decoded = codec.decode(codec.encode(chunk), positions)
        assert torch.equal(decoded.positions, positions)
        keys = chunk.keys
        if chunk.spec.rope is not None:
            keys = chunk.spec.rope.shift(keys, positions - chunk.positions)
            assert not torch.allclose(keys.float(), chunk.keys.float(), atol=0.1)
        self.assert_close(decoded.keys, keys)
        self.assert_close(decoded.values, chunk.values)

    def test_decodes_layers_alone(self, codec: Codec, chunk: KVChunk) -> None:
        positions = chunk.positions + 5
        blob = codec.encode(chunk)
        whole, part = codec.decode(blob, positions), codec.decode(blob.layers(1, 2), positions)
        assert part.first_layer == 1
        assert same_bits(part.keys, whole.keys[1:2]) and same_bits(part.values, whole.values[1:2])

    def test_refuses_wrong_positions(self, codec: Codec) -> None:
        blob = codec.encode(make_chunk(7))
        for positions in (torch.arange(4), torch.arange(5.0), torch.arange(1)):
            with pytest.raises(SpecMismatchError):
                codec.decode(blob, positions)

    def test_refuses_foreign_blobs(self, codec: Codec) -> None:
        blob = codec.encode(make_chunk(7))
        some = dict(list(blob.tensors.items())[1:])
        for foreign in (
            EncodedChunk("another", blob.tensors, blob.meta, blob.layered),
            EncodedChunk(blob.codec, some, blob.meta, blob.layered & some.keys()),
            EncodedChunk(blob.codec, blob.tensors, {}, blob.layered),
        ):
            with pytest.raises(CodecError):
                codec.decode(foreign)


class TierContract:
    """Give a fixture `tier` without capacity limit, and `make_tier(capacity_bytes)` if the tier can have one."""

    @pytest.fixture
    def tier(self) -> Iterator[Tier]:
        tier = self.make_tier(None)
        yield tier
        tier.close()

    def make_tier(self, capacity_bytes: int | None) -> Tier:
        raise NotImplementedError

    def test_is_a_tier(self, tier: Tier) -> None:
        assert isinstance(tier, Tier) and tier.name and tier.used_bytes == 0 and keys_of(tier) == []

    def test_absent(self, tier: Tier) -> None:
        assert tier.get(make_key(1)) is None and make_key(1) not in tier and not tier.delete(make_key(1))
        assert "text" not in tier

    def test_round_trip(self, tier: Tier) -> None:
        for seed in range(3):
            tier.put(make_key(seed), make_blob(seed, numbers=50 * seed))
        for seed in range(3):
            found = tier.get(make_key(seed))
            assert found is not None and same_blob(found, make_blob(seed, numbers=50 * seed))
            assert make_key(seed) in tier

    def test_accounts_for_every_byte(self, tier: Tier) -> None:
        used = [tier.used_bytes]
        for seed in range(3):
            tier.put(make_key(seed), make_blob(seed))
            used.append(tier.used_bytes)
        assert used[1] >= make_blob(0).nbytes and used == [n * used[1] for n in range(4)]
        assert tier.delete(make_key(1)) and not tier.delete(make_key(1))
        assert tier.used_bytes == used[2] and tier.get(make_key(1)) is None and make_key(1) not in tier

    def test_says_what_a_chunk_takes_if_it_says_anything(self, tier: Tier) -> None:
        for number, numbers in enumerate((10, 1000, 300, 0)):
            taken_bytes = tier.put(make_key(number % 3), make_blob(number, numbers=numbers))
            held = {entry.key: entry.nbytes for entry in tier.entries()}
            assert taken_bytes in (None, held[make_key(number % 3)])

    def test_replaces(self, tier: Tier) -> None:
        tier.put(make_key(1), make_blob(1, numbers=1000))
        large_bytes = tier.used_bytes
        tier.put(make_key(1), make_blob(2, numbers=10))
        found = tier.get(make_key(1))
        assert found is not None and same_blob(found, make_blob(2, numbers=10))
        assert 0 < tier.used_bytes < large_bytes and keys_of(tier) == [make_key(1)]

    def test_iterates_in_order_of_writing(self, tier: Tier) -> None:
        for number in (5, 3, 9, 5):
            tier.put(make_key(number), make_blob(number))
        assert keys_of(tier) == [make_key(3), make_key(9), make_key(5)]
        assert sum(entry.nbytes for entry in tier.entries()) == tier.used_bytes

    def test_remembers_what_it_is_told_of_a_chunk(self, tier: Tier) -> None:
        infos = [ChunkInfo(make_key(9), "tenant é", 2e9, 0.25), ChunkInfo(), ChunkInfo(namespace="other")]
        for number, info in enumerate(infos):
            tier.put(make_key(number), make_blob(number), info)
        assert [entry.info for entry in tier.entries()] == infos
        tier.put(make_key(0), make_blob(0))
        assert [entry.info for entry in tier.entries()] == [*infos[1:], ChunkInfo()]

    def test_full_changes_nothing(self, tier: Tier) -> None:
        tier.put(make_key(0), make_blob(0))
        chunk_bytes = tier.used_bytes
        small = self.make_tier(2 * chunk_bytes)
        small.put(make_key(0), make_blob(0))
        small.put(make_key(1), make_blob(1))
        for number, blob in ((2, make_blob(2)), (0, make_blob(2, numbers=1000))):
            with pytest.raises(TierFullError) as full:
                small.put(make_key(number), blob)
            assert full.value.needed_bytes >= blob.nbytes
        assert small.used_bytes == small.capacity_bytes == 2 * chunk_bytes
        found = small.get(make_key(0))
        assert found is not None and same_blob(found, make_blob(0)) and make_key(2) not in small
        del found  # what is being read may keep its space
        small.put(make_key(1), make_blob(3))  # replacing takes no further space
        assert small.delete(make_key(0))
        small.put(make_key(2), make_blob(2))
        assert keys_of(small) == [make_key(1), make_key(2)]
        small.close()

    def test_layers_are_those_of_the_whole(self, tier: Tier) -> None:
        if not isinstance(tier, ReadsLayers):
            pytest.skip("tier reads no layers")
        blob = make_blob(1)
        tier.put(make_key(1), blob)
        assert tier.get_layers(make_key(2), 0, 1) is None
        for start, stop in ((0, 4), (1, 3), (3, 4), (2, 99)):
            found = tier.get_layers(make_key(1), start, stop)
            assert found is not None and same_blob(found, blob.layers(start, stop))

    def test_closed(self) -> None:
        tier = self.make_tier(None)
        tier.put(make_key(1), make_blob(1))
        tier.close()
        tier.close()
        for call in (
            lambda: tier.get(make_key(1)),
            lambda: tier.put(make_key(2), make_blob(2)),
            lambda: tier.delete(make_key(1)),
        ):
            with pytest.raises(TierUnavailableError):
                call()


class PolicyContract:
    """Give `make`, which makes an eviction policy."""

    make: Callable[[], EvictionPolicy]

    @pytest.fixture
    def policy(self) -> EvictionPolicy:
        return type(self).make()

    def test_is_a_policy(self, policy: EvictionPolicy) -> None:
        assert isinstance(policy, EvictionPolicy)
        assert policy.victim(lambda _: True) is None

    def test_asking_changes_nothing_that_is_held(self, policy: EvictionPolicy) -> None:
        policy.add(make_key(1), 100)
        assert policy.victim(lambda _: False) is None
        assert policy.victim(lambda _: True) == policy.victim(lambda _: True) == make_key(1)

    @pytest.mark.parametrize("seed", range(3))
    def test_every_key_goes_exactly_once(self, policy: EvictionPolicy, seed: int) -> None:
        draw = random.Random(seed)
        held: set[ChunkKey] = set()
        for step in range(6000):
            key = make_key(draw.randrange(400))
            if key not in held or draw.random() < 0.1:
                policy.add(key, 100, draw.choice([None, make_key(draw.randrange(400))]))
                held.add(key)
            elif draw.random() < 0.1:
                policy.remove(key)
                held.remove(key)
            else:
                policy.touch(key)
            if len(held) > 100:
                pinned = set(draw.sample(sorted(held), 5))
                victim = policy.victim(lambda key: key not in pinned)  # noqa: B023
                assert victim in held - pinned, step
                policy.remove(victim, evicted=True)
                held.remove(victim)
        last = draw.choice(sorted(held))
        assert policy.victim(lambda key: key == last) == last
        while held:
            victim = policy.victim(lambda _: True)
            held.remove(victim)
            policy.remove(victim, evicted=draw.random() < 0.5)
        assert policy.victim(lambda _: True) is None
