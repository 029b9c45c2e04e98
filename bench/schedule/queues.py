"""Requests on their way through engines: what waits for loads, what waits to be computed, and when first tokens come.

An engine computes one prompt after the other, in the order in which they are ready, as engines do that fill each step
with the oldest prompts. It loads for a few requests at once while it computes others. A tier of other machines delivers
to all engines in turn. Time that engines spend on generating tokens is left out.

    served = schedule(jobs, costs, "controller", engines=2)
    [each.ttft_s for each in served]

Costs may be measured ones, of a real engine: then `schedule` predicts what that engine does with the same requests.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

from ...connectors.serving.controller.controller import Controller
from ...connectors.serving.controller.decisions import Queue, Reason, StoredPrefix, StoredRun
from .costs import Costs

Policy: TypeAlias = Literal["always", "never", "controller"]
POLICIES: tuple[Policy, ...] = get_args(Policy)
_TAUGHT_CHUNKS = (1, 8, 64)
_TAUGHT_TOKENS = ((256, 0), (4096, 0), (512, 16384))


@dataclass(frozen=True, slots=True)
class Job:
    """A request.

    Attributes
    ----------
    tokens : of its prompt.
    stored : leading chunks of it in each tier, the first ones' tier first.
    recompute_ratio : share of the loaded tokens that is computed all the same, by a fusion.
    """

    arrival_s: float
    tokens: int
    stored: Mapping[str, int] = field(default_factory=dict)
    recompute_ratio: float = 0.0


@dataclass(frozen=True, slots=True)
class Served:
    """What became of a request.

    Attributes
    ----------
    engine : number of the one that took it.
    chunks : that were loaded.
    reason : the controller's, "always" or "nothing stored".
    loaded_s : when they were there; the arrival if none were loaded.
    first_token_s : when its prompt was computed.
    computed_s : how long that took.
    """

    job: Job
    engine: int
    chunks: int
    reason: Reason
    loaded_s: float
    first_token_s: float
    computed_s: float

    @property
    def ttft_s(self) -> float:
        return self.first_token_s - self.job.arrival_s


@dataclass(slots=True)
class _Request:
    number: int
    job: Job
    engine: int
    prefix: StoredPrefix
    chunks: int = 0
    reason: Reason = "nothing stored"
    load_s: float = 0.0  # without waiting
    loaded_s: float = 0.0
    computed_s: float = 0.0
    first_token_s: float = 0.0

    @property
    def behind(self) -> int:
        return self.prefix.stop(self.chunks)

    @property
    def left(self) -> int:
        return self.job.tokens - self.behind


class _Engine:
    """What waits in an engine, with running sums: a trace may leave thousands of requests waiting."""

    def __init__(self, controller: Controller | None) -> None:
        self.controller = controller
        self.waiting: deque[_Request] = deque()  # loads that have not begun
        self.loading = 0
        self.computing = False
        self._ready: deque[_Request] = deque()
        self._load_bytes: Counter[str] = Counter()
        self._tokens, self._reached = 0, 0.0  # to be computed; and the sum of their positions

    @property
    def open_requests(self) -> int:
        return len(self.waiting) + self.loading + len(self._ready) + self.computing

    def take_load(self, request: _Request) -> None:
        self.waiting.append(request)
        self._load_bytes.update(request.prefix.bytes_of(request.chunks))

    def end_load(self, request: _Request) -> None:
        self._load_bytes.subtract(request.prefix.bytes_of(request.chunks))

    def take_prompt(self, request: _Request) -> None:
        self._ready.append(request)
        self._count(request, 1)

    def next_prompt(self) -> _Request | None:
        return None if self.computing or not self._ready else self._ready.popleft()

    def end_prompt(self, request: _Request) -> None:
        self._count(request, -1)

    def _count(self, request: _Request, sign: int) -> None:
        self._tokens += sign * request.left
        self._reached += sign * request.left * (request.behind + request.left / 2)

    def queue(self) -> Queue:
        """What is ahead of a request that comes now."""
        position = self._reached / self._tokens if self._tokens else 0.0
        return Queue(len(self.waiting) + self.loading, dict(self._load_bytes), self._tokens, position)


class _Schedule:
    def __init__(self, costs: Costs, policy: Policy, engines: int, *, is_taught: bool) -> None:
        self._costs, self._policy = costs, policy
        self.now_s = 0.0
        self._events: list[tuple[float, int, str, _Request]] = []
        self._count = 0
        self._shared_free_s: dict[str, float] = {}  # when a tier that engines share can be read again
        self._engines = [_Engine(self._controller(is_taught)) for _ in range(engines)]
        self.served: dict[int, Served] = {}

    def _controller(self, is_taught: bool) -> Controller | None:
        if self._policy != "controller":
            return None
        controller = Controller(lanes=self._costs.lanes, clock=lambda: self.now_s)
        if is_taught:
            teach(controller, self._costs)
        return controller

    def run(self, jobs: Sequence[Job]) -> None:
        for number, job in enumerate(jobs):
            runs = [
                StoredRun(tier, count, self._costs.chunk_bytes, self._costs.chunk_tokens)
                for tier, count in job.stored.items()
                if count
            ]
            prefix = StoredPrefix(runs, 0, 0, job.tokens)
            self._at(job.arrival_s, "arrival", _Request(number, job, 0, prefix))
        handlers = {"arrival": self._arrive, "loaded": self._loaded, "computed": self._computed}
        while self._events:
            self.now_s, _, what, request = heapq.heappop(self._events)
            handlers[what](request)

    def _at(self, when_s: float, what: str, request: _Request) -> None:
        heapq.heappush(self._events, (when_s, self._count, what, request))
        self._count += 1

    def _arrive(self, request: _Request) -> None:
        request.engine = min(
            range(len(self._engines)), key=lambda number: (self._engines[number].open_requests, number)
        )
        engine = self._engines[request.engine]
        request.loaded_s = self.now_s
        if self._policy == "always" and request.prefix.chunks:
            request.chunks, request.reason = request.prefix.chunks, "always"
        elif engine.controller is not None:
            decision = engine.controller.decide(request.prefix, engine.queue())
            engine.controller.begin(decision)
            request.chunks, request.reason = decision.chunks, decision.reason
        if request.chunks:
            engine.take_load(request)
            self._begin_loads(engine)
        else:
            engine.take_prompt(request)
            self._begin_computing(engine)

    def _begin_loads(self, engine: _Engine) -> None:
        while engine.waiting and engine.loading < self._costs.lanes:
            request = engine.waiting.popleft()
            if engine.controller is not None and request.loaded_s < self.now_s:  # it has waited
                queue = engine.queue()
                ahead = Queue(engine.loading, {}, queue.compute_tokens, queue.compute_position)
                if not engine.controller.pays_to_wait(_first(request.prefix, request.chunks), ahead):
                    engine.end_load(request)
                    request.chunks, request.reason, request.loaded_s = 0, "computes while waiting", self.now_s
                    engine.take_prompt(request)
                    self._begin_computing(engine)
                    continue
            chunks = _counts(request.prefix, request.chunks)
            over_s = self.now_s + self._costs.load_s(chunks)
            for tier, count in chunks.items():
                if shared_s := self._costs.loads[tier].shared_s:
                    free_s = max(self.now_s, self._shared_free_s.get(tier, 0.0)) + count * shared_s
                    self._shared_free_s[tier] = free_s
                    over_s = max(over_s, free_s)
            request.load_s = over_s - self.now_s
            engine.loading += 1
            self._at(over_s, "loaded", request)

    def _loaded(self, request: _Request) -> None:
        engine = self._engines[request.engine]
        engine.loading -= 1
        engine.end_load(request)
        request.loaded_s = self.now_s
        if engine.controller is not None:
            found = request.prefix.bytes_of(request.chunks)
            total = sum(
                self._costs.loads[tier].seconds(n) for tier, n in _counts(request.prefix, request.chunks).items()
            )
            for tier, nbytes in found.items():
                count = nbytes // self._costs.chunk_bytes
                share = self._costs.loads[tier].seconds(count) / total if total else 1.0
                spent_s = (request.load_s - self._costs.call_s) * share
                engine.controller.observe_load(tier, nbytes, spent_s)
            engine.controller.observe_turnaround(self._costs.call_s)
        engine.take_prompt(request)
        self._begin_computing(engine)
        self._begin_loads(engine)

    def _begin_computing(self, engine: _Engine) -> None:
        request = engine.next_prompt()
        if request is None:
            return
        engine.computing = True
        prefill, fused = self._costs.prefill, request.behind * request.job.recompute_ratio
        request.computed_s = prefill.seconds(request.left, request.behind) + prefill.scattered_s(fused, request.behind)
        self._at(self.now_s + request.computed_s, "computed", request)

    def _computed(self, request: _Request) -> None:
        engine = self._engines[request.engine]
        engine.computing = False
        engine.end_prompt(request)
        if engine.controller is not None and request.left > 0:
            position = request.behind + request.left / 2
            engine.controller.observe_prefill(request.left, position, request.computed_s)
        self.served[request.number] = Served(
            request.job,
            request.engine,
            request.chunks,
            request.reason,
            request.loaded_s,
            self.now_s,
            request.computed_s,
        )
        self._begin_computing(engine)


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
    run = _Schedule(costs, policy, engines, is_taught=is_taught)
    run.run(jobs)
    return [run.served[number] for number in range(len(jobs))]


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


def _counts(prefix: StoredPrefix, chunks: int) -> dict[str, int]:
    """Leading chunks by tier."""
    found: dict[str, int] = {}
    for run in prefix.runs:
        taken = min(chunks, run.chunks)
        if taken:
            found[run.tier] = found.get(run.tier, 0) + taken
        chunks -= taken
    return found


def _first(prefix: StoredPrefix, chunks: int) -> StoredPrefix:
    runs = []
    for run in prefix.runs:
        taken = min(chunks, run.chunks)
        if taken:
            runs.append(StoredRun(run.tier, taken, run.chunk_bytes, run.chunk_tokens))
        chunks -= taken
    return StoredPrefix(runs, prefix.start, prefix.computed, prefix.prompt_tokens)
