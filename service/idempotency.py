"""Answers that are given again for a repeated `Idempotency-Key` (draft-ietf-httpapi-idempotency-key-header)."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict, defaultdict
from collections.abc import Awaitable, Callable
from typing import TypeAlias, TypeVar, cast

from .problems import ProblemError

T = TypeVar("T")
_Answers: TypeAlias = OrderedDict[tuple[str, str], tuple[bytes, float, asyncio.Future[object]]]

_REMEMBERED = 1024  # of each tenant
_REMEMBERED_S = 24 * 3600.0


class Idempotency:
    """The answers of late. For the event loop's thread alone."""

    def __init__(self) -> None:
        self._known: defaultdict[str, _Answers] = defaultdict(OrderedDict)

    async def once(self, tenant: str, route: str, key: str, body: str, work: Callable[[], Awaitable[T]]) -> T:
        """What `work` returns, or returned for the same key and body before.

        Raises
        ------
        ProblemError : the key was used for another body.
        """
        digest, now_s = hashlib.sha256(body.encode()).digest(), time.monotonic()
        answers = self._known[tenant]
        known = answers.get((route, key))
        if known is not None and now_s - known[1] < _REMEMBERED_S:
            if known[0] != digest:
                raise ProblemError(422, "idempotency", "this Idempotency-Key was used for another request")
            return cast("T", await asyncio.shield(known[2]))
        answer: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        answers[route, key] = digest, now_s, answer
        while len(answers) > _REMEMBERED:
            answers.popitem(last=False)
        try:
            result = await work()
        except BaseException as exc:
            answers.pop((route, key), None)  # what failed may be tried again
            answer.set_exception(exc if isinstance(exc, Exception) else ProblemError(503, "unavailable", "try again"))
            answer.exception()  # taken note of, for those who wait for nothing
            raise
        answer.set_result(result)
        return result
