"""Requests on their way through engines: what waits for loads, what waits to be computed, and when first tokens come.

An engine works in steps, as vLLM does: each computes tokens of several requests; first of those that it has begun, then
of those whose loads have ended, then of those that wait. It looks at a request when a step has room for it: then it is
decided whether it loads. Loads go on beside steps.

    served = schedule(jobs, costs, "controller", engines=2)
    [each.ttft_s for each in served]

Costs may be measured ones, of a real engine: then `schedule` predicts what that engine does with the same requests.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from functools import partial

from ...connectors.serving.controller.controller import Controller
from .costs import Costs
from .engine import Engine, Request
from .jobs import POLICIES, Job, Policy, Served
from .loads import Load, Loads

_TAUGHT_CHUNKS = (1, 8, 64)
_TAUGHT_TOKENS = ((256, 0), (4096, 0), (512, 16384))


class _Schedule:
    """What happens, in its order: requests arrive, loads end, steps end."""

    def __init__(self, costs: Costs, policy: Policy, engines: int, *, is_taught: bool) -> None:
        self._costs = costs
        self._now_s = 0.0
        self._loads = Loads(costs)
        told = partial(teach, costs=costs) if is_taught else None
        self._engines = [Engine(i, costs, policy, self._loads, lambda: self._now_s, told) for i in range(engines)]
        self._requests: list[Request] = []
        self._events: list[tuple[float, int, Callable[[], Engine]]] = []
        self._count = 0

    def run(self, jobs: Sequence[Job]) -> list[Served]:
        """What becomes of them."""
        self._requests = [Request(number, job) for number, job in enumerate(jobs)]
        for request in self._requests:
            self._at(request.job.arrival_s, partial(self._arrive, request))
        while True:
            event_s = self._events[0][0] if self._events else math.inf
            loads_s = self._loads.next_s
            if loads_s <= event_s and loads_s < math.inf:
                self._now_s = max(loads_s, self._now_s)
                for load in self._loads.advance(self._now_s):
                    self._at(self._now_s + self._costs.call_s, partial(self._end_load, load))
            elif self._events:
                self._now_s = event_s
                self._loads.advance(event_s)
                touched = dict[int, Engine]()
                while self._events and self._events[0][0] == event_s:  # before anything begins
                    engine = heapq.heappop(self._events)[2]()
                    touched[engine.number] = engine
                for engine in touched.values():
                    if not engine.is_computing:
                        self._compute(engine)
            else:
                return [request.served() for request in self._requests]

    def _at(self, when_s: float, happen: Callable[[], Engine]) -> None:
        heapq.heappush(self._events, (when_s, self._count, happen))
        self._count += 1

    def _arrive(self, request: Request) -> Engine:
        engine = min(self._engines, key=lambda each: each.open_requests)
        engine.take(request)
        return engine

    def _end_load(self, load: Load) -> Engine:
        engine = self._engines[load.engine]
        engine.end_load(self._requests[load.name], load)
        return engine

    def _compute(self, engine: Engine) -> None:
        until_s = min(self._events[0][0] if self._events else math.inf, self._loads.next_s)
        if (over_s := engine.begin_step(until_s)) is not None:
            self._at(over_s, partial(self._end_step, engine))

    def _end_step(self, engine: Engine) -> Engine:
        engine.end_step()
        return engine


def schedule(
    jobs: Sequence[Job], costs: Costs, policy: Policy, *, engines: int = 1, is_taught: bool = False
) -> list[Served]:
    """Serve requests; the outcome of each, in the order of `jobs`.

    Parameters
    ----------
    policy : `always` loads whatever is stored, `never` nothing, `controller` what it decides. Each engine has one.
    engines : how many; a request goes to the one with the fewest open requests.
    is_taught : controllers know the costs from the start; otherwise they learn them, as they do in an engine.

    Raises
    ------
    ValueError : no such policy, no engine, a tier without a cost, or a prompt that all chunks together exceed.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy is {policy!r}; expected one of {', '.join(POLICIES)}")
    if engines < 1:
        raise ValueError(f"engines is {engines}; expected at least 1")
    for job in jobs:
        chunks = sum(job.stored.values())
        if unknown := job.stored.keys() - costs.loads.keys():
            raise ValueError(f"chunks are stored in {', '.join(unknown)}; costs are of {', '.join(costs.loads)}")
        if chunks and chunks * costs.chunk_tokens >= job.tokens:
            raise ValueError(
                f"{chunks} chunks of {costs.chunk_tokens} are stored of a prompt of {job.tokens} tokens; expected "
                "fewer, as its last token is always computed"
            )
    return _Schedule(costs, policy, engines, is_taught=is_taught).run(jobs)


def teach(controller: Controller, costs: Costs) -> None:
    """Tell a controller what a machine takes, as if it had been observed."""
    for _ in range(4):
        for tier, cost in costs.loads.items():
            for chunks in _TAUGHT_CHUNKS:
                controller.observe_load(tier, chunks * costs.chunk_bytes, cost.seconds(chunks))
        for tokens, behind in _TAUGHT_TOKENS:
            seconds = costs.prefill.seconds(tokens, behind)
            controller.observe_prefill(tokens, behind + tokens / 2, seconds)
        controller.observe_turnaround(costs.call_s)
