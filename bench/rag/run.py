"""How much sooner does a RAG pipeline answer over a corpus's cached KV? `kvloom bench rag`."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...connectors.hf.generation import generation_call
from ...evaluation.environment import usable
from ...evaluation.intervals import share_interval
from ...evaluation.models import load_model
from ...evaluation.page import Table
from ...evaluation.passages import CHECK, Question, load_questions
from ...evaluation.report import BenchResult, Metric, Target
from ...evaluation.screen import StepProgress, progress
from ...kvstore.store import KVStore
from ...kvstore.tiers.host import HostTier
from ...rag.answers import INSTRUCTIONS, Answer, question_prompt
from ...rag.catalog import Passage
from ...rag.corpus import Corpus
from .pipelines import FRAMEWORKS, first_piece_s

TITLE = "How much sooner does a RAG pipeline answer over cached KV, and does it answer the same?"
MEANING = (
    "Questions over MuSiQue's Wikipedia passages (split to check with), their chunks found by words. Plain: the same "
    "chunks and prompt through transformers' own generate, nothing cached. Times to first token, plain over kvloom, "
    "median of the questions, from the host tier; the two take turns. A framework's time: to the first piece of text "
    "through its own classes, beside its plain pipeline, which has the chunks' texts in the prompt of the same model. "
    "Second question: the same chunks in another order, beside the first, for which nothing was stored. Ordering: at "
    "ratio 1, share of the tokens of later "
    "questions over the same chunks that are loaded exactly, less the same share in the order of relevance. Batch: "
    "answers of `answer_many` equal to those one by one. Right: the expected words stand in the answer."
)
TARGETS = (
    *(Target(f"{name}_ttft_speedup", ">=", 1.5) for name in FRAMEWORKS),
    Target("batch_equals_single", ">=", 1.0),
)


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured: questions, chunks that the model reads, tokens of an answer."""

    questions: int
    passages: int
    answer_tokens: int


FULL, QUICK = Sizes(20, 6, 24), Sizes(2, 2, 4)
_SHOWN = 8  # answers in the report
PRETRAINED = Sizes(8, 6, 16)  # under a quarter of an hour on two cores with 135M parameters


def run(*, quick: bool = False, model_dir: Path | None = None, questions: int | None = None) -> BenchResult:
    """Measure `Corpus` and the frameworks that are installed.

    Parameters
    ----------
    quick : smallest sizes, to see that it runs.
    model_dir : a Hugging Face folder; None for the bundled model.
    questions : how many; None for 20 with the bundled model, 8 with another one.
    """
    sizes = QUICK if quick else FULL if model_dir is None else PRETRAINED
    asked = load_questions(CHECK)[: questions or sizes.questions]
    texts = [passage for question in asked for passage in question.passages]
    said = [question.question for question in asked]
    metrics: dict[str, Metric] = {}
    answers: list[list[str]] = []
    with tempfile.TemporaryDirectory(prefix="kvloom-bench-") as folder, progress() as bar:
        loading = bar.add_task("loading the model", total=1, logged=False)
        model, tokenizer = load_model(model_dir)
        bar.advance(loading)
        make = partial(_corpus, Path(folder), model, tokenizer)
        with make("fused") as corpus:
            _fill(corpus, texts, bar)
            metrics |= _times(corpus, asked, sizes, bar, answers)
            metrics |= _frameworks(corpus, said, sizes, bar)
            metrics |= _batch(corpus, said, sizes, bar)
        with make("second") as corpus:
            corpus.add(texts, precompute=False)
            metrics |= _second_question(corpus, said, sizes, bar)
        metrics |= _ordering(make, texts, said, sizes, bar)
    rows = [[name, metric.value, metric.low, metric.high, metric.unit] for name, metric in metrics.items()]
    missing = [name for name, module in FRAMEWORKS.items() if not usable(module)]
    notes = [MEANING, f"model: {'the bundled one' if model_dir is None else model_dir.name}; {len(asked)} questions."]
    if missing:
        notes.append(f"Not installed here, so not measured: {', '.join(missing)}; `make engines` makes an environment.")
    targets = [each for each in TARGETS if each.metric in metrics]
    table = Table(["figure", "value", "low", "high", "unit"], rows, "RAG over cached KV", left=(0, 4))
    shown = Table(["question", "expected", "plain", "over cached KV"], answers[:_SHOWN], "Answers", left=(0, 1, 2, 3))
    return BenchResult("rag", metrics, [], [table, shown], targets=targets, notes=notes, title=TITLE)


