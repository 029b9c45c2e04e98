"""The bundled model's part of `kvloom bench blend`: every method side by side on the tasks that it was trained for."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ...blend.method import FusionMethod
from ...connectors.hf.connector import TransformersConnector
from ...evaluation.fused_answers import FULL, HOST_BYTES, NAIVE, PREFIX, Method, Score, blend, own, score
from ...evaluation.intervals import Floats, paired_bootstrap, share_of_gap
from ...evaluation.models import load_model, token_counter
from ...evaluation.page import Row, Table
from ...evaluation.report import BenchResult, Metric, Target, figures_table
from ...evaluation.screen import progress
from ...evaluation.workload import task_cases
from ...kvstore.store import KVStore
from ...kvstore.tiers.disk.tier import DiskTier
from ...kvstore.tiers.host import HostTier
from ..demo.run import METHODS
from ..harness.page_cache import drop_page_cache

RATIOS = (0.01, 0.02, 0.05, 0.15)
NUM_DOCUMENTS = 8
CONTEXT_TOKENS = 4480  # documents end at sentences, somewhat short of it, but above 4,096 together
QUESTION = Method("question 5%", blender=FusionMethod(0.05, "question").blender)
_RECORDS, _ALIASES = 0.62, 0.2  # of the time; what is left is for lengths and the disk
TARGETS = (
    Target("tokens_identical_at_1", ">=", 1.0),
    Target("gap_closed_at_0.05", ">=", 0.95),
    Target("alias_gap_closed_at_0.05", ">=", 0.9),
    Target("ttft_speedup_at_0.15_host_4k", ">=", 2.0),
)
TITLE = "Does fusing cached documents answer as full prefill does, and how much sooner?"
MEANING = (
    "TTFT: time to first token, from the request's tokens to the answer's first, median. Speed-up: full prefill's time "
    "over it, question by question. Computed: tokens that ran through a layer, mean over layers. Exact: answered word "
    "for word. Gap closed: share of the gap between naive reuse and full prefill, 95 % interval. KL: of the next-token "
    "distribution to full prefill's. CacheBlend: as published. kvloom: its default method, at the share of tokens "
    "in the name. The bundled model's figures do not carry over to other models: give one with --model."
)


def measure_bundled(*, quick: bool, device: str | None, stop_s: float = math.inf) -> BenchResult:
    """Exact match and times on the tasks that the bundled model was trained for.

    Parameters
    ----------
    stop_s : of the monotonic clock; about then all ends, with fewer tasks if need be.
    """
    tasks, alias_tasks, timed = (3, 2, 2) if quick else (200, 100, 12)
    context = 512 if quick else CONTEXT_TOKENS
    lengths = (256, 512) if quick else (1120, 2240, 4480, 8960)
    model, tokenizer = load_model(None, device=device)
    context = min(context, model.config.max_position_embeddings - 128)
    count_tokens = token_counter(tokenizer)
    began_s = time.monotonic()
    metrics: dict[str, Metric] = {}
    rows: list[dict[str, object]] = []
    tables: list[Table] = []
    notes = [MEANING]

    def add(title: str, scores: Sequence[Score]) -> None:
        cells: list[Row] = []
        for s in scores:
            row, gap = s.summary(scores[0]), gap_closed(scores, s)
            rows.append({"table": title} | asdict(row) | {"gap_closed": asdict(gap)})
            exact = [f"{share:.1%}" for share in row.exact_match.values()]
            times = [f"{row.ttft_s * 1e3:.0f}", f"{row.speedup:.2f}x", f"{row.computed_tokens:,.0f}"]
            cells.append([row.method, *times, *exact, _with_interval(gap), f"{row.kl:.4f}"])
        title = f"{title}, {len(scores[0].outcomes)} tasks"
        tables.append(
            Table(["method", "TTFT ms", "speed-up", "computed", "exact", "gap closed", "KL nats"], cells, title)
        )

    with tempfile.TemporaryDirectory(prefix="kvloom-bench-") as folder, progress() as bar:
        store_dir = Path(folder) / "store"
        with KVStore([HostTier(HOST_BYTES), DiskTier(store_dir)]) as store:
            connector = TransformersConnector(model, tokenizer, store)

            def measure(
                kind: str, count: int, tokens: int, methods: Sequence[Method], seed: int, until: float = math.inf
            ) -> list[Score]:
                cases = task_cases(
                    None,
                    count_tokens,
                    kind=kind,
                    count=count,
                    context_tokens=tokens,
                    num_documents=NUM_DOCUMENTS,
                    seed=seed,
                )
                task = bar.add_task(f"{kind}, {tokens:,} tokens", total=count)
                scores = score(
                    connector,
                    cases,
                    methods,
                    before_case=lambda case: connector.precompute(case.documents),
                    advance=lambda: bar.advance(task),
                    stop_s=until,
                )
                bar.remove_task(task)
                if len(scores[0].outcomes) < count:
                    notes.append(f"Time was up after {len(scores[0].outcomes)} of {count} tasks of {kind}.")
                return scores

            records = measure(
                "record",
                tasks,
                context,
                [
                    FULL,
                    NAIVE,
                    *(own(r) for r in RATIOS),
                    blend(0.05),
                    blend(0.15),
                    QUESTION,
                    blend(0.15, "first"),
                    blend(0.15, "random"),
                    own(1.0),
                ],
                seed=1,
                until=began_s + _RECORDS * (stop_s - began_s),
            )
            add(f"records, {context:,} tokens", records)
            aliases = measure(
                "alias",
                alias_tasks,
                context,
                [
                    FULL,
                    NAIVE,
                    own(0.05),
                    own(0.15),
                    blend(0.05),
                    blend(0.15),
                    QUESTION,
                    blend(0.15, "random"),
                ],
                seed=2,
                until=began_s + (_RECORDS + _ALIASES) * (stop_s - began_s),
            )
            add(f"aliases, {context:,} tokens", aliases)
            for tokens in lengths:
                if tokens + 128 <= model.config.max_position_embeddings:
                    swept = measure("record", timed, tokens, [FULL, PREFIX, *METHODS[2:]], seed=3)
                    add(f"records by length, {tokens:,} tokens", swept)
            metrics |= _quality_metrics(records, aliases)
            metrics["ttft_speedup_at_0.15_host_4k"] = speedup(records, "kvloom 15%")
        with KVStore([DiskTier(store_dir)]) as store:
            connector = TransformersConnector(model, tokenizer, store, model_id=connector.spec.model_id)
            cases = task_cases(
                None,
                count_tokens,
                kind="record",
                count=timed,
                context_tokens=context,
                num_documents=NUM_DOCUMENTS,
                seed=1,
            )
            cold = score(
                connector, cases[: len(records[0].outcomes)], METHODS, before_each=lambda: drop_page_cache(store_dir)
            )
            add(f"records from disk, past the page cache, {context:,} tokens", cold)
            metrics["ttft_speedup_at_0.15_disk_4k"] = speedup(cold, "kvloom 15%")
    tables.append(figures_table(metrics))
    return BenchResult("blend", metrics, rows, tables, targets=TARGETS, notes=notes, title=TITLE)


def named(scores: Sequence[Score], name: str) -> Score:
    return next(s for s in scores if s.method.name == name)


def _gap(naive: Floats, full: Floats, other: Floats) -> float:
    return share_of_gap(float(naive.mean()), float(full.mean()), float(other.mean()))


def gap_closed(scores: Sequence[Score], other: Score) -> Metric:
    """Share of the exact-match gap between naive reuse and full prefill, with its paired bootstrap interval."""
    naive, full = named(scores, NAIVE.name), scores[0]
    samples = [[float(right) for right in s.known] for s in (naive, full, other)]
    value, low, high = paired_bootstrap(*samples, statistic=_gap)
    return Metric(value, low, high, "share", "full prefill is 1, naive reuse is 0")


def _quality_metrics(records: Sequence[Score], aliases: Sequence[Score]) -> dict[str, Metric]:
    full, exact = records[0], named(records, own(1.0).name)
    identical = sum(a.tokens == b.tokens for a, b in zip(full.outcomes, exact.outcomes, strict=True))
    difference = max(
        float((a.logits - b.logits).abs().max()) for a, b in zip(full.outcomes, exact.outcomes, strict=True)
    )
    closing = [r for r in RATIOS if gap_closed(records, named(records, own(r).name)).value >= 0.9]
    metrics = {
        "tokens_identical_at_1": Metric.of_share(identical, len(full.outcomes), baseline=1.0),
        "max_abs_dlogit_at_1": Metric(difference, unit="logits", baseline=0.0),
        "gap_closed_at_0.05": gap_closed(records, named(records, "kvloom 5%")),
        "gap_closed_at_0.15": gap_closed(records, named(records, "kvloom 15%")),
        "gap_closed_random_at_0.15": gap_closed(records, named(records, "random 15%")),
        "smallest_ratio_closing_0.9": Metric(min(closing, default=math.nan), unit="share of tokens", baseline=1.0),
        "alias_gap_closed_at_0.05": gap_closed(aliases, named(aliases, "kvloom 5%")),
        "alias_gap_closed_at_0.15": gap_closed(aliases, named(aliases, "kvloom 15%")),
        "cacheblend_gap_closed_at_0.05": gap_closed(records, named(records, "CacheBlend 5%")),
        "cacheblend_alias_gap_closed_at_0.05": gap_closed(aliases, named(aliases, "CacheBlend 5%")),
        "cacheblend_alias_gap_closed_at_0.15": gap_closed(aliases, named(aliases, "CacheBlend 15%")),
        "question_alias_gap_closed_at_0.05": gap_closed(aliases, named(aliases, "question 5%")),
        "alias_gap_closed_random_at_0.15": gap_closed(aliases, named(aliases, "random 15%")),
    }
    for kind, scores in (("record", records), ("alias", aliases)):
        for name, method in (("full", FULL), ("naive", NAIVE)):
            known = named(scores, method.name).known
            metrics[f"exact_match_{kind}_{name}"] = Metric.of_share(sum(known), len(known))
    return metrics


def speedup(scores: Sequence[Score], name: str) -> Metric:
    return Metric.of_samples(named(scores, name).speedups(scores[0]), unit="times", baseline="full prefill")


def _with_interval(metric: Metric) -> str:
    interval = "" if metric.low is None or metric.high is None else f" [{metric.low:.2f}, {metric.high:.2f}]"
    return f"{metric.value:.2f}{interval}"
