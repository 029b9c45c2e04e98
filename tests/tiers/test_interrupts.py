"""An exception at any instruction of a tier: nothing stays locked, leaked or half there, and the tier goes on."""

import gc
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from kvloom.core import ChunkKey, Entry, Tier
from kvloom.errors import TierFullError, TierUnavailableError
from kvloom.kvstore.tiers.device import DeviceTier
from kvloom.kvstore.tiers.disk.files import Files
from kvloom.kvstore.tiers.disk.tier import DiskTier, Durability
from kvloom.kvstore.tiers.host import HostTier
from kvloom.kvstore.tiers.memory import MemoryTier
from kvloom.kvstore.tiers.slab import Slab
from kvloom.testing import keys_of, make_blob, make_key, same_blob

from ..support.interrupts import at_every_position, interrupted

KEYS = 6
ALL = pytest.param(1, id="all", marks=[pytest.mark.torture, pytest.mark.timeout(3600)])
STEPS = [pytest.param(47, id="some"), ALL]
DISK_STEPS = [pytest.param(211, id="some"), ALL]
LONG_S = 20.0


@pytest.fixture
def elsewhere() -> Iterator[Callable[[Callable[[], Any]], Any]]:
    """Calls something in another thread, which waits for locks that the test's thread has left held."""
    with ThreadPoolExecutor(1) as threads:
        yield lambda call: threads.submit(call).result(timeout=LONG_S)


class Trial:
    """A tier, and which chunk may lie under which key: by key the seeds, None for no chunk."""

    def __init__(
        self, tier: Any, elsewhere: Callable[[Callable[[], Any]], Any], *, is_full: bool = False, numbers: int = 100
    ) -> None:
        self.tier, self.elsewhere, self.is_full, self.numbers = tier, elsewhere, is_full, numbers
        self.may: dict[ChunkKey, set[int | None]] = {make_key(n): {None} for n in range(KEYS)}
        self.seeds = 0

    def put(self, number: int) -> Callable[[], object]:
        """Puts a chunk that was never put before."""
        self.seeds += 1
        seed = self.seeds
        self.may[make_key(number)] |= {seed, None}
        return lambda: self.tier.put(make_key(number), make_blob(seed, numbers=self.numbers))

    def settle(self, number: int) -> None:
        """As `put`, without an interrupt."""
        self.put(number)()
        self.may[make_key(number)] = {self.seeds}

    def delete(self, number: int) -> Callable[[], object]:
        self.may[make_key(number)].add(None)
        return lambda: self.tier.delete(make_key(number))

    def get(self, number: int) -> Callable[[], object]:
        return lambda: self.tier.get(make_key(number))

    def get_layers(self, number: int) -> Callable[[], object]:
        return lambda: self.tier.get_layers(make_key(number), 1, 3)

    def verify(self) -> None:
        """What other threads find, and that they can go on."""
        gc.collect(0)
        self.elsewhere(self._verify)
        assert self.tier.check() == []

    def _verify(self) -> None:
        tier = self.tier
        assert tier.check() == []
        listed = {entry.key: entry.nbytes for entry in tier.entries()}
        assert sum(listed.values()) == tier.used_bytes
        for key, seeds in self.may.items():
            found = tier.get(key)
            seed = None if found is None else int(found.meta["seed"])
            assert seed in seeds, (key[-1], seed, seeds)
            assert found is None or same_blob(found, make_blob(seed, numbers=self.numbers))
            assert (key in listed) == (key in tier) == (found is not None)
            self.may[key] = {seed}
        del found
        extra = make_key(KEYS)
        try:
            tier.put(extra, make_blob(0, numbers=self.numbers))
        except TierFullError:
            assert self.is_full and tier.delete(make_key(0))
            self.may[make_key(0)] = {None}
            tier.put(extra, make_blob(0, numbers=self.numbers))
        assert same_blob(tier.get(extra), make_blob(0, numbers=self.numbers))
        assert tier.delete(extra) and tier.get(extra) is None


def slab_tier(chunks: int) -> MemoryTier[Any]:
    """As a `DeviceTier` on CUDA, in plain memory."""
    buffer = torch.empty(chunks * 512, dtype=torch.uint8)
    return MemoryTier("slab", chunks * 512, Slab("slab", buffer, layered_only=True, wait=lambda: None))


MEMORY_TIERS: dict[str, Callable[[], MemoryTier[Any]]] = {
    "heap": lambda: HostTier(100_000, pinned=False),
    "cpu": lambda: DeviceTier(8 * 512, device="cpu"),
    "slab": lambda: slab_tier(8),
    "full": lambda: slab_tier(4),  # what replaces a chunk must take its place
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    "operation", ["put", "replace", "delete", "get", "get_layers", "entries", "used_bytes", "full"]
)
@pytest.mark.parametrize("kind", MEMORY_TIERS)
def test_memory(kind: str, operation: str, step: int, elsewhere: Any) -> None:
    trial = Trial(MEMORY_TIERS[kind](), elsewhere, is_full=kind == "full")
    tier, filling = trial.tier, 4 if operation != "put" and kind == "full" else 3

    def prepare() -> Callable[[], object]:
        for number in range(filling):
            if make_key(number) not in tier:
                trial.settle(number)
        match operation:
            case "put":
                trial.delete(3)()
                return trial.put(3)
            case "replace":
                return trial.put(1)
            case "full":
                trial.may[make_key(1)].add(None)  # it may have made room
                return lambda: too_large(tier)
            case "delete":
                return trial.delete(1)
            case "get":
                return trial.get(1)
            case "get_layers":
                return trial.get_layers(1)
            case "used_bytes":
                trial.get(1)()
                trial.delete(1)()
                return lambda: tier.used_bytes
            case _:
                return lambda: tier.entries()

    assert at_every_position(prepare, trial.verify, step) >= step
    tier.close()
    assert tier.used_bytes == 0


