"""Answers at whole multiples of a time since their request: `latency_quantum_s` (decision 87)."""

import asyncio
import math
import time

_IN_THREAD_S = 0.002


async def sleep_to_multiple(began_s: float, quantum_s: float) -> None:
    """Sleep until a whole multiple of `quantum_s` seconds after `began_s`, a time of `time.monotonic()`."""
    spent_s = time.monotonic() - began_s
    await sleep_until(began_s + math.ceil(spent_s / quantum_s) * quantum_s)


async def sleep_until(due_s: float) -> None:
    """Sleep until `time.monotonic()` is `due_s` seconds.

    It is late by some microseconds, which do not depend on when it was called. A timer of the event loop is late by
    up to a millisecond, since the loop rounds what is left up to milliseconds: how late follows from when the timer
    was set, hence from how long a look-up took. So a thread sleeps the last moments.
    """
    await asyncio.sleep(due_s - _IN_THREAD_S - time.monotonic())
    await asyncio.to_thread(lambda: time.sleep(max(due_s - time.monotonic(), 0.0)))
