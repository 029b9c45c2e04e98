"""Threads that wait for others, and the way to a tier that can stall."""

import random
import signal
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvloom.core import Tier
from kvloom.errors import ChunkCorruptError, TierFullError, TierTimeoutError, TierUnavailableError
from kvloom.kvstore.capabilities import MayStall
from kvloom.kvstore.guard import lane as lanes
from kvloom.kvstore.guard import worker_pool as pools
from kvloom.kvstore.guard.circuit_breaker import Breaker
from kvloom.kvstore.guard.deadline import Patience
from kvloom.kvstore.guard.lane import Lane
from kvloom.kvstore.guard.worker_pool import Workers
from kvloom.kvstore.tiers.disk.tier import DiskTier
from kvloom.kvstore.tiers.host import HostTier
from kvloom.kvstore.tiers.shared import SharedTier
from kvloom.testing import keys_of, make_blob, make_key

from ..support.faulty import LONG_S, FaultyTier, eventually, leaves_no_threads

no_threads_left = pytest.fixture(autouse=True)(leaves_no_threads)


@pytest.fixture
def tier() -> Iterator[FaultyTier]:
    tier = FaultyTier()
    yield tier
    tier.heal()


@pytest.fixture
def make_lane(tier: FaultyTier) -> Iterator[Callable[..., Lane]]:
    made: list[Lane] = []

    def make(timeout_s: float = LONG_S, **options: object) -> Lane:
        made.append(Lane(tier, timeout_s, **options))
        return made[-1]

    yield make
    tier.heal()
    for lane in made:
        lane.close()


def stall(lane: Lane, tier: FaultyTier, calls: int = 4) -> None:
    """All threads of the lane wait for the tier, and the callers have gone."""
    tier.gate.clear()
    with ThreadPoolExecutor(calls) as pool:
        for outcome in [pool.submit(lane.run, lambda tier: tier.get(make_key(0))) for _ in range(calls)]:
            assert isinstance(outcome.exception(LONG_S), TierTimeoutError)


def idle(lane: Lane) -> bool:
    return not lane._running


# ------------------------------------------------------------------------------------------------------- workers


def test_workers_do_everything_in_order() -> None:
    workers, done = Workers("kvloom-test", 1, queued_tasks=100), []
    assert all(workers.submit(lambda n=n: done.append(n)) for n in range(100))
    assert workers.close(LONG_S) and done == list(range(100))
    assert not workers.submit(lambda: done.append(-1)) and workers.close() and len(done) == 100


def test_workers_refuse_what_does_not_fit() -> None:
    workers, gate, done = Workers("kvloom-test", 2, queued_tasks=3), threading.Event(), []
    for _ in range(2):
        assert workers.submit(lambda: gate.wait(LONG_S))
    assert eventually(lambda: not workers._tasks)
    assert [workers.submit(lambda: done.append(1)) for _ in range(5)] == [True] * 3 + [False] * 2
    assert workers.submit(lambda: done.append(2), last=True)  # closing is not refused
    assert not workers.submit(lambda: done.append(3))
    assert not workers.close(0.01) and done == []
    gate.set()
    assert workers.close(LONG_S) and sorted(done) == [1, 1, 1, 2]


