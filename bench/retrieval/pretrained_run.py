"""`kvloom bench retrieval --model DIR`: every method on a pretrained model, as one result."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean

import numpy as np

from ...evaluation.answers import Answer, difference_of, mean_of
from ...evaluation.forcing import ForcedModel
from ...evaluation.intervals import Floats, paired_bootstrap
from ...evaluation.page import Table
from ...evaluation.questions import QuestionSampler
from ...evaluation.report import BenchResult, Metric, Target
from ...evaluation.screen import progress
from ...evaluation.tasks import EXTRACTED, SINGLE
from ...retrieval.settings import Retrieval
from ..harness.pool import LoadedModel, ModelPool
from .pretrained import ALONE, DENSE, SINK_TOKENS, Trial, Way, answered, tokens_at_equal_loss

DEFAULT = Retrieval().method
NEEDLE, EXTRACT = SINGLE, "extract"
KINDS = (NEEDLE, EXTRACT)
RATIOS = (0.03, 0.06, 0.12)
EXACT_RATIOS = (0.03, 0.06)
BOUND_RATIO = 0.12  # within which a coverage chooses
SAVING_COVERAGE = 0.95
OTHER_COVERAGES = (0.9, 0.98)
OTHERS = ("random", "landmarks", "landmarks+factor", "factor", "sketch")
OTHER_RATIOS = (0.03, 0.06)
MINUTES = 14.0
_FACTS_TOKENS = 256  # the least context that the facts fit into

TARGETS = (
    Target("real_needle_kl_default_3pct", "<=", 0.01),
    Target("real_extract_delta_default_6pct", "<=", 0.02),
    Target("coverage_budget_saving", ">=", 1.5),
)
TITLE = "What does attending to few tokens cost a pretrained model?"
MEANING = (
    "A context and the question behind it are computed densely; the answer's tokens attend to "
    f"{SINK_TOKENS} sinks, the last tokens of the context (1 of 128, at least 16), all that follows it, and what a "
    "method chooses, one set for each KV head. Attended: sinks, window and chosen tokens, a mean over layers, heads "
    "and tokens. KL: of the gold answer's tokens to full attention, nats a token. Values: share of the values that "
    "greedy decoding gives behind the gold answer so far. A coverage chooses "
    f"within {BOUND_RATIO:.0%}, then keeps the fewest tokens that hold its share of the attention. "
    "`quantized` also attends to the tokens that are not chosen, by values of one bit; all others drop them. A context "
    f"states {EXTRACTED} facts: extract asks for all at once, a needle for one of them. All questions about a context "
    "share its keys and values. Intervals of 95 %: contexts drawn anew, with all their questions."
)


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured: contexts, each with one extraction and so many needles; `others` also by other methods."""

    contexts: int = 100
    needles: int = 4
    context_tokens: int = 2048
    others: int = 3


FULL, QUICK = Sizes(), Sizes(contexts=2, needles=2, context_tokens=512, others=1)


def run(
    folder: Path,
    *,
    device: str | None = None,
    quick: bool = False,
    questions: int | None = None,
    context_tokens: int | None = None,
    processes: int | None = None,
    minutes: float | None = None,
) -> BenchResult:
    """Measure a model of a local folder.

    Parameters
    ----------
    device : `cpu` or `cuda`; None for a GPU if there is one.
    questions : contexts, each with one extraction and four needles; None for 100.
    context_tokens : of each context, about; None for 2,048, or less where the model's own context is shorter: at this
        length a model of 135 million parameters gets through 99 in 14 minutes on two cores.
    processes : that share the contexts; None for one for each core of a processor.
    minutes : after which no context begins; None for `MINUTES`.

    Raises
    ------
    ValueError : there is no such model or device, or a number is out of range.
    """
    sizes = QUICK if quick else FULL
    stop_s = time.monotonic() + 60 * (MINUTES if minutes is None else minutes)
    with ModelPool(folder, device=device, processes=processes or (1 if quick else None)) as pool, progress() as bar:
        longest = int(pool.here.model.config.max_position_embeddings) - 512
        width = min(sizes.context_tokens, longest) if context_tokens is None else context_tokens
        count = sizes.contexts if questions is None else questions
        if not _FACTS_TOKENS <= width <= longest or count < 1:
            raise ValueError(
                f"context_tokens is {width}, questions {count}; expected {_FACTS_TOKENS} to {longest}, and at least 1"
            )
        missing = [] if find_spec("faiss") else ["sketch"]
        items = [(number, number < sizes.others) for number in range(count)]
        task = bar.add_task(f"contexts of {width:,} tokens", total=count)
        measured = partial(_answered, width=width, needles=sizes.needles, methods=set(OTHERS) - set(missing))
        found = pool.map(measured, items, stop_s=stop_s, advance=lambda: bar.advance(task))
        device = pool.here.model.device.type
    trials = [trial for of_context in found for trial in of_context]
    rows = [{**asdict(t.way), "attended": t.attended, "context_tokens": width, **asdict(t.answer)} for t in trials]
    asked = ", ".join(f"{len(_of(trials, Way(DENSE), (kind,)))} of {kind}" for kind in KINDS)
    notes = [MEANING, f"{folder.name}: {len(found)} contexts of {width:,} tokens, questions: {asked}; {device}."]
    notes += [f"{method}: not measured, a package is missing" for method in missing]
    everywhere = set(_ways())
    few = {t.answer.group for t in trials if t.way not in everywhere and t.way.method != DENSE}
    tables = [_table([t for t in trials if t.way in everywhere or t.way.method == DENSE], width, "all contexts")]
    if few:
        compared = [trial for trial in trials if trial.answer.group in few]
        tables.append(_table(compared, width, f"every method, the first {len(few)}"))
    return BenchResult("retrieval", _metrics(trials), rows, tables, (), TARGETS, notes, title=TITLE)


