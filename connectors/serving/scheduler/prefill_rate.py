"""How fast the engine computes prompts, observed from its steps. Imports no engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

_PROMPT_TOKENS = 32  # of one request in one step; fewer may be generated or drafted tokens
_MEMORY = 0.9  # of the sums, from one timed step to the next


@dataclass(frozen=True, slots=True)
class TimedStep:
    """A step of the engine that computed pieces of prompts.

    Attributes
    ----------
    begun_s : when it was planned.
    tokens : that it computed.
    prompts : requests of which it computed a piece of a prompt.
    position : mean of the tokens' positions.
    spent_s : what it took; 0 until it is over.
    """

    begun_s: float
    tokens: int
    prompts: tuple[str, ...]
    position: float = 0.0
    spent_s: float = 0.0


class PrefillRate:
    """Measures the seconds that the engine computes on a token of a prompt.

    A step of the engine lasts from when it was planned, or from the end of the step before it if that was later (an
    engine may plan ahead), to when its outcome is reported. Steps count if most of their tokens belong to prompts, in
    pieces of 32 tokens or more; their seconds are divided among all their tokens alike. The rate of the engine is that
    of its recent steps together, each weighing 0.9 of the one after it.

    Parameters
    ----------
    clock : monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._number = 0
        self._under_way: dict[int, TimedStep] = {}
        self._ended_s = float("-inf")
        self._seconds, self._tokens = 0.0, 0.0
        self._of_request: dict[str, float] = {}

    def begin(self, new_tokens: Mapping[str, int], position: float = 0.0) -> int:
        """Note that a step is planned; its number, from 1 on, or 0 if it does not tell how fast prompts are computed.

        Parameters
        ----------
        new_tokens : that it computes, for each request.
        position : mean of their positions.
        """
        if not is_prefill_step(new_tokens):
            return 0
        prompts = {name: count for name, count in new_tokens.items() if count >= _PROMPT_TOKENS}
        total = sum(new_tokens.values())
        self._number += 1
        self._under_way[self._number] = TimedStep(self._clock(), total, tuple(prompts), position)
        return self._number

    def end(self, number: int) -> TimedStep | None:
        """Note that the outcome of the step of this number was reported; 0 for a step without a number. The step, if it
        was timed.
        """
        now_s = self._clock()
        step = self._under_way.get(number)
        if step is not None:
            spent_s = now_s - max(step.begun_s, self._ended_s)
            self._seconds = _MEMORY * self._seconds + spent_s
            self._tokens = _MEMORY * self._tokens + step.tokens
            self._of_request.update(dict.fromkeys(step.prompts, spent_s / step.tokens))
            self._under_way = {other: later for other, later in self._under_way.items() if other > number}
            step = replace(step, spent_s=spent_s)
        self._ended_s = now_s
        return step

    def token_s(self, request_id: str | None = None) -> float | None:
        """Seconds a token in the last timed step that computed a piece of this request's prompt, as tokens behind a
        long context take longer. Without such a step, of the engine; None if no step was timed yet.
        """
        known = None if request_id is None else self._of_request.get(request_id)
        return known if known is not None or not self._tokens else self._seconds / self._tokens

    def forget(self, request_id: str) -> None:
        """The request is over."""
        self._of_request.pop(request_id, None)


def is_prefill_step(new_tokens: Mapping[str, int]) -> bool:
    """Whether a step that computes so many tokens of each request tells how fast prompts are computed."""
    if not new_tokens or max(new_tokens.values()) < _PROMPT_TOKENS:
        return False
    return 2 * sum(count for count in new_tokens.values() if count >= _PROMPT_TOKENS) > sum(new_tokens.values())