def test_idle_threads_end_and_no_task_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks come just when threads are about to end."""
    monkeypatch.setattr(pools, "_IDLE_S", 0.0005)
    workers, dice, done = Workers("kvloom-test", 3, queued_tasks=10), random.Random(0), []
    for number in range(500):
        assert workers.submit(lambda n=number: done.append(n))
        time.sleep(dice.choice([0.0, 0.0005, 0.001]))
        assert len(workers._threads) <= 3
        if number % 50 == 49:
            assert eventually(lambda n=number: len(done) == n + 1)
    assert eventually(lambda: not workers._threads)
    assert sorted(done) == list(range(500)) and workers._idle == 0


def test_no_thread_to_be_had(monkeypatch: pytest.MonkeyPatch, tier: FaultyTier) -> None:
    workers, done = Workers("kvloom-test", 2, queued_tasks=9), []
    with monkeypatch.context() as patch:

        def refuse(self: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        patch.setattr(threading.Thread, "start", refuse)
        assert not workers.submit(lambda: done.append(1))
        with pytest.raises(TierUnavailableError, match="no thread can be started"):
            (lane := Lane(tier, 1.0)).run(lambda tier: tier.get(make_key(1)))
        lane.close()
        assert tier.closed
    assert workers.submit(lambda: done.append(2)) and workers.close(LONG_S) and done == [2]


# ------------------------------------------------------------------------------------------------- the breaker


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_breaker_waits_longer_with_every_probe_that_fails() -> None:
    clock = Clock()
    breaker = Breaker(clock)
    waits = []
    for _ in range(3):
        assert breaker.admits() and not breaker.is_down
        assert breaker.judge(probes=False, fault=True) is None
    for _ in range(12):
        assert breaker.is_down and not breaker.admits()
        waits.append(round(breaker.wait_s(), 6))
        clock.now_s += waits[-1] - 1e-3
        assert not breaker.admits()
        clock.now_s += 2e-3
        assert breaker.admits() and not breaker.admits()  # one probe at a time
        breaker.judge(probes=True, fault=True)
    assert waits[:9] == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6] and set(waits[9:]) == {30.0}
    clock.now_s += 30.0
    assert breaker.admits()
    assert breaker.judge(probes=True, answered=True) == pytest.approx(clock.now_s - 100.0)
    assert not breaker.is_down and breaker.judge(probes=False, answered=True) is None
    for _ in range(2):
        breaker.judge(probes=False, fault=True)
    assert breaker.admits()  # it starts from nothing again


def test_breaker_counts_faults_in_a_row() -> None:
    breaker = Breaker(Clock())
    for _ in range(10):
        breaker.judge(probes=False, fault=True)
        breaker.judge(probes=False, fault=True)
        breaker.judge(probes=False, answered=True)
    assert breaker.admits() and not breaker.is_down


def test_breaker_learns_nothing_from_calls_of_before() -> None:
    clock = Clock()
    breaker = Breaker(clock)
    for _ in range(8):
        breaker.judge(probes=False, fault=True)
    assert breaker.wait_s() == pytest.approx(0.1)
    clock.now_s += 1.0
    assert breaker.admits()
    breaker.judge(probes=True)  # the caller of the probe was in a hurry: nothing is known, and another may probe
    assert breaker.is_down and breaker.admits()
    breaker.judge(probes=True, fault=True)
    breaker.hurry()
    assert breaker.wait_s() == 0.0 and breaker.admits()


# ---------------------------------------------------------------------------------------------------------- lane


def test_who_may_stall(tier: FaultyTier) -> None:
    assert isinstance(tier, MayStall) and not isinstance(HostTier(None), MayStall)


def test_a_disk_may_stall() -> None:
    assert DiskTier.may_stall is True and SharedTier.may_stall is True  # its lock and its swap device may


def test_results_and_errors_are_those_of_the_tier(make_lane: Callable[..., Lane], tier: FaultyTier) -> None:
    lane = make_lane()
    blob = make_blob(1)
    lane.run(lambda tier: tier.put(make_key(1), blob), writes=make_key(1))
    assert lane.run(lambda tier: tier.get(make_key(1))) is blob
    assert lane.run(lambda tier: tier.get(make_key(2))) is None
    tier.faults = {"get": lambda: ChunkCorruptError("flipped")}
    with pytest.raises(ChunkCorruptError, match="flipped") as error:
        lane.run(lambda tier: tier.get(make_key(1)))
    assert "_reach" in {frame.name for frame in traceback.extract_tb(error.value.__traceback__)}


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, MemoryError, ZeroDivisionError])
def test_no_error_ends_a_thread(make_lane: Callable[..., Lane], tier: FaultyTier, error: type[BaseException]) -> None:
    lane = make_lane(threads=1)
    tier.faults = {"get": error}
    for _ in range(5):
        with pytest.raises(error):
            lane.run(lambda tier: tier.get(make_key(1)))
    assert len(lane._workers._threads) == 1 and lane.run(lambda tier: tier.delete(make_key(1))) is False


def test_a_call_that_does_not_end_is_given_up(make_lane: Callable[..., Lane], tier: FaultyTier) -> None:
    lane = make_lane(0.05)
    tier.gate.clear()
    begun_s = time.monotonic()
    with pytest.raises(TierTimeoutError, match="has not answered within 0") as error:
        lane.run(lambda tier: tier.get(make_key(1)))
    assert error.value.begun and 0.05 <= time.monotonic() - begun_s < LONG_S / 2
    tier.heal()
    assert eventually(lambda: idle(lane)) and make_lane().run(lambda tier: tier.get(make_key(1))) is None


def test_late_results_are_thrown_away(make_lane: Callable[..., Lane], tier: FaultyTier) -> None:
    class Result:
        pass

    made: list[weakref.ref[Result]] = []

    def slow(tier: Tier) -> Result:
        tier.get(make_key(1))
        result = Result()
        made.append(weakref.ref(result))
        return result

    lane = make_lane(0.05)
    tier.gate.clear()
    with pytest.raises(TierTimeoutError):
        lane.run(slow)
    tier.heal()
    assert eventually(lambda: made and made[0]() is None)


def test_what_is_given_up_in_the_queue_never_happens(make_lane: Callable[..., Lane], tier: FaultyTier) -> None:
    patience = Patience()
    lane = make_lane(threads=1, patience=patience)
    tier.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(lane.run, lambda tier: tier.get(make_key(1)))
        assert eventually(lambda: tier.calls == ["get"])
        with patience.within(0.02), pytest.raises(TierTimeoutError) as error:
            lane.run(lambda tier: tier.put(make_key(1), make_blob(1)), writes=make_key(1))
        assert not error.value.begun and lane.doubtful() == frozenset()
        with patience.within(0.0), pytest.raises(TierTimeoutError, match="no time is left"):
            lane.run(lambda tier: tier.get(make_key(1)))
        tier.heal()
        assert first.result(LONG_S) is None
    assert lane.run(lambda tier: tier.get(make_key(1))) is None and tier.calls == ["get", "get"]


def test_brief_calls_do_not_wait_behind_others(make_lane: Callable[..., Lane], tier: FaultyTier) -> None:
    lane, done = make_lane(threads=1), []
    tier.gate.clear()
    with ThreadPoolExecutor(4) as pool:
        running = pool.submit(lane.run, lambda tier: tier.get(make_key(1)))
        assert eventually(lambda: tier.calls == ["get"])
        waiting = []
        for number, is_brief in enumerate([False, False, True]):
            waiting.append(pool.submit(lane.run, lambda tier, n=number: done.append(n), is_brief=is_brief))
            assert eventually(lambda n=number: len(lane._workers._tasks) == n + 1)
        tier.gate.set()
        assert [call.result(LONG_S) for call in (running, *waiting)] == [None] * 4
    assert done == [2, 0, 1]


def test_nothing_piles_up_behind_a_stalled_tier(make_lane: Callable[..., Lane], tier: FaultyTier) -> None:
    recovered: list[float] = []
    lane = make_lane(0.1, on_recovery=recovered.append)
    stall(lane, tier)
    assert eventually(lambda: all(time.monotonic() - call.begun_at_s > 0.1 for call in lane._running))
    begun_s = time.monotonic()
    for _ in range(1000):
        with pytest.raises(TierUnavailableError, match="is stalled: 4 calls") as error:
            lane.run(lambda tier: tier.get(make_key(1)))
        assert not isinstance(error.value, TierTimeoutError)
    assert time.monotonic() - begun_s < LONG_S / 4 and len(tier.calls) == len(lane._running) == 4
    assert len(lane._workers._threads) == 4 and not lane._workers._tasks

    def works() -> bool:
        try:
            return lane.run(lambda tier: tier.delete(make_key(1))) is False
        except TierUnavailableError:
            return False

    assert recovered == []
    tier.heal()
    assert eventually(works) and len(recovered) == 1


def test_a_tier_that_is_down_is_left_alone(make_lane: Callable[..., Lane], tier: FaultyTier) -> None:
    recovered: list[float] = []
    lane = make_lane(on_recovery=recovered.append)
    tier.fail(5)
    for _ in range(3):
        with pytest.raises(TierUnavailableError, match="Input/output error"):
            lane.run(lambda tier: tier.get(make_key(1)))
    lane._breaker._retry_at_s += 1000.0
    for _ in range(100):
        with pytest.raises(TierUnavailableError, match="is down, and asked again in"):
            lane.run(lambda tier: tier.get(make_key(1)))
    assert len(tier.calls) == 3
    lane._breaker._retry_at_s -= 1000.1
    with pytest.raises(TierUnavailableError, match="Input/output error"):
        lane.run(lambda tier: tier.get(make_key(1)))
    tier.heal()
    lane._breaker._retry_at_s -= 1.0
    assert [lane.run(lambda tier: tier.get(make_key(1))) for _ in range(5)] == [None] * 5
    assert len(recovered) == 1 and recovered[0] > 0.0 and len(tier.calls) == 9


@pytest.mark.parametrize("error", [ChunkCorruptError("no"), TierFullError("no", needed_bytes=1), ValueError("no")])
def test_a_tier_that_answers_is_not_down(make_lane: Callable[..., Lane], tier: FaultyTier, error: Exception) -> None:
    lane = make_lane()
    tier.faults = {"get": lambda: error}
    for _ in range(10):
        with pytest.raises(type(error), match="no"):
            lane.run(lambda tier: tier.get(make_key(1)))
    assert len(tier.calls) == 10


def test_a_caller_in_a_hurry_is_no_fault_of_the_tier(make_lane: Callable[..., Lane], tier: FaultyTier) -> None:
    patience = Patience()
    lane = make_lane(patience=patience)
    for _ in range(10):
        tier.gate.clear()
        with patience.within(0.005), pytest.raises(TierTimeoutError):
            lane.run(lambda tier: tier.get(make_key(1)))
        tier.gate.set()
    assert lane.run(lambda tier: tier.get(make_key(1))) is None


def test_patience_is_of_one_thread_and_never_grows() -> None:
    patience = Patience()
    with patience.within(50.0), patience.within(100.0), patience.within(None):
        assert 40.0 < patience.left_s() <= 50.0
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(patience.left_s).result(LONG_S) == float("inf")
        with pytest.raises(ZeroDivisionError), patience.within(0.0):
            assert patience.left_s() <= 0.0 and 1 / 0
        assert 40.0 < patience.left_s() <= 50.0
    assert patience.left_s() == float("inf")


def put(lane: Lane, number: int, blob_seed: int = 1) -> None:
    lane.run(lambda tier: tier.put(make_key(number), make_blob(blob_seed)), writes=make_key(number))


def test_a_late_write_is_undone(make_lane: Callable[..., Lane], tier: FaultyTier) -> None:
    lane = make_lane(0.1)
    tier.gate.clear()
    with pytest.raises(TierTimeoutError) as error:
        put(lane, 1)
    assert error.value.begun and lane.doubtful() == {make_key(1)}
    with pytest.raises(TierUnavailableError, match="an earlier call was given up"):
        put(lane, 1, 2)
    tier.heal()
    assert eventually(lambda: not lane.doubtful())
    assert tier.calls == ["put", "delete"] and keys_of(tier) == []
    assert eventually(lambda: idle(lane))
    make_lane_again = make_lane()
    put(make_lane_again, 1, 2)
    assert keys_of(tier) == [make_key(1)]


def test_a_late_deletion_is_certain(make_lane: Callable[..., Lane], tier: FaultyTier) -> None:
    """Also if the late call itself failed."""
    tier.put(make_key(1), make_blob(1))
    lane = make_lane(0.1)
    tier.gate.clear()
    with pytest.raises(TierTimeoutError):
        lane.run(lambda tier: tier.delete(make_key(1)), writes=make_key(1))
    tier.fail(5, "delete")
    tier.gate.set()
    assert eventually(lambda: idle(lane)) and keys_of(tier) == [make_key(1)] and lane.doubtful() == {make_key(1)}
    tier.heal()
    assert lane.run(lambda tier: tier.get(make_key(2))) is None  # the tier answers: now it can be done
    assert eventually(lambda: not lane.doubtful()) and keys_of(tier) == []


def test_a_tier_that_gives_up_by_itself(make_lane: Callable[..., Lane], tier: FaultyTier) -> None:
    lane = make_lane()

    def lose_the_answer(tier: Tier) -> None:
        tier.put(make_key(1), make_blob(1))
        raise TierTimeoutError("no answer", begun=True)

    with pytest.raises(TierTimeoutError, match="no answer"):
        lane.run(lose_the_answer, writes=make_key(1))
    assert lane.doubtful() == {make_key(1)} == set(keys_of(tier))
    assert lane.run(lambda tier: tier.get(make_key(2))) is None
    assert eventually(lambda: not lane.doubtful()) and keys_of(tier) == []


def test_an_undoing_that_fails_is_tried_again_and_a_bug_in_it_is_heard(
    make_lane: Callable[..., Lane], tier: FaultyTier
) -> None:
    lane = make_lane(0.1)
    tier.gate.clear()
    with pytest.raises(TierTimeoutError):
        put(lane, 1)
    tier.faults = {"delete": ZeroDivisionError}
    tier.gate.set()
    assert eventually(lambda: idle(lane)) and lane.doubtful() == {make_key(1)} == set(keys_of(tier))
    with pytest.raises(ZeroDivisionError):
        lane.run(lambda tier: tier.get(make_key(1)))
    tier.heal()
    assert lane.run(lambda tier: tier.get(make_key(2))) is None
    assert eventually(lambda: not lane.doubtful()) and keys_of(tier) == []


def test_doubtful_chunks_are_bounded(
    make_lane: Callable[..., Lane], tier: FaultyTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes, "_DOUBTFUL_CHUNKS", 2)
    patience = Patience()
    lane = make_lane(patience=patience)
    tier.gate.clear()
    for number in range(2):
        with patience.within(0.02), pytest.raises(TierTimeoutError):
            put(lane, number)
    with pytest.raises(TierUnavailableError, match="2 chunks whose writing was given up"):
        put(lane, 2)
    tier.heal()
    assert eventually(lambda: not lane.doubtful())
    put(lane, 2)
    assert keys_of(tier) == [make_key(2)]


def test_an_interrupted_caller_gives_up(make_lane: Callable[..., Lane], tier: FaultyTier) -> None:
    lane = make_lane()

    def interrupt(tier: Tier) -> None:
        time.sleep(0.2)  # until the caller waits: a signal right before that wakes nobody
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        tier.put(make_key(1), make_blob(1))

    tier.gate.clear()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    begun_s = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            lane.run(interrupt, writes=make_key(1))
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - begun_s < LONG_S / 2
    assert lane.doubtful() == {make_key(1)}
    tier.heal()
    assert eventually(lambda: not lane.doubtful()) and keys_of(tier) == []


def test_waiting_for_a_lock_counts(make_lane: Callable[..., Lane], tier: FaultyTier) -> None:
    lane, lock = make_lane(0.3), threading.Lock()
    with lock, pytest.raises(TierTimeoutError, match="another call has the chunk") as error, lane.hold(lock):
        pytest.fail("the lock is held")
    assert not error.value.begun
    with lane.hold(lock):
        assert lock.locked()
        time.sleep(0.2)
        tier.gate.clear()
        begun_s = time.monotonic()
        with pytest.raises(TierTimeoutError):
            lane.run(lambda tier: tier.get(make_key(1)))
        assert time.monotonic() - begun_s < 0.3  # what is left of it
    assert not lock.locked()


def test_close(make_lane: Callable[..., Lane], tier: FaultyTier) -> None:
    lane = make_lane()
    lane.run(lambda tier: tier.get(make_key(1)))
    lane.close(), lane.close()
    assert tier.calls == ["get", "close"] and tier.closed and not lane._workers._threads
    with pytest.raises(TierUnavailableError, match="is closed"):
        lane.run(lambda tier: tier.get(make_key(1)))


def test_close_behind_a_stalled_tier(make_lane: Callable[..., Lane], tier: FaultyTier) -> None:
    lane = make_lane(0.1)
    stall(lane, tier)
    begun_s = time.monotonic()
    with pytest.raises(TierTimeoutError, match="is closed when it does"):
        lane.close()
    assert time.monotonic() - begun_s < LONG_S / 4 and not tier.closed
    tier.heal()
    assert eventually(lambda: tier.closed and not lane._workers._threads)


def test_close_says_what_went_wrong(tier: FaultyTier) -> None:
    tier.fail(5, "close")
    with pytest.raises(TierUnavailableError, match="Input/output error"):
        Lane(tier, LONG_S).close()


def test_every_caller_gets_its_own_result(make_lane: Callable[..., Lane], tier: FaultyTier) -> None:
    """Calls that are fast, slow, too slow and failing by turns, from more threads than the lane has."""
    patience = Patience()
    lane = make_lane(0.3, patience=patience)

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
                with patience.within(0.002 if delay_s == 0.004 else None):
                    assert lane.run(operation) == token
                    answered += 1
            except LookupError as error:
                assert error.args == (token,)
            except TierUnavailableError:
                pass
        return answered

    with ThreadPoolExecutor(8) as pool:
        answered = sum(pool.map(work, range(8)))
    assert answered > 100 and eventually(lambda: idle(lane)) and len(lane._workers._threads) <= 4
