"""Is the store as fast as the machine, and faster than what else there is? `kvloom bench tiers`.

Host and disk tiers beside plain copies and raw file access, verification, finding a prompt among a million chunks,
opening a directory again, and the stores that a person would use instead: all in one run, way by way in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...evaluation.page import Table
from ...evaluation.report import BenchResult, Metric, Target
from ...evaluation.screen import progress
from ..harness.page_cache import can_drop_page_cache, file_system
from ..harness.peer import INSTALL, PeerError, find_python
from ..harness.rounds import Comparison, size_text, speed_table, time_text
from . import disk_speed, host_speed, many_chunks, peer_speed
from .alternative_speed import alternative_speeds
from .alternatives import KVLOOM, LMDB, installed_stores
from .disk_speed import disk_speeds
from .host_speed import host_speeds
from .many_chunks import MatchTimes, ReopenTimes, match_times, reopen_times
from .peer_speed import peer_speeds
from .verification import COLD_VERIFY, WARM_VERIFY, overhead

KIB, MIB = 1 << 10, 1 << 20
WORST_FROM_BYTES = MIB  # below, a figure of the table; from here on, what the targets are about


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured. A round moves about `total_bytes` each way."""

    rounds: int
    host: tuple[int, ...]
    disk: tuple[int, ...]
    alternatives: tuple[int, ...]
    host_bytes: int
    disk_bytes: int
    stored: int
    prompt: int
    calls: int
    reopened: int


FULL = Sizes(
    rounds=10,
    host=(MIB, 4 * MIB, 16 * MIB, 32 * MIB),
    disk=(128 * KIB, MIB, 4 * MIB, 16 * MIB, 32 * MIB),
    alternatives=(128 * KIB, MIB, 16 * MIB),
    host_bytes=256 * MIB,
    disk_bytes=128 * MIB,
    stored=1_000_000,
    prompt=1000,
    calls=200,
    reopened=100_000,
)
QUICK = Sizes(
    rounds=2,
    host=(MIB,),
    disk=(MIB,),
    alternatives=(MIB,),
    host_bytes=4 * MIB,
    disk_bytes=2 * MIB,
    stored=2000,
    prompt=100,
    calls=5,
    reopened=200,
)


TARGETS = (
    Target("host_put_vs_copy", ">=", 0.80),
    Target("host_get_vs_copy", ">=", 0.80),
    Target("disk_put_vs_raw", ">=", 0.80),
    Target("disk_cold_get_vs_raw", ">=", 0.85),
    Target("verify_overhead", "<", 0.07),
    Target("match_1m_p99_s", "<", 1e-3),
    Target("reopen_100k_s", "<", 2.0),
    Target("worst_vs_alternatives", ">=", 1.0),
    Target("put_vs_lmcache_disk", ">=", 2.0),
    Target("get_vs_lmcache_disk", ">=", 2.0),
    Target("get_vs_lmcache_host", ">=", 2.0),
)
TITLE = "Is the store as fast as the machine, and faster than what else there is?"
MEANING = (
    "Medians over the rounds, in which the ways take turns; a share is the median of the ratios within each round. Of "
    "several sizes from 1 MiB on the worst counts. Put is compared with a copy into fresh memory, get with one into "
    "memory in use: the same page faults on both sides. verify_overhead is that of cold reads, which it is part of; "
    "verify_overhead_page_cache that of reads which no disk hides. LMCache is compared without syncs, its reads from "
    "the page cache."
)


def run(*, quick: bool = False, folder: Path = Path(), lmcache_python: Path | None = None) -> BenchResult:
    """Measure the store, the machine and the alternatives.

    Parameters
    ----------
    quick : smallest sizes, to see that it runs.
    folder : whose disk is measured. Up to 1 GiB is written there at a time and removed.
    lmcache_python : interpreter of an environment that has LMCache; None for that of `make engines`, if it is there.

    Raises
    ------
    ValueError : `lmcache_python` is not there.
    """
    python = find_python(lmcache_python)
    sizes = QUICK if quick else FULL
    notes = _notes(folder)
    with progress() as bar:
        whole = bar.add_task("kvloom bench tiers", total=6)

        def step(work: Callable[[], list[Comparison]]) -> list[Comparison]:
            found = work()
            bar.advance(whole)
            return found

        found = step(lambda: host_speeds(sizes.host, sizes.host_bytes, sizes.rounds, bar))
        found += step(lambda: disk_speeds(folder, sizes.disk, sizes.disk_bytes, sizes.rounds, bar))
        found += step(lambda: alternative_speeds(folder, sizes.alternatives, sizes.disk_bytes, sizes.rounds, bar))
        if python is None:
            notes.append(f"LMCache is not installed, its figures are left out. To have them: {INSTALL}")
        else:
            try:
                version, peers = peer_speeds(python, folder, sizes.alternatives, sizes.disk_bytes, sizes.rounds, bar)
                found += peers
                notes.append(f"LMCache {version}: local CPU and local disk backends, in a process of its own.")
            except PeerError as exc:
                notes.append(f"LMCache could not be measured, its figures are left out: {exc}")
        bar.advance(whole)
        match = match_times(sizes.stored, sizes.prompt, sizes.calls, sizes.rounds, bar)
        bar.advance(whole)
        reopen = reopen_times(folder, sizes.reopened, sizes.rounds, bar)
    metrics = figures(found, match, reopen)
    rows = [*(row for comparison in found for row in comparison.rows()), *match.rows(), *reopen.rows()]
    ahead = {name: metric.value for name, metric in _against_alternatives(found).items() if metric.value < 1}
    for name, value in sorted(ahead.items(), key=lambda item: item[1]):
        notes.append(f"Ahead of kvloom: {name} (kvloom reaches {value:.2f} of its speed)")
    tables = _tables(found, match, reopen)
    return BenchResult("tiers", metrics, rows, tables, targets=TARGETS, notes=[*notes, MEANING], title=TITLE)


