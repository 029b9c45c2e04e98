"""Decoding through retrieval inside stock vLLM: tokens a second and answers beside the engine as it is.

Runs in vLLM's environment, whose interpreter is given. Each way of attending is an engine in a process of its own: this
file, run as a script with the job as JSON in its standard input, and what was measured as the last line of its output.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ...evaluation.report import Metric

PLAIN = "vLLM as it is"
WAYS: Mapping[str, Mapping[str, Any] | None] = {
    PLAIN: None,
    "quantized": {"method": "quantized", "budget_ratio": 0.06},
    "quantized_coverage_0.95": {"method": "quantized", "budget_ratio": 0.12, "coverage": 0.95},
    "landmarks": {"method": "landmarks", "budget_ratio": 0.06},
    "factor": {"method": "factor", "budget_ratio": 0.06},
}
KINDS = ("single_text", "multi_key", "only_needles")
ANSWER_TOKENS = 8
START_S = 300.0
_BLOCK_TOKENS = 32  # the smallest that the processor's kernels take: the fewest tokens beside those chosen


@dataclass(frozen=True, slots=True)
class RetrievalJob:
    """The work of one engine.

    Attributes
    ----------
    model : its folder.
    settings : `additional_config["kvloom"]["retrieval"]`; None for vLLM as it is.
    prompts : by the number of tokens of their contexts: token ids, the kind of task and the tokens that answer it.
    new_tokens : decoded in every round behind the first prompt of a length; its prefill is not in the time.
    skips_attention : prompts are computed with attention of zero, which takes a minute for 64K tokens and not an hour:
        for times alone, on a model whose keys are random anyway.
    """

    model: str
    settings: Mapping[str, Any] | None
    prompts: Mapping[int, Sequence[tuple[Sequence[int], str, Sequence[int]]]]
    new_tokens: int = 64
    rounds: int = 5
    dtype: str = "float32"
    skips_attention: bool = False


@dataclass(frozen=True, slots=True)
class RetrievalRow:
    """One way of attending behind contexts of one length.

    Attributes
    ----------
    token_s, dense_s : seconds that decoding one token takes, one for each round; the latter densely, in the same
        engine, in turn with the former.
    first_s : seconds of the first token that was decoded through a new index, prefill not counted.
    right : by kind of task, whether each answer was right.
    same : whether each answer was that of vLLM as it is; empty for itself.
    chosen_tokens, touched_tokens : a decoded token, mean over layers and KV heads: chosen, and in blocks that hold
        some of them, which is what an engine would read that can only read whole blocks.
    index_bytes : of all layers, for one context.
    break_even_tokens : from which on the engine retrieves: given, or measured at its start.
    """

    way: str
    tokens: int
    token_s: Sequence[float]
    dense_s: Sequence[float]
    first_s: float
    right: Mapping[str, Sequence[bool]]
    same: Sequence[bool] = field(default_factory=tuple)
    chosen_tokens: float = 0.0
    touched_tokens: float = 0.0
    index_bytes: int = 0
    break_even_tokens: int = 0

    @property
    def speedup(self) -> Metric:
        """Tokens a second over those of dense decoding, medians of the ratios within rounds."""
        ratios = [dense / own for dense, own in zip(self.dense_s, self.token_s, strict=True)]
        return Metric.of_samples(ratios, unit="times", baseline="dense, in the same engine")

    def row(self) -> dict[str, object]:
        """Plain values by name."""
        return {"what": "retrieval", **asdict(self), "speedup": self.speedup.value}


def measure(
    python: Path,
    model: Path,
    prompts: Mapping[int, Sequence[tuple[Sequence[int], str, Sequence[int]]]],
    *,
    ways: Mapping[str, Mapping[str, Any] | None] = WAYS,
    new_tokens: int = 64,
    rounds: int = 5,
    skips_attention: bool = False,
) -> list[RetrievalRow]:
    """Every way over the same prompts, one engine after the other; retrieval from the first decoded token on, unless
    its settings say otherwise.

    Raises
    ------
    RuntimeError : an engine does not start or fails.
    """
    rows: list[RetrievalRow] = []
    said: dict[int, list[list[int]]] = {}
    for way, settings in ways.items():
        if settings is not None:
            settings = {"break_even_tokens": 0, "allow_uncertified": True, **settings}
        found = _run(
            python, RetrievalJob(str(model), settings, prompts, new_tokens, rounds, skips_attention=skips_attention)
        )
        for tokens, of_length in found.items():
            answers = of_length.pop("answers")
            exact = said.setdefault(tokens, answers)
            right: dict[str, list[bool]] = {}
            for (_, kind, expected), answer in zip(prompts[tokens], answers, strict=True):
                right.setdefault(kind, []).append(answer[: len(expected)] == list(expected))
            same = [] if exact is answers else [a == b for a, b in zip(exact, answers, strict=True)]
            rows.append(RetrievalRow(way, tokens, right=right, same=same, **of_length))
    return rows


def make_prompts(
    model: Path, lengths: Sequence[int], *, contexts: int, kinds: Sequence[str] = KINDS, seed: int = 0
) -> dict[int, list[tuple[list[int], str, list[int]]]]:
    """Contexts of these lengths, so many of each kind, each with one question behind it."""
    from transformers import AutoTokenizer

    from ..retrieval.quality import TaskTokens

    tasks = TaskTokens(AutoTokenizer.from_pretrained(model, local_files_only=True))
    found: dict[int, list[tuple[list[int], str, list[int]]]] = {}
    for tokens in lengths:
        for number in range(contexts):
            for kind in kinds:
                ids, asked = tasks.sample(kind, tokens, random.Random(f"{seed} {kind} {tokens} {number}"))
                question, answer = asked[0]
                found.setdefault(tokens, []).append(([*ids.tolist(), *question.tolist()], kind, answer.tolist()))
    return found


def _run(python: Path, job: RetrievalJob) -> dict[int, dict[str, Any]]:
    """One engine in a process of its own; its answers by length."""
    root = Path(__file__).resolve().parent.parent.parent
    with tempfile.TemporaryDirectory(prefix="kvloom-bench-") as folder:
        (Path(folder) / "kvloom").symlink_to(root, target_is_directory=True)
        path = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
        done = subprocess.run(
            [str(python), "-m", "kvloom.bench.vllm.retrieval"],
            input=json.dumps(asdict(job)),
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(f"vLLM failed: {done.stderr[-2000:]}")
    return {int(tokens): row for tokens, row in json.loads(done.stdout.splitlines()[-1]).items()}


# --------------------------------------------------------------------------------------------------- in the engine


def _serve(job: RetrievalJob) -> dict[int, dict[str, Any]]:
    os.environ.update(
        VLLM_CPU_KVCACHE_SPACE=os.environ.get("VLLM_CPU_KVCACHE_SPACE", "2"),
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        HF_HUB_OFFLINE="1",
        VLLM_NO_USAGE_STATS="1",
    )
    from vllm import LLM

    from ...connectors.vllm.plugin import register

    register()
    if job.skips_attention:
        _skip_attention_of_prompts()
    longest = max(len(ids) for of_length in job.prompts.values() for ids, *_ in of_length)
    llm = LLM(
        job.model,
        dtype=job.dtype,
        max_model_len=longest + max(job.new_tokens, ANSWER_TOKENS) + 1,
        max_num_seqs=4,
        block_size=_BLOCK_TOKENS,
        enforce_eager=True,
        enable_prefix_caching=True,
        skip_tokenizer_init=True,
        additional_config={} if job.settings is None else {"kvloom": {"retrieval": dict(job.settings)}},
    )
    return {tokens: _of_length(llm, job, prompts) for tokens, prompts in job.prompts.items()}


def _skip_attention_of_prompts() -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    stock = CPUAttentionBackendImpl.forward

    def forward(
        self: Any, layer: Any, q: Any, k: Any, v: Any, cache: Any, attn_metadata: Any, output: Any, **more: Any
    ) -> Any:
        if attn_metadata is None or attn_metadata.max_query_len == 1:
            return stock(self, layer, q, k, v, cache, attn_metadata, output, **more)
        return output.zero_()

    CPUAttentionBackendImpl.forward = forward


def _of_length(llm: Any, job: RetrievalJob, prompts: Sequence[tuple[Sequence[int], str, Sequence[int]]]) -> Any:
    from vllm import SamplingParams

    from ...connectors.break_even import NEVER

    def decode(ids: Sequence[int], count: int) -> tuple[list[int], float]:
        sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        began_s = time.perf_counter()
        (output,) = llm.generate([{"prompt_token_ids": list(ids)}], sampling, use_tqdm=False)
        return list(output.outputs[0].token_ids), time.perf_counter() - began_s

    worker = llm.llm_engine.model_executor.driver_worker.worker
    context = worker.model_runner.vllm_config.compilation_config.static_forward_context
    layers = [found for layer in context.values() if (found := getattr(layer.impl, "retrieving", None)) is not None]
    groups = (group for groups in worker.model_runner.attn_groups for group in groups)
    made = (builder for group in groups for builder in group.metadata_builders)
    builders = [(builder, builder.retrieving) for builder in made if hasattr(builder, "retrieving")]
    touched = _Touched()
    for layer in layers:
        layer.on_choice = touched
    answers = [decode(ids, ANSWER_TOKENS)[0] for ids, *_ in prompts]
    ids = prompts[0][0]
    for layer in layers:
        layer.on_choice = None
    decode(ids, 1)  # the prompt is in vLLM's cache, but for its last tokens
    starts = [decode(ids, 1)[1] for _ in range(job.rounds)]
    first = decode(ids, 2)[1] - sorted(starts)[job.rounds // 2]
    # An index outlives its request while its blocks are not written, so that rounds find it as a long answer does.
    token_s: list[float] = []
    dense_s: list[float] = []
    for number, start_s in enumerate(starts):
        for seconds in (token_s, dense_s) if number % 2 else (dense_s, token_s):
            for builder, retrieving in builders:
                builder.retrieving = replace(retrieving, break_even_tokens=NEVER if seconds is dense_s else 0)
            seconds.append((decode(ids, 1 + job.new_tokens)[1] - start_s) / job.new_tokens)
    for builder, retrieving in builders:
        builder.retrieving = retrieving
    held = [sum(index.selector.held_bytes for index in layer.indexes[-1:]) for layer in layers]
    return {
        "answers": answers,
        "token_s": token_s,
        "dense_s": dense_s,
        "first_s": first,
        "chosen_tokens": touched.chosen / max(1, touched.rows),
        "touched_tokens": touched.blocks * _BLOCK_TOKENS / max(1, touched.rows),
        "index_bytes": sum(held),
        "break_even_tokens": max((retrieving.break_even_tokens for _, retrieving in builders), default=0),
    }


class _Touched:
    """Counts blocks that hold chosen tokens; rows of a KV head."""

    def __init__(self) -> None:
        self.rows = self.chosen = self.blocks = 0

    def __call__(self, ids: Any) -> None:
        for row in ids:
            chosen = row[row >= 0]
            self.rows += 1
            self.chosen += len(chosen)
            self.blocks += len((chosen // _BLOCK_TOKENS).unique())


def main() -> None:
    """Runs one engine."""
    given = json.loads(sys.stdin.read())
    given["prompts"] = {int(tokens): prompts for tokens, prompts in given["prompts"].items()}
    sys.stdout.write(f"\n{json.dumps(_serve(RetrievalJob(**given)))}\n")


if __name__ == "__main__":
    main()
