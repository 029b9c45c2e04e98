"""Loads under way in engines: a few threads in each, which share the machine's speed and that of tiers."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from ...connectors.serving.messages import LOADERS
from .costs import Costs

_NOTHING_S = 1e-9  # of rounding, in seconds of a week


@dataclass(slots=True)
class Load:
    """Chunks that a request loads, tier by tier.

    Attributes
    ----------
    name : of the request.
    engine : its number.
    chunks : by tier.
    begun_s : when it was handed to the engine's threads.
    read_s : seconds spent on each tier, divided by the loads of the engine then, as workers report them.
    """

    name: int
    engine: int
    chunks: Mapping[str, int]
    begun_s: float
    read_s: dict[str, float] = field(default_factory=dict)
    stages: deque[tuple[str, float]] = field(default_factory=deque)  # tier, and seconds that are left at full speed


class Loads:
    """All loads. Those of one engine begin in their order, at most `LOADERS` at once, and share what there is.

    Parameters
    ----------
    costs : of which `lanes` and `LoadCost.shared_s` say how much loads slow one another.
    """

    def __init__(self, costs: Costs) -> None:
        self._costs = costs
        self._running: list[Load] = []
        self._waiting: dict[int, deque[Load]] = {}  # by engine
        self._count: Counter[int] = Counter()  # running, by engine
        self._now_s = 0.0
        self._speeds: list[float] = []

    def add(self, load: Load) -> None:
        """A load that begins as soon as a thread is free."""
        for tier, count in load.chunks.items():
            load.stages.append((tier, self._costs.loads[tier].seconds(count)))
        self._waiting.setdefault(load.engine, deque()).append(load)
        self._begin(load.engine)

    def withdraw(self, name: int, engine: int) -> bool:
        """Forget a load that has not begun; whether it is one."""
        waiting = self._waiting.get(engine, deque())
        for load in waiting:
            if load.name == name:
                waiting.remove(load)
                return True
        return False

    def advance(self, now_s: float) -> list[Load]:
        """Let time pass; the loads that have ended by then."""
        spent_s, self._now_s = now_s - self._now_s, now_s
        ended = []
        for load, speed in zip(self._running, self._speeds, strict=True):
            tier, left_s = load.stages[0]
            load.read_s[tier] = load.read_s.get(tier, 0.0) + spent_s / self._count[load.engine]
            left_s -= speed * spent_s
            if left_s > _NOTHING_S:
                load.stages[0] = (tier, left_s)
                continue
            load.stages.popleft()
            if not load.stages:
                ended.append(load)
        self._running = [load for load in self._running if load.stages]
        for load in ended:
            self._count[load.engine] -= 1
        for load in ended:
            self._begin(load.engine)
        self._share()
        return ended

    @property
    def next_s(self) -> float:
        """When something happens, if nothing is added before; infinite if nothing is under way."""
        ends = (load.stages[0][1] / speed for load, speed in zip(self._running, self._speeds, strict=True))
        return self._now_s + min(ends, default=math.inf)

    def _begin(self, engine: int) -> None:
        waiting = self._waiting.get(engine, deque())
        while waiting and self._count[engine] < LOADERS:
            self._running.append(waiting.popleft())
            self._count[engine] += 1
        self._share()

    def _share(self) -> None:
        """Speed of each load: 1 alone."""
        use: dict[str, float] = {}
        for load in self._running:
            tier = load.stages[0][0]
            cost = self._costs.loads[tier]
            use[tier] = use.get(tier, 0.0) + (cost.shared_s / cost.chunk_s if cost.shared_s else 0.0)
        self._speeds = [
            min(1.0, self._costs.lanes / self._count[load.engine], 1.0 / max(use[load.stages[0][0]], 1e-9))
            for load in self._running
        ]
