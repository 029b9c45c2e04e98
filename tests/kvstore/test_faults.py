"""KVStore over tiers that fail, stall, die and come back: a cache may cost time, never an answer."""

import errno
import logging
import os
import random
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from kvloom.compress.raw import RawCodec
from kvloom.core import ChunkKey, EncodedChunk, KVChunk
from kvloom.errors import ChunkCorruptError, TierError, TierTimeoutError, TierUnavailableError
from kvloom.kvstore.guard.guarded_tier import GuardedTier
from kvloom.kvstore.store import KVStore
from kvloom.kvstore.tiers.disk.tier import DiskTier
from kvloom.kvstore.tiers.host import HostTier
from kvloom.testing import make_chunk, make_key, same_chunk

from ..support.fakes import assert_adds_up, filled
from ..support.faulty import LONG_S, FaultyTier, eventually, leaves_no_threads

no_threads_left = pytest.fixture(autouse=True)(leaves_no_threads)

CHUNK_BYTES = RawCodec().encode(make_chunk(0)).nbytes
DEVICE_ERRORS = [errno.EIO, errno.ENOSPC, errno.EROFS, errno.EMFILE, errno.EINTR]


def holds(chunk: KVChunk | None, number: int) -> bool:
    return chunk is not None and same_chunk(chunk, make_chunk(number))


def guards_of(store: KVStore) -> list[GuardedTier]:
    return [tier for tier in store.tiers if isinstance(tier, GuardedTier)]


def quiet(store: KVStore) -> bool:
    """No call that was given up is under way, nothing is left to be undone, and every tier is asked."""
    return not any(guard.running or guard.doubtful() or guard.is_down for guard in guards_of(store))


def revive(store: KVStore, disk: FaultyTier) -> None:
    """The device works again; returns when the store has noticed."""
    disk.heal()

    def asked_until_quiet() -> bool:
        for guard in guards_of(store):
            try:
                guard.get(make_key(99))
            except TierUnavailableError:
                return False
        return quiet(store)

    assert eventually(asked_until_quiet)


def in_order(store: KVStore) -> bool:
    assert_adds_up(store.stats())
    problems = ["not answered"]
    until_s = time.monotonic() + LONG_S
    while any("not answered" in problem for problem in problems) and time.monotonic() < until_s:
        problems = store.check()  # on a busy machine even a device that works may not answer within milliseconds
    assert problems == []
    return store.stats().pinned == 0


@pytest.fixture
def disk() -> Iterator[FaultyTier]:
    disk = FaultyTier()
    yield disk
    disk.heal()


@pytest.fixture
def make_store(disk: FaultyTier) -> Iterator[Callable[..., KVStore]]:
    """One chunk fits into the host; the disk has no limit."""
    made: list[KVStore] = []

    def make(timeout_s: float | None = LONG_S, **options: bool) -> KVStore:
        made.append(KVStore([HostTier(CHUNK_BYTES), disk], timeout_s=timeout_s, **options))
        return made[-1]

    yield make
    disk.heal()
    for store in made:
        store.close()


# ------------------------------------------------------------------------------------------------ devices that fail


