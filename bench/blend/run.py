"""Does fusing cached chunks answer as full prefill does, and how much sooner? `kvloom bench blend`.

On the bundled model, cross-document tasks with known answers, every method side by side on every task: exact match,
greedy tokens, time to first token. On any other model (`--model DIR`), questions of several kinds (`quality`), and
times. `gap_closed` is the share of the gap between naive reuse and full prefill that a method makes good: in exact
match on the bundled model, in the loss of the answer on others.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ...blend.correction import Correction
from ...calibration.model_profile import Profile
from ...certify.correction_fit import learn_correction
from ...connectors.hf.connector import TransformersConnector
from ...evaluation.fused_answers import FULL, HOST_BYTES, NAIVE, Method, Score, blend, score
from ...evaluation.models import token_counter
from ...evaluation.page import Row, Table
from ...evaluation.passages import TUNE, load_heldout
from ...evaluation.report import BenchResult, Metric, Target, figures_table
from ...evaluation.screen import progress
from ...evaluation.windows import SEQUENCE_TOKENS, SEQUENCES, token_windows
from ...evaluation.wording import frame_of
from ...evaluation.workload import task_cases
from ...kvstore.store import KVStore
from ...kvstore.tiers.host import HostTier
from ..harness.pool import ModelPool
from .bundled import CONTEXT_TOKENS, NUM_DOCUMENTS, TITLE, measure_bundled, named, speedup
from .pooled import PooledBed
from .quality import COST_TOKENS, KINDS, QualitySizes, corrected, default_methods, measure_quality, quality_work

MODEL_TARGETS = (
    Target("real_gap_closed_at_0.15", ">=", 0.7),
    Target("real_gap_closed_at_0.30", ">=", 0.95),
    Target("real_musique_kl_at_0.15_vs_cacheblend", "<=", 0.6),
    Target("real_corrected_gap_closed_at_0.15", ">=", 0.7),
    Target("real_corrected_gap_closed_at_0.30", ">=", 0.95),
    Target("real_corrected_musique_kl_at_0.15_vs_cacheblend", "<=", 0.6),
    Target("real_ttft_speedup_at_0.15", ">=", 2.2),
    Target("real_corrected_ttft_speedup_at_0.15", ">=", 2.2),
)
FULL_FORM = QualitySizes(check=dict.fromkeys(KINDS, 200), tune=16)
DEFAULT_FORM = QualitySizes(check={"astride": 200, "multihop": 65}, context_tokens=640, has_all_methods=False)
QUICK_FORM = QualitySizes(
    check=dict.fromkeys(KINDS, 2), tune=1, context_tokens=256, num_documents=4, per_context=2, budgets=(0.15, 0.30)
)
MINUTES = 14.0  # of the default form on a processor
_TIMED_WORK = 1.7  # work of a token of so long a context, beside one of a short context
SEED = 2611  # of the questions that are reported; nothing was ever tuned on it
MODEL_MEANING = (
    "kvloom: its default method. Corrected: the same over documents that a linear map, fitted to other text by "
    "`kvloom calibrate`, brings nearer to what they are in a context. All methods compute as many tokens times layers "
    f"as CacheBlend does at the share in their name, over {COST_TOKENS:,} tokens, where a question is asked for the "
    "choice included; it weighs more in the short contexts of these tables, and `computed` counts it. Tuned: the "
    "choice and check layer that did best on the split to tune on. EPIC: the first tokens of each document; ProphetKV: "
    "those that the question attends to most, as far as its paper tells. Closed: share of the gap between naive reuse "
    "and full prefill, in the loss of the gold answer, or in KL where the model may not know it; 95 % interval, "
    "contexts drawn anew with all their questions. Right: values given word for word."
)


def run(
    *,
    quick: bool = False,
    model_dir: Path | None = None,
    device: str | None = None,
    full: bool = False,
    questions: int | None = None,
    kinds: Sequence[str] = (),
    context_tokens: int | None = None,
    timed: bool = True,
    processes: int | None = None,
    minutes: float | None = None,
) -> BenchResult:
    """Measure every method.

    Parameters
    ----------
    quick : smallest sizes, to see that it runs.
    model_dir : a Hugging Face folder, measured by `quality`; None for the bundled reference model.
    device : as for `load_model`.
    full : every kind of question and every method, and one chosen on the split to tune on; of the bundled model, all
        tasks however long they take.
    questions : with `model_dir`, as what follows but `minutes`: of each kind; None for those of the form.
    kinds : of question, see `quality.KINDS`; none for those of the form.
    context_tokens : of the documents of one question; None for those of the form.
    timed : measure times, too.
    processes : that share its questions; None for one for each core of a processor.
    minutes : after which no question begins, but for one of each kind; None for `MINUTES`, and without end if `full`.
    """
    began_s = time.monotonic()
    if model_dir is None:
        limit = MINUTES if minutes is None and not full else minutes
        stop_s = math.inf if limit is None else began_s + 60 * limit
        return measure_bundled(quick=quick, device=device, stop_s=stop_s)
    form = QUICK_FORM if quick else FULL_FORM if full else DEFAULT_FORM
    chosen = {kind: questions or form.check.get(kind, 200) for kind in kinds or form.check}
    form = replace(form, check=chosen, context_tokens=context_tokens or form.context_tokens)
    if minutes is None and form.tune == 0:
        minutes = MINUTES
    with ModelPool(model_dir, device=device, processes=processes or (1 if quick else None)) as pool:
        stop_s = math.inf if minutes is None else began_s + 60 * minutes
        return _of_model(pool, form, quick=quick, timed=timed, stop_s=stop_s)


def _of_model(pool: ModelPool, form: QualitySizes, *, quick: bool, timed: bool, stop_s: float) -> BenchResult:
    """Times to first token at 4K tokens; quality at equal cost on questions of several kinds."""
    bed = PooledBed(pool)
    methods_at = default_methods(bed.layers.spec.num_layers, form.budgets)
    methods = [FULL, NAIVE, *(blend(share) for share in methods_at)]
    correction = _correction(bed, pool, sequences=2 if quick else SEQUENCES)
    for share, method in methods_at.items():
        methods.append(Method(f"kvloom at {share:.0%}", blender=method.blender))
        methods.append(Method(corrected(share), blender=replace(method.blender, correction=correction)))
    count, tokens = (1, 512) if quick else (3, CONTEXT_TOKENS)
    tokens = min(tokens, bed.layers.max_tokens - 128)
    timing = _TIMED_WORK * tokens * (1 + count * (1 + 4 * sum(form.budgets))) / 1000 if timed else 0.0
    metrics: dict[str, Metric] = {}
    tables: list[Table] = []
    with progress() as bar:
        task = bar.add_task("thousand tokens", total=timing + quality_work(form))
        if timed:
            scores = _times(pool, methods, count, tokens, lambda: bar.advance(task, timing / (count + 1)))
            tables.append(_times_table(scores, tokens))
            for share in methods_at:
                metrics[f"real_ttft_speedup_at_{share:.2f}"] = speedup(scores, f"kvloom at {share:.0%}")
                metrics[f"real_corrected_ttft_speedup_at_{share:.2f}"] = speedup(scores, corrected(share))
                published = Metric.of_samples(
                    named(scores, f"kvloom at {share:.0%}").speedups(named(scores, f"CacheBlend {share:.0%}")),
                    unit="times",
                    baseline=f"CacheBlend {share:.0%}",
                )
                metrics[f"real_ttft_speedup_at_{share:.2f}_vs_cacheblend"] = published
                metrics[f"real_cacheblend_ttft_speedup_at_{share:.2f}"] = speedup(scores, f"CacheBlend {share:.0%}")

        def advance(part: str, work: float) -> None:
            bar.update(task, description=f"{part}, thousand tokens")
            bar.advance(task, work)

        found = measure_quality(
            bed,
            pool.here.tokenizer,
            form,
            prefix="real_",
            seed=SEED,
            correction=correction,
            stop_s=stop_s,
            advance=advance,
        )
    metrics |= found.metrics
    tables += [*found.tables, figures_table(metrics)]
    return BenchResult(
        "blend",
        metrics,
        found.rows,
        tables,
        targets=[each for each in MODEL_TARGETS if timed or "ttft" not in each.metric],
        notes=[*found.notes, MODEL_MEANING],
        title=TITLE,
    )


def _correction(bed: PooledBed, pool: ModelPool, *, sequences: int) -> Correction:
    """As `kvloom calibrate` fits it, to text that no question comes from."""
    tokenizer, tokens = pool.here.tokenizer, min(SEQUENCE_TOKENS, bed.layers.max_tokens)
    windows = token_windows(tokenizer, ["\n".join(load_heldout(TUNE))], sequences=sequences, tokens=tokens)
    with progress() as bar:
        task = bar.add_task("learning a correction", total=sum(map(len, windows)))
        tensors = learn_correction(bed.layers, tokenizer, windows, advance=lambda tokens: bar.advance(task, tokens))
    found = Correction.from_profile(Profile(bed.layers.spec, tensors))
    if found is None:
        raise ValueError("the profile holds no correction")
    return found


def _times(
    pool: ModelPool, methods: Sequence[Method], count: int, tokens: int, advance: Callable[[], object]
) -> list[Score]:
    """Every method on one context, `count` times, from host memory; `advance` once before and after each."""
    model, tokenizer = pool.here.model, pool.here.tokenizer
    context, brief = (
        task_cases(
            None,
            token_counter(tokenizer),
            kind="record",
            count=1,
            context_tokens=long,
            num_documents=NUM_DOCUMENTS,
            frame=frame_of(tokenizer),
        )[0]
        for long in (tokens, min(512, tokens))
    )
    with KVStore([HostTier(HOST_BYTES)]) as store:
        connector = TransformersConnector(model, tokenizer, store)
        connector.precompute([*context.documents, *brief.documents])
        methods = [_named_as(connector, method) for method in methods]
        score(connector, [brief], methods)
        advance()
        return score(connector, [context] * count, methods, warm_up=False, advance=advance)


def _named_as(connector: TransformersConnector, method: Method) -> Method:
    """The method for the same model under the connector's name of it."""
    blender = method.blender
    if blender is None or blender.correction is None:
        return method
    correction = replace(blender.correction, spec=connector.spec)
    return replace(method, blender=replace(blender, correction=correction))


def _times_table(scores: Sequence[Score], tokens: int) -> Table:
    cells: list[Row] = []
    for one in scores:
        row = one.summary(scores[0])
        cells.append([row.method, f"{row.ttft_s * 1e3:.0f}", f"{row.speedup:.2f}x", f"{row.computed_tokens:,.0f}"])
    return Table(
        ["method", "TTFT ms", "speed-up", "computed"],
        cells,
        f"times to first token, one context of {tokens:,} tokens, {len(scores[0].outcomes)} times",
    )