def too_large(tier: Tier) -> None:
    with pytest.raises(TierFullError):
        tier.put(make_key(1), make_blob(1, numbers=100_000))


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kind", MEMORY_TIERS)
def test_memory_closes(kind: str, step: int, elsewhere: Any) -> None:
    for position in range(0, 10_000, step):
        tier = MEMORY_TIERS[kind]()
        tier.put(make_key(1), make_blob(1))
        held = tier.get(make_key(1))
        was_interrupted = interrupted(tier.close, position)
        elsewhere(tier.close)
        with pytest.raises(TierUnavailableError):
            tier.get(make_key(1))
        assert tier.entries() == [] and same_blob(held, make_blob(1))
        del held
        assert tier.used_bytes == 0 and tier.check() == []
        if not was_interrupted:
            return


# -------------------------------------------------------------------------------------------------------------- disk


class DiskTrial(Trial):
    """A disk tier, and another on the same folder, as in another process."""

    def __init__(self, path: Path, elsewhere: Callable[[Callable[[], Any]], Any], durability: Durability) -> None:
        files = Files()
        files.lock_timeout_s = 5.0
        files.slack_records = 40  # so that the journal is rewritten every now and then
        self.open = lambda: DiskTier(
            path, 60 * 4096, durability=durability, sync_interval_s=600, segment_bytes=20 * 4096, files=files
        )
        super().__init__(self.open(), elsewhere)
        self.other = self.open()
        self.descriptors = 0

    def verify(self) -> None:
        super().verify()
        self.descriptors = self.descriptors or descriptors()
        assert descriptors() <= self.descriptors, [os.path.realpath(link) for link in links()]

    def _verify(self) -> None:
        super()._verify()
        number, other = KEYS + 1, self.other
        assert other.check() == [] and keys_of(other) == keys_of(self.tier)
        other.put(make_key(number), make_blob(number))
        assert same_blob(self.tier.get(make_key(number)), make_blob(number))
        assert make_key(number) in [change.key for change in self.tier.changes() if isinstance(change, Entry)]
        assert self.tier.delete(make_key(number)) and other.get(make_key(number)) is None
        self.tier.flush()

    def close(self) -> None:
        self.elsewhere(self.tier.close)
        self.other.close()
        self.tier, self.other = self.open(), self.open()
        self._verify()
        self.tier.close(), self.other.close()


def descriptors() -> int:
    """How many files this process has open, without segments: some of those stay open to be read again."""
    return sum(not os.path.realpath(link).removesuffix(" (deleted)").endswith(".seg") for link in links())


def links() -> list[Path]:
    return list(Path("/proc/self/fd").iterdir())


@pytest.mark.parametrize("step", DISK_STEPS)
@pytest.mark.parametrize("durability", ["cache", "batch", "sync"])
@pytest.mark.parametrize(
    "operation",
    ["put", "replace", "delete", "get", "get_layers", "cached", "entries", "changes", "contains", "flush", "check"],
)
def test_disk(tmp_path: Path, operation: str, durability: Durability, step: int, elsewhere: Any) -> None:
    trial = DiskTrial(tmp_path, elsewhere, durability)

    def prepare() -> Callable[[], object]:
        tier = trial.tier
        for number in range(3):
            if make_key(number) not in tier:
                trial.settle(number)
        match operation:
            case "put":
                trial.delete(4)()
                return trial.put(4)
            case "replace":
                return trial.put(1)
            case "delete":
                return trial.delete(1)
            case "get":
                return trial.get(1)
            case "get_layers":
                return trial.get_layers(1)
            case "cached":
                return lambda: cached(tier)
            case "changes":
                trial.other.put(make_key(2), make_blob(0))
                trial.may[make_key(2)] = {0}
                return tier.changes
            case "contains":
                return lambda: make_key(1) in tier
            case "flush":
                trial.settle(3)
                return tier.flush
            case _:
                return getattr(tier, operation)  # type: ignore[no-any-return]

    assert at_every_position(prepare, trial.verify, step) > 20
    trial.close()


def cached(tier: DiskTier) -> None:
    with suppress(BlockingIOError):
        tier.cached.get(make_key(1))


@pytest.mark.slow
@pytest.mark.parametrize("step", DISK_STEPS)
@pytest.mark.parametrize("durability", ["cache", "batch"])
@pytest.mark.parametrize("operation", ["open", "close"])
def test_disk_opens_and_closes(
    tmp_path: Path, operation: str, durability: Durability, step: int, elsewhere: Any
) -> None:
    before = 0
    for position in range(0, 1_000_000, step):
        path = tmp_path / ("kv" if operation == "close" or position % 2 else f"new {position}")
        if operation == "open":
            was_interrupted = interrupted(lambda path=path: DiskTier(path, durability=durability).close(), position)
        else:
            tier = DiskTier(path, durability=durability)
            tier.put(make_key(1), make_blob(1))
            was_interrupted = interrupted(tier.close, position)
            elsewhere(tier.close)
            with pytest.raises(TierUnavailableError):
                tier.get(make_key(1))
            del tier
        gc.collect()
        tier = DiskTier(path, durability=durability)
        assert tier.check() == [] and (tier.get(make_key(1)) is not None) == (operation == "close")
        tier.close()
        del tier
        gc.collect()
        before = before or descriptors()
        assert descriptors() <= before and len(links()) <= before + 1
        if not was_interrupted:
            return
