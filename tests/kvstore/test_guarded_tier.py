"""Threads that wait for others, and the guard around a tier that can stall."""

import random
import signal
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

import pytest

from kvloom.core import Tier
from kvloom.errors import ChunkCorruptError, TierFullError, TierTimeoutError, TierUnavailableError
from kvloom.kvstore.capabilities import MayStall
from kvloom.kvstore.guard.circuit_breaker import CircuitBreaker
from kvloom.kvstore.guard.deadline import Deadline, DeadlineLock
from kvloom.kvstore.guard.guarded_tier import GuardedTier
from kvloom.kvstore.guard.locks import Latch, release_owned
from kvloom.kvstore.guard.worker_pool import WorkerPool
from kvloom.kvstore.tiers.disk.tier import DiskTier
from kvloom.kvstore.tiers.host import HostTier
from kvloom.kvstore.tiers.shared import SharedTier
from kvloom.testing import TierContract, keys_of, make_blob, make_key

from ..support.fakes import Clock
from ..support.faulty import LONG_S, FaultyTier, eventually, leaves_no_threads

MakeGuard: TypeAlias = Callable[..., GuardedTier]

CALL = object()

no_threads_left = pytest.fixture(autouse=True)(leaves_no_threads)


@pytest.fixture
def tier() -> Iterator[FaultyTier]:
    tier = FaultyTier()
    yield tier
    tier.heal()


@pytest.fixture
def make_guard(tier: FaultyTier) -> Iterator[MakeGuard]:
    made: list[GuardedTier] = []

    def make(timeout_s: float = LONG_S, **options: object) -> GuardedTier:
        made.append(GuardedTier(tier, timeout_s, **options))
        return made[-1]

    yield make
    tier.heal()
    for guard in made:
        guard.close()


def stall(guard: GuardedTier, tier: FaultyTier, calls: int = 4) -> None:
    """All threads of the guard wait for the tier, and the callers have gone."""
    tier.gate.clear()
    with ThreadPoolExecutor(calls) as pool:
        for outcome in [pool.submit(guard.call, lambda tier: tier.get(make_key(0))) for _ in range(calls)]:
            assert isinstance(outcome.exception(LONG_S), TierTimeoutError)


def idle(guard: GuardedTier) -> bool:
    return guard.running == 0


# ------------------------------------------------------------------------------------------------------- workers


def test_workers_do_everything_in_order() -> None:
    workers, done = WorkerPool("kvloom-test", 1, queued_tasks=100), []
    assert all(workers.submit(lambda n=n: done.append(n)) for n in range(100))
    assert workers.close(LONG_S) and done == list(range(100))
    assert not workers.submit(lambda: done.append(-1)) and workers.close() and len(done) == 100


def test_workers_refuse_what_does_not_fit() -> None:
    workers, gate, done = WorkerPool("kvloom-test", 2, queued_tasks=3), threading.Event(), []
    for _ in range(2):
        assert workers.submit(lambda: gate.wait(LONG_S))
    assert eventually(lambda: not workers.queued)
    assert [workers.submit(lambda: done.append(1)) for _ in range(5)] == [True] * 3 + [False] * 2
    assert workers.submit(lambda: done.append(2), last=True)  # closing is not refused
    assert not workers.submit(lambda: done.append(3))
    assert not workers.close(0.01) and done == []
    gate.set()
    assert workers.close(LONG_S) and sorted(done) == [1, 1, 1, 2]


def test_idle_threads_end_and_no_task_is_lost() -> None:
    """Tasks come just when threads are about to end."""
    workers, dice, done = WorkerPool("kvloom-test", 3, queued_tasks=10, idle_s=0.0005), random.Random(0), []
    for number in range(500):
        assert workers.submit(lambda n=number: done.append(n))
        time.sleep(dice.choice([0.0, 0.0005, 0.001]))
        assert workers.threads <= 3
        if number % 50 == 49:
            assert eventually(lambda n=number: len(done) == n + 1)
    assert eventually(lambda: not workers.threads)
    assert sorted(done) == list(range(500)) and workers.queued == 0