@pytest.mark.parametrize("code", DEVICE_ERRORS, ids=lambda code: errno.errorcode[code])
def test_device_errors(make_store: Callable[..., KVStore], disk: FaultyTier, code: int) -> None:
    store = make_store()
    for number in range(2):
        store.put(make_key(number), make_chunk(number))  # 0 is on the disk alone now
    disk.fail(code, "get")  # a read may need space, too: for the quarantine
    assert store.get(make_key(0)) is None and store.get(make_key(0), layers=(0, 1)) is None
    assert store.stats().misses == {"unavailable": 2} and store.stats().tiers[1].errors == 2
    assert store.prefetch([make_key(0)]).result(LONG_S) == 0
    revive(store, disk)
    assert holds(store.get(make_key(0)), 0)
    disk.fail(code, "delete")
    with pytest.raises(TierError):
        store.delete(make_key(0))
    disk.heal()
    assert in_order(store) and holds(store.get(make_key(0)), 0) and store.delete(make_key(0))
    disk.fail(code, "put")
    store.put(make_key(2), make_chunk(2))  # the host takes it
    assert store.locate(make_key(2)) == "host" and holds(store.get(make_key(2)), 2)
    with pytest.raises(TierError, match=os.strerror(code)):  # it does not take this one
        store.put(make_key(3), make_chunk(3, tokens=99))
    failed = store.stats().tiers[1]
    assert (failed.rejections if code == errno.ENOSPC else failed.errors) >= 2
    revive(store, disk)
    store.put(make_key(4), make_chunk(4))
    assert disk.get(make_key(4)) is not None and in_order(store)


def test_a_corrupt_chunk_on_a_disk_that_refuses_its_deletion(
    make_store: Callable[..., KVStore], disk: FaultyTier
) -> None:
    store = make_store()
    for number in range(2):
        store.put(make_key(number), make_chunk(number))
    disk.fail(errno.EROFS, "delete")
    disk.faults["get"] = lambda: ChunkCorruptError("flipped")
    assert store.get(make_key(0)) is None and store.stats().misses == {"corrupt": 1}
    disk.heal()
    assert in_order(store)


def test_death_and_comeback(
    make_store: Callable[..., KVStore], disk: FaultyTier, caplog: pytest.LogCaptureFixture
) -> None:
    store = make_store()
    for number in range(2):
        store.put(make_key(number), make_chunk(number))
    asked = len(disk.calls)
    disk.fail(errno.EIO)
    with caplog.at_level(logging.WARNING):
        for _ in range(50):
            assert store.get(make_key(0)) is None
        assert len(disk.calls) - asked < 15  # three, and a probe now and then
        store.put(make_key(2), make_chunk(2))
        assert holds(store.get(make_key(2)), 2)
        assert store.stats().misses == {"unavailable": 50} and store.stats().tiers[1].errors == 51
        disk.heal()
        assert eventually(lambda: holds(store.get(make_key(0)), 0))
        assert store.stats().tiers[1].recoveries == 1
    assert [record.message.split(",")[0].split(":")[0] for record in caplog.records] == [
        "tier 'disk'",
        "tier 'disk' answers again",
    ]
    assert in_order(store)


# ----------------------------------------------------------------------------------------------- devices that stall


def test_a_stalled_read_is_a_miss(make_store: Callable[..., KVStore], disk: FaultyTier) -> None:
    filled(disk, 0)
    store = make_store(0.3)
    disk.gate.clear()
    begun_s = time.monotonic()
    assert store.get(make_key(0)) is None and store.get(make_key(0), layers=(1, 2)) is None
    assert 0.6 <= time.monotonic() - begun_s < LONG_S / 2
    assert store.stats().misses == {"timeout": 2} and store.stats().tiers[1].timeouts == 2
    assert store.stats().tiers[1].errors == 0 and store.stats().lookups == 2
    for _ in range(100):
        assert store.get(make_key(0)) is None
    assert store.stats().misses["unavailable"] > 90 and len(disk.calls) <= 5  # the put, and one call a thread
    revive(store, disk)
    assert holds(store.get(make_key(0)), 0) and in_order(store)


def test_time_of_one_call(make_store: Callable[..., KVStore], disk: FaultyTier) -> None:
    """A caller in a hurry misses; the tier stays what it is to others."""
    store = make_store()
    for number in range(2):
        store.put(make_key(number), make_chunk(number))
    disk.gate.clear()
    begun_s = time.monotonic()
    assert store.get(make_key(0), timeout_s=0.02) is None
    assert store.get(make_key(0), layers=(0, 3), timeout_s=0.02) is None
    assert time.monotonic() - begun_s < LONG_S / 2 and store.stats().misses == {"timeout": 2}
    assert holds(store.get(make_key(1), timeout_s=0.0), 1)  # the host is not waited for
    disk.gate.set()
    assert holds(store.get(make_key(0)), 0) and in_order(store) and store.stats().tiers[1].recoveries == 0
    for wrong in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="timeout_s is"):
            store.get(make_key(0), timeout_s=wrong)


