"""Tiers over one buffer, `DeviceTier` and pinned `HostTier`: what a reader holds is never written over.

They run over plain memory, and where CUDA is there also on the device.
"""

import gc
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvloom.compress.raw import RawCodec
from kvloom.core import EncodedChunk
from kvloom.errors import TierFullError, TierUnavailableError
from kvloom.kvstore.encoding.copies import wait_for_devices
from kvloom.kvstore.format import from_bytes, to_bytes
from kvloom.kvstore.store import KVStore
from kvloom.kvstore.tiers import host, slab
from kvloom.kvstore.tiers.arena import aligned
from kvloom.kvstore.tiers.device import DeviceTier
from kvloom.kvstore.tiers.host import HostTier
from kvloom.kvstore.tiers.memory import MemoryTier
from kvloom.kvstore.tiers.slab import Slab
from kvloom.testing import SPEC, TierContract, make_blob, make_chunk, make_key, same_bits, same_blob, same_chunk

HAS_CUDA = torch.cuda.is_available()
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device"))]
MIB = 1 << 20
BLOB_BYTES = 512  # what `make_blob` takes on a device, without what is not layered


class Device:
    """Stands for a device that reads the buffer: counts how often it was waited for, and may do something then."""

    def __init__(self) -> None:
        self.waits = 0
        self.during: Callable[[], object] = lambda: None
        self.buffer = torch.empty(0, dtype=torch.uint8)

    def wait(self) -> None:
        self.waits += 1
        self.during()


def slab_tier(capacity_bytes: int, device: Device) -> MemoryTier[Any]:
    """Like a `DeviceTier` on CUDA, in plain memory."""
    device.buffer = torch.empty(capacity_bytes, dtype=torch.uint8)
    return MemoryTier("slab", capacity_bytes, Slab("slab", device.buffer, layered_only=True, wait=device.wait))


def same(found: EncodedChunk | None, seed: int, numbers: int = 100) -> bool:
    return found is not None and same_blob(found, make_blob(seed, numbers=numbers))


def fill(tier: MemoryTier[Any], *, start: int = 1000) -> int:
    """Puts chunks until one does not fit; how many did."""
    for count in range(10_000):
        try:
            tier.put(make_key(start + count), make_blob(start + count))
        except TierFullError:
            return count
    raise AssertionError("the tier takes everything")