def test_no_thread_to_be_had(monkeypatch: pytest.MonkeyPatch, tier: FaultyTier) -> None:
    workers, done = WorkerPool("kvloom-test", 2, queued_tasks=9), []
    with monkeypatch.context() as patch:

        def refuse(self: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        patch.setattr(threading.Thread, "start", refuse)
        assert not workers.submit(lambda: done.append(1))
        with pytest.raises(TierUnavailableError, match="no thread can be started"):
            (guard := GuardedTier(tier, 1.0)).call(lambda tier: tier.get(make_key(1)))
        guard.close()
        assert tier.closed
    assert workers.submit(lambda: done.append(2)) and workers.close(LONG_S) and done == [2]


# ------------------------------------------------------------------------------------------------- the breaker


def test_breaker_waits_longer_with_every_probe_that_fails() -> None:
    clock = Clock(100.0)
    breaker = CircuitBreaker(clock)
    waits = []
    for _ in range(3):
        assert breaker.admit(CALL) and not breaker.is_down
        assert breaker.judge(CALL, fault=True) is None
    for _ in range(12):
        assert breaker.is_down and not breaker.admit(CALL)
        waits.append(round(breaker.wait_s(), 6))
        clock.now_s += waits[-1] - 1e-3
        assert not breaker.admit(CALL)
        clock.now_s += 2e-3
        assert breaker.admit(CALL) and not breaker.admit("another")  # one probe at a time
        breaker.judge(CALL, fault=True)
    assert waits[:9] == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6] and set(waits[9:]) == {30.0}
    clock.now_s += 30.0
    assert breaker.admit(CALL)
    assert breaker.judge(CALL, answered=True) == pytest.approx(clock.now_s - 100.0)
    assert not breaker.is_down and breaker.judge(CALL, answered=True) is None
    for _ in range(2):
        breaker.judge(CALL, fault=True)
    assert breaker.admit(CALL)  # it starts from nothing again


def test_breaker_counts_faults_in_a_row() -> None:
    breaker = CircuitBreaker(Clock())
    for _ in range(10):
        breaker.judge(CALL, fault=True)
        breaker.judge(CALL, fault=True)
        breaker.judge(CALL, answered=True)
    assert breaker.admit(CALL) and not breaker.is_down


def test_breaker_learns_nothing_from_calls_of_before() -> None:
    clock = Clock()
    breaker = CircuitBreaker(clock)
    for _ in range(8):
        breaker.judge(CALL, fault=True)
    assert breaker.wait_s() == pytest.approx(0.1)
    clock.now_s += 1.0
    assert breaker.admit(CALL)
    breaker.judge("another", fault=True)  # it is not the probe
    assert not breaker.admit("another")
    breaker.judge(CALL)  # the probe was given up early: nothing is known, and another call may probe
    assert breaker.is_down and breaker.admit("another")
    breaker.judge("another", fault=True)
    breaker.retry_now()
    assert breaker.wait_s() == 0.0 and breaker.admit(CALL)


# ----------------------------------------------------------------------------------------------------- the guard


def test_who_may_stall(tier: FaultyTier) -> None:
    assert isinstance(tier, MayStall) and not isinstance(HostTier(None), MayStall)


def test_a_disk_may_stall() -> None:
    assert DiskTier.may_stall is True and SharedTier.may_stall is True  # its lock and its swap device may


