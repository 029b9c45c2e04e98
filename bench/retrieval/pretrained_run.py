"""`kvloom bench retrieval --model DIR`: every method on a pretrained model, as one result."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from ...evaluation.answers import Answer, difference_of, mean_of
from ...evaluation.forcing import ForcedModel
from ...evaluation.intervals import Floats, paired_bootstrap
from ...evaluation.page import Table
from ...evaluation.questions import QuestionSampler
from ...evaluation.report import BenchResult, Metric, Target
from ...evaluation.screen import progress
from ...retrieval.settings import Retrieval
from ..harness.pool import LoadedModel, ModelPool
from .pretrained import DENSE, SINK_TOKENS, WINDOW_TOKENS, Trial, Way, answered, tokens_at_equal_loss

DEFAULT = Retrieval().method
NEEDLES, EXTRACT = ("needle", "needle8"), "extract"
KINDS = (*NEEDLES, EXTRACT)
RATIOS = (0.015, 0.03, 0.06, 0.12)
EXACT_RATIOS = (0.03, 0.06)
COVERAGES = (0.9, 0.95, 0.98)
BOUND_RATIO = 0.12  # within which a coverage chooses
SAVING_COVERAGE = 0.95
OTHERS = ("random", "landmarks", "landmarks+factor", "factor", "sketch")
OTHER_RATIOS = (0.03, 0.06)
_FACTS_TOKENS = 256  # the least context that the bench's own kinds fit into

TARGETS = (
    Target("real_needle_kl_default_3pct", "<=", 0.01),
    Target("real_extract_delta_default_6pct", "<=", 0.02),
    Target("coverage_budget_saving", ">=", 1.5),
)
TITLE = "What does attending to few tokens cost a pretrained model?"
MEANING = (
    "A context and the question behind it are computed densely; the answer's tokens attend to "
    f"{SINK_TOKENS} sinks, the last {WINDOW_TOKENS} tokens of the context, all that follows it, and what a method "
    "chooses, one set for each KV head. Attended: sinks, window and chosen tokens, a mean over layers, heads and "
    "tokens. KL: of the gold answer's tokens to full attention, nats a token. Values: share of the values that greedy "
    "decoding gives behind the gold answer so far, and how many fewer than under full attention. A coverage chooses "
    f"within {BOUND_RATIO:.0%}, then keeps the fewest tokens that hold its share of the attention. Needles: one fact, "
    "or eight of which one is asked for; extract: twelve facts asked for at once. Intervals of 95 %, questions drawn "
    "anew."
)


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured: needles and extractions, each so many; `others` of each kind of needle also by `OTHERS`."""

    questions: int = 100
    context_tokens: int = 4096
    others: int = 4


FULL, QUICK = Sizes(), Sizes(questions=2, context_tokens=512, others=1)