def _corpus(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, ratio: float | None = None
) -> Corpus:
    store = KVStore([HostTier(8 << 30)])
    return Corpus(folder / name, model, tokenizer, store=store, recompute_ratio=ratio)


def _fill(corpus: Corpus, texts: Sequence[str], bar: StepProgress) -> None:
    task = bar.add_task("computing documents", total=len(texts))
    for start in range(0, len(texts), 10):
        corpus.add(texts[start : start + 10])
        bar.advance(task, len(texts[start : start + 10]))


def _found(corpus: Corpus, question: str, sizes: Sizes) -> list[Passage]:
    return corpus.search(question, passages=sizes.passages)


def _plain(corpus: Corpus, question: str, passages: Sequence[Passage], tokens: int) -> tuple[float, str]:
    """Seconds to the first token of stock generate, and its whole greedy answer."""
    connector = corpus.connector
    prompt = question_prompt(connector.tokenizer, question, INSTRUCTIONS)
    ids = [*connector.lead_ids]
    for passage in passages:
        ids += connector.encode_document(passage.text)
    ids += connector.encode_question(prompt.text)
    row = torch.tensor([ids], device=connector.model.device)
    inputs = {"input_ids": row, "attention_mask": torch.ones_like(row)}
    first = generation_call(connector.model, connector.tokenizer, {}, max_new_tokens=1)
    began_s = time.perf_counter()
    output = first.run(connector.model, None, first.criteria, **inputs)
    spent_s = time.perf_counter() - began_s
    if tokens > 1:
        whole = generation_call(connector.model, connector.tokenizer, {}, max_new_tokens=tokens)
        output = whole.run(connector.model, None, whole.criteria, **inputs)
    text = str(connector.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))
    return spent_s, (text if getattr(connector.tokenizer, "chat_template", None) else text.partition("\n")[0]).strip()


def _ask(corpus: Corpus, question: str, passages: Sequence[Passage], sizes: Sizes, *, ordered: bool = False) -> Answer:
    return corpus.ask(question, sources=passages, max_new_tokens=sizes.answer_tokens, order_for_reuse=ordered)


def _times(
    corpus: Corpus, questions: Sequence[Question], sizes: Sizes, bar: StepProgress, answers: list[list[str]]
) -> dict[str, Metric]:
    """Figures of `ask` beside the plain pipeline; `answers` gets question, expected, plain and our answer of each."""
    speedups, totals, equal, reused, documents, right, plain_right = [], [], 0, 0, 0, 0, 0
    task = bar.add_task("ask and plain in turns", total=len(questions))
    for question in questions:
        passages = _found(corpus, question.question, sizes)
        began_s = time.perf_counter()
        plain_s, plain_text = _plain(corpus, question.question, passages, sizes.answer_tokens)
        plain_total_s = time.perf_counter() - began_s - plain_s  # the answer's own prefill is in it
        began_s = time.perf_counter()
        answer = _ask(corpus, question.question, passages, sizes)
        totals.append(plain_total_s / (time.perf_counter() - began_s))
        speedups.append(plain_s / answer.usage.prompt_s)
        equal += answer.text == plain_text
        right += _is_right(answer.text, question)
        plain_right += _is_right(plain_text, question)
        reused += answer.usage.reused_tokens
        documents += answer.usage.reused_tokens + answer.usage.recomputed_tokens
        answers.append([question.question, question.answers[0], plain_text, answer.text])
        bar.advance(task)
    return {
        "ask_ttft_speedup": Metric.of_samples(speedups, unit="times", baseline="plain"),
        "ask_total_speedup": Metric.of_samples(totals, unit="times", baseline="plain"),
        "ask_tokens_reused": Metric(reused / max(documents, 1), unit="share"),
        "ask_answers_equal": Metric.of_share(equal, len(questions), baseline="plain"),
        "ask_answers_right": Metric.of_share(right, len(questions), baseline=plain_right / len(questions)),
    }