def test_results_and_errors_are_those_of_the_tier(make_guard: MakeGuard, tier: FaultyTier) -> None:
    guard = make_guard()
    blob = make_blob(1)
    guard.call(lambda tier: tier.put(make_key(1), blob), writes=make_key(1))
    assert guard.call(lambda tier: tier.get(make_key(1))) is blob
    assert guard.call(lambda tier: tier.get(make_key(2))) is None
    tier.faults = {"get": lambda: ChunkCorruptError("flipped")}
    with pytest.raises(ChunkCorruptError, match="flipped") as error:
        guard.call(lambda tier: tier.get(make_key(1)))
    assert "_reach" in {frame.name for frame in traceback.extract_tb(error.value.__traceback__)}


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, MemoryError, ZeroDivisionError])
def test_no_error_ends_a_thread(make_guard: MakeGuard, tier: FaultyTier, error: type[BaseException]) -> None:
    guard = make_guard(threads=1)
    tier.faults = {"get": error}
    for _ in range(5):
        with pytest.raises(error):
            guard.call(lambda tier: tier.get(make_key(1)))
    assert guard.threads == 1 and guard.call(lambda tier: tier.delete(make_key(1))) is False


def test_a_call_that_does_not_end_is_given_up(make_guard: MakeGuard, tier: FaultyTier) -> None:
    guard = make_guard(0.5)
    tier.gate.clear()
    begun_s = time.monotonic()
    with pytest.raises(TierTimeoutError, match="has not answered within 0") as error:
        guard.call(lambda tier: tier.get(make_key(1)))
    assert error.value.begun and 0.5 <= time.monotonic() - begun_s < LONG_S / 2
    tier.heal()
    assert eventually(lambda: idle(guard)) and make_guard().call(lambda tier: tier.get(make_key(1))) is None


def test_late_results_are_thrown_away(make_guard: MakeGuard, tier: FaultyTier) -> None:
    class Result:
        pass

    made: list[weakref.ref[Result]] = []

    def slow(tier: Tier) -> Result:
        tier.get(make_key(1))
        result = Result()
        made.append(weakref.ref(result))
        return result

    guard = make_guard(0.5)
    tier.gate.clear()
    with pytest.raises(TierTimeoutError):
        guard.call(slow)
    tier.heal()
    assert eventually(lambda: made and made[0]() is None)


def test_what_is_given_up_in_the_queue_never_happens(make_guard: MakeGuard, tier: FaultyTier) -> None:
    deadline = Deadline()
    guard = make_guard(threads=1, deadline=deadline)
    tier.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(guard.call, lambda tier: tier.get(make_key(1)))
        assert eventually(lambda: tier.calls == ["get"])
        with deadline.within(0.02), pytest.raises(TierTimeoutError) as error:
            guard.call(lambda tier: tier.put(make_key(1), make_blob(1)), writes=make_key(1))
        assert not error.value.begun and guard.doubtful() == frozenset()
        with deadline.within(0.0), pytest.raises(TierTimeoutError, match="no time is left"):
            guard.call(lambda tier: tier.get(make_key(1)))
        tier.heal()
        assert first.result(LONG_S) is None
    assert guard.call(lambda tier: tier.get(make_key(1))) is None and tier.calls == ["get", "get"]


def test_brief_calls_do_not_wait_behind_others(make_guard: MakeGuard, tier: FaultyTier) -> None:
    guard, done = make_guard(threads=1), []
    tier.gate.clear()
    with ThreadPoolExecutor(4) as pool:
        running = pool.submit(guard.call, lambda tier: tier.get(make_key(1)))
        assert eventually(lambda: tier.calls == ["get"])
        waiting = []
        for number, is_brief in enumerate([False, False, True]):
            waiting.append(pool.submit(guard.call, lambda tier, n=number: done.append(n), is_brief=is_brief))
            assert eventually(lambda n=number: guard.queued == n + 1)
        tier.gate.set()
        assert [call.result(LONG_S) for call in (running, *waiting)] == [None] * 4
    assert done == [2, 0, 1]


def test_nothing_piles_up_behind_a_stalled_tier(make_guard: MakeGuard, tier: FaultyTier) -> None:
    recovered: list[float] = []
    guard = make_guard(0.5)
    guard.on_recovery = recovered.append
    stall(guard, tier)
    assert eventually(lambda: not guard.is_available)
    begun_s = time.monotonic()
    for _ in range(1000):
        with pytest.raises(TierUnavailableError, match="is stalled: 4 calls") as error:
            guard.call(lambda tier: tier.get(make_key(1)))
        assert not isinstance(error.value, TierTimeoutError)
    assert time.monotonic() - begun_s < LONG_S / 4 and len(tier.calls) == guard.running == 4
    assert guard.threads == 4 and guard.queued == 0

    def works() -> bool:
        try:
            return guard.call(lambda tier: tier.delete(make_key(1))) is False
        except TierUnavailableError:
            return False

    assert recovered == []
    tier.heal()
    assert eventually(works) and len(recovered) == 1


