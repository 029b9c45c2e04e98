"""Time to the first token of stored prompts, loaded always, never, and as kvloom decides: cell by cell, in turn."""

from __future__ import annotations

import random
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..vllm.engine import Engine, VLLMError
from ..vllm.inputs import Prompts
from ..vllm.server import Served

ALWAYS, NEVER, AUTO = "always load", "never load", "as decided"
WAYS = (ALWAYS, NEVER, AUTO)
QUESTION_TOKENS = 32  # behind what is stored, new in every request
BOUND = 1.05  # of the better fixed way


@dataclass(frozen=True, slots=True)
class Rounds:
    """How often a cell is measured: `least` times at least, and on until it took `seconds` in all, or `most` times."""

    least: int
    most: int
    seconds: float


@dataclass(slots=True)
class Cell:
    """One tier, length and number of requests at once.

    Attributes
    ----------
    tokens : stored of each prompt.
    first_s : by way, round by round, of every request.
    total_s : by way, round by round, of all requests together.
    decisions : how often each reason was given.
    """

    tier: str
    tokens: int
    requests: int
    first_s: dict[str, list[tuple[float, ...]]] = field(default_factory=lambda: {way: [] for way in WAYS})
    total_s: dict[str, list[float]] = field(default_factory=lambda: {way: [] for way in WAYS})
    decisions: Counter[str] = field(default_factory=Counter)

    def add(self, way: str, served: Served) -> None:
        """A round of one way."""
        self.first_s[way].append(served.first_s)
        self.total_s[way].append(served.seconds)
        if way == AUTO:
            self.decisions.update(served.decisions)

    def median_s(self, way: str) -> float:
        """Median over the rounds of the mean over the requests."""
        return statistics.median(statistics.fmean(each) for each in self.first_s[way])

    def is_done(self, rounds: Rounds) -> bool:
        """Whether it was measured often enough."""
        count = len(self.total_s[AUTO])
        spent_s = sum(sum(each) for each in self.total_s.values())
        return count >= rounds.most or (count >= rounds.least and spent_s >= rounds.seconds)

    @property
    def best_fixed(self) -> str:
        """The faster one of always and never."""
        return min((ALWAYS, NEVER), key=self.median_s)

    @property
    def ratio(self) -> float:
        """Time to the first token as decided over that of the better fixed way: median of the rounds' ratios."""
        best = self.first_s[self.best_fixed]
        pairs = zip(self.first_s[AUTO], best, strict=True)
        return statistics.median(statistics.fmean(own) / statistics.fmean(other) for own, other in pairs)

    def seconds(self, way: str) -> float:
        """Median seconds until all requests were answered."""
        return statistics.median(self.total_s[way])

    def row(self) -> dict[str, object]:
        """Plain values."""
        times = {f"{way} s": self.median_s(way) for way in WAYS} | {f"{way}, all, s": self.seconds(way) for way in WAYS}
        cell = {"tier": self.tier, "tokens": self.tokens, "requests": self.requests, "rounds": len(self.total_s[AUTO])}
        return {**cell, **times, "ratio": self.ratio, "decisions": dict(self.decisions)}


def p99_ratio(cells: Sequence[Cell]) -> float:
    """99th percentile of the time to the first token as decided, over that of computing, of all requests together."""

    def p99(way: str) -> float:
        return float(np.quantile([one for cell in cells for each in cell.first_s[way] for one in each], 0.99))

    return p99(AUTO) / p99(NEVER)


def throughput_ratio(cells: Sequence[Cell]) -> float:
    """Prompts a second as decided over those of the better of always and never, each for the whole sweep."""
    total = {way: sum(cell.seconds(way) for cell in cells) for way in WAYS}
    return min(total[ALWAYS], total[NEVER]) / total[AUTO]


class Sweep:
    """Measures cells on an engine of one tier that has all `texts` stored.

    One engine serves all ways: two processes of equal settings differ by up to 10 % in loads of 10 to 40 ms. What it
    decides by, and what it has learned from, is exchanged before it is asked to always load (`Engine.choose`).

    Parameters
    ----------
    engine : decides by cost.
    texts : prompts as they are stored; a cell takes their beginnings.
    prompts : of which questions are drawn.
    """

    def __init__(self, tier: str, engine: Engine, texts: Sequence[Sequence[int]], prompts: Prompts) -> None:
        self._tier, self._engine = tier, engine
        self._texts, self._prompts = texts, prompts
        self._draw = random.Random(0)

    def measure(
        self, lengths: Sequence[int], requests: Sequence[int], rounds: Rounds, done: Callable[[], object]
    ) -> list[Cell]:
        """Every cell, after one round of all that does not count, from which the engine learns.

        `done` is called when a cell was measured often enough.
        """
        cells = [Cell(self._tier, tokens, count) for tokens in lengths for count in requests]
        for number in range(rounds.most + 1):
            for cell in cells:
                if cell.is_done(rounds):
                    continue
                ways = list(WAYS)
                self._draw.shuffle(ways)
                for way in ways:
                    served = self.ask(way, cell.tokens, cell.requests)
                    if number:
                        cell.add(way, served)
                if cell.is_done(rounds):
                    done()
        return cells

    def ask(self, way: str, tokens: int, requests: int) -> Served:
        """Stored prompts of `tokens`, so many at once, each with another question."""
        self._engine.reset()
        asked = [[*text[:tokens], *self._prompts.ids(QUESTION_TOKENS)] for text in self._texts[:requests]]
        if way != ALWAYS:
            return self._engine.generate(asked, {"load": way != NEVER, "save": False})
        self._engine.choose("always")
        served = self._engine.generate(asked, {"save": False})
        self._engine.choose("auto")
        loaded = [sum((usage or {}).get("loaded_tokens", {}).values()) for usage in served.usage]
        if loaded != [tokens] * requests:
            raise VLLMError(f"{self._engine.name}: loaded {loaded} tokens; expected {tokens} of each request")
        return served