def _is_right(text: str, question: Question) -> bool:
    """Whether an accepted spelling stands in it."""
    return any(answer.casefold() in text.casefold() for answer in question.answers)


def _frameworks(corpus: Corpus, questions: Sequence[str], sizes: Sizes, bar: StepProgress) -> dict[str, Metric]:
    found: dict[str, Metric] = {}
    for name, module in FRAMEWORKS.items():
        if not usable(module):
            continue
        task = bar.add_task(name, total=len(questions))
        speedups = []
        for question in questions:
            passages = _found(corpus, question, sizes)
            measure = partial(first_piece_s, name, corpus, question, passages, sizes.answer_tokens)
            speedups.append(measure(is_cached=False) / measure(is_cached=True))
            bar.advance(task)
        found[f"{name}_ttft_speedup"] = Metric.of_samples(
            speedups, unit="times", baseline="the framework without kvloom"
        )
    return found


def _batch(corpus: Corpus, questions: Sequence[str], sizes: Sizes, bar: StepProgress) -> dict[str, Metric]:
    task = bar.add_task("a batch, and one by one", total=2)
    began_s = time.perf_counter()
    alone = [_ask(corpus, question, _found(corpus, question, sizes), sizes).text for question in questions]
    alone_s = time.perf_counter() - began_s
    bar.advance(task)
    began_s = time.perf_counter()
    together = corpus.answer_many(
        questions, passages=sizes.passages, max_new_tokens=sizes.answer_tokens, order_for_reuse=False
    )
    together_s = time.perf_counter() - began_s
    bar.advance(task)
    equal = sum(one == other.text for one, other in zip(alone, together, strict=True))
    low, high = share_interval(equal, len(questions))
    return {
        "batch_equals_single": Metric(equal / len(questions), low, high, "share", "one by one"),
        "batch_speedup": Metric(alone_s / together_s, unit="times", baseline="one by one"),
    }


def _second_question(corpus: Corpus, questions: Sequence[str], sizes: Sizes, bar: StepProgress) -> dict[str, Metric]:
    """Nothing is stored for the first; the second reads the same passages in another order."""
    speedups = []
    task = bar.add_task("first and second question", total=len(questions))
    seen: set[int] = set()
    for question in questions:
        passages = [each for each in _found(corpus, question, sizes) if each.number not in seen]
        if len(passages) > 1:
            seen |= {each.number for each in passages}
            first = _ask(corpus, question, passages, sizes)
            second = _ask(corpus, question, passages[::-1], sizes)
            speedups.append(first.usage.prompt_s / second.usage.prompt_s)
        bar.advance(task)
    return {"ask_second_question_speedup": Metric.of_samples(speedups, unit="times", baseline="the first question")}


def _ordering(
    make: Callable[[str, float], Corpus],
    texts: Sequence[str],
    questions: Sequence[str],
    sizes: Sizes,
    bar: StepProgress,
) -> dict[str, Metric]:
    """Exact answers to three questions over the same passages, found in three orders."""
    draw = random.Random(0)
    task = bar.add_task("orders of the same passages", total=2 * len(questions))
    shares = {}
    for is_ordered in (True, False):
        reused = documents = 0
        with make(f"ordered {is_ordered}", 1.0) as corpus:
            corpus.add(texts, precompute=False)
            for question in questions:
                passages = _found(corpus, question, sizes)
                for turn in range(3):
                    answer = _ask(corpus, question, passages, Sizes(1, sizes.passages, 1), ordered=is_ordered)
                    if turn:
                        reused += answer.usage.reused_tokens
                        documents += answer.usage.reused_tokens + answer.usage.recomputed_tokens
                    passages = draw.sample(passages, len(passages))
                bar.advance(task)
        shares[is_ordered] = reused / max(documents, 1)
    return {
        "ordering_hit_gain": Metric(shares[True] - shares[False], unit="share", baseline=shares[False]),
        "ordered_tokens_reused": Metric(shares[True], unit="share", baseline=shares[False]),
    }
