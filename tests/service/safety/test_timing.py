"""What times tell: nothing of another tenant's keys, and with `latency_quantum_s` nothing of hits and misses."""

import asyncio
import http.client
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from kvloom.kvstore.tiers.host import HostTier
from kvloom.service.access.quantum import sleep_until
from kvloom.testing.chunks import make_blob, make_key

from ..serving import Service, service_in_thread

pytestmark = pytest.mark.slow

SAMPLES = 150
STORED = 200
QUANTUM_S = 0.04
CHANCE = 0.14  # four standard errors of an estimate from so many samples


def advantage(one: Sequence[float], other: Sequence[float]) -> float:
    """How much better than a coin whoever sees one time tells the two apart: 0 for not at all, 0.5 for always.

    The area under the ROC curve (Mann and Whitney's U over the number of pairs), less a half.
    """
    wins = sum((a > b) + 0.5 * (a == b) for a in one for b in other)
    return abs(wins / (len(one) * len(other)) - 0.5)


def expect_untold(measure: Callable[[], tuple[Sequence[float], Sequence[float]]]) -> None:
    """Assert that the two kinds of times are not told apart. A busy machine has three tries."""
    found = []
    while len(found) < 3:
        found.append(advantage(*measure()))
        if found[-1] < CHANCE:
            return
    pytest.fail(f"times tell the two kinds apart: {found}")


class Watch:
    """Requests of one tenant on one connection; times until the header of the answer is there."""

    def __init__(self, service: Service, token: str) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=30)
        self._headers = {"Authorization": f"Bearer {token}"}

    def seconds(self, method: str, path: str, body: object = None) -> tuple[float, int, bytes]:
        data = None if body is None else json.dumps(body).encode()
        headers = self._headers if data is None else {**self._headers, "Content-Type": "application/json"}
        began_s = time.perf_counter()
        self._connection.request(method, path, data, headers)
        answer = self._connection.getresponse()
        spent_s = time.perf_counter() - began_s
        return spent_s, answer.status, answer.read()


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with service_in_thread(tmp_path, [HostTier(None)]) as service:
        yield service


def fill(service: Service, token: str) -> list[str]:
    with service.client(token, shared_memory=False) as client:
        for number in range(STORED):
            client.put(make_key(number), make_blob(number, numbers=8))
    return [make_key(number).hex() for number in range(STORED)]


def test_anothers_key_is_answered_as_one_that_nobody_has(service: Service) -> None:
    theirs = fill(service, service.new_token("theirs"))
    nobodys = [make_key(10_000 + number).hex() for number in range(STORED)]
    watch = Watch(service, service.new_token("curious"))
    for method, path in (("GET", "/v1/chunks/{}"), ("HEAD", "/v1/chunks/{}"), ("POST", "/v1/match")):

        def measure(method: str = method, path: str = path) -> tuple[list[float], list[float]]:
            times: tuple[list[float], list[float]] = ([], [])
            answers: tuple[set[object], set[object]] = (set(), set())
            for number in range(SAMPLES):
                for which, key in ((0, theirs[number]), (1, nobodys[number])):
                    body = {"keys": [key]} if method == "POST" else None
                    spent_s, *answer = watch.seconds(method, path.format(key), body)
                    times[which].append(spent_s)
                    answers[which].add(tuple(answer))
            assert answers[0] == answers[1] and len(answers[0]) == 1, method
            return times

        expect_untold(measure)


def hits_and_misses(service: Service) -> tuple[list[float], list[float]]:
    """Times of a match of many chunks that are there, and of as many that are not, in turns."""
    stored = fill(service, service.token)
    absent = [make_key(10_000 + number).hex() for number in range(STORED)]
    watch, times = Watch(service, service.token), ([], [])
    for _ in range(SAMPLES):
        for which, keys in ((0, stored), (1, absent)):
            spent_s, status, _ = watch.seconds("POST", "/v1/match", {"keys": keys})
            assert status == 200
            times[which].append(spent_s)
    return times


def test_without_a_quantum_times_tell_hits_from_misses(service: Service) -> None:
    """So the next test can fail."""
    hits, misses = hits_and_misses(service)
    assert advantage(hits, misses) > 0.2


def test_with_a_quantum_they_do_not_and_it_costs_the_quantum(tmp_path: Path) -> None:
    def measure() -> tuple[list[float], list[float]]:
        times = hits_and_misses(service)
        for each in times:
            assert min(each) > 0.95 * QUANTUM_S
            medians_s.append(statistics.median(each))
        return times

    medians_s: list[float] = []
    with service_in_thread(tmp_path, [HostTier(None)], latency_quantum_s=QUANTUM_S) as service:
        expect_untold(measure)
    assert min(medians_s) < 2.5 * QUANTUM_S


def test_how_late_a_sleeper_wakes_does_not_tell_when_it_lay_down() -> None:
    """An event loop's own timer is half a millisecond later for one of these than for the other."""

    async def least_late_s(asleep_s: float) -> float:
        late_s = []
        for _ in range(100):
            due_s = time.monotonic() + asleep_s
            await sleep_until(due_s)
            late_s.append(time.monotonic() - due_s)
        return min(late_s)

    short_s, long_s = (asyncio.run(least_late_s(asleep_s)) for asleep_s in (0.0052, 0.0057))
    assert short_s >= 0.0 and long_s >= 0.0 and abs(short_s - long_s) < 0.0003
