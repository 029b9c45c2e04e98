"""Is the default eviction policy worth its complexity? `kvloom bench eviction` compares it on several kinds of traffic.

Each policy is asked as a store with one tier asks it. What it closes of the gap between LRU and a cache that knows the
future is averaged over instances of a family (`families.py`), so that no single trace decides.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import NamedTuple

from ...evaluation.intervals import paired_bootstrap, share_of_gap
from ...evaluation.page import Table
from ...evaluation.report import BenchResult, Metric, Target
from ...evaluation.screen import progress
from .families import CHOSEN_ON, FAMILIES, HELD_OUT, Trace, make_trace
from .policies import SIMULATED_POLICIES
from .replay import belady_matched, matched_by

BOUND = "belady"
CAPACITY_RATIOS = (0.02, 0.05, 0.10)
TITLE = "Which eviction policy holds on traffic that it was not made for?"
HOW_TO_READ = (
    "Gap closed: 0 is LRU, 1 is a cache that knows the future (`belady`, an upper bound: as many chunks as fit "
    "of the smallest). Means over instances, with 95 % intervals of a bootstrap over instances. Capacity is a share of "
    "the bytes of all different chunks. The traffic is drawn from published descriptions, not recorded; no figure "
    "depends on the machine."
)
WHO_IS_TUNED_ON_WHAT = (
    f"Policies may be tuned on {' and '.join(CHOSEN_ON)}; {', '.join(HELD_OUT)} are held out, and make "
    "`eviction_gap_closed_mean`. Beside a figure stands the best of the other policies there."
)


class Outcome(NamedTuple):
    """Hits of a policy on a trace: as a share of the chunks asked for, and of the seconds they take."""

    hit_ratio: float
    saved_ratio: float


@dataclass(slots=True)
class Found:
    """Outcomes by policy, of one family: of each capacity a list over instances."""

    outcomes: dict[str, dict[float, list[Outcome]]] = field(
        default_factory=lambda: {
            name: {ratio: [] for ratio in CAPACITY_RATIOS} for name in (*SIMULATED_POLICIES, BOUND)
        }
    )

    def gaps(self, policy: str, capacity_ratios: Iterable[float] = CAPACITY_RATIOS) -> list[float]:
        """What a policy closes of the gap: for each instance, the mean over capacities where there is a gap."""
        each = []
        for ratio in capacity_ratios:
            lru, bound, own = (self.outcomes[name][ratio] for name in ("lru", BOUND, policy))
            each.append(
                [share_of_gap(a.hit_ratio, b.hit_ratio, c.hit_ratio) for a, b, c in zip(lru, bound, own, strict=True)]
            )
        return [_mean(gaps) for gaps in zip(*each, strict=True)]


def run(*, quick: bool = False) -> BenchResult:
    """Replay instances of every family with every policy at every capacity."""
    instances, most_references = (2, 3000) if quick else (6, 40_000)
    found = {family: Found() for family in FAMILIES}
    rows: list[dict[str, object]] = []
    with progress() as bar:
        task = bar.add_task("traces", total=instances * len(FAMILIES))
        for family, instance in itertools.product(FAMILIES, range(instances)):
            trace = make_trace(family, instance, most_references=most_references)
            for capacity_ratio in CAPACITY_RATIOS:
                for name, outcome in _outcomes(trace, capacity_ratio).items():
                    found[family].outcomes[name][capacity_ratio].append(outcome)
                    row = {"family": family, "instance": instance, "capacity_ratio": capacity_ratio, "policy": name}
                    rows.append(row | outcome._asdict())
            bar.advance(task)
    targets = [Target("eviction_gap_closed_mean", ">=", 0.15), Target("eviction_least_gap_closed", ">=", 0.0)]
    tables = [_gap_table(found), _hit_table(found), _seconds_table(found)]
    return BenchResult(
        "eviction",
        _metrics(found),
        rows,
        tables,
        targets=targets,
        notes=[HOW_TO_READ, WHO_IS_TUNED_ON_WHAT],
        title=TITLE,
    )


def _outcomes(trace: Trace, capacity_ratio: float) -> dict[str, Outcome]:
    capacity_bytes = capacity_ratio * trace.footprint_bytes
    sizes = itertools.accumulate(sorted(cost.nbytes for cost in trace.costs.values()))
    room = sum(1 for _ in itertools.takewhile(lambda size: size <= capacity_bytes, sizes))
    matched = {name: matched_by(make(), trace, capacity_bytes) for name, make in SIMULATED_POLICIES.items()}
    matched[BOUND] = belady_matched(trace.chains, room)
    all_s = sum(trace.costs[key].recompute_s for chain in trace.chains for key in chain)
    found = {}
    for name, hits in matched.items():
        saved_s = sum(
            trace.costs[key].recompute_s for n, keys in zip(hits, trace.chains, strict=True) for key in keys[:n]
        )
        found[name] = Outcome(sum(hits) / trace.references, saved_s / all_s)
    return found


def _metrics(found: Mapping[str, Found]) -> dict[str, Metric]:
    least = min(
        _mean(each.gaps("default", [capacity_ratio]))
        for each, capacity_ratio in itertools.product(found.values(), CAPACITY_RATIOS)
    )
    held_out = [found[family] for family in HELD_OUT]
    metrics = {
        "eviction_gap_closed_mean": _gap_closed(held_out),
        "eviction_gap_closed_over_best_other": _lead(held_out),
        "eviction_least_gap_closed": Metric(least, unit="share", baseline="LRU is 0, belady is 1"),
        "eviction_gap_closed_chosen_on": _gap_closed([found[family] for family in CHOSEN_ON]),
    }
    return metrics | {f"eviction_gap_closed_{family}": _gap_closed([each]) for family, each in found.items()}


def _gap_closed(found: Sequence[Found]) -> Metric:
    """By the default, over families; beside the best of the others."""
    own, best = _own_and_best(found)
    value, low, high = paired_bootstrap(own, statistic=lambda gaps: float(gaps.mean()))
    return Metric(value, low, high, "share", fmean(best[1]))


def _lead(found: Sequence[Found]) -> Metric:
    """How much more the default closes than the best of the others, over families; beside its name."""
    own, best = _own_and_best(found)
    value, low, high = paired_bootstrap(own, best[1])
    return Metric(value, low, high, "share", best[0])


def _own_and_best(found: Sequence[Found]) -> tuple[list[float], tuple[str, list[float]]]:
    """What the default closes, for each instance, and the best of the others, with its name."""
    means = {
        name: [_mean(gaps) for gaps in zip(*(each.gaps(name) for each in found), strict=True)]
        for name in SIMULATED_POLICIES
    }
    own = means.pop("default")
    return own, max(means.items(), key=lambda item: fmean(item[1]))


def _gap_table(found: Mapping[str, Found]) -> Table:
    rows = []
    for family, each in found.items():
        for name in SIMULATED_POLICIES:
            if name != "lru":
                cells = [f"{_mean(each.gaps(name, [ratio])):.3f}" for ratio in CAPACITY_RATIOS]
                value, low, high = paired_bootstrap(each.gaps(name), statistic=lambda gaps: float(gaps.mean()))
                rows.append([family, name, *cells, f"{value:.3f}", f"{low:.3f} to {high:.3f}"])
                family = ""
    heads = [f"{100 * ratio:g} %" for ratio in CAPACITY_RATIOS]
    return Table(["family", "policy", *heads, "mean", "interval"], rows, "gap closed, by capacity", left=(0, 1))


def _hit_table(found: Mapping[str, Found]) -> Table:
    names = ("lru", "default", BOUND)
    rows = [
        [family]
        + [f"{fmean(o.hit_ratio for o in each.outcomes[n][ratio]):.3f}" for ratio in CAPACITY_RATIOS for n in names]
        for family, each in found.items()
    ]
    heads = [f"{name}, {100 * ratio:g} %" for ratio in CAPACITY_RATIOS for name in names]
    return Table(["family", *heads], rows, "chunks that are hits, as a share of those asked for")


def _seconds_table(found: Mapping[str, Found]) -> Table:
    names = (*SIMULATED_POLICIES, BOUND)
    rows = [
        [
            family,
            *(
                f"{fmean(o.saved_ratio for ratio in CAPACITY_RATIOS for o in each.outcomes[n][ratio]):.3f}"
                for n in names
            ),
        ]
        for family, each in found.items()
    ]
    return Table(["family", *names], rows, "seconds of computing that hits save, as a share; mean over capacities")


def _mean(values: Iterable[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return fmean(known) if known else math.nan