def test_the_tier_below_a_stalled_one_is_asked(disk: FaultyTier) -> None:
    with KVStore([disk, HostTier(None, name="below")], timeout_s=0.3) as store:
        store.put(make_key(0), make_chunk(0))
        disk.gate.clear()
        assert holds(store.get(make_key(0)), 0)  # and cannot be promoted
        assert store.stats().misses == {} and store.stats().tiers[0].timeouts >= 1
        revive(store, disk)
        assert in_order(store)


def test_a_stalled_put_goes_to_the_other_tiers(make_store: Callable[..., KVStore], disk: FaultyTier) -> None:
    store = make_store(0.3)
    store.put(make_key(0), make_chunk(0))  # replaced below
    disk.gate.clear()
    for number in range(8):
        store.put(make_key(number), make_chunk(number))
        assert store.locate(make_key(number)) == "host" and holds(store.get(make_key(number)), number)
    with pytest.raises(TierUnavailableError, match="may still hold the chunk"):
        store.delete(make_key(0))
    assert store.stats().tiers[1].timeouts >= 3 and store.stats().tiers[1].errors >= 1
    revive(store, disk)
    assert in_order(store) and store.match([make_key(0)]) == 0 and make_key(0) not in disk  # undone
    assert store.delete(make_key(7)) and not store.delete(make_key(0))
    store.put(make_key(0), make_chunk(0))
    assert make_key(0) in disk and in_order(store)


def test_a_stalled_deletion_is_certain_in_the_end(make_store: Callable[..., KVStore], disk: FaultyTier) -> None:
    store = make_store(0.3)
    store.put(make_key(0), make_chunk(0))
    disk.gate.clear()
    for _ in range(2):
        with pytest.raises(TierUnavailableError):
            store.delete(make_key(0))
    assert make_key(0) not in store
    revive(store, disk)
    assert make_key(0) not in disk and in_order(store) and not store.delete(make_key(0))
    for number in range(3):  # nor does the policy remember it
        store.put(make_key(number), make_chunk(number))
    assert in_order(store)


def test_no_tier_takes_it_in_time(disk: FaultyTier) -> None:
    with KVStore([disk], timeout_s=0.3) as store:
        disk.gate.clear()
        with pytest.raises(TierTimeoutError, match="has not answered"):
            store.put(make_key(0), make_chunk(0))
        assert make_key(0) not in store
        revive(store, disk)
        assert in_order(store)


def test_eviction_goes_on_above_a_stalled_tier(make_store: Callable[..., KVStore], disk: FaultyTier) -> None:
    store = make_store(0.3)
    disk.gate.clear()
    for number in range(10):
        store.put(make_key(number), make_chunk(number))
        assert holds(store.get(make_key(number)), number)
    assert store.stats().tiers[0].evictions == 9 and store.stats().tiers[0].demotions == 0
    revive(store, disk)
    store.put(make_key(10), make_chunk(10))
    assert store.stats().tiers[0].demotions == 1 and holds(store.get(make_key(9)), 9) and in_order(store)


def test_a_short_deadline_costs_no_chunk(disk: FaultyTier) -> None:
    """Promotion would evict a chunk that the caller has no time to demote."""
    store = KVStore([filled(HostTier(CHUNK_BYTES), 1), filled(disk, 0)], timeout_s=LONG_S)
    assert store.locate(make_key(0)) == "disk"
    put, may_put = disk.put, threading.Event()
    disk.put = lambda *args: (may_put.wait(LONG_S), put(*args))[1]
    assert holds(store.get(make_key(0), timeout_s=1.0), 0)
    assert store.locate(make_key(1)) == "host" and store.locate(make_key(0)) == "disk"
    may_put.set()
    assert eventually(lambda: quiet(store)) and in_order(store) and holds(store.get(make_key(1)), 1)
    store.close()