def assert_empty(tier: MemoryTier[Any]) -> None:
    for entry in tier.entries():
        tier.delete(entry.key)
    assert tier.used_bytes == 0 and tier.check() == []
    tier.put(make_key(1), make_blob(1, numbers=tier.capacity_bytes // 4))  # in one piece again
    assert tier.used_bytes == tier.capacity_bytes


@pytest.mark.parametrize("kind", DEVICES)
class TestDeviceTier(TierContract):
    @pytest.fixture(autouse=True)
    def choose(self, kind: str) -> None:
        self.kind = kind

    def make_tier(self, capacity_bytes: int | None) -> DeviceTier:
        return DeviceTier(MIB if capacity_bytes is None else capacity_bytes, device=self.kind)

    def test_layered_tensors_are_views_on_the_device(self, tier: DeviceTier) -> None:
        tier.put(make_key(1), make_blob(1))
        first, second, part = tier.get(make_key(1)), tier.get(make_key(1)), tier.get_layers(make_key(1), 1, 3)
        assert first.leased and part.leased and first.tensors["codes"].device.type == self.kind
        assert first.tensors["scale"].device.type == "cpu"
        assert first.tensors["codes"].data_ptr() == second.tensors["codes"].data_ptr()
        assert part.tensors["codes"].data_ptr() == first.tensors["codes"][1].data_ptr()

    def test_counts_what_is_on_the_device(self, tier: DeviceTier) -> None:
        tier.put(make_key(1), make_blob(1))
        assert tier.used_bytes == BLOB_BYTES == aligned(make_blob(1).tensors["codes"].nbytes)

    def test_put_does_not_alias(self, tier: DeviceTier) -> None:
        blob = make_blob(1)
        tier.put(make_key(1), blob)
        for tensor in blob.tensors.values():
            tensor.zero_()
        assert same(tier.get(make_key(1)), 1)

    def test_goes_to_other_tiers_and_comes_back(self, tier: DeviceTier) -> None:
        tier.put(make_key(1), make_blob(1))
        below = HostTier(None, pinned=False)
        below.put(make_key(1), tier.get(make_key(1)))
        assert same(from_bytes(make_key(1), to_bytes(make_key(1), tier.get(make_key(1)))), 1)
        assert_empty(tier)
        tier.delete(make_key(1))
        kept = below.get(make_key(1))
        assert same(kept, 1) and not kept.leased and kept.tensors["codes"].device.type == "cpu"
        tier.put(make_key(2), kept)
        assert same(tier.get(make_key(2)), 1)


class ImaginedCudart:
    """Stands for the CUDA runtime as torch shows it: pins memory, and knows which."""

    def __init__(self) -> None:
        self.pinned: dict[int, int] = {}
        self.error = 0

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802
        if not self.error:
            assert flags == 1 and nbytes > 0 and address not in self.pinned
            self.pinned[address] = nbytes
        return self.error

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        del self.pinned[address]
        return 0


@pytest.fixture
def cudart(monkeypatch: pytest.MonkeyPatch) -> Iterator[ImaginedCudart]:
    cudart = ImaginedCudart()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(host, "wait_for_devices", lambda: None)
    yield cudart
    gc.collect()
    assert cudart.pinned == {}


@pytest.mark.skipif(HAS_CUDA, reason="there is a real device")
class TestPinnedHostTier(TierContract):
    """On a device that is imagined."""

    @pytest.fixture(autouse=True)
    def imagine_a_device(self, cudart: ImaginedCudart) -> None:
        self.cudart = cudart

    def make_tier(self, capacity_bytes: int | None) -> HostTier:
        return HostTier(MIB if capacity_bytes is None else capacity_bytes, pinned=True)

    def test_is_pinned_until_the_last_reader_is_gone(self, tier: HostTier) -> None:
        (address,) = self.cudart.pinned
        assert self.cudart.pinned == {address: MIB}
        tier.put(make_key(1), make_blob(1))
        found = tier.get(make_key(1))
        tier.close()
        assert self.cudart.pinned == {address: MIB} and same(found, 1)
        del found
        assert self.cudart.pinned == {}

    def test_pinned_memory_that_cannot_be_had(self) -> None:
        self.cudart.error = 2
        with pytest.raises(TierUnavailableError, match=r"bytes of pinned memory; give a smaller .* returned error 2"):
            HostTier(MIB, pinned=True)

    def test_nothing_to_pin(self) -> None:
        with pytest.raises(TierFullError):
            HostTier(0, pinned=True).put(make_key(1), make_blob(1))

    def test_everything_is_in_the_buffer(self, tier: HostTier) -> None:
        tier.put(make_key(1), make_blob(1))
        assert tier.used_bytes == BLOB_BYTES + 256
        found = tier.get(make_key(1))
        assert found.leased and found.tensors["scale"].data_ptr() == found.tensors["codes"].data_ptr() + BLOB_BYTES

    def test_is_the_default_where_it_can_be(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(host, "can_pin", lambda: True)
        assert HostTier(MIB).pinned and not HostTier(None).pinned and not HostTier(MIB, pinned=False).pinned
        monkeypatch.setattr(host, "can_pin", lambda: False)
        assert not HostTier(MIB).pinned


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="capacity_bytes is None"):
        HostTier(None, pinned=True)
    with pytest.raises(ValueError, match="capacity_bytes is -1"):
        DeviceTier(-1, device="cpu")
    for device in ("mps", "meta", "", "cudo:1"):
        with pytest.raises(ValueError, match=f"device is '{device}'"):
            DeviceTier(MIB, device=device)
    with pytest.raises(TierUnavailableError, match="of cuda:77 memory"):
        DeviceTier(MIB, device="cuda:77")
    with pytest.raises(TierUnavailableError, match="smaller capacity_bytes"):
        DeviceTier(1 << 60, device="cpu")


@pytest.mark.skipif(HAS_CUDA, reason="memory can be pinned here")
def test_pinned_memory_that_cannot_be_had() -> None:
    with pytest.raises(TierUnavailableError, match="of pinned memory"):
        HostTier(MIB, pinned=True)


@pytest.mark.parametrize(("in_use", "expected"), [({1, 2}, [1, 2]), (None, [0, 1, 2])])
def test_waits_for_the_devices_in_use(
    monkeypatch: pytest.MonkeyPatch, in_use: set[int] | None, expected: list[int]
) -> None:
    """A device that the process does not use gets no context by that; where torch cannot tell, all are waited for."""
    waited: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    monkeypatch.delattr(torch._C, "_cuda_hasPrimaryContext", raising=False)
    if in_use is not None:
        monkeypatch.setattr(torch._C, "_cuda_hasPrimaryContext", in_use.__contains__, raising=False)
    wait_for_devices()
    assert waited == expected


def test_decoding_stays_on_the_device() -> None:
    """`meta` has no data, so whatever went through the cpu would fail."""
    blob = RawCodec().encode(make_chunk(1))
    on_device = {name: t.to("meta") if name in blob.layered else t for name, t in blob.tensors.items()}
    chunk = RawCodec().decode(EncodedChunk(blob.codec, on_device, blob.meta, blob.layered), torch.arange(5) + 9)
    assert chunk.keys.is_meta and chunk.values.is_meta and chunk.keys.shape == make_chunk(1).keys.shape
    assert chunk.positions.tolist() == [9, 10, 11, 12, 13]


@pytest.fixture
def device() -> Device:
    return Device()


@pytest.fixture
def tier(device: Device) -> Iterator[MemoryTier[Any]]:
    """Room for four chunks."""
    tier = slab_tier(4 * BLOB_BYTES, device)
    tier.put(make_key(1), make_blob(1))
    yield tier
    tier.close()


HOLDS: dict[str, Callable[[EncodedChunk], object]] = {
    "chunk": lambda blob: blob,
    "tensor": lambda blob: blob.tensors["codes"],
    "layer": lambda blob: blob.tensors["codes"][2],
    "layers": lambda blob: blob.layers(1, 2),
    "other dtype": lambda blob: blob.tensors["codes"].view(torch.int32),
    "other strides": lambda blob: blob.tensors["codes"].t()[::7],
    "one number": lambda blob: blob.tensors["codes"][3, 99],
    "numpy": lambda blob: blob.tensors["codes"].numpy(),
    "memoryview": lambda blob: memoryview(blob.tensors["codes"].numpy())[5:],
    "storage": lambda blob: blob.tensors["codes"].untyped_storage(),
    "autograd": lambda blob: blob.tensors["codes"].view(torch.float32).requires_grad_().square(),
}


@pytest.mark.parametrize("hold", HOLDS.values(), ids=HOLDS)
def test_whatever_refers_to_the_bytes_keeps_them(tier: MemoryTier[Any], hold: Callable[[EncodedChunk], object]) -> None:
    held = hold(tier.get(make_key(1)))
    assert tier.delete(make_key(1)) and tier.get(make_key(1)) is None and make_key(1) not in tier
    assert fill(tier) == 3 and tier.used_bytes == 4 * BLOB_BYTES and tier.check() == []
    del held
    assert tier.used_bytes == 3 * BLOB_BYTES and fill(tier, start=2000) == 1
    assert_empty(tier)


def test_bytes_of_a_reader_stay(tier: MemoryTier[Any]) -> None:
    held = tier.get(make_key(1)), tier.get_layers(make_key(1), 1, 3)
    tier.delete(make_key(1))
    for start in (1000, 2000, 3000):
        fill(tier, start=start)
        for entry in tier.entries():
            tier.delete(entry.key)
    tier.close()
    with pytest.raises(TierUnavailableError):
        tier.get(make_key(1))
    assert same(held[0], 1) and same_blob(held[1], make_blob(1).layers(1, 3))


def test_refusal_says_who_has_the_space(tier: MemoryTier[Any]) -> None:
    held = [tier.get(make_key(1)), tier.get(make_key(1))]
    tier.delete(make_key(1))
    large = make_blob(9, numbers=4 * BLOB_BYTES // 4)
    with pytest.raises(TierFullError) as full:
        tier.put(make_key(9), large)
    assert full.value.needed_bytes == tier.capacity_bytes
    assert "2048 bytes do not fit, 512 of 2048 are used, 512 of them by readers of chunks" in str(full.value)
    assert "the largest gap is 1536" in str(full.value)
    held.pop()
    with pytest.raises(TierFullError):
        tier.put(make_key(9), large)
    held.pop()
    tier.put(make_key(9), large)
    assert same(tier.get(make_key(9)), 9, numbers=512)


def test_replaced_while_it_is_read(tier: MemoryTier[Any]) -> None:
    held = tier.get(make_key(1))
    tier.put(make_key(1), make_blob(2))
    assert same(held, 1) and same(tier.get(make_key(1)), 2) and tier.used_bytes == 2 * BLOB_BYTES
    fill(tier)
    with pytest.raises(TierFullError):  # no room for both, and a reader may not lose the old one
        tier.put(make_key(1), make_blob(3, numbers=400))
    assert same(held, 1) and same(tier.get(make_key(1)), 2) and tier.check() == []
    del held
    tier.put(make_key(1), make_blob(3))
    tier.put(make_key(1), make_blob(4))
    assert same(tier.get(make_key(1)), 4) and tier.check() == []
    assert_empty(tier)


def test_a_chunk_as_large_as_the_tier_can_be_replaced(device: Device) -> None:
    tier = slab_tier(BLOB_BYTES, device)
    for seed in range(3):
        tier.put(make_key(1), make_blob(seed))
        assert same(tier.get(make_key(1)), seed)
    assert tier.used_bytes == BLOB_BYTES and tier.check() == []


def test_devices_are_waited_for_before_lent_space_is_written(tier: MemoryTier[Any], device: Device) -> None:
    fill(tier)
    tier.delete(make_key(1))
    assert fill(tier, start=2000) == 1 and device.waits == 0  # nobody has read that chunk
    found = tier.get(make_key(2000))
    assert same(found, 2000)
    del found
    tier.delete(make_key(2000))
    assert tier.used_bytes == 3 * BLOB_BYTES and device.waits == 0 and tier.check() == []
    seen: list[bytes] = []
    device.during = lambda: seen.append(bytes(device.buffer.numpy()))
    before = bytes(device.buffer.numpy())
    tier.put(make_key(3000), make_blob(3000))
    assert device.waits == 1 and seen == [before] and same(tier.get(make_key(3000)), 3000)


def test_space_that_nobody_has_read_is_used_first(tier: MemoryTier[Any], device: Device) -> None:
    tier.get(make_key(1))
    tier.delete(make_key(1))
    assert fill(tier) == 4 and device.waits == 1  # with the last one


def test_who_reads_during_the_wait_is_not_overlooked(device: Device) -> None:
    tier = slab_tier(BLOB_BYTES, device)
    tier.put(make_key(1), make_blob(1))
    tier.get(make_key(1))
    held: list[EncodedChunk | None] = []
    device.during = lambda: held.append(tier.get(make_key(1)))
    with pytest.raises(TierFullError):
        tier.put(make_key(1), make_blob(2))
    assert device.waits == 1 and same(held.pop(), 1)
    device.during = lambda: tier.get(make_key(1))  # and is done with it before the wait is over
    with pytest.raises(TierFullError):
        tier.put(make_key(1), make_blob(2))
    assert device.waits == 2 and same(tier.get(make_key(1)), 1)
    device.during = lambda: None
    tier.put(make_key(1), make_blob(2))
    assert device.waits == 3 and same(tier.get(make_key(1)), 2)


def test_who_lets_go_during_the_wait_may_have_queued_work(device: Device) -> None:
    tier = slab_tier(2 * BLOB_BYTES, device)
    tier.put(make_key(1), make_blob(1))
    tier.put(make_key(2), make_blob(2))
    held = [tier.get(make_key(1))]
    tier.get(make_key(2))
    tier.delete(make_key(2))
    device.during = held.clear
    large = make_blob(3, numbers=2 * BLOB_BYTES // 4)
    with pytest.raises(TierFullError):
        tier.put(make_key(1), large)
    assert device.waits == 1 and held == [] and same(tier.get(make_key(1)), 1)
    tier.put(make_key(1), large)
    assert device.waits == 2 and same(tier.get(make_key(1)), 3, numbers=256)


def test_a_device_that_fails_loses_nothing(tier: MemoryTier[Any], device: Device) -> None:
    fill(tier)
    tier.get(make_key(1))
    tier.delete(make_key(1))

    def fail() -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    device.during = fail
    with pytest.raises(TierUnavailableError, match="cannot wait for its device: CUDA error"):
        tier.put(make_key(9), make_blob(9))
    assert tier.check() == [] and make_key(9) not in tier
    device.during = lambda: None
    tier.put(make_key(9), make_blob(9))
    assert same(tier.get(make_key(9)), 9)


@pytest.mark.parametrize("is_full", [False, True])
def test_a_copy_that_fails_leaves_nothing(
    tier: MemoryTier[Any], monkeypatch: pytest.MonkeyPatch, is_full: bool
) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    if is_full:
        fill(tier)
    used_bytes = tier.used_bytes
    with monkeypatch.context() as patch:
        patch.setattr(slab, "copy", fail)
        with pytest.raises(TierUnavailableError, match="cannot copy to its device"):
            tier.put(make_key(1), make_blob(2))
    if is_full:  # the old chunk had to make room
        assert make_key(1) not in tier and tier.get(make_key(1)) is None
        assert tier.used_bytes == used_bytes - BLOB_BYTES
    else:
        assert same(tier.get(make_key(1)), 1) and tier.used_bytes == used_bytes
    assert tier.check() == []
    tier.put(make_key(1), make_blob(3))
    assert same(tier.get(make_key(1)), 3)


def test_closed_during_a_put(tier: MemoryTier[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    copy = slab.copy

    def close_then_copy(pairs: Any) -> None:
        tier.close()
        copy(pairs)

    monkeypatch.setattr(slab, "copy", close_then_copy)
    with pytest.raises(TierUnavailableError, match="is closed"):
        tier.put(make_key(2), make_blob(2))
    assert tier.entries() == [] and tier.used_bytes == 0 and tier.check() == []


def test_check_finds_damage(tier: MemoryTier[Any]) -> None:
    assert tier.check() == []
    lost = tier._table.pop(make_key(1))
    assert "1 ranges are taken, 0" in tier.check()[0]
    tier._table[make_key(1)] = lost
    assert tier.check() == []


@pytest.mark.parametrize("made, written", [(True, False), (False, True)])
def test_any_mode_of_autograd(made: bool, written: bool) -> None:
    with torch.inference_mode(made):
        tier = DeviceTier(MIB, device="cpu")
    assert not tier._memory._buffer.is_inference()
    with torch.inference_mode(written):
        tier.put(make_key(1), make_blob(1))
    assert same(tier.get(make_key(1)), 1)
    blob = make_blob(2)
    blob.tensors["scale"].requires_grad_()
    tier.put(make_key(2), EncodedChunk("test", blob.tensors, blob.meta, frozenset({"codes", "scale"})))
    found = tier.get(make_key(2))
    assert not found.tensors["scale"].requires_grad and same_bits(found.tensors["scale"], blob.tensors["scale"])


class SlabMachine(RuleBasedStateMachine):
    """A tier over a slab against a dictionary and a list of readers."""

    def __init__(self) -> None:
        super().__init__()
        self.tier = slab_tier(16 * BLOB_BYTES, Device())
        self.chunks: dict[int, tuple[int, int]] = {}  # key -> seed and numbers
        self.readers: list[tuple[EncodedChunk, int, int]] = []
        self.seeds = 0

    @rule(number=st.integers(0, 9), numbers=st.sampled_from([0, 1, 100, 200, 500, 1000]))
    def put(self, number: int, numbers: int) -> None:
        self.seeds += 1
        try:
            self.tier.put(make_key(number), make_blob(self.seeds, numbers=numbers))
        except TierFullError as exc:
            assert exc.needed_bytes == max(aligned(4 * numbers), 256)
            assert int(str(exc).rpartition("the largest gap is ")[2]) < exc.needed_bytes
            return
        self.chunks[number] = self.seeds, numbers

    @precondition(lambda self: self.chunks)
    @rule(data=st.data(), layers=st.booleans())
    def read(self, data: st.DataObject, layers: bool) -> None:
        number = data.draw(st.sampled_from(sorted(self.chunks)))
        key = make_key(number)
        found = self.tier.get_layers(key, 0, 4) if layers else self.tier.get(key)
        assert found is not None
        self.readers.append((found, *self.chunks[number]))

    @precondition(lambda self: self.readers)
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        del self.readers[data.draw(st.integers(0, len(self.readers) - 1))]

    @rule(number=st.integers(0, 9))
    def delete(self, number: int) -> None:
        assert self.tier.delete(make_key(number)) == (self.chunks.pop(number, None) is not None)

    def used_bytes(self) -> int:
        versions = {*self.chunks.values(), *((seed, numbers) for _, seed, numbers in self.readers)}
        return sum(max(aligned(4 * numbers), 256) for _, numbers in versions)

    @invariant()
    def agrees(self) -> None:
        assert self.tier.used_bytes == self.used_bytes() <= self.tier.capacity_bytes and self.tier.check() == []
        assert {entry.key for entry in self.tier.entries()} == {make_key(number) for number in self.chunks}
        assert all(same(found, seed, numbers) for found, seed, numbers in self.readers)

    def teardown(self) -> None:
        for number, (seed, numbers) in self.chunks.items():
            assert same(self.tier.get(make_key(number)), seed, numbers)
        self.readers.clear()
        assert_empty(self.tier)


TestSlab = SlabMachine.TestCase
TestSlab.settings = settings(max_examples=40, stateful_step_count=40)


def plain_blob(value: int, numbers: int) -> EncodedChunk:
    return EncodedChunk("test", {"n": torch.full((2, numbers), value)}, {"value": str(value)}, frozenset({"n"}))


@pytest.mark.slow
@pytest.mark.parametrize("waits", [False, True])
def test_threads(waits: bool) -> None:
    """Eight threads, keys for twice the space; some readers keep what they got for a while."""
    device = Device()
    device.during = lambda: time.sleep(0.0005)
    capacity_bytes = 20 * 32_768
    tier = slab_tier(capacity_bytes, device) if waits else DeviceTier(capacity_bytes, device="cpu")
    until_s = time.monotonic() + 2.0
    wrong: list[object] = []
    counts = [0, 0]

    def check(found: EncodedChunk) -> None:
        if not bool((found.tensors["n"] == int(found.meta["value"])).all()):
            wrong.append(found.meta)

    def work(seed: int) -> None:
        draw = random.Random(seed)
        held: list[EncodedChunk] = []
        while time.monotonic() < until_s:
            key = make_key(draw.randrange(40))
            choice = draw.random()
            if choice < 0.4:
                try:
                    tier.put(key, plain_blob(draw.randrange(1 << 40), draw.choice([1500, 2048, 2048, 2500])))
                    counts[0] += 1
                except TierFullError:
                    tier.delete(make_key(draw.randrange(40)))
            elif choice < 0.45:
                tier.delete(key)
            elif (found := tier.get(key)) is not None:
                counts[1] += 1
                check(found)
                held.append(found)
                if len(held) > 2:
                    check(held.pop(draw.randrange(3)))
        for found in held:
            check(found)

    with ThreadPoolExecutor(8) as threads:
        for future in [threads.submit(work, seed) for seed in range(8)]:
            future.result()
    assert wrong == [] and min(counts) > 50 and tier.check() == []
    assert (device.waits > 0) == waits
    gc.collect()
    for entry in tier.entries():
        tier.delete(entry.key)
    assert tier.used_bytes == 0 and tier.check() == []
    tier.put(make_key(1), plain_blob(1, capacity_bytes // 16))  # in one piece again
    assert tier.used_bytes == capacity_bytes


def test_readings_that_are_over_do_not_pile_up(tier: MemoryTier[Any]) -> None:
    for _ in range(1000):
        tier.get(make_key(1))
    gc.collect()
    assert not [thing for thing in gc.get_objects() if type(thing) is slab.Lease]
    (chunk,) = (thing for thing in gc.get_objects() if type(thing) is slab.SlabChunk and not thing.released)
    assert chunk.leases == set()


def test_readings_in_a_cycle_end_with_it(tier: MemoryTier[Any]) -> None:
    cycle: list[object] = [tier.get(make_key(1))]
    cycle.append(cycle)
    tier.delete(make_key(1))
    del cycle
    gc.collect()
    assert tier.used_bytes == 0


CHUNK_BYTES = sum(aligned(t.nbytes) for t in (make_chunk(0).keys, make_chunk(0).values))


@pytest.mark.parametrize("host_chunks", [4, 12])
@pytest.mark.parametrize("kind", DEVICES)
def test_under_a_store(kind: str, host_chunks: int) -> None:
    """Three chunks fit on the device, four or all into the host; readers hold some of what was evicted."""
    draw = random.Random(7)
    raw_bytes = RawCodec().encode(make_chunk(0)).nbytes
    tiers = [DeviceTier(3 * CHUNK_BYTES, device=kind), HostTier(host_chunks * raw_bytes, pinned=False)]
    known: set[int] = set()
    held: list[tuple[Any, int]] = []
    with KVStore(tiers) as store:
        for _ in range(300):
            number = draw.randrange(12)
            if draw.random() < 0.5:
                store.put(make_key(number), make_chunk(number))
                known.add(number)
            elif (chunk := store.get(make_key(number))) is not None:
                assert number in known
                held = [*held[-1:], (chunk, number)]
            assert all(same_chunk(chunk, number) for chunk, number in ((c, make_chunk(n)) for c, n in held))
        chunk = held = None
        assert store.check() == []
        on_device, in_host = store.stats().tiers
        assert on_device.hits > 10 and in_host.hits > 10 and on_device.evictions > 10
        assert on_device.promotions > 10 and (on_device.demotions > 0) == (in_host.evictions > 10) == (host_chunks == 4)
        assert on_device.used_bytes == CHUNK_BYTES * on_device.chunks and in_host.errors == on_device.errors == 0
        moved = store.get(make_key(number), torch.arange(100, 105)) if number in store else None
        assert moved is None or torch.allclose(
            moved.keys.cpu(), SPEC.rope.shift(make_chunk(number).keys, 100), atol=1e-5
        )


@pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")
class TestReallyPinnedHostTier(TierContract):
    def make_tier(self, capacity_bytes: int | None) -> HostTier:
        return HostTier(MIB if capacity_bytes is None else capacity_bytes, pinned=True)

    def test_is_pinned(self, tier: HostTier) -> None:
        tier.put(make_key(1), make_blob(1))
        assert tier.get(make_key(1)).tensors["codes"].is_pinned()


@pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")
def test_work_that_is_queued_reads_what_it_was_given() -> None:
    """A kernel on some stream reads a chunk long after its tensors are gone and its space is wanted again."""
    numbers = 16 * MIB
    tier = DeviceTier(4 * numbers)
    stream = torch.cuda.Stream()
    tier.put(make_key(1), make_blob(1, numbers=numbers))
    with torch.cuda.stream(stream):
        torch.cuda._sleep(500_000_000)
        result = tier.get(make_key(1)).tensors["codes"].clone()
    tier.delete(make_key(1))
    tier.put(make_key(2), make_blob(2, numbers=numbers))
    stream.synchronize()
    assert same_bits(result, make_blob(1, numbers=numbers).tensors["codes"])


@pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")
def test_copies_to_a_device_that_are_queued_read_what_they_were_given() -> None:
    numbers = 16 * MIB
    tier = HostTier(4 * numbers + 256, pinned=True)
    stream = torch.cuda.Stream()
    tier.put(make_key(1), make_blob(1, numbers=numbers))
    with torch.cuda.stream(stream):
        torch.cuda._sleep(500_000_000)
        result = tier.get(make_key(1)).tensors["codes"].to("cuda", non_blocking=True)
    tier.delete(make_key(1))
    tier.put(make_key(2), make_blob(2, numbers=numbers))
    stream.synchronize()
    assert same_bits(result, make_blob(1, numbers=numbers).tensors["codes"])
