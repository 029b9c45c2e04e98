"""As a program: one engine of stock SGLang with one storage backend, whose first tokens are timed.

It reads what to do as JSON from its first argument, and writes what it measured as the last line of its output.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..harness.page_cache import drop_page_cache

PAGE_TOKENS = 64
_SETTLE_S = 120.0
_QUIET_S = 2.0


def prompt(seed: int, tokens: int, vocabulary: int) -> list[int]:
    """Random token ids; equal seeds, equal prompts."""
    rng = random.Random(seed)
    return [rng.randrange(8, vocabulary) for _ in range(tokens)]


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Seconds to the first token: nothing cached, from storage after the system's page cache was emptied, and warm.

    Every round has its own prompt. A hit counts only if SGLang itself says that storage gave all whole pages.
    """
    os.environ.update(SGLANG_USE_CPU_ENGINE="1", HF_HUB_OFFLINE="1")
    os.environ["SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR"] = task["folder"]
    import sglang

    engine = sglang.Engine(
        model_path=task["model"], device="cpu", attention_backend="torch_native", dtype="float32",
        max_total_tokens=2 * task["tokens"] + 1024, page_size=PAGE_TOKENS, disable_cuda_graph=True,
        mem_fraction_static=0.3, log_level="error", skip_tokenizer_init=True, enable_hierarchical_cache=True,
        hicache_ratio=2.0, hicache_io_backend="kernel", hicache_mem_layout="page_first",
        hicache_write_policy="write_through", hicache_storage_backend=task["backend"],
        hicache_storage_prefetch_policy="wait_complete",
        hicache_storage_backend_extra_config=json.dumps(task["extra"]),
    )  # fmt: skip
    found: dict[str, list[float]] = {"computed_s": [], "cold_s": [], "warm_s": []}
    answers, wrong, missed = [], 0, 0
    folder, whole = Path(task["folder"]), (task["tokens"] - 1) // PAGE_TOKENS * PAGE_TOKENS
    try:
        _first_token(engine, prompt(1 << 20, task["tokens"], task["vocabulary"]))  # a warm-up
        for seed in range(task["rounds"]):
            row = prompt(seed, task["tokens"], task["vocabulary"])
            spent_s, answer, _ = _first_token(engine, row)
            found["computed_s"].append(spent_s)
            answers.append(answer)
            _settle(folder)
        for name in ("cold_s", "warm_s"):
            for seed, answer in enumerate(answers):
                _flush(engine)
                if name == "cold_s":
                    drop_page_cache(folder)
                spent_s, token, stored = _first_token(engine, prompt(seed, task["tokens"], task["vocabulary"]))
                wrong += token != answer
                missed += stored != whole
                found[name].append(spent_s)
    finally:
        engine.shutdown()
    return {**found, "wrong": wrong, "missed": missed}


def _first_token(engine: Any, row: Sequence[int]) -> tuple[float, int, int]:
    """Seconds, the token, and the tokens that came from storage."""
    began_s = time.perf_counter()
    output = engine.generate(input_ids=list(row), sampling_params={"temperature": 0, "max_new_tokens": 1})
    spent_s = time.perf_counter() - began_s
    details = output["meta_info"].get("cached_tokens_details") or {}
    return spent_s, int(output["output_ids"][0]), int(details.get("storage", 0))


def _flush(engine: Any) -> None:
    """Empty SGLang's own caches; it refuses as long as it is still at work on the request before."""
    end_s = time.monotonic() + _SETTLE_S
    while not engine.flush_cache().success:
        if time.monotonic() > end_s:
            raise TimeoutError(f"SGLang has not emptied its caches within {_SETTLE_S:.0f} s")
        time.sleep(0.1)


def _settle(folder: Path) -> None:
    """Wait until nothing has been written for two seconds: what is saved begins after the answer."""
    end_s, size, since_s = time.monotonic() + _SETTLE_S, -1, time.monotonic()
    while time.monotonic() < end_s:
        now = sum(path.stat().st_blocks for path in folder.rglob("*") if path.is_file())
        if now != size:
            size, since_s = now, time.monotonic()
        elif now and time.monotonic() - since_s > _QUIET_S:
            return
        time.sleep(0.2)


if __name__ == "__main__":
    sys.stdout.write("RESULT " + json.dumps(measure(json.loads(sys.argv[1]))) + "\n")
