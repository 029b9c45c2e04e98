"""An engine of stock vLLM in a process of its own, driven by `vllm_engine.Engine` through a pipe.

Engine, scheduler and worker are this one process: it computes nothing between requests.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

SETTLE_S = 120.0
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "LMCACHE_TRACK_USAGE": "false",
}


@dataclass(frozen=True, slots=True)
class Setup:
    """Settings of an engine.

    Attributes
    ----------
    model : folder of the model.
    connector : fields of vLLM's `KVTransferConfig`; None for plain vLLM.
    max_tokens : of a request.
    cache_gib : memory for the engine's own KV blocks.
    log : file for all that the process prints.
    path : folders to import from, behind those of this environment.
    prefix_caching : vLLM's own.
    options : of the engine, instead of those below.
    environment : of the process, instead of what is set below.
    """

    model: Path
    connector: Mapping[str, object] | None
    max_tokens: int
    cache_gib: int
    log: Path
    path: Sequence[str] = field(default=())
    prefix_caching: bool = True
    options: Mapping[str, object] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Served:
    """Outcome of requests that were made at once.

    Attributes
    ----------
    seconds : from token ids to the last token of all.
    decode_s : from when every request had its first token to when every one had its last.
    tokens : greedy, request by request.
    cached_tokens : of each prompt, taken from wherever: vLLM's own count.
    usage : what kvloom says that it did for each; None if it did not serve it.
    loaded_bytes : that kvloom loaded for all of them.
    first_s : from the arrival of each to its first token.
    """

    seconds: float
    decode_s: float
    tokens: tuple[tuple[int, ...], ...]
    cached_tokens: tuple[int, ...]
    usage: tuple[Mapping[str, Any] | None, ...]
    loaded_bytes: int = 0
    first_s: tuple[float, ...] = ()

    @property
    def decisions(self) -> tuple[str, ...]:
        """Why each loaded as much as it did, in kvloom's word for it."""
        return tuple(str((usage or {}).get("decision")) for usage in self.usage)


@dataclass(frozen=True, slots=True)
class Ask:
    """`prompts` at once, `new_tokens` each; `options` are kvloom's for all of them, by request if several are given."""

    prompts: Sequence[Sequence[int]]
    new_tokens: int
    options: Sequence[Mapping[str, object] | None]


@dataclass(frozen=True, slots=True)
class Replay:
    """Each of `prompts` so many seconds after the start, in ascending order, with so many `new_tokens`; `options` as of
    `Ask`.
    """

    prompts: Sequence[Sequence[int]]
    arrivals_s: Sequence[float]
    new_tokens: Sequence[int]
    options: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Reset:
    """Forget vLLM's own prefix cache, and nothing else."""


@dataclass(frozen=True, slots=True)
class SlowDown:
    """From now on, loads take longer; see `Throttle`."""

    latency_s: float
    byte_s: float


@dataclass(frozen=True, slots=True)
class Expire:
    """From now on, chunks are stored for so many seconds; None for ever."""

    ttl_s: float | None


@dataclass(frozen=True, slots=True)
class Choose:
    """From now on, what is loaded is decided by another `load_or_recompute`.

    Each has learned its own costs, from the requests that came while it decided.
    """

    load_or_recompute: str


@dataclass(frozen=True, slots=True)
class Settle:
    """Wait until kvloom has stored what it was to store."""


@dataclass(frozen=True, slots=True)
class Failure:
    """One line that says what went wrong."""

    text: str


