"""One engine of a schedule: it computes in steps, and asks the connector's own half what to load."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...connectors.serving.controller.controller import Controller
from ...connectors.serving.controller.decisions import Reason
from ...connectors.serving.messages import Loaded
from ...connectors.serving.scheduler.load_control import LoadControl
from ...connectors.serving.scheduler.prefill_rate import is_prefill_step
from ...connectors.serving.settings import ServingSettings
from .costs import Costs
from .jobs import Job, Policy, Served
from .loads import Load, Loads


@dataclass(slots=True)
class Request:
    """A job on its way.

    Attributes
    ----------
    done : tokens whose KV the engine has.
    generated : tokens of the answer.
    """

    number: int
    job: Job
    engine: int = 0
    chunks: int = 0
    reason: Reason = "nothing stored"
    done: int = 0
    generated: int = 0
    loaded_s: float = 0.0
    first_token_s: float = 0.0
    done_s: float = 0.0
    computed_s: float = 0.0

    @property
    def name(self) -> str:
        """For the connector's half."""
        return str(self.number)

    @property
    def tokens(self) -> int:
        """That it needs memory for in the end."""
        return self.job.tokens + self.job.output_tokens

    def served(self) -> Served:
        """What became of it."""
        return Served(
            self.job,
            self.engine,
            self.chunks,
            self.reason,
            self.loaded_s,
            self.first_token_s,
            self.computed_s,
            self.done_s,
        )


