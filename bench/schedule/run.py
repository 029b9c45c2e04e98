"""Load or compute? `kvloom simulate TRACE --model ... --gpu ...` serves a trace's requests by each rule."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from ...evaluation.intervals import quantiles
from ...evaluation.page import Plot, Point, Row, Table
from ...evaluation.report import BenchResult, Metric
from ...evaluation.screen import progress
from ..eviction.replay import read_timed_trace, replay_tiers
from ..plan.predict import engines_needed, job_of
from ..plan.request import figure
from ..plan.run import PlanOptions, setup_of
from ..plan.setup import Setup
from ..plan.traffic import TRACE_BLOCK_TOKENS
from .jobs import POLICIES, Job, Policy, Served
from .queues import schedule

SPEEDS = (0.5, 1.0, 1.5, 2.0)
"""How many times as fast as in the trace requests come."""

_MOST_AT_ONCE = 2000  # requests, to see how many an engine serves in a second

MEANING = (
    "Requests arrive as in the trace. `always` loads whatever is stored, `never` nothing, `controller` decides as in "
    "the engine, and begins without knowing what loading and computing cost. Hits are those of the store with its "
    "default policy and all tiers. An engine works in steps of 2,048 tokens, prompts and answers together, and loads "
    "for a few requests beside. TTFT includes all queues. At most: requests a second if the first "
    "2,000 at most came at once."
)


def with_schedules(result: BenchResult, options: PlanOptions) -> BenchResult:
    """What `kvloom simulate` has found, and before it the times to first token of each rule.

    Parameters
    ----------
    options : of which model, machine, tiers, codecs and engines count; `traffic` names the trace.

    Raises
    ------
    ValueError : as `plan`.
    """
    requests = read_timed_trace(Path(options.traffic or ""))
    with progress() as bar:
        measuring = bar.add_task("measuring", total=None, logged=False)
        setup = setup_of(options)
        bar.remove_task(measuring)
        tables, plots, rows = list[Table](), list[Plot](), list[dict[str, object]]()
        metrics: dict[str, Metric] = {}
        for codec in setup.forms:
            task = bar.add_task(f"hits, {codec}", total=len(requests))
            blocks = -(-TRACE_BLOCK_TOKENS // setup.forms[codec].tokens)
            capacities = [t.capacity_bytes // setup.forms[codec].bytes_in(t.name, blocks) for t in setup.tiers]
            keys = [request.keys for request in requests]
            hits = replay_tiers(keys, capacities, options.policy, advance=partial(bar.advance, task))
            bar.remove_task(task)
            names = [tier.name for tier in setup.tiers]
            jobs = [
                job_of(request, dict(zip(names, found, strict=True)), blocks, setup.forms[codec].tokens)
                for request, found in zip(requests, hits, strict=True)
            ]
            task = bar.add_task(f"schedules, {codec}", total=len(SPEEDS) + 1)
            found = _Found(setup, codec, jobs, options.engines, partial(bar.advance, task))
            bar.remove_task(task)
            tables += found.tables()
            plots.append(found.plot())
            rows += found.rows()
            metrics |= found.metrics()
    return replace(
        result,
        metrics={**metrics, **result.metrics},
        rows=[*rows, *result.rows],
        tables=[*tables, *result.tables],
        plots=[*plots, *result.plots],
        notes=[MEANING, *result.notes],
    )


class _Found:
    """Schedules of one trace under one codec."""

    def __init__(
        self, setup: Setup, codec: str, jobs: Sequence[Job], engines: int | None, advance: partial[None]
    ) -> None:
        self._setup, self._codec, self._jobs = setup, codec, jobs
        costs = setup.costs(codec)
        self._duration_s = jobs[-1].arrival_s - jobs[0].arrival_s
        self._engines = engines or engines_needed(jobs, costs, self._duration_s, setup.assume.busy_ratio)
        self._served: dict[tuple[float, Policy], list[Served]] = {}
        for speed in SPEEDS:
            faster = [replace(job, arrival_s=job.arrival_s / speed) for job in jobs]
            for policy in POLICIES:
                self._served[speed, policy] = schedule(faster, costs, policy, engines=self._engines)
            advance()
        at_once = [replace(job, arrival_s=0.0) for job in jobs[:_MOST_AT_ONCE]]
        self._most = {
            policy: len(at_once) / max(each.done_s for each in schedule(at_once, costs, policy, engines=self._engines))
            for policy in POLICIES
        }
        advance()

    @property
    def _where(self) -> str:
        engines = "1 engine" if self._engines == 1 else f"{self._engines} engines"
        tiers = " + ".join(tier.name for tier in self._setup.tiers)
        return f"{self._setup.shape.name}, {engines} of {self._setup.machine.name}, {tiers}, {self._codec}"

    def tables(self) -> list[Table]:
        cells: list[Row] = []
        for policy in POLICIES:
            served = self._served[1.0, policy]
            times = quantiles([each.ttft_s for each in served], (0.5, 0.9, 0.99))
            mean_s = sum(each.ttft_s for each in served) / len(served)
            spent_s = max(each.first_token_s for each in served) - served[0].job.arrival_s
            tokens_s = sum(each.job.tokens for each in served) / spent_s
            loading = sum(each.chunks > 0 for each in served) / len(served)
            busy = sum(each.computed_s for each in served) / (self._engines * spent_s)
            shown = [figure(value) for value in (mean_s, *times)]
            cells.append(
                [policy, *shown, f"{loading:.0%}", f"{busy:.0%}", f"{tokens_s:,.0f}", f"{self._most[policy]:.3g}"]
            )
        heads = [
            "rule",
            "TTFT mean s",
            "p50",
            "p90",
            "p99",
            "load",
            "computing",
            "prompt tokens/s",
            "prompts/s at most",
        ]
        rate = len(self._jobs) / self._duration_s if self._duration_s else 0.0
        first = Table(heads, cells, f"load or compute: {self._where}, {rate:.3g} requests a second")
        second: list[Row] = []
        for speed in SPEEDS:
            times_of = [
                quantiles([each.ttft_s for each in self._served[speed, policy]], (0.5, 0.99)) for policy in POLICIES
            ]
            second.append([f"{speed:g}x", *(figure(value) for pair in times_of for value in pair)])
        heads = ["requests come", *(f"{policy} {name}" for policy in POLICIES for name in ("p50", "p99"))]
        reasons = Counter(each.reason for each in self._served[1.0, "controller"])
        third: list[Row] = [
            [reason, count, f"{count / len(self._jobs):.1%}"] for reason, count in reasons.most_common()
        ]
        return [
            first,
            Table(heads, second, "TTFT in seconds, as requests come more slowly or faster than in the trace"),
            Table(["reason", "requests", "share"], third, "why the controller loads, or does not"),
        ]

    def plot(self) -> Plot:
        shares = [i / 100 for i in (*range(1, 99, 3), 99)]
        series: dict[str, list[Point]] = {}
        for policy in POLICIES:
            times = quantiles([each.ttft_s for each in self._served[1.0, policy]], shares)
            series[policy] = [Point(100 * share, max(value, 1e-6)) for share, value in zip(shares, times, strict=True)]
        caption = f"Times to first token: {self._where}."
        return Plot("% of the requests", "TTFT s, that many or faster", series, caption, log_y=True)

    def rows(self) -> list[dict[str, object]]:
        found: list[dict[str, object]] = []
        for (speed, policy), served in self._served.items():
            p50, p90, p99 = quantiles([each.ttft_s for each in served], (0.5, 0.9, 0.99))
            row: dict[str, object] = {"subject": "schedule", "codec": self._codec, "rule": policy, "speed": speed}
            row |= {"engines": self._engines, "ttft_p50_s": p50, "ttft_p90_s": p90, "ttft_p99_s": p99}
            row |= {"ttft_mean_s": sum(each.ttft_s for each in served) / len(served)}
            row |= {"loading": sum(each.chunks > 0 for each in served) / len(served)}
            row |= {"prompts_s_at_most": self._most[policy]}
            found.append(row)
        return found

    def metrics(self) -> dict[str, Metric]:
        found = {}
        for name, share in (("p50", 0.5), ("p99", 0.99)):
            times = {p: quantiles([each.ttft_s for each in self._served[1.0, p]], (share,))[0] for p in POLICIES}
            best_s = min(times["always"], times["never"])
            found[f"ttft_{name}_s_controller_{self._codec}"] = Metric(times["controller"], unit="s", baseline=best_s)
        best = max(self._most["always"], self._most["never"])
        most = Metric(self._most["controller"], unit="prompts a second", baseline=best)
        return found | {f"prompts_s_at_most_controller_{self._codec}": most}
