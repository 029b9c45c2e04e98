"""Tables and the plot of what was measured at the 8B shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from ...evaluation.page import Plot, Point, Row, Table
from .decode_speed import PIECES
from .planted_speed import FAR, PlantedFound


def search_table(found: PlantedFound) -> Table:
    """Keys that searches compare, by size and index."""
    rows: list[Row] = []
    for search in found.searches:
        for way, scan in search["scan"].items():
            last = search["points"][way][-1]
            reached = f"{scan:.2%}" if scan is not None else f"> {last['scan_ratio']:.0%}, recall {last['recall']:.2f}"
            rows.append(
                [
                    f"{search['tokens']:,}",
                    search["asking"],
                    way,
                    reached,
                    f"{last['mass']:.3f}",
                    f"{1000 * last['search_s']:.2f}",
                    f"{search['build_s'][way]:.1f}",
                ]
            )
    heads = ["tokens", "queries", "index", "compared", "mass of 100", "ms a query", "build, s"]
    return Table(heads, rows, "SYNTHETIC, one KV head: keys compared for recall@100 of 0.95", left=(1, 2))


def real_search_table(rows: Sequence[Mapping[str, Any]], tokens: int) -> Table:
    """Keys that searches compare, for the queries and keys of the bundled model."""
    shown: list[Row] = []
    for way in ("graph", "ivf", "hnsw"):
        scans = [row[f"{way}_scan"] for row in rows]
        reached = sorted(scan for scan in scans if scan is not None)
        middle = f"{median(reached):.1%}" if reached else "-"
        worst = f"{reached[-1]:.1%}" if len(reached) == len(scans) else f"not reached in {len(scans) - len(reached)}"
        shown.append([way, middle, worst, f"{median(row[f'{way}_mass'] for row in rows):.3f}"])
    heads = ["index", "compared, median head", "worst head", "mass of 100"]
    return Table(heads, shown, f"the bundled model's own queries and keys, {tokens:,} tokens: recall@100 of 0.95")


def decode_table(found: PlantedFound) -> Table:
    """One decode step of one layer, by pieces."""
    rows: list[Row] = []
    for step in found.steps:
        ms = [f"{1000 * step.piece(piece).value:.2f}" for piece in PIECES]
        speed = step.speedup
        rows.append(
            [
                f"{step.tokens:,}",
                step.selector,
                f"{step.budget:,}",
                f"{step.mass:.3f}",
                f"{step.error_ratio:.3f}",
                *ms,
                f"{1000 * median(step.dense_s):.1f}",
                f"{speed.value:.1f} ({speed.low:.1f} {speed.high:.1f})",
                f"{step.build_s:.1f}",
            ]
        )
    pieces = ("select", "chosen", "ends", "merge")
    heads = ["tokens", "selector", "budget", "mass", "error", *pieces, "dense", "times faster", "build, s"]
    caption = "SYNTHETIC, one decode step of one layer beside the fastest dense, ms by pieces; 8 KV heads, 2 for graph"
    return Table(heads, rows, caption, left=(1,))


def key_bytes_table(found: PlantedFound) -> Table:
    """Keys that stay on the device."""
    rows: list[Row] = [
        [f"{bits}", index, *(f"{value / 2**20:.1f}" for value in (parts.rows, parts.basis, parts.index, parts.pinned)),
         f"{parts.dense / 2**20:.0f}", f"{parts.ratio:.2f}"]
        for (bits, index), parts in found.keys.items()
    ]  # fmt: skip
    heads = ["bits of a row", "chosen by", "rows", "basis", "index", "pinned", "all keys", "times smaller"]
    return Table(heads, rows, f"MiB of one layer's keys, 8B shape, {found.sizes.keys:,} tokens", left=(1,))


def search_plot(found: PlantedFound) -> Plot:
    """Recall against keys compared."""
    search = found.search(found.sizes.pair[0], FAR)
    series = {
        way: [Point(100 * point["scan_ratio"], point["recall"]) for point in points]
        for way, points in search["points"].items()
    }
    caption = f"SYNTHETIC, planted queries, {search['tokens']:,} tokens, one KV head"
    return Plot("keys compared, %", "recall@100", series, caption, log_x=True)