class Engine:
    """An engine with its connector.

    Parameters
    ----------
    policy : see `schedule`.
    loads : of all engines.
    clock : of the simulation, in seconds.
    teach : tells a controller what the machine takes; None if it is to learn it.
    """

    def __init__(
        self,
        number: int,
        costs: Costs,
        policy: Policy,
        loads: Loads,
        clock: Callable[[], float],
        teach: Callable[[Controller], None] | None,
    ) -> None:
        self.number, self._costs, self._policy, self._loads, self._clock = number, costs, policy, loads, clock
        self._control: LoadControl | None = None
        if policy == "controller":
            settings = ServingSettings(chunk_tokens=costs.chunk_tokens)
            token_bytes = max(1, costs.chunk_bytes // costs.chunk_tokens)
            self._control = LoadControl(settings, token_bytes, list(costs.loads), clock=clock)
            if teach is not None:
                teach(self._control._controller)  # noqa: SLF001  nobody else tells it what was not observed
        self._waiting: deque[Request] = deque()  # not looked at yet
        self._loading: dict[int, Request] = {}
        self._loaded: deque[Request] = deque()  # or given back
        self._running: list[Request] = []
        self._held_tokens = 0
        self._to_probe: set[str] = set()  # tiers in which something was found
        self._step: list[tuple[Request, int]] = []  # under way, with the tokens that it computes of each
        self._steps = 0  # that are taken at once: of answers alone
        self._begun_s = 0.0

    @property
    def open_requests(self) -> int:
        """That are not through."""
        return len(self._waiting) + len(self._loading) + len(self._loaded) + len(self._running)

    @property
    def is_computing(self) -> bool:
        """Whether a step is under way."""
        return bool(self._step)

    def take(self, request: Request) -> None:
        """A request arrives."""
        request.engine, request.loaded_s = self.number, self._clock()
        self._waiting.append(request)

    def end_load(self, request: Request, load: Load) -> None:
        """A load is over, and the engine knows."""
        del self._loading[request.number]
        request.loaded_s = self._clock()
        size = self._costs.chunk_tokens
        request.done = min(request.chunks * size, request.job.tokens - 1)
        if self._control is not None:
            tokens = {tier: count * size for tier, count in load.chunks.items()}
            spent_s = self._clock() - self._costs.call_s - load.begun_s
            self._control.end(request.name, Loaded(tokens, False, spent_s, read_s=load.read_s))
        self._loaded.append(request)

    # --------------------------------------------------------------------------------------------------- steps

    def begin_step(self, until_s: float) -> float | None:
        """Begin the next step, or several that only continue answers; when it ends; None if there is nothing to do.

        Parameters
        ----------
        until_s : when something else may happen, at the earliest: several steps go no farther.
        """
        step = self._plan()
        if not step and self._loaded:  # what was given back while there was nothing else to do
            step = self._plan()
        if not step:
            return None
        self._step, self._begun_s = step, self._clock()
        seconds = self._step_s(0)
        self._steps = 1
        if all(request.generated for request, _ in step) and len(step) == len(self._running):
            seconds = self._several(seconds, until_s - self._begun_s)
        return self._begun_s + seconds

    def _plan(self) -> list[tuple[Request, int]]:
        """Requests of the next step, with the tokens that it computes of each."""
        left, step = self._costs.step_tokens, list[tuple[Request, int]]()
        for request in self._running:
            if not left:
                break
            left -= self._add(step, request, left)
        while left and len(self._running) < self._costs.most_running:
            if (found := self._next()) is None:
                break
            self._running.append(found)
            left -= self._add(step, found, left)
        self._tell(step)
        return step

    def _add(self, step: list[tuple[Request, int]], request: Request, left: int) -> int:
        count = min(max(request.job.tokens - request.done, 1), left)
        step.append((request, count))
        return count

    def _step_s(self, later: int) -> float:
        """Seconds of the step; of one so many steps later, if answers go on."""
        prefill = self._costs.prefill
        seconds = prefill.step_s([(count, request.done + later) for request, count in self._step])
        for request, _ in self._step:
            if request.job.recompute_ratio and not request.generated and request.done == self._stop(request):
                seconds += prefill.scattered_s(request.done * request.job.recompute_ratio, request.done)
        return seconds

    def _stop(self, request: Request) -> int:
        return request.chunks * self._costs.chunk_tokens

    def _several(self, first_s: float, room_s: float) -> float:
        """Seconds of as many steps as fit until something happens or an answer is complete, and one more at most."""
        most = min(request.job.output_tokens - request.generated for request, _ in self._step)
        if most > 1:
            growth_s = (self._step_s(most - 1) - first_s) / (most - 1)
            low, high = 1, most
            while low < high:
                middle = (low + high) // 2
                is_past = middle * first_s + growth_s * middle * (middle - 1) / 2 >= room_s
                low, high = (low, middle) if is_past else (middle + 1, high)
            self._steps = low
            return low * first_s + growth_s * low * (low - 1) / 2
        return first_s

    def end_step(self) -> None:
        """The step is over."""
        now_s, step = self._clock(), self._step
        self._step = []
        if self._control is not None and is_prefill_step({each.name: count for each, count in step}):
            total = sum(count for _, count in step)
            position = sum(count * (each.done + count / 2) for each, count in step) / total
            self._control.observe_prefill(total, position, now_s - self._begun_s)
        for request, count in step:
            request.done += count if not request.generated else self._steps
            if request.done < request.job.tokens:
                continue
            if not request.generated:
                request.first_token_s = now_s
                request.generated = 1
            else:
                request.generated += self._steps
            if request.generated >= request.job.output_tokens:
                self._end(request)

    def _end(self, request: Request) -> None:
        request.done_s = self._clock()
        self._running.remove(request)
        self._held_tokens -= request.tokens
        if self._control is not None:
            self._control.forget(request.name)

    # ------------------------------------------------------------------------------------------------ requests

    def _next(self) -> Request | None:
        """The next request that can be computed. Those that are looked at before it and are to load begin to."""
        if self._loaded:
            return self._loaded.popleft()
        while self._waiting:
            request = self._waiting[0]
            if self._held_tokens and self._held_tokens + request.tokens > self._costs.kv_tokens:
                return None
            self._waiting.popleft()
            self._held_tokens += request.tokens
            self._decide(request)
            left = request.job.tokens - self._stop(request)
            request.computed_s = self._computed_s(request, left)
            if not request.chunks:
                return request
            self._loading[request.number] = request
            self._loads.add(Load(request.number, self.number, request.job.leading(request.chunks), self._clock()))
        return None

    def _computed_s(self, request: Request, left: int) -> float:
        prefill, behind = self._costs.prefill, self._stop(request)
        fused = behind * request.job.recompute_ratio
        return prefill.seconds(left, behind) + prefill.scattered_s(fused, behind)

    def _decide(self, request: Request) -> None:
        stored = [tier for tier, count in request.job.stored.items() for _ in range(count)]
        if self._policy == "always" and stored:
            request.chunks, request.reason = len(stored), "always"
        if self._control is None:
            return
        tokens = request.job.tokens
        request.chunks = self._control.decide(request.name, stored, 0, 0, tokens)
        computed = request.chunks * self._costs.chunk_tokens
        decision = self._control.take_on(request.name, tokens, computed, loads=request.chunks > 0)
        if decision is not None:
            request.reason = decision.reason
        self._to_probe |= set(stored)

    def _probe(self, control: LoadControl) -> None:
        """Chunks of tiers that requests leave alone, or that nobody knows, are read beside steps; here at once."""
        controller, nbytes = control._controller, self._costs.chunk_bytes  # noqa: SLF001  as above
        for tier in sorted(self._to_probe):
            while controller.is_probe_due(tier, nbytes):
                controller.begin_probe(tier)
                controller.observe_load(tier, nbytes, self._costs.loads[tier].seconds(1))
        self._to_probe.clear()

    def _tell(self, step: Sequence[tuple[Request, int]]) -> None:
        """The connector learns of a step that is planned. It gives back loads that wait and do not pay any more: these
        requests are computed from the next step on.
        """
        if self._control is None:
            return
        for request, count in step:
            self._control.computed(request.name, request.done + count)
        if not self._loading:
            self._probe(self._control)
        for name in self._control.given_back():
            number = int(name)
            if number not in self._loading or not self._loads.withdraw(number, self.number):
                continue
            request = self._loading.pop(number)
            decision = self._control.end(name, Loaded({}, True, 0.0, given_back=True))
            request.chunks, request.loaded_s = 0, self._clock()
            request.reason = "computes while waiting" if decision is None else decision.reason
            request.computed_s = self._computed_s(request, request.job.tokens)
            self._loaded.append(request)
