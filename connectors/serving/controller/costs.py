"""Costs learned from what was observed: seconds as a sum of non-negative terms. Imports neither torch nor an engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_MEMORY = 0.95  # weight of all observations so far, from one to the next: the last twenty or so count
_SURPRISE = 2.0  # two observations that are off by more than this factor, the same way, make older ones count for less
_SURPRISED_MASS = 2.0  # observations that those before a surprise count for, together
_MOST_SURPRISE = 10.0  # a stall counts for at most so many times what was expected; one right after it for its square
_LEAST_S = 1e-3  # differences below this are noise of clocks and threads
_SHRINKAGE = 1e-4  # of terms beside the main one, so that it takes what cannot be told apart
_FEWEST = 3  # observations before a cost counts as known: the first ones warm up


class LearnedCost:
    """Seconds of an operation as `sum(c[i] * x[i])`, with coefficients `c >= 0` learned by least squares.

    Newer observations count for more. Where observations cannot tell the terms apart (all loads had one size), the
    main term takes all. A change of speed is followed within a few observations: the second in a row that differs from
    what was expected by more than a factor of 2, the same way, takes a third of the weight. A single one may be a
    stall, or of a kind that the terms describe badly, and counts for ten times what was expected at most.

    Parameters
    ----------
    terms : how many there are.
    main : number of the main one.
    clock : monotonic seconds.
    memory : weight of all observations so far, from one to the next.

    Attributes
    ----------
    count : of all observations.
    """

    def __init__(self, terms: int, main: int, clock: Callable[[], float], *, memory: float = _MEMORY) -> None:
        self._terms, self._memory = terms, memory
        self._main = main
        self._clock = clock
        self._products = [[0.0] * terms for _ in range(terms)]  # decayed sums of x[i] * x[j], each over x[main]**2
        self._seconds = [0.0] * terms  # of x[i] * seconds, the same
        self._mass = 0.0  # of how many observations
        self._surprises = 0  # in a row, below 0 if they took less than expected
        self._coefficients: list[float] | None = [0.0] * terms  # None: to be solved for
        self._observed_s = float("-inf")  # when the last observation came
        self.count = 0

    @property
    def is_known(self) -> bool:
        """Whether there were observations enough to go by."""
        return self.count >= _FEWEST

    @property
    def age_s(self) -> float:
        """Seconds since the last observation; infinite before the first."""
        return self._clock() - self._observed_s

    def observe(self, x: Sequence[float], seconds: float) -> None:
        """Note that an operation of these terms took so many seconds. The main one is above 0."""
        memory = self._memory
        if self.is_known:
            expected_s = max(self.predict(x), _LEAST_S)
            seconds = min(seconds, _MOST_SURPRISE ** (max(self._surprises, 0) + 1) * expected_s)
            is_off = not expected_s / _SURPRISE <= seconds <= expected_s * _SURPRISE
            if is_off and abs(seconds - expected_s) > _LEAST_S:
                way = 1 if seconds > expected_s else -1
                self._surprises = self._surprises + way if self._surprises * way > 0 else way
                if abs(self._surprises) > 1:
                    memory = min(memory, _SURPRISED_MASS / self._mass)
            else:
                self._surprises = 0
        elif self.count:  # the first ones warm up: later ones are nearer the truth
            memory = 0.5
        weight = 1.0 / x[self._main] ** 2  # seconds a byte or a token are fitted: long operations drown no short ones
        for i in range(self._terms):
            self._seconds[i] = memory * self._seconds[i] + weight * x[i] * seconds
            for j in range(self._terms):
                self._products[i][j] = memory * self._products[i][j] + weight * x[i] * x[j]
        self._mass = memory * self._mass + 1.0
        self._coefficients = None
        self._observed_s = self._clock()
        self.count += 1

    def predict(self, x: Sequence[float]) -> float:
        """Seconds that an operation of these terms takes; 0 before the first observation."""
        return sum(c * value for c, value in zip(self.coefficients, x, strict=True))

    @property
    def coefficients(self) -> Sequence[float]:
        """Seconds of one unit of each term."""
        if self._coefficients is None:
            self._coefficients = self._solve()
        return self._coefficients

    def _solve(self) -> list[float]:
        """Least squares without negative coefficients: the most negative term is left out until there is none."""
        left = list(range(self._terms))
        while True:
            matrix = [[self._products[i][j] for j in left] for i in left]
            for row, i in enumerate(left):
                if i != self._main:
                    matrix[row][row] *= 1.0 + _SHRINKAGE
            solved = _solved(matrix, [self._seconds[i] for i in left])
            worst = min(range(len(left)), key=lambda row: solved[row], default=None)
            if worst is None or solved[worst] >= 0.0:
                break
            del left[worst]
        coefficients = [0.0] * self._terms
        for i, value in zip(left, solved, strict=True):
            coefficients[i] = value
        return coefficients


def _solved(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Solution of a small symmetric system; 0 for unknowns that nothing was observed of."""
    size = len(right)
    rows = [[*line, value] for line, value in zip(matrix, right, strict=True)]
    scales = [line[i] for i, line in enumerate(matrix)]
    kept = []
    for i in range(size):
        if scales[i] <= 0.0 or rows[i][i] <= 1e-9 * scales[i]:
            continue
        kept.append(i)
        for other in range(size):
            if other == i:
                continue
            factor = rows[other][i] / rows[i][i]
            rows[other] = [value - factor * pivot for value, pivot in zip(rows[other], rows[i], strict=True)]
    return [rows[i][size] / rows[i][i] if i in kept else 0.0 for i in range(size)]
