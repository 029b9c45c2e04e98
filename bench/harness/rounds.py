"""Ways of doing the same thing, timed in turn, so that a busy moment of the machine meets them alike."""

from __future__ import annotations

import ctypes
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from rich.progress import Progress

from ...evaluation.page import Table
from ...evaluation.report import Metric


@dataclass(frozen=True, slots=True)
class Comparison:
    """Ways of moving the same bytes, round by round.

    Attributes
    ----------
    what : what was done.
    size_bytes : of one chunk.
    chunks : how many of them each way moved in a round.
    baseline : the way that the others are compared with.
    seconds : of every way, one figure for each round; the same place is the same round.
    references : ways that move no bytes but hand out memory that is there; they have a time and no speed.
    """

    what: str
    size_bytes: int
    chunks: int
    baseline: str
    seconds: Mapping[str, Sequence[float]]
    references: frozenset[str] = field(default=frozenset())

    def speed(self, way: str) -> Metric:
        """GB/s of a way."""
        total_bytes = self.size_bytes * self.chunks
        return Metric.of_samples([total_bytes / spent / 1e9 for spent in self.seconds[way]], unit="GB/s")

    def share(self, way: str, of: str | None = None) -> Metric:
        """Speed of a way over that of another, by default the baseline: the median of the ratios within each round."""
        of = self.baseline if of is None else of
        pairs = zip(self.seconds[of], self.seconds[way], strict=True)
        return Metric.of_samples([other / own for other, own in pairs], unit="times", baseline=of)

    def rows(self) -> list[dict[str, object]]:
        """Returns one row of plain values for each way."""
        return [self._row(way) for way in self.seconds]

    def _row(self, way: str) -> dict[str, object]:
        per_chunk = Metric.of_samples([spent / self.chunks for spent in self.seconds[way]], unit="s")
        row: dict[str, object] = {"what": self.what, "size_bytes": self.size_bytes, "alternative": way}
        row |= {"chunk_s": per_chunk.value, "chunk_s_p10": per_chunk.low, "chunk_s_p90": per_chunk.high}
        row["rounds"] = len(self.seconds[way])
        if way not in self.references:
            speed, share = self.speed(way), self.share(way)
            row |= {"gb_s": speed.value, "gb_s_p10": speed.low, "gb_s_p90": speed.high}
            row |= {"baseline": self.baseline, "share": share.value, "share_p10": share.low, "share_p90": share.high}
        return row


def interleave(
    ways: Mapping[str, Callable[[], float]], rounds: int, bar: Progress, title: str
) -> dict[str, list[float]]:
    """Seconds of every way, round by round.

    A round that does not count comes first. Every round has another order, drawn by lot and always the same: what a way
    leaves behind (caches, free memory, dirty pages) falls to all of them.

    Parameters
    ----------
    ways : each does its work once, with whatever preparation it needs, and returns the seconds that count.
    """
    task = bar.add_task(title, total=rounds + 1)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    draw = random.Random(0)
    for number in range(rounds + 1):
        for name in draw.sample(list(ways), len(ways)):
            spent = ways[name]()
            if number:
                seconds[name].append(spent)
        bar.advance(task)
    bar.remove_task(task)
    return seconds


def timed(work: Callable[[], object]) -> float:
    """Seconds that `work` takes. Its result is freed after the clock has stopped."""
    start = time.perf_counter()
    result = work()
    spent = time.perf_counter() - start
    del result
    return spent


def exhaust(items: Iterable[object]) -> None:
    """Consume an iterable and keep nothing of it."""
    for _ in items:
        pass


def return_free_memory() -> None:
    """Return free memory of the C library to the system, so that the next allocation gets fresh pages in every way."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, others keep little
    if trim is not None:
        trim(0)


def speed_table(comparisons: Sequence[Comparison]) -> Table:
    """Comparisons of one kind as a table, size by size."""
    first, rows = comparisons[0], []
    for comparison in comparisons:
        for i, way in enumerate(comparison.seconds):
            size = size_text(comparison.size_bytes) if not i else ""
            chunk_s = Metric.of_samples(comparison.seconds[way], unit="s").value / comparison.chunks
            if way in comparison.references:
                rows.append([size, way, time_text(chunk_s), "-", "", "-", ""])
                continue
            speed, share = comparison.speed(way), comparison.share(way)
            shares = [f"{share.value:.2f}", "" if way == comparison.baseline else _interval(share)]
            rows.append([size, way, time_text(chunk_s), f"{speed.value:.2f}", _interval(speed), *shares])
    heads = ["chunk", "way", "a chunk", "GB/s", "p10 to p90", f"x {first.baseline}", "p10 to p90"]
    return Table(heads, rows, first.what, left=(1,))


def _interval(metric: Metric) -> str:
    return "" if metric.low is None or metric.high is None else f"{metric.low:.2f} to {metric.high:.2f}"


def size_text(nbytes: int) -> str:
    """`"128 KiB"`, `"16 MiB"`."""
    return f"{nbytes >> 20} MiB" if nbytes >= 1 << 20 else f"{nbytes >> 10} KiB"


def time_text(seconds: float) -> str:
    """Formats a duration with three digits: `"1.23 ms"`."""
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"
