"""Measure the reference model: tasks with known answers, held-out English, attention sinks.

    python -m kvloom.bench.reference.evaluate MODEL_DIR --corpus DIR --json MODEL_DIR/evaluation.json

Every name of the tasks is held out from training, and so is the text around them (`bench/passages.py`). With
`--corpus` (from `corpus.py`) the English is compared with a 5-gram model of the whole training text.
"""

import argparse
import math
import random
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from ...evaluation.intervals import mean_difference, paired_bootstrap
from ...evaluation.passages import load_heldout, load_questions, sentences
from ...evaluation.report import BenchResult, Metric
from ...evaluation.tasks import Task, TaskSampler
from .ngram import Ids, NgramModel

SHORTEST_CONTEXT = 512
WINDOW_TOKENS = 1024  # of the English test, BOS included
QUESTION_TOKENS = 40  # kept free of documents: BOS, question and answer
_SINK_WINDOWS, _SINK_FROM = 4, 64  # early queries see little else than the first token


def load(folder: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The model in float32, on the CPU, and its tokenizer."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, PreTrainedTokenizerFast.from_pretrained(folder)


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Token ids of a text, without BOS."""
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def encode_task(tokenizer: PreTrainedTokenizerFast, task: Task) -> tuple[list[int], list[int]]:
    """(prompt with BOS first, answer with its full stop): without the stop, 48 would pass for 4821's beginning."""
    prompt = encode(tokenizer, "".join(task.documents) + task.question)
    return [tokenizer.bos_token_id, *prompt], encode(tokenizer, f" {task.answer}.")


def answered(model: LlamaForCausalLM, pairs: Sequence[tuple[list[int], list[int]]]) -> list[bool]:
    """Whether greedy decoding after each prompt gives its answer, token by token.

    One forward pass over prompt and gold answer decides it: greedy decoding gives the answer if and only if the most
    likely token is the gold one at every position of the answer, since up to the first difference both have the same
    past. Prompts are padded on the right, where causal attention never looks; only the answers' logits are computed.
    """
    width = max(len(prompt) + len(answer) - 1 for prompt, answer in pairs)
    ids = torch.zeros(len(pairs), width, dtype=torch.int64)
    for row, (prompt, answer) in zip(ids, pairs, strict=True):
        row[: len(prompt) + len(answer) - 1] = torch.tensor(prompt + answer[:-1])
    with torch.inference_mode():
        hidden = model.model(ids, use_cache=False).last_hidden_state
        ends = [row[len(p) - 1 :][: len(a)] for row, (p, a) in zip(hidden, pairs, strict=True)]
        best = [model.lm_head(end).argmax(-1).tolist() for end in ends]
    return [tokens == answer for tokens, (_, answer) in zip(best, pairs, strict=True)]


def sample_tasks(
    tokenizer: PreTrainedTokenizerFast, filler: Sequence[str], kind: str, *, trials: int, context_tokens: int, seed: int
) -> list[Task]:
    """Tasks whose prompt and answer take at most `context_tokens` tokens, and little less."""
    sampler = TaskSampler(filler, cache(lambda text: len(encode(tokenizer, text))))
    rng = random.Random(f"{seed} {kind} {context_tokens}")
    return [sampler.sample(rng, kind, context_tokens=context_tokens - QUESTION_TOKENS) for _ in range(trials)]


def windows(tokenizer: PreTrainedTokenizerFast, paragraphs: Iterable[str]) -> Ids:
    """Natural text as rows of `WINDOW_TOKENS - 1` tokens, one paragraph a line; what is left over is dropped."""
    ids = np.asarray(encode(tokenizer, "".join(f"{p}\n" for p in paragraphs)), dtype=np.int64)
    width = WINDOW_TOKENS - 1
    return ids[: len(ids) // width * width].reshape(-1, width)


def language_losses(model: LlamaForCausalLM, rows: Ids) -> list[float]:
    """Mean loss of each row, nats a token, BOS put before it: `[rows]`."""
    means = []
    for row in track(torch.from_numpy(rows), "English", console=Console(stderr=True), transient=True):
        ids = F.pad(row, (1, 0), value=model.config.bos_token_id)
        with torch.inference_mode():
            means.append(F.cross_entropy(model(ids[None, :-1]).logits[0], row).item())
    return means


def ngram_losses(tokenizer: PreTrainedTokenizerFast, corpus: Path, rows: Ids) -> list[float]:
    """Mean loss of each row by a 5-gram model of `corpus/train.txt`; it also sees the end of the row before."""
    lines = [line for line in (corpus / "train.txt").read_text().splitlines(keepends=True) if line.strip()]
    encodings = tokenizer.backend_tokenizer.encode_batch(lines, add_special_tokens=False)
    text = np.concatenate([np.asarray(e.ids, dtype=np.int64) for e in encodings])
    ngram = NgramModel(text, vocab_size=len(tokenizer))
    return [-float(row.mean()) for row in ngram.log_probabilities(rows.ravel()).reshape(rows.shape)]


def sink_ratios(model: LlamaForCausalLM, rows: Ids) -> Tensor:
    """Mean share of attention that a query gives BOS, by layer and query head: `[L, Hq]`.

    Leaves the model with eager attention, the only implementation that returns its weights.
    """
    model.set_attn_implementation("eager")
    shares = []
    for row in torch.from_numpy(rows[:_SINK_WINDOWS]):
        ids = F.pad(row, (1, 0), value=model.config.bos_token_id)
        with torch.inference_mode():
            attentions = model(ids[None], output_attentions=True).attentions
        shares.append(torch.stack([a[0, :, _SINK_FROM:, 0].mean(-1) for a in attentions]))
    return torch.stack(shares).mean(0)


def evaluate(
    folder: Path, *, trials: int = 500, context: int = 4096, corpus: Path | None = None, seed: int = 0
) -> BenchResult:
    """Every measurement of a model folder.

    Parameters
    ----------
    trials : tasks of each kind at each length.
    context : longest prompt, tokens; shorter ones are a quarter each, down to 512.
    corpus : folder with `train.txt`, for the 5-gram; without it English has no baseline.

    Returns
    -------
    Metrics `{kind}_at_{tokens}` (share of exact matches), `heldout_loss` (nats a token), `heldout_loss_gain` (over the
    5-gram, same tokens), `heldout_perplexity`, and `sink_ratio` (largest share of attention on BOS of any head).
    Rows: each kind and length, each head.
    """
    model, tokenizer = load(folder)
    metrics: dict[str, Metric] = {}
    rows: list[dict[str, object]] = []
    filler = sentences(passage for question in load_questions() for passage in question.passages)
    contexts = [context]
    while contexts[0] // 4 >= SHORTEST_CONTEXT:
        contexts.insert(0, contexts[0] // 4)
    for kind in TaskSampler.KINDS:
        for length in contexts:
            tasks = sample_tasks(tokenizer, filler, kind, trials=trials, context_tokens=length, seed=seed)
            pairs = [encode_task(tokenizer, task) for task in tasks]
            step = max(1, context // length)
            batches = [pairs[i : i + step] for i in range(0, trials, step)]
            progress = track(batches, f"{kind} at {length}", console=Console(stderr=True), transient=True)
            right = sum(sum(answered(model, batch)) for batch in progress)
            metric = metrics[f"{kind}_at_{length}"] = Metric.of_share(right, trials)
            prompt_tokens = round(sum(len(prompt) for prompt, _ in pairs) / trials)
            rows.append({"measure": kind, "prompt_tokens": prompt_tokens, "trials": trials, **_figures(metric)})

    english = windows(tokenizer, load_heldout())
    losses = language_losses(model, english)
    loss, low, high = paired_bootstrap(losses, statistic=lambda x: float(x.mean()))
    baseline = None
    if corpus is not None:
        ngram = ngram_losses(tokenizer, corpus, english)
        baseline = sum(ngram) / len(ngram)
        gain = paired_bootstrap(ngram, losses, statistic=mean_difference)
        metrics["heldout_loss_gain"] = Metric(*gain, unit="nats/token", baseline="5-gram")
    metrics["heldout_loss"] = Metric(loss, low, high, "nats/token", baseline)
    perplexity = Metric(math.exp(loss), math.exp(low), math.exp(high), "per token", baseline and math.exp(baseline))
    metrics["heldout_perplexity"] = perplexity

    sinks = sink_ratios(model, english)
    metrics["sink_ratio"] = Metric(sinks.max().item(), unit="share")
    for layer, heads in enumerate(sinks.tolist()):
        rows += [{"measure": "sink", "layer": layer, "head": head, "value": share} for head, share in enumerate(heads)]
    return BenchResult("reference", metrics, rows)


def _figures(metric: Metric) -> dict[str, object]:
    return {"value": metric.value, "low": metric.low, "high": metric.high}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL_DIR")
    parser.add_argument("--trials", type=int, default=500, help="tasks of each kind at each length")
    parser.add_argument("--context", type=int, default=4096, help="longest prompt, tokens")
    parser.add_argument("--corpus", type=Path, metavar="DIR", help="folder with train.txt, for the 5-gram")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    args = parser.parse_args()
    result = evaluate(args.model, trials=args.trials, context=args.context, corpus=args.corpus)
    result.show()
    if args.json is not None:
        result.write(args.json)


if __name__ == "__main__":
    main()
