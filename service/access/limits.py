"""How much a tenant may ask for: requests a second, and requests at a time."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

from ..problems import ProblemError

_BURST_S = 10.0


@dataclass(slots=True)
class _Bucket:
    tokens: float
    at_s: float


class RequestLimits:
    """Counts requests under way, and fills a token bucket for each tenant. For the event loop's thread alone.

    Parameters
    ----------
    clock : seconds, monotonic.
    """

    def __init__(self, most: int, most_of_tenant: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._most_of_tenant, self._clock = most, most_of_tenant, clock
        self.open_requests = 0
        self._of_tenant: Counter[str] = Counter()
        self._buckets: dict[str, _Bucket] = {}

    def enter(self, tenant: str, requests_per_s: float | None) -> None:
        """Counts a request of the tenant until `leave`.

        Raises
        ------
        ProblemError : 429 if the tenant asks too often, 503 if too much is under way.
        """
        if requests_per_s is not None:
            self._take(tenant, requests_per_s)
        if self.open_requests >= self._most or self._of_tenant[tenant] >= self._most_of_tenant:
            raise ProblemError(
                503, "busy", "too many requests are under way; try again later", headers={"Retry-After": "1"}
            )
        self.open_requests += 1
        self._of_tenant[tenant] += 1

    def leave(self, tenant: str) -> None:
        self.open_requests -= 1
        self._of_tenant[tenant] -= 1
        if not self._of_tenant[tenant]:
            del self._of_tenant[tenant]

    def _take(self, tenant: str, per_s: float) -> None:
        now_s, most = self._clock(), max(per_s * _BURST_S, 1.0)
        bucket = self._buckets.setdefault(tenant, _Bucket(most, now_s))
        bucket.tokens = min(most, bucket.tokens + max(0.0, now_s - bucket.at_s) * per_s)
        bucket.at_s = now_s
        if bucket.tokens < 1:
            wait_s = (1 - bucket.tokens) / per_s
            raise ProblemError(
                429,
                "too-many-requests",
                f"more than {per_s:g} requests a second",
                headers={"Retry-After": str(int(wait_s) + 1)},
            )
        bucket.tokens -= 1


class TransferTurns:
    """At most a few bodies move at a time, so that look-ups stay fast; a slow one gives up its turn, and goes on.

    Parameters
    ----------
    most : turns at a time.
    turn_s : how long one lasts at most.
    """

    def __init__(self, most: int, *, turn_s: float = 1.0) -> None:
        self._free = asyncio.Semaphore(most)
        self._turn_s = turn_s

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Waits for a turn; within, a body may move."""
        await self._free.acquire()
        is_over = False

        def end() -> None:
            nonlocal is_over
            if not is_over:
                is_over = True
                self._free.release()

        timer = asyncio.get_running_loop().call_later(self._turn_s, end)
        try:
            yield
        finally:
            timer.cancel()
            end()


class UploadBudget:
    """Bytes of bodies that are on their way in. For the event loop's thread alone.

    Parameters
    ----------
    most_bytes : all together.
    most_of_tenant_bytes : of one tenant, so that nobody keeps the others out.
    """

    def __init__(self, most_bytes: int, most_of_tenant_bytes: int) -> None:
        self._most_bytes, self._most_of_tenant_bytes = most_bytes, most_of_tenant_bytes
        self.used_bytes = 0
        self._of_tenant: Counter[str] = Counter()

    @contextmanager
    def taking(self, tenant: str, nbytes: int) -> Iterator[None]:
        """Raises `ProblemError` if so much more may not come in now."""
        mine_bytes = self._of_tenant[tenant]
        if self.used_bytes + nbytes > self._most_bytes or mine_bytes + nbytes > self._most_of_tenant_bytes:
            raise ProblemError(
                503, "busy", "too many bodies are on their way; try again later", headers={"Retry-After": "1"}
            )
        self.used_bytes += nbytes
        self._of_tenant[tenant] += nbytes
        try:
            yield
        finally:
            self.used_bytes -= nbytes
            self._of_tenant[tenant] -= nbytes
            if not self._of_tenant[tenant]:
                del self._of_tenant[tenant]
