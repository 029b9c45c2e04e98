"""What would a cache of this size have saved? `kvloom simulate` replays a recorded trace through the store.

A trace is JSON lines as Mooncake publishes them (FAST 2025): a request names its blocks of 512 tokens, each chained on
its prefix. A block is a hit if it and its whole prefix are stored when the request arrives; then the request reads its
hits and stores all its other blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ...evaluation.intervals import share_of_gap
from ...evaluation.page import Plot, Point, Table
from ...evaluation.report import BenchResult, Metric
from ...evaluation.screen import progress
from .policies import SIMULATED_POLICIES
from .replay import belady_hits, read_trace, replay

BLOCK_BYTES = 1 << 20  # what a block counts for without a codec; any figure gives the same hits
BOUND = "belady"
TITLE = "What would a cache of this size have saved?"
MEANING = (
    "Share of block references that are hits: the block and its whole prefix are stored when its request arrives. "
    "Capacity is a share of the bytes of all different blocks. 'belady' knows the future: after each request it keeps "
    "the blocks that are needed again soonest, of a chain its beginning first, and none that is not needed again."
)


@dataclass(frozen=True, slots=True)
class SimulateOptions:
    """The trace, and what it is replayed with.

    Attributes
    ----------
    trace : file of JSON lines with `timestamp` (ms), `input_length`, `output_length` (tokens) and `hash_ids`.
    capacity_ratios : capacities, as shares of the bytes of the trace's different blocks.
    codec_ratios : how many times smaller a codec makes a block.
    policies : names from `SIMULATED_POLICIES`; `lru` and `default` are always replayed.
    """

    trace: Path
    capacity_ratios: Sequence[float] = (0.02, 0.05, 0.10, 0.25)
    codec_ratios: Sequence[float] = (1.0,)
    policies: Sequence[str] = tuple(SIMULATED_POLICIES)

    def __post_init__(self) -> None:
        for ratio in self.capacity_ratios:
            if not 0 < ratio <= 1:
                raise ValueError(f"capacity is {100 * ratio:g}%; expected more than 0% and at most 100%")
        for ratio in self.codec_ratios:
            if not (math.isfinite(ratio) and ratio >= 1):
                raise ValueError(f"codec ratio is {ratio:g}; expected 1 (bytes as they are) or more")
        if not self.capacity_ratios or not self.codec_ratios:
            raise ValueError("no capacity or no codec ratio; expected at least one of each")
        for name in self.policies:
            if name not in SIMULATED_POLICIES:
                raise ValueError(f"policy is {name!r}; expected some of {', '.join(SIMULATED_POLICIES)}")


def simulate(options: SimulateOptions) -> BenchResult:
    """Replay the trace with every policy, capacity and codec ratio.

    Raises
    ------
    ValueError : the trace cannot be read as one.
    """
    requests = read_trace(options.trace)
    references = sum(map(len, requests))
    unique = len({key for request in requests for key in request})
    names = list(dict.fromkeys(["lru", *(name for name in options.policies if name != "default"), "default"]))
    rows: list[dict[str, object]] = []
    hit_ratios: dict[tuple[float, float, str], float] = {}
    with progress() as bar:
        whole = bar.add_task("all replays", total=len(options.codec_ratios) * len(options.capacity_ratios) * len(names))
        for codec_ratio in options.codec_ratios:
            block_bytes = max(1, round(BLOCK_BYTES / codec_ratio))
            for capacity_ratio in options.capacity_ratios:
                capacity_bytes = round(capacity_ratio * unique * BLOCK_BYTES)
                for name in (*names, BOUND):
                    if name == BOUND:
                        hits = belady_hits(requests, capacity_bytes // block_bytes)
                    else:
                        task = bar.add_task(f"{name}, {capacity_ratio:.4g}", total=len(requests))
                        hits = replay(requests, capacity_bytes, block_bytes, name, partial(bar.advance, task))
                        bar.remove_task(task)
                        bar.advance(whole)
                    hit_ratio = hits / references
                    hit_ratios[codec_ratio, capacity_ratio, name] = hit_ratio
                    row = {"policy": name, "capacity_ratio": capacity_ratio, "codec_ratio": codec_ratio}
                    rows.append({**row, "hit_ratio": hit_ratio})
    title = f"{options.trace.name}: {len(requests):,} requests, {references:,} references to {unique:,} blocks."
    tables = _tables(hit_ratios, [*names, BOUND], options)
    plot = _plot(hit_ratios, [*names, BOUND], options)
    return BenchResult("simulate", _metrics(hit_ratios), rows, tables, [plot], notes=[title, MEANING], title=TITLE)


def _metrics(hit_ratios: dict[tuple[float, float, str], float]) -> dict[str, Metric]:
    metrics = {}
    gaps = []
    for (codec_ratio, capacity_ratio, name), hit_ratio in hit_ratios.items():
        lru, bound = (hit_ratios[codec_ratio, capacity_ratio, other] for other in ("lru", BOUND))
        suffix = f"at_{capacity_ratio:g}" + (f"_codec_{codec_ratio:g}" if codec_ratio != 1 else "")
        metrics[f"hit_ratio_{name}_{suffix}"] = Metric(hit_ratio, unit="share of block references", baseline=lru)
        if name == "default":
            gaps.append(share_of_gap(lru, bound, hit_ratio))
            metrics[f"gap_closed_{suffix}"] = Metric(gaps[-1], unit="share", baseline="LRU is 0, belady is 1")
    known = [gap for gap in gaps if math.isfinite(gap)]
    mean = sum(known) / len(known) if known else math.nan
    return metrics | {"gap_closed_mean": Metric(mean, unit="share", baseline="LRU is 0, belady is 1")}


def _tables(
    hit_ratios: dict[tuple[float, float, str], float], names: Sequence[str], options: SimulateOptions
) -> list[Table]:
    tables = []
    for codec_ratio in options.codec_ratios:
        found = {name: [hit_ratios[codec_ratio, c, name] for c in options.capacity_ratios] for name in names}
        rows = [[name, *(f"{ratio:.4f}" for ratio in ratios)] for name, ratios in found.items()]
        gaps = map(share_of_gap, found["lru"], found[BOUND], found["default"])
        rows.append(["gap closed by default", *(f"{gap:.4f}" if math.isfinite(gap) else "-" for gap in gaps)])
        heads = [f"{capacity_ratio * 100:g} %" for capacity_ratio in options.capacity_ratios]
        tables.append(Table(["policy", *heads], rows, f"hit ratio by capacity, codec ratio {codec_ratio:g}"))
    return tables


def _plot(hit_ratios: dict[tuple[float, float, str], float], names: Sequence[str], options: SimulateOptions) -> Plot:
    series = {
        name if len(options.codec_ratios) == 1 else f"{name}, codec {codec_ratio:g}": [
            Point(100 * c, hit_ratios[codec_ratio, c, name]) for c in sorted(options.capacity_ratios)
        ]
        for codec_ratio in options.codec_ratios
        for name in names
    }
    return Plot("capacity, % of the different blocks", "hit ratio", series, MEANING, log_x=True)
