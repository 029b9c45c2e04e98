"""Waiting and measuring on a machine that may be busy: limits that are long, and noise that only ever adds."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

LONG_S = 60.0  # what no test ever waits for, on however slow a machine


def eventually(condition: Callable[[], object]) -> bool:
    until_s = time.monotonic() + LONG_S
    while not condition():
        if time.monotonic() > until_s:
            return False
        time.sleep(0.002)
    return True


def at_best(measure: Callable[[], T], holds: Callable[[T], object], tries: int = 4) -> T:
    """The first of several measurements that holds what is claimed, or the last: others on the machine spoil some."""
    for _ in range(tries - 1):
        if holds(measured := measure()):
            return measured
    return measure()


def least_cpu_s(work: Callable[[], object], tries: int = 7) -> float:
    """The least CPU time of this process for the work, of several tries: whoever else is busy only adds to it."""
    spent_s = []
    for _ in range(tries):
        begun_s = time.process_time()
        work()
        spent_s.append(time.process_time() - begun_s)
    return min(spent_s)
