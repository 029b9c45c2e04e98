"""Which requests are being fused, and what is remembered of fusions that are over. Imports no engine.

The scheduler's side of it; `vllm_fusion` is the workers'.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..messages import Advance, Fusion, Loaded
from .requests import Request

Fused: TypeAlias = Literal["no", "yes", "partly"]
"""Whether the span of a fusion is what one fusion makes of it; "partly": its rest was computed exactly behind it."""

_PLANS = 256  # fusions whose choice is remembered: four bytes for each token computed


@dataclass(slots=True)
class _Course:
    """Of one request's fusions."""

    request: Request
    first: int  # token that is not exact
    local_tokens: int | None = None  # that the engine has itself, when it has asked and not yet taken the request up
    begun_at: int = 0  # token, of the last one
    fused: Fused | None = None


class Fusions:
    """Of the requests that are not exact; has nothing to say of others.

    Parameters
    ----------
    ranks : how many there are; all of them fetch before any computes.
    block_tokens : of the engine.
    """

    def __init__(self, ranks: int, block_tokens: int) -> None:
        self._ranks = ranks
        self._block_tokens = block_tokens
        self._courses: dict[str, _Course] = {}
        self._found: dict[str, tuple[tuple[bool, ...], ...]] = {}  # by each rank, of fusions in order of arrival
        self._choices: OrderedDict[bytes, NDArray[np.int32]] = OrderedDict()  # what fusions computed, by plan

    @property
    def is_fusing(self) -> bool:
        """A fusion has begun whose end has not been told of."""
        return bool(self._found)

    def open(self, request_id: str, request: Request) -> None:
        if request.inexact is not None:
            self._courses[request_id] = _Course(request, request.inexact)

    def close(self, request_id: str) -> Fused:
        """Forget a request; what became of it."""
        self._found.pop(request_id, None)
        course = self._courses.pop(request_id, None)
        return "no" if course is None else course.fused or "no"

    def ask(self, request_id: str, computed_tokens: int) -> None:
        """The engine is about to take the request up, of which it has so many tokens itself."""
        if (course := self._courses.get(request_id)) is not None:
            course.local_tokens = computed_tokens

    def reach(self, request_id: str, computed_tokens: int) -> int:
        """Token up to which a fusion can provide KV to a request that is not exact; 0 if it cannot."""
        course = self._courses[request_id]
        if computed_tokens > course.first and course.request.plan not in self._choices:
            # The engine has fused tokens of a request like this one, or of this one before it was preempted. A
            # second choice among the rest alone would be another one than the first: the rest is computed.
            return 0
        # Whole blocks only: the engine finds them again as they are, and computes what follows in any case. One
        # token must be left to it: the first new one is sampled from what it computes.
        stop = min(course.request.documents[-1].stop, len(course.request.token_ids) - 1)
        return stop - stop % self._block_tokens

    def begin(self, request_id: str, start: int, stop: int, blocks: Sequence[int]) -> Fusion:
        """The engine took the offer up to `stop`: tokens `[start, stop)` are to be provided."""
        course = self._courses[request_id]
        request, course.local_tokens, course.begun_at = course.request, None, start
        self._found[request_id] = ()
        return Fusion(
            request_id,
            np.asarray(request.token_ids[:stop], dtype=np.int64),
            start,
            stop,
            course.first,
            request.documents,
            request.ratio,
            tuple(blocks),
            self._choices.get(request.plan) if start > course.first else None,
        )

    def decline(self, request_id: str) -> None:
        """The engine goes on without an offer: it computes what it does not have."""
        course = self._courses.get(request_id)
        if course is None or course.local_tokens is None:  # merely back from a fusion
            return
        local, course.local_tokens = course.local_tokens, None
        stop = course.request.documents[-1].stop
        now: Fused = "yes" if local >= stop - stop % self._block_tokens else "partly"
        course.fused = _either(course.fused, "no" if local <= course.first else now)

    def fetched(self, request_id: str, masks: tuple[tuple[bool, ...], ...]) -> None:
        """More ranks have fetched the documents; which of them each has."""
        if request_id in self._found:
            self._found[request_id] += masks

    def advance(self) -> Advance | None:
        """The next slice. One fusion at a time, the first that all ranks have fetched."""
        for request_id, masks in self._found.items():
            if len(masks) == self._ranks:
                return Advance(request_id, tuple(all(ranks) for ranks in zip(*masks, strict=True)))
        return None

    def end(self, request_id: str, loaded: Loaded) -> None:
        """What became of it."""
        self._found.pop(request_id, None)
        course = self._courses.get(request_id)
        if course is None:
            return
        if loaded.chosen is not None:
            self._choices[course.request.plan] = loaded.chosen
            self._choices.move_to_end(course.request.plan)
            while len(self._choices) > _PLANS:
                self._choices.popitem(last=False)
        lost: Fused = "no" if course.begun_at <= course.first else "partly"
        course.fused = _either(course.fused, lost if loaded.failed else "yes")


def _either(before: Fused | None, now: Fused) -> Fused:
    """Of a request that was taken up again: its tokens so far came of `before`."""
    return now if before is None or before == now else "partly"