def serve(pipe: Connection, setup: Setup) -> None:
    """Start the engine, say None, and answer until the pipe closes. A process of its own begins here."""
    log = os.open(setup.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.path += setup.path
    try:
        llm = start_engine(setup)
    except Exception as exc:
        pipe.send(Failure(line_of(exc)))
        raise
    pipe.send(None)
    while True:
        try:
            question = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(_answer(llm, question))
        except Exception as exc:
            pipe.send(Failure(line_of(exc)))
            raise


def line_of(exc: Exception) -> str:
    """What went wrong, in a line."""
    return " ".join(f"{type(exc).__name__}: {exc}".split())[:300]


def start_engine(setup: Setup) -> Any:
    """Stock vLLM in this process; its ranks, where it has several, in processes of their own."""
    options = dict(setup.options)
    ranks = int(str(options.get("tensor_parallel_size", 1))) * int(str(options.get("pipeline_parallel_size", 1)))
    cores = "|".join(map(str, range(ranks))) if ranks > 1 else "auto"
    memory = str(setup.cache_gib)
    os.environ.update(ENVIRONMENT, VLLM_CPU_KVCACHE_SPACE=memory, VLLM_CPU_OMP_THREADS_BIND=cores)
    os.environ.update(setup.environment)
    hide_fake_attributes()
    from vllm import LLM
    from vllm.config import KVTransferConfig
    from vllm.platforms import current_platform

    settings: dict[str, Any] = {
        "dtype": "float32" if current_platform.is_cpu() else "bfloat16",
        "max_model_len": setup.max_tokens,
        "max_num_batched_tokens": 2048,  # as vLLM's server has it, so that longer prompts are computed in pieces
        "max_num_seqs": 8,
        "enforce_eager": True,
        "enable_prefix_caching": setup.prefix_caching,
        "disable_log_stats": False,
        "skip_tokenizer_init": True,
        "seed": 0,
    }
    transfer = None if setup.connector is None else KVTransferConfig(**dict(setup.connector))
    return LLM(str(setup.model), kv_transfer_config=transfer, **(settings | options))


def hide_fake_attributes() -> None:
    """For vLLM's CPU build, which asks all that modules hold for `__dict__`: llvmlite's library answers to any name."""
    try:
        from llvmlite.binding import ffi
    except ImportError:
        return
    wrapper: Any = ffi._lib_wrapper  # noqa: SLF001  # what vLLM stumbles over has no public name
    answer = wrapper.__getattr__
    if answer.__name__ == "without_dunders":
        return

    def without_dunders(self: Any, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return answer(self, name)

    wrapper.__getattr__ = without_dunders


def _answer(llm: Any, question: Ask | Replay | Reset | Settle | SlowDown | Expire | Choose) -> Served | None:
    if isinstance(question, Reset):
        if not llm.reset_prefix_cache():
            raise RuntimeError("vLLM does not forget its prefix cache: blocks are in use")
        return None
    if isinstance(question, Settle):
        _settle()
        return None
    if isinstance(question, SlowDown):
        _slow_down(question)
        return None
    if isinstance(question, Expire):
        _expire(question.ttl_s)
        return None
    if isinstance(question, Choose):
        _choose(llm, question.load_or_recompute)
        return None
    return replay(llm, question) if isinstance(question, Replay) else generate(llm, question)


def _params(new_tokens: int, options: Mapping[str, object] | None) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0,
        max_tokens=new_tokens,
        ignore_eos=True,
        detokenize=False,
        extra_args=None if options is None else {"kv_transfer_params": {"kvloom": dict(options)}},
    )


def generate(llm: Any, ask: Ask) -> Served:
    """What an engine in this process answers."""
    inputs = [{"prompt_token_ids": list(prompt)} for prompt in ask.prompts]
    params = [_params(ask.new_tokens, options) for options in ask.options]
    loaded_bytes = _loaded_bytes(llm)
    start = time.perf_counter()
    outputs = llm.generate(inputs, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    first = max(output.metrics.first_token_ts for output in outputs)
    last = max(output.metrics.last_token_ts for output in outputs)
    return Served(
        seconds,
        last - first,
        tuple(tuple(output.outputs[0].token_ids) for output in outputs),
        tuple(output.num_cached_tokens or 0 for output in outputs),
        tuple((output.kv_transfer_params or {}).get("kvloom") for output in outputs),
        _loaded_bytes(llm) - loaded_bytes,
        tuple(output.metrics.first_token_latency for output in outputs),
    )


def replay(llm: Any, asked: Replay) -> Served:
    """What an engine in this process answers to requests that come while it computes: it sees them between its steps.

    Their times to the first token count from when they should have come.
    """
    engine, loaded_bytes = llm.llm_engine, _loaded_bytes(llm)
    begun_s = time.perf_counter()
    numbers: dict[str, int] = {}
    first_s: dict[int, float] = {}
    answers: dict[int, Any] = {}
    coming = list(enumerate(asked.arrivals_s))
    while coming or engine.has_unfinished_requests():
        while coming and coming[0][1] <= time.perf_counter() - begun_s:
            number, _ = coming.pop(0)
            name = f"{begun_s}-{number}"
            numbers[name] = number
            prompt = {"prompt_token_ids": list(asked.prompts[number])}
            engine.add_request(name, prompt, _params(asked.new_tokens[number], asked.options))
        if not engine.has_unfinished_requests():
            time.sleep(max(coming[0][1] - (time.perf_counter() - begun_s), 0.0))
            continue
        outputs = engine.step()
        now_s = time.perf_counter() - begun_s
        for output in outputs:
            number = numbers[output.request_id]
            first_s.setdefault(number, now_s - asked.arrivals_s[number])
            if output.finished:
                answers[number] = output
    found = [answers[number] for number in range(len(asked.prompts))]
    return Served(
        time.perf_counter() - begun_s - asked.arrivals_s[0],
        0.0,
        tuple(tuple(output.outputs[0].token_ids) for output in found),
        tuple(output.num_cached_tokens or 0 for output in found),
        tuple((output.kv_transfer_params or {}).get("kvloom") for output in found),
        _loaded_bytes(llm) - loaded_bytes,
        tuple(first_s[number] for number in range(len(found))),
    )


def _loaded_bytes(llm: Any) -> int:
    return sum(int(each.value) for each in llm.get_metrics() if each.name == "vllm:kvloom_loaded_bytes")


def _settle() -> None:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    connector = get_kv_transfer_group()
    if not connector.worker.transfers.settle(SETTLE_S):
        raise RuntimeError(f"kvloom was not done storing after {SETTLE_S:g} s")


def _expire(ttl_s: float | None) -> None:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    store = get_kv_transfer_group().worker.transfers.store
    store.put = partial(type(store).put, store, ttl_s=ttl_s)


_THROTTLES: list[Any] = []  # of this process: at most one


def _slow_down(wanted: SlowDown) -> None:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    from .throttle import Throttle

    if not _THROTTLES:
        _THROTTLES.append(Throttle(get_kv_transfer_group().worker.transfers))
    _THROTTLES[0].latency_s, _THROTTLES[0].byte_s = wanted.latency_s, wanted.byte_s


_CONTROLS: dict[str, Any] = {}  # of this process, by `load_or_recompute`


def _choose(llm: Any, choice: str) -> None:
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    planner = scheduler.connector.scheduler_half._planner  # noqa: SLF001 - no user changes it while an engine runs
    now = planner._control  # noqa: SLF001
    _CONTROLS.setdefault(now.settings.load_or_recompute, now)
    if choice not in _CONTROLS:
        settings = replace(now.settings, load_or_recompute=choice)
        _CONTROLS[choice] = replace(now, settings=settings, counts=Counter())
    planner._control = _CONTROLS[choice]  # noqa: SLF001
