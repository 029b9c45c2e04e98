"""`kvloom bench retrieval`: what selectors find, what they cost a model, and what they save, in one run.

Quality: the bundled model on RULER's tasks in its own language and on held-out prose, its contexts prefilled densely,
every selector within every budget behind the same ones. Search and speed: contexts of the 8B shape with planted
queries.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial

from rich.progress import Progress, TaskID
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...evaluation.models import load_model
from ...evaluation.report import BenchResult, Metric, Target
from ...evaluation.screen import progress
from .contexts import SINK_TOKENS, WINDOW_TOKENS, ContextModel
from .graph_speed import model_figures
from .methods import TEXT, learn, selectors
from .planted_speed import FULL, QUICK, measure_planted
from .planted_tables import decode_table, key_bytes_table, real_search_table, search_plot, search_table
from .quality import ANSWER, QUESTION, Found, Scope, TaskTokens, measure
from .ruler import AGGREGATION
from .summary import pooled_loss, summaries
from .tables import answers_table, attention_table, builds_table, known_table, plots
from .vq_ablation import VqQuality, vq_ablation, vq_table

TRAINED_TOKENS = 4096
CONTEXTS = 2  # of a kind at `TRAINED_TOKENS`, and one at longer ones: more would take hours, not half of one
LONGEST_KINDS = (TEXT, "common_words")  # from `LONG_TOKENS` on, one context each: the model answers nothing there
LONG_TOKENS = 16_384
FULL_SIZES = (4096, 8192, 24_576)
LEARN_FULL, LEARN_QUICK = (16, 2048), (2, 256)  # sequences and their tokens, for codebooks
SEARCHED_TOKENS = 8192  # of the context whose real queries are searched for
QUICK_SIZES = (512,)
QUICK_RATIOS = (0.03, 0.06, 0.3)
# ShadowKV's keys are the index themselves here, as in the figures of its bytes; its landmarks have one of their own
FIGURES = {
    "shadowkv_task_delta_6pct": ("factor", 0.06),
    "landmarks_task_delta_6pct": ("landmarks", 0.06),
    "vq_task_delta_3pct": ("vq", 0.03),
}
TARGETS = (
    Target("graph_scan_at_recall95_128k", "<=", 0.03),
    Target("ivf_scan_vs_graph_128k", ">=", 3.0),
    Target("hnsw_scan_vs_graph_128k", ">=", 3.0),
    Target("graph_scan_growth_128k_512k", "<=", 1.5),
    Target("graph_bytes_per_token_layer_8b", "<=", 1000),
    Target("shadowkv_task_delta_6pct", "<=", 0.01),
    Target("landmarks_task_delta_6pct", "<=", 0.01),
    Target("shadowkv_key_bytes_ratio", ">=", 6.26),
    Target("shadowkv_key_bytes_ratio_int4", ">=", 20.0),
    Target("vq_task_delta_3pct", "<=", 0.01),
    Target("decode_mass_128k", ">=", 0.95),
    Target("decode_speedup_128k", ">=", 8.0),
    Target("decode_mass_512k", ">=", 0.95),
    Target("decode_speedup_512k", ">=", 20.0),
    Target("build_time_vs_prefill", "<=", 0.5),
)
TITLE = "What does attending to few tokens lose, and what does it save?"
MEANING = (
    "A context is prefilled densely once; behind it every token attends, in every layer, to 4 sinks, the last 32 "
    "tokens of the context, everything after it, and what a selector chooses, one set for each KV head. Attended: all "
    "of these at the last step, over the context (more where the pinned ones alone are more). Read: keys and values "
    "of these in 16 bits and what the index reads to choose, over the keys and values that dense attention reads. "
    "Mass: share of the softmax that falls on what is attended to. Recall: share of what exact search chooses within "
    "the same budget. Error: of attention's output, relative. All three along the dense pass. Answers are greedy; a "
    "loss is the share of answers lost to dense attention, with an interval of 95 % (Agresti & Min); other intervals "
    "draw contexts anew. The model was trained on contexts of 4,096 tokens, and on positions up to 24,576 by random "
    "jumps: longer contexts are an extrapolation, and beyond 8,192 tokens its answers fade."
)


def run(*, quick: bool = False, sizes: Sequence[int] | None = None) -> BenchResult:
    """Measure every selector.

    Parameters
    ----------
    quick : smallest sizes, to see that it runs.
    sizes : tokens of the contexts on the bundled model.

    Raises
    ------
    ValueError : a size is out of range.
    """
    model, tokenizer = load_model(None)
    learning, planted_sizes = (LEARN_QUICK, QUICK) if quick else (LEARN_FULL, FULL)
    longest = model.config.max_position_embeddings - 64
    sizes = tuple(sizes or (QUICK_SIZES if quick else FULL_SIZES))
    if wrong := [size for size in sizes if not 256 <= size <= longest]:
        raise ValueError(f"sizes are {', '.join(map(str, wrong))}; expected 256 to {longest} tokens")
    with progress() as bar:
        task = bar.add_task("codebooks", total=1)
        factories = selectors(learn(model, tokenizer, sequences=learning[0], tokens=learning[1]))
        bar.advance(task)
        found = Found([], [], {})
        for size in sizes:
            scope = _scope(size, quick)
            task = bar.add_task(f"bundled model, {size:,} tokens", total=scope.total)
            found += measure(model, tokenizer, factories, scope, advance=partial(_advance, bar, task))
        searched = _real_searches(model, tokenizer, min(sizes, key=lambda size: abs(size - SEARCHED_TOKENS)))
        ablated = _ablation(model, tokenizer, learning, min(TRAINED_TOKENS, *sizes))
        planted = measure_planted(planted_sizes, bar)
    lines = summaries(found)
    metrics = _quality_metrics(found) | planted.metrics()
    tables = [known_table(found)]
    for size in sizes:
        tables.append(attention_table(lines, (TEXT, *AGGREGATION), size))
        tables.append(answers_table(lines, size))
    tables = [table for table in tables if table.rows]  # of the longest contexts nothing is asked
    tables += [
        builds_table(found.builds, model.config.num_hidden_layers),
        vq_table(ablated),
        real_search_table(*searched),
        search_table(planted),
        decode_table(planted),
        key_bytes_table(planted),
    ]
    drawn = [*(plot for size in sizes for plot in plots(lines, size)), search_plot(planted)]
    rows = [*(line.row() for line in lines), *(build.row() for build in found.builds), *planted.rows()]
    rows += [quality.row() for quality in ablated] + [{"what": "search", **row} for row in searched[0]]
    return BenchResult("retrieval", metrics, rows, tables, drawn, TARGETS, [MEANING], title=TITLE)


def _advance(bar: Progress, task: TaskID, _: str) -> None:
    bar.advance(task)


def _scope(tokens: int, quick: bool) -> Scope:
    if quick:
        return Scope({tokens: 1}, ratios=QUICK_RATIOS, kinds=(TEXT, "multi_key", "common_words"))
    if tokens >= LONG_TOKENS:
        return Scope({tokens: 1}, kinds=LONGEST_KINDS)
    return Scope({tokens: CONTEXTS if tokens <= TRAINED_TOKENS else 1})


def _ablation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, learning: tuple[int, int], tokens: int
) -> list[VqQuality]:
    sequences, learned_tokens = learning
    return vq_ablation(
        model, tokenizer, tokens=tokens, contexts=CONTEXTS, sequences=sequences, learned_tokens=learned_tokens
    )


def _real_searches(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: int
) -> tuple[list[dict[str, object]], int]:
    """The graph, IVF and HNSW over prose, for the queries of its end."""
    layers = ContextModel(model)
    ids, _ = TaskTokens(tokenizer).sample(TEXT, tokens, random.Random(0))
    context = layers.dense(ids)
    of_layers = list(zip(context.queries, context.keys, strict=True))
    rows = model_figures(of_layers, window_tokens=WINDOW_TOKENS, queries=min(32, tokens // 16), sinks=SINK_TOKENS)
    return rows, tokens


def _quality_metrics(found: Found) -> dict[str, Metric]:
    metrics = {}
    for name, (method, ratio) in FIGURES.items():
        for since, suffix in ((ANSWER, ""), (QUESTION, "_question")):
            lost = pooled_loss(found, method, ratio, since)
            if lost is not None:
                metrics[name + suffix] = Metric(*lost[0], unit="share", baseline=f"dense, {lost[1]} trials")
    return metrics