def _notes(folder: Path) -> list[str]:
    kind = file_system(folder)
    if can_drop_page_cache(folder):
        notes = [f"Disk: {kind}; its page cache was emptied before every cold read."]
    else:
        notes = [f"Disk: {kind}, which keeps its pages in memory although asked to drop them: no read was cold."]
    if LMDB not in installed_stores():
        notes.append('LMDB is not installed and left out; run: pip install "kvloom[bench-peers]"')
    return notes


def figures(found: Sequence[Comparison], match: MatchTimes, reopen: ReopenTimes) -> dict[str, Metric]:
    """The tracked figures: of several sizes the worst counts."""
    shares = {
        "host_put_vs_copy": (host_speed.PUT, host_speed.STORE_PUT),
        "host_get_vs_copy": (host_speed.GET, host_speed.STORE_GET),
        "disk_put_vs_raw": (disk_speed.PUT, disk_speed.STORE_PUT),
        "disk_cold_get_vs_raw": (disk_speed.COLD_GET, disk_speed.STORE_GET),
        "put_vs_lmcache_disk": (peer_speed.DISK_PUT, peer_speed.KVLOOM),
        "get_vs_lmcache_disk": (peer_speed.DISK_GET, peer_speed.KVLOOM),
        "get_vs_lmcache_host": (peer_speed.HOST_GET, peer_speed.KVLOOM),
    }
    metrics = {}
    for name, (what, way) in shares.items():
        candidates = [c.share(way) for c in _large(found, what)]
        if candidates:
            metrics[name] = min(candidates, key=lambda metric: metric.value)
    for name, what in (("verify_overhead", COLD_VERIFY), ("verify_overhead_page_cache", WARM_VERIFY)):
        metrics[name] = max((overhead(c) for c in _large(found, what)), key=lambda metric: metric.value)
    metrics["worst_vs_alternatives"] = min(_against_alternatives(found).values(), key=lambda metric: metric.value)
    p99 = match.quantile(many_chunks.STORE_MATCH, 0.99)
    metrics["match_1m_p99_s"] = replace(p99, baseline=match.quantile(many_chunks.PLAIN_LOOKUP, 0.99).value)
    cold = reopen.metric(many_chunks.COLD_OPEN)
    metrics["reopen_100k_s"] = replace(cold, baseline=reopen.metric(many_chunks.COLD_LIST).value)
    return metrics


def _large(found: Sequence[Comparison], what: str) -> list[Comparison]:
    return [c for c in found if c.what == what and c.size_bytes >= WORST_FROM_BYTES]


def _against_alternatives(found: Sequence[Comparison]) -> dict[str, Metric]:
    """The speed of kvloom over that of every alternative, by what was compared."""
    return {
        f"{way}, {c.what}, {size_text(c.size_bytes)}": c.share(KVLOOM, of=way)
        for c in found
        if c.baseline == KVLOOM
        for way in c.seconds
        if way != KVLOOM
    }


def _tables(found: Sequence[Comparison], match: MatchTimes, reopen: ReopenTimes) -> list[Table]:
    by_what: dict[str, list[Comparison]] = {}
    for comparison in found:
        by_what.setdefault(comparison.what, []).append(comparison)
    calls = [(way, match.quantile(way, 0.5).value, match.quantile(way, 0.99).value) for way in match.rounds]
    openings = [(way, reopen.metric(way).value) for way in reopen.seconds]
    title = f"match of {match.prompt:,} chunks among {match.stored:,}"
    return [
        *map(speed_table, by_what.values()),
        _times_table(title, ("p50", "p99"), calls),
        _times_table(f"opening a directory of {reopen.stored:,} chunks", ("median",), openings),
    ]


def _times_table(title: str, heads: Sequence[str], rows: Sequence[tuple[str, *tuple[float, ...]]]) -> Table:
    return Table(["way", *heads], [[way, *map(time_text, seconds)] for way, *seconds in rows], title)