def test_a_tier_that_is_down_is_left_alone(make_guard: MakeGuard, tier: FaultyTier) -> None:
    recovered: list[float] = []
    clock = Clock()
    guard = make_guard(clock=clock)
    guard.on_recovery = recovered.append
    tier.fail(5)
    for _ in range(3):
        with pytest.raises(TierUnavailableError, match="Input/output error"):
            guard.call(lambda tier: tier.get(make_key(1)))
    clock.now_s += 0.09
    for _ in range(100):
        with pytest.raises(TierUnavailableError, match="is down, and asked again in"):
            guard.call(lambda tier: tier.get(make_key(1)))
    assert len(tier.calls) == 3
    clock.now_s += 0.02
    with pytest.raises(TierUnavailableError, match="Input/output error"):
        guard.call(lambda tier: tier.get(make_key(1)))
    tier.heal()
    assert guard.is_down and not guard.is_available
    clock.now_s += 0.2
    assert [guard.call(lambda tier: tier.get(make_key(1))) for _ in range(5)] == [None] * 5
    assert recovered == [pytest.approx(0.31)] and len(tier.calls) == 9 and not guard.is_down


@pytest.mark.parametrize("error", [ChunkCorruptError("no"), TierFullError("no", needed_bytes=1), ValueError("no")])
def test_a_tier_that_answers_is_not_down(make_guard: MakeGuard, tier: FaultyTier, error: Exception) -> None:
    guard = make_guard()
    tier.faults = {"get": lambda: error}
    for _ in range(10):
        with pytest.raises(type(error), match="no"):
            guard.call(lambda tier: tier.get(make_key(1)))
    assert len(tier.calls) == 10


def test_a_call_given_up_early_is_no_fault_of_the_tier(make_guard: MakeGuard, tier: FaultyTier) -> None:
    deadline = Deadline()
    guard = make_guard(deadline=deadline)
    for _ in range(10):
        tier.gate.clear()
        with deadline.within(0.005), pytest.raises(TierTimeoutError):
            guard.call(lambda tier: tier.get(make_key(1)))
        tier.gate.set()
    assert guard.call(lambda tier: tier.get(make_key(1))) is None


def test_deadline_is_of_one_thread_and_never_grows() -> None:
    deadline = Deadline()
    with deadline.within(50.0), deadline.within(100.0), deadline.within(None):
        assert 40.0 < deadline.left_s() <= 50.0
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(deadline.left_s).result(LONG_S) == float("inf")
        with pytest.raises(ZeroDivisionError), deadline.within(0.0):
            assert deadline.left_s() <= 0.0 and 1 / 0
        assert 40.0 < deadline.left_s() <= 50.0
    assert deadline.left_s() == float("inf")


def put(guard: GuardedTier, number: int, blob_seed: int = 1) -> None:
    guard.call(lambda tier: tier.put(make_key(number), make_blob(blob_seed)), writes=make_key(number))


def test_a_late_write_is_undone(make_guard: MakeGuard, tier: FaultyTier) -> None:
    guard = make_guard(0.5)
    tier.gate.clear()
    with pytest.raises(TierTimeoutError) as error:
        put(guard, 1)
    assert error.value.begun and guard.doubtful() == {make_key(1)}
    with pytest.raises(TierUnavailableError, match="an earlier call was given up"):
        put(guard, 1, 2)
    tier.heal()
    assert eventually(lambda: not guard.doubtful())
    assert tier.calls == ["put", "delete"] and keys_of(tier) == []
    assert eventually(lambda: idle(guard))
    another = make_guard()
    put(another, 1, 2)
    assert keys_of(tier) == [make_key(1)]