def _ways() -> list[Way]:
    """What every question is answered with."""
    ways = [Way(DEFAULT, ratio) for ratio in RATIOS]
    return [*ways, Way(DEFAULT, BOUND_RATIO, SAVING_COVERAGE), *(Way("exact", ratio) for ratio in EXACT_RATIOS)]


def _answered(
    loaded: LoadedModel, item: tuple[int, bool], *, width: int, needles: int, methods: Collection[str]
) -> list[Trial]:
    """All questions about one context; if the item says so, with other coverages, and needles by other `methods`."""
    number, is_compared = item
    forced = loaded.once("forced", lambda: ForcedModel(loaded.model, model_id="measured", keeps_queries=True))
    sampler = loaded.once("sampler", lambda: QuestionSampler(loaded.tokenizer, context_tokens=width, num_documents=4))
    ways, others = _ways(), []
    if is_compared:
        ways += [Way(DEFAULT, BOUND_RATIO, coverage) for coverage in OTHER_COVERAGES]
        ways += [Way(ALONE, ratio) for ratio in OTHER_RATIOS]
        # They choose token by token: an extraction has a hundred.
        others = [Way(method, ratio) for method in OTHERS if method in methods for ratio in OTHER_RATIOS]
    questions = sampler.extraction(number, singles=needles)
    return answered(forced, [(each, ways if each.kind == EXTRACT else ways + others) for each in questions])


def _of(trials: Sequence[Trial], way: Way, kinds: Sequence[str]) -> list[Trial]:
    return [trial for trial in trials if trial.way == way and trial.answer.kind in kinds]


def _answers(trials: Sequence[Trial], way: Way, kinds: Sequence[str]) -> list[Answer]:
    return [trial.answer for trial in _of(trials, way, kinds)]


def _metrics(trials: Sequence[Trial]) -> dict[str, Metric]:
    dense, default, exact = Way(DENSE), Way(DEFAULT, 0.03), Way("exact", 0.03)
    needles = mean_of(_answers(trials, exact, (NEEDLE,)), "kl")[0]
    extract = _answers(trials, dense, (EXTRACT,))
    lost = difference_of(extract, _answers(trials, Way(DEFAULT, 0.06), (EXTRACT,)), "values_right")
    known = mean_of(extract, "values_right")[0]
    return {
        "real_needle_kl_default_3pct": Metric(
            *mean_of(_answers(trials, default, (NEEDLE,)), "kl"), unit="nats a token", baseline=needles
        ),
        "real_extract_delta_default_6pct": Metric(
            *lost, unit="share", baseline=f"full attention gives {known:.2f} of the values"
        ),
        "coverage_budget_saving": _saving(trials),
    }


def _saving(trials: Sequence[Trial]) -> Metric:
    """Tokens that a fixed share attends to over those of a coverage, where both lose as much; kinds count alike."""
    ways = [*(Way(DEFAULT, ratio) for ratio in RATIOS), Way(DEFAULT, BOUND_RATIO, SAVING_COVERAGE)]
    columns = [_by_context(trials, way, each) for way in ways for each in (_kl, _attended)]

    def saving(*means: Floats) -> float:
        losses, tokens = ([float(column.mean()) for column in means[place::2]] for place in (0, 1))
        by_tokens = dict(zip(tokens[:-1], losses[:-1], strict=True))
        return tokens_at_equal_loss(by_tokens, losses[-1]) / tokens[-1]

    value, low, high = paired_bootstrap(*columns, statistic=saving, resamples=500)
    return Metric(value, low, high, "times", f"coverage {SAVING_COVERAGE:g} within {BOUND_RATIO:.0%}")


def _by_context(trials: Sequence[Trial], way: Way, figure: Callable[[Trial], float]) -> list[float]:
    """Of each context, the mean over kinds of the mean over its questions."""
    found: dict[str, dict[str, list[float]]] = {}
    for trial in _of(trials, way, KINDS):
        found.setdefault(trial.answer.group, {}).setdefault(trial.answer.kind, []).append(figure(trial))
    return [fmean(map(fmean, of_context.values())) for of_context in found.values()]


def _kl(trial: Trial) -> float:
    return trial.answer.kl


def _attended(trial: Trial) -> float:
    return trial.attended


def _table(trials: Sequence[Trial], width: int, caption: str) -> Table:
    """One row a way: tokens attended to, KL of needles and of values, values lost."""
    rows: list[list[str]] = []
    for way in dict.fromkeys(trial.way for trial in trials):
        own = [trial for trial in trials if trial.way == way]
        cells = [way.name, "" if way.method == DENSE else f"{way.ratio:.1%}"]
        cells.append(f"{np.mean([trial.attended for trial in own]) / width:.1%}")
        for kind in KINDS:
            answers = _answers(trials, way, (kind,))
            if not answers:
                cells += ["-", "-"]
                continue
            right = mean_of(answers, "values_right")[0]
            kl = mean_of(answers, "kl")
            bounds = f" ({kl[1]:.4f} to {kl[2]:.4f})" if math.isfinite(kl[1]) and way.method != DENSE else ""
            cells += [f"{kl[0]:.4f}{bounds}", f"{right:.3f}"]
        rows.append(cells)
    heads = ["method", "share", "attended", "KL, needles", "right", "KL, extract", "values"]
    return Table(heads, rows, f"{caption}, contexts of {width:,} tokens")