def run(
    folder: Path,
    *,
    device: str | None = None,
    quick: bool = False,
    questions: int | None = None,
    context_tokens: int | None = None,
    processes: int = 1,
    minutes: float | None = None,
) -> BenchResult:
    """Measure a model of a local folder.

    Parameters
    ----------
    device : `cpu` or `cuda`; None for a GPU if there is one.
    questions : needles, half of each kind, and as many extractions; None for 100.
    context_tokens : of each context, about; None for 4,096, or less where the model's own context is shorter.
    processes : that share the questions.
    minutes : after which no question begins.

    Raises
    ------
    ValueError : there is no such model or device, or a number is out of range.
    """
    sizes = QUICK if quick else FULL
    stop_s = math.inf if minutes is None else time.monotonic() + 60 * minutes
    with ModelPool(folder, device=device, processes=processes) as pool, progress() as bar:
        longest = int(pool.here.model.config.max_position_embeddings) - 512
        width = min(sizes.context_tokens, longest) if context_tokens is None else context_tokens
        count = sizes.questions if questions is None else questions
        if not _FACTS_TOKENS <= width <= longest or count < 1:
            raise ValueError(
                f"context_tokens is {width}, questions {count}; expected {_FACTS_TOKENS} to {longest}, and at least 1"
            )
        ways = [Way(DEFAULT, ratio) for ratio in RATIOS]
        ways += [Way(DEFAULT, BOUND_RATIO, coverage) for coverage in COVERAGES]
        ways += [Way("exact", ratio) for ratio in EXACT_RATIOS]
        missing = [] if find_spec("faiss") else ["sketch"]
        others = [Way(method, ratio) for method in OTHERS if method not in missing for ratio in OTHER_RATIOS]
        counts = dict(zip(KINDS, (-(-count // 2), max(1, count // 2), count), strict=True))
        # One of every kind before the next number, so that kinds end alike if time is up.
        items = [
            (kind, number, kind in NEEDLES and number < sizes.others)
            for number in range(max(counts.values()))
            for kind, of_kind in counts.items()
            if number < of_kind
        ]
        task = bar.add_task(f"questions, {width:,} tokens", total=len(items))
        measured = partial(_answered, width=width, ways=ways, others=others)
        found = pool.map(measured, items, stop_s=stop_s, advance=lambda: bar.advance(task))
        device = pool.here.model.device.type
    trials = [trial for of_question in found for trial in of_question]
    counts = {kind: sum(each == kind for each, *_ in items[: len(found)]) for kind in KINDS}
    metrics = _metrics(trials)
    rows = [{**asdict(t.way), "attended": t.attended, "context_tokens": width, **asdict(t.answer)} for t in trials]
    asked = ", ".join(f"{of_kind} of {kind}" for kind, of_kind in counts.items())
    notes = [MEANING, f"{folder.name}: {asked}; {width:,} tokens; {device}."]
    notes += [f"{method}: not measured, a package is missing" for method in missing]
    few = {t.answer.number for t in trials if t.way.method in OTHERS}
    tables = [_table([t for t in trials if t.way.method not in OTHERS], width, None, "all questions")]
    if few:
        tables.append(_table(trials, width, few, f"every method, the first {len(few)} of each kind of needle"))
    return BenchResult("retrieval", metrics, rows, tables, (), TARGETS, notes, title=TITLE)


def _answered(
    loaded: LoadedModel, item: tuple[str, int, bool], *, width: int, ways: Sequence[Way], others: Sequence[Way]
) -> list[Trial]:
    """One question in every way, by `OTHERS` too if the item says so."""
    kind, number, is_compared = item
    forced = loaded.once("forced", lambda: ForcedModel(loaded.model, model_id="measured", keeps_queries=True))
    sampler = loaded.once("sampler", lambda: QuestionSampler(loaded.tokenizer, context_tokens=width, num_documents=4))
    return answered(forced, sampler.sample(kind, number), ways, others if is_compared else ())


def _of(trials: Sequence[Trial], way: Way, kinds: Sequence[str]) -> list[Trial]:
    return [trial for trial in trials if trial.way == way and trial.answer.kind in kinds]


def _answers(trials: Sequence[Trial], way: Way, kinds: Sequence[str]) -> list[Answer]:
    return [trial.answer for trial in _of(trials, way, kinds)]


def _metrics(trials: Sequence[Trial]) -> dict[str, Metric]:
    dense, default, exact = Way(DENSE), Way(DEFAULT, 0.03), Way("exact", 0.03)
    needles = mean_of(_answers(trials, exact, NEEDLES), "kl")[0]
    extract = _answers(trials, dense, (EXTRACT,))
    lost = difference_of(extract, _answers(trials, Way(DEFAULT, 0.06), (EXTRACT,)), "values_right")
    known = mean_of(extract, "values_right")[0]
    return {
        "real_needle_kl_default_3pct": Metric(
            *mean_of(_answers(trials, default, NEEDLES), "kl"), unit="nats a token", baseline=needles
        ),
        "real_extract_delta_default_6pct": Metric(
            *lost, unit="share", baseline=f"full attention gives {known:.2f} of the values"
        ),
        "coverage_budget_saving": _saving(trials),
    }


def _saving(trials: Sequence[Trial]) -> Metric:
    """Tokens that a fixed share attends to over those of a coverage, where both lose as much."""
    fixed = [_of(trials, Way(DEFAULT, ratio), KINDS) for ratio in RATIOS]
    covered = _of(trials, Way(DEFAULT, BOUND_RATIO, SAVING_COVERAGE), KINDS)
    columns = [[each(trial) for trial in way] for way in (*fixed, covered) for each in (_kl, _attended)]

    def saving(*means: Floats) -> float:
        losses, tokens = ([float(column.mean()) for column in means[place::2]] for place in (0, 1))
        by_tokens = dict(zip(tokens[:-1], losses[:-1], strict=True))
        return tokens_at_equal_loss(by_tokens, losses[-1]) / tokens[-1]

    value, low, high = paired_bootstrap(*columns, statistic=saving, resamples=500)
    return Metric(value, low, high, "times", f"coverage {SAVING_COVERAGE:g} within {BOUND_RATIO:.0%}")


def _kl(trial: Trial) -> float:
    return trial.answer.kl


def _attended(trial: Trial) -> float:
    return trial.attended


def _table(trials: Sequence[Trial], width: int, numbers: set[int] | None, caption: str) -> Table:
    """One row a way: tokens attended to, KL of needles and of values, values lost."""
    if numbers is not None:
        trials = [trial for trial in trials if trial.answer.number in numbers and trial.answer.kind in NEEDLES]
    rows: list[list[str]] = []
    for way in dict.fromkeys(trial.way for trial in trials):
        own = [trial for trial in trials if trial.way == way]
        cells = [way.name, "" if way.method == DENSE else f"{way.ratio:.1%}"]
        cells.append(f"{np.mean([trial.attended for trial in own]) / width:.1%}")
        for kinds in (NEEDLES, (EXTRACT,)):
            answers = _answers(trials, way, kinds)
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