def test_a_late_deletion_is_certain(make_guard: MakeGuard, tier: FaultyTier) -> None:
    """Also if the late call itself failed."""
    tier.put(make_key(1), make_blob(1))
    guard = make_guard(0.5)
    tier.gate.clear()
    with pytest.raises(TierTimeoutError):
        guard.call(lambda tier: tier.delete(make_key(1)), writes=make_key(1))
    tier.fail(5, "delete")
    tier.gate.set()
    assert eventually(lambda: idle(guard)) and keys_of(tier) == [make_key(1)] and guard.doubtful() == {make_key(1)}
    tier.heal()
    assert guard.call(lambda tier: tier.get(make_key(2))) is None  # the tier answers: now it can be done
    assert eventually(lambda: not guard.doubtful()) and keys_of(tier) == []


def test_a_tier_that_gives_up_by_itself(make_guard: MakeGuard, tier: FaultyTier) -> None:
    guard = make_guard()

    def lose_the_answer(tier: Tier) -> None:
        tier.put(make_key(1), make_blob(1))
        raise TierTimeoutError("no answer", begun=True)

    with pytest.raises(TierTimeoutError, match="no answer"):
        guard.call(lose_the_answer, writes=make_key(1))
    assert guard.doubtful() == {make_key(1)} == set(keys_of(tier))
    assert guard.call(lambda tier: tier.get(make_key(2))) is None
    assert eventually(lambda: not guard.doubtful()) and keys_of(tier) == []


def test_an_undoing_that_fails_is_tried_again_and_a_bug_in_it_is_raised(
    make_guard: MakeGuard, tier: FaultyTier
) -> None:
    guard = make_guard(0.5)
    tier.gate.clear()
    with pytest.raises(TierTimeoutError):
        put(guard, 1)
    tier.faults = {"delete": ZeroDivisionError}
    tier.gate.set()
    assert eventually(lambda: idle(guard)) and guard.doubtful() == {make_key(1)} == set(keys_of(tier))
    with pytest.raises(ZeroDivisionError):
        guard.call(lambda tier: tier.get(make_key(1)))
    tier.heal()
    assert guard.call(lambda tier: tier.get(make_key(2))) is None
    assert eventually(lambda: not guard.doubtful()) and keys_of(tier) == []


def test_doubtful_chunks_are_bounded(make_guard: MakeGuard, tier: FaultyTier) -> None:
    deadline = Deadline()
    guard = make_guard(deadline=deadline, most_doubtful=2)
    tier.gate.clear()
    for number in range(2):
        with deadline.within(0.5), pytest.raises(TierTimeoutError):
            put(guard, number)
    with pytest.raises(TierUnavailableError, match="2 chunks whose writing was given up"):
        put(guard, 2)
    tier.heal()
    assert eventually(lambda: not guard.doubtful())
    put(guard, 2)
    assert keys_of(tier) == [make_key(2)]


def test_an_interrupted_caller_gives_up(make_guard: MakeGuard, tier: FaultyTier) -> None:
    guard = make_guard()

    def interrupt(tier: Tier) -> None:
        time.sleep(0.2)  # until the caller waits: a signal right before that wakes nobody
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        tier.put(make_key(1), make_blob(1))

    tier.gate.clear()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    begun_s = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            guard.call(interrupt, writes=make_key(1))
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - begun_s < LONG_S / 2
    assert guard.doubtful() == {make_key(1)}
    tier.heal()
    assert eventually(lambda: not guard.doubtful()) and keys_of(tier) == []