def test_a_stall_holds_up_no_other_tier(disk: FaultyTier) -> None:
    """Keys share locks for writing; the host's are its own."""
    with KVStore([filled(HostTier(5 * CHUNK_BYTES // 2), 1), disk], timeout_s=LONG_S) as store:
        first, second = make_key(1), make_key(257)
        assert first[-1] == second[-1]
        disk.gate.clear()
        with ThreadPoolExecutor(2) as pool:
            evicting = pool.submit(store.put, make_key(2), make_chunk(2, tokens=10))  # demotes the first, and waits
            assert eventually(lambda: "put" in disk.calls)
            begun_s = time.monotonic()
            putting = pool.submit(store.put, second, make_chunk(257))  # its write to the disk waits, not the host's
            assert eventually(lambda: holds(store.get(second), 257)) and holds(store.get(first), 1)
            assert time.monotonic() - begun_s < LONG_S / 2 and not evicting.done()
            disk.gate.set()
            evicting.result(LONG_S), putting.result(LONG_S)
        assert holds(store.get(first), 1) and in_order(store)


def test_memory_is_bounded_behind_a_stalled_tier(
    make_store: Callable[..., KVStore], disk: FaultyTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    encode = RawCodec.encode

    def watched(self: RawCodec, chunk: KVChunk) -> EncodedChunk:
        blob = encode(self, chunk)
        alive.append(weakref.ref(blob.tensors["keys"]))
        return blob

    monkeypatch.setattr(RawCodec, "encode", watched)
    store = make_store(0.05)
    disk.gate.clear()

    def put(number: int) -> None:
        with suppress(TierError):  # eight threads and room for one chunk in the host
            store.put(make_key(number), make_chunk(number))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(put, range(100)))
    assert len(alive) == 100 and sum(ref() is not None for ref in alive) <= 1 + 4  # the host's, and one a thread
    revive(store, disk)
    assert in_order(store)


def test_closing_a_stalled_store(disk: FaultyTier) -> None:
    store = KVStore([HostTier(None), disk], timeout_s=0.3)
    for number in range(20):
        store.put(make_key(number), make_chunk(number))
    disk.gate.clear()
    prefetch = store.prefetch([make_key(number) for number in range(50)])
    begun_s = time.monotonic()
    store.close()
    assert time.monotonic() - begun_s < LONG_S / 4 and prefetch.result(LONG_S) == 20
    assert store.stats().tiers[1].timeouts >= 1 and not disk.closed
    with pytest.raises(TierUnavailableError, match="the store is closed"):
        store.get(make_key(0))
    disk.gate.set()
    assert eventually(lambda: disk.closed)


def test_one_tier_that_cannot_be_closed_keeps_no_other_open(disk: FaultyTier) -> None:
    below = FaultyTier(name="below")
    disk.fail(errno.EIO, "close")
    with pytest.raises(TierUnavailableError, match="Input/output error"):
        KVStore([disk, below]).close()
    assert below.closed


def test_checking_a_stalled_store(make_store: Callable[..., KVStore], disk: FaultyTier) -> None:
    store = make_store(0.05)
    disk.gate.clear()
    (problem,) = store.check()
    assert problem.startswith("tier 'disk' cannot be checked: tier 'disk' has not answered")
    revive(store, disk)
    assert in_order(store)


def test_without_a_timeout_tiers_are_called_directly(make_store: Callable[..., KVStore], disk: FaultyTier) -> None:
    store, threads = make_store(None), []
    put = disk.put
    disk.put = lambda *args: (threads.append(threading.current_thread()), put(*args))[1]
    store.put(make_key(0), make_chunk(0))
    assert threads == [threading.current_thread()]
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="timeout_s is"):
            make_store(wrong)


LEAVES_A_STALLED_STORE = """
import os, sys, threading, time
from kvloom.kvstore.store import KVStore
from kvloom.kvstore.tiers.host import HostTier
from kvloom.testing import make_chunk, make_key

class Stuck(HostTier):
    may_stall = True
    stuck = False
    def get(self, key):
        if self.stuck:
            threading.Event().wait()
        return super().get(key)

disk = Stuck(None, name="disk")
store = KVStore([disk], timeout_s=1.0)
store.put(make_key(1), make_chunk(1))
child = os.fork()
if not child:
    begun_s = time.monotonic()
    missed = store.get(make_key(1)) is None and store.stats().misses == {"unavailable": 1}
    store.close()
    os._exit(0 if missed and time.monotonic() - begun_s < 10 else 1)
assert os.waitpid(child, 0)[1] == 0, "the forked process"
assert store.get(make_key(1)) is not None
disk.stuck = True
assert store.get(make_key(1)) is None
print("leaving", threading.active_count())
"""


@pytest.mark.slow
def test_forked_and_leaving_processes(tmp_path: Path) -> None:
    """A forked process has no threads and waits for none; one that leaves does not wait for what is stuck."""
    done = subprocess.run(
        [sys.executable, "-c", LEAVES_A_STALLED_STORE], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.stdout.startswith("leaving") and done.returncode == 0, done.stderr


def test_the_real_disk_within_its_guard(tmp_path: Path) -> None:
    with KVStore([HostTier(CHUNK_BYTES), DiskTier(tmp_path)]) as store:
        for number in range(5):
            store.put(make_key(number), make_chunk(number))
        assert all(holds(store.get(make_key(n)), n) for n in range(5)) and in_order(store)
        assert torch.equal(store.get(make_key(0), layers=(1, 2)).values, make_chunk(0).values[1:2])
    with KVStore([DiskTier(tmp_path)]) as store:
        assert store.match([make_key(n) for n in range(9)]) == 5 and in_order(store)


# ------------------------------------------------------------------------------------------------------ all at once


@pytest.mark.parametrize("steps", [80, pytest.param(4000, marks=[pytest.mark.torture, pytest.mark.timeout(7200)])])
@pytest.mark.parametrize(("host_chunks", "disk_chunks"), [(4, 8), (8, 4)])
def test_threads_on_a_device_that_comes_and_goes(host_chunks: int, disk_chunks: int, steps: int) -> None:
    disk = FaultyTier(disk_chunks * CHUNK_BYTES)
    stop = threading.Event()

    def disturb() -> None:
        dice = random.Random(1)
        while not stop.is_set():
            choice = dice.randrange(4)
            if choice == 0:
                disk.gate.clear()
            elif choice == 1:
                disk.fail(dice.choice(DEVICE_ERRORS))
            elif choice == 2:
                disk.delay_s = 0.004
            stop.wait(dice.choice([0.005, 0.02, 0.06]))
            disk.heal()
            stop.wait(0.02)

    with KVStore([HostTier(host_chunks * CHUNK_BYTES), disk], timeout_s=0.02) as store:

        def work(seed: int) -> int:
            dice, hits = random.Random(seed), 0
            for _ in range(steps):
                number = dice.randrange(16)
                key, action = make_key(number), dice.random()
                try:
                    if action < 0.35:
                        store.put(key, make_chunk(number))
                    elif action < 0.45:
                        store.delete(key)
                    elif action < 0.55:
                        store.prefetch([key], deadline_s=dice.choice([None, 0.01])).cancel()
                    elif action < 0.65:
                        part = store.get(key, layers=(1, 3))
                        assert part is None or torch.equal(part.keys, make_chunk(number).keys[1:])
                    else:
                        with store.pinned([key]):
                            found = store.get(key, timeout_s=dice.choice([None, 0.005]))
                        assert found is None or same_chunk(found, make_chunk(number))
                        hits += found is not None
                except TierError:
                    assert action < 0.45  # what writes may be refused
            return hits

        with ThreadPoolExecutor(7) as pool:
            disturbing = pool.submit(disturb)
            try:
                hits = list(pool.map(work, range(6)))
            finally:
                stop.set()
            disturbing.result(LONG_S)
        assert sum(hits) > 20
        store.prefetch([]).result(LONG_S)
        revive(store, disk)
        assert in_order(store) and store.stats().background_errors == 0
        store.put(make_key(1), make_chunk(1))
        assert holds(store.get(make_key(1)), 1) and len(disk.entries()) <= disk_chunks


class FaultMachine(RuleBasedStateMachine):
    """The store against a dictionary while its disk fails and stalls: it may forget, but it is never wrong."""

    numbers = st.integers(0, 5)

    def __init__(self) -> None:
        super().__init__()
        self.disk = FaultyTier(4 * CHUNK_BYTES)
        self.store = KVStore([HostTier(2 * CHUNK_BYTES), self.disk], timeout_s=0.03)
        self.model: dict[ChunkKey, KVChunk] = {}
        self.pins = 0

    def teardown(self) -> None:
        revive(self.store, self.disk)
        assert in_order(self.store)
        assert {key for key in map(make_key, range(6)) if key in self.store} <= self.model.keys()
        for key, chunk in self.model.items():
            found = self.store.get(key)
            assert found is None or same_chunk(found, chunk)
        self.store.close()

    @rule(number=numbers, tokens=st.sampled_from([1, 5]))
    def put(self, number: int, tokens: int) -> None:
        """Not always the same chunk: an old one must not come back."""
        key, chunk = make_key(number), make_chunk(10 * number + tokens, tokens=tokens)
        if self.model.get(key) is not None and not same_chunk(self.model[key], chunk):
            try:
                self.store.delete(key)
            except TierError:
                return
        try:
            self.store.put(key, chunk)
        except TierError:
            return
        self.model[key] = chunk

    @rule(number=numbers, timeout_s=st.sampled_from([None, None, 0.001]))
    def get(self, number: int, timeout_s: float | None) -> None:
        found = self.store.get(make_key(number), timeout_s=timeout_s)
        assert found is None or same_chunk(found, self.model[make_key(number)])

    @rule(number=numbers)
    def prefetch(self, number: int) -> None:
        key = make_key(number)
        assert self.store.prefetch([key], deadline_s=0.02).result(LONG_S) == (self.store.locate(key) == "host")

    @rule(number=numbers)
    def delete(self, number: int) -> None:
        try:
            self.store.delete(make_key(number))
        except TierError:
            return
        self.model.pop(make_key(number), None)
        assert make_key(number) not in self.store

    @rule(code=st.sampled_from(DEVICE_ERRORS), verb=st.sampled_from(["get", "put", "delete"]))
    def fail(self, code: int, verb: str) -> None:
        self.disk.fail(code, verb)

    @rule()
    def stall(self) -> None:
        self.disk.gate.clear()

    @rule()
    def heal(self) -> None:
        self.disk.heal()

    @precondition(lambda self: not self.disk.faults and self.disk.gate.is_set())
    @rule()
    def revive(self) -> None:
        revive(self.store, self.disk)
        assert in_order(self.store)

    @invariant()
    def nothing_leaks(self) -> None:
        assert self.store.stats().pinned == 0
        assert_adds_up(self.store.stats())
        (guard,) = guards_of(self.store)
        assert guard.threads <= 4 and guard.running <= 4


TestFaultMachine = pytest.mark.slow(FaultMachine.TestCase)
TestFaultMachine.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)


@pytest.mark.torture
@pytest.mark.timeout(7200)
def test_many_more_of_them() -> None:
    run_state_machine_as_test(FaultMachine, settings=settings(max_examples=1000, stateful_step_count=50, deadline=None))