def test_waiting_for_a_lock_counts(make_guard: MakeGuard, tier: FaultyTier) -> None:
    deadline = Deadline()
    guard, lock = make_guard(deadline=deadline), threading.RLock()
    held = DeadlineLock(tier.name, lock, deadline, 0.3)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lock.acquire).result(LONG_S)
        with pytest.raises(TierTimeoutError, match="another call has the chunk") as error, held:
            pytest.fail("the lock is held")
        assert not error.value.begun
        pool.submit(lock.release).result(LONG_S)
        with held:
            assert not pool.submit(lock.acquire, blocking=False).result(LONG_S)
            tier.gate.clear()
            begun_s = time.monotonic()
            with pytest.raises(TierTimeoutError):  # within what is left of it, not within the guard's own time
                guard.call(lambda tier: tier.get(make_key(1)))
            assert time.monotonic() - begun_s < LONG_S / 2
        assert deadline.left_s() == float("inf")
        assert pool.submit(lock.acquire, blocking=False).result(LONG_S)
        pool.submit(lock.release).result(LONG_S)


class TestGuardedTier(TierContract):
    """A guarded tier is a tier."""

    def make_tier(self, capacity_bytes: int | None) -> GuardedTier:
        return GuardedTier(HostTier(capacity_bytes, pinned=False), LONG_S)


def test_a_latch_stays_open() -> None:
    latch, passed = Latch(), []
    assert not latch.wait(0.01) and not latch.is_open
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(latch.wait) for _ in range(4)]
        time.sleep(0.02)
        latch.open(), latch.open()
        passed = [each.result(LONG_S) for each in waiting]
    assert passed == [True] * 4 and latch.wait(0) and latch.is_open


def test_only_what_this_thread_owns_is_released() -> None:
    mine, others, free = threading.RLock(), threading.RLock(), threading.RLock()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(others.acquire).result(LONG_S)
        mine.acquire(), mine.acquire()
        release_owned(mine, others, free)
        assert pool.submit(mine.acquire, blocking=False).result(LONG_S) and not others.acquire(blocking=False)
        assert free.acquire(blocking=False)
        release_owned(free)
        pool.submit(lambda: release_owned(mine, others)).result(LONG_S)


def test_close(make_guard: MakeGuard, tier: FaultyTier) -> None:
    guard = make_guard()
    guard.call(lambda tier: tier.get(make_key(1)))
    guard.close(), guard.close()
    assert tier.calls == ["get", "close"] and tier.closed and not guard.threads
    with pytest.raises(TierUnavailableError, match="is closed"):
        guard.call(lambda tier: tier.get(make_key(1)))


def test_close_behind_a_stalled_tier(make_guard: MakeGuard, tier: FaultyTier) -> None:
    guard = make_guard(0.5)
    stall(guard, tier)
    begun_s = time.monotonic()
    with pytest.raises(TierTimeoutError, match="is closed when it does"):
        guard.close()
    assert time.monotonic() - begun_s < LONG_S / 4 and not tier.closed
    tier.heal()
    assert eventually(lambda: tier.closed and not guard.threads)


def test_close_says_what_went_wrong(tier: FaultyTier) -> None:
    tier.fail(5, "close")
    with pytest.raises(TierUnavailableError, match="Input/output error"):
        GuardedTier(tier, LONG_S).close()


def test_every_caller_gets_its_own_result(make_guard: MakeGuard, tier: FaultyTier) -> None:
    """Calls that are fast, slow, too slow and failing by turns, from more threads than the guard has."""
    deadline = Deadline()
    guard = make_guard(0.3, deadline=deadline)

    def work(seed: int) -> int:
        dice, answered = random.Random(seed), 0
        for number in range(60):
            token, delay_s = (seed, number), dice.choice([0.0, 0.0, 0.001, 0.004])

            def operation(tier: Tier, token: object = token, delay_s: float = delay_s) -> object:
                time.sleep(delay_s)
                if delay_s == 0.001:
                    raise LookupError(token)
                return token

            try:
                with deadline.within(0.002 if delay_s == 0.004 else None):
                    assert guard.call(operation) == token
                    answered += 1
            except LookupError as error:
                assert error.args == (token,)
            except TierUnavailableError:
                pass
        return answered

    with ThreadPoolExecutor(8) as pool:
        answered = sum(pool.map(work, range(8)))
    assert answered > 100 and eventually(lambda: idle(guard)) and guard.threads <= 4
