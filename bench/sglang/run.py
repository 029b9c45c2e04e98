"""What a prefix hit from storage costs in stock SGLang, beside HiCache's own `file` backend and beside computing.

`kvloom bench sglang`, in SGLang's environment. Each backend has an engine of its own, one after the other; prompts are
equal. Every hit is checked: SGLang says that storage gave it, and the token is the one that was computed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...evaluation.page import Row, Table
from ...evaluation.report import BenchResult, Metric, Target
from ..harness.page_cache import can_drop_page_cache, file_system
from ..vllm.inputs import Shape, make_model
from .served import PAGE_TOKENS

KVLOOM, FILE = "kvloom", "HiCache file"


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured: rounds, tokens of a prompt, and the random model."""

    rounds: int
    tokens: int
    shape: Shape


FULL = Sizes(7, 4096, Shape())
QUICK = Sizes(2, 512, Shape(layers=2, hidden=256, intermediate=512, heads=4, kv_heads=2, vocabulary=512))


def run(*, quick: bool, folder: Path) -> BenchResult:
    """Measure in `folder`, whose disk the stores are on.

    Raises
    ------
    ImportError : SGLang is not installed here.
    RuntimeError : an engine does not start; the message has the end of its log.
    """
    if find_spec("sglang") is None:
        raise ImportError(
            "SGLang is not installed in this environment; engines have one of their own: "
            "make engines, then .venv-engines/sglang/bin/kvloom bench sglang"
        )
    sizes = QUICK if quick else FULL
    with tempfile.TemporaryDirectory(dir=folder) as name:
        place = Path(name)
        can_be_cold, system = can_drop_page_cache(place), file_system(place)
        make_model(place / "model", sizes.shape)
        found = {backend: _measured(backend, place, sizes) for backend in (KVLOOM, FILE)}
    metrics = {}
    for way in ("cold_s", "warm_s"):
        if way == "cold_s" and not can_be_cold:
            continue
        ours, theirs = (Metric.of_samples(found[backend][way], unit="s") for backend in (KVLOOM, FILE))
        metrics[f"storage_hit_{way}"] = Metric(ours.value, ours.low, ours.high, "s", theirs.value)
        metrics[f"storage_hit_{way[:-2]}_vs_file"] = Metric(theirs.value / ours.value, unit="times", baseline=FILE)
    computed = Metric.of_samples(found[KVLOOM]["computed_s"], unit="s")
    metrics["computed_s"] = computed
    metrics["speedup_over_computing"] = Metric(
        computed.value / Metric.of_samples(found[KVLOOM]["warm_s"], unit="s").value, unit="times", baseline="computing"
    )
    metrics["wrong_tokens"] = Metric(sum(found[KVLOOM][name] for name in ("wrong",)), unit="tokens", baseline=0.0)
    metrics["missed_hits"] = Metric(found[KVLOOM]["missed"], unit="requests", baseline=float(found[FILE]["missed"]))
    rows = [
        {"backend": backend, "way": way, "round": i, "seconds": seconds}
        for backend, times in found.items()
        for way in ("computed_s", "cold_s", "warm_s")
        for i, seconds in enumerate(times[way])
    ]
    return BenchResult(
        "sglang",
        metrics,
        rows=rows,
        tables=[_table(found, can_be_cold)],
        targets=[Target("wrong_tokens", "<=", 0), Target("missed_hits", "<=", 0)],
        notes=[
            f"{sizes.tokens:,} tokens, pages of {PAGE_TOKENS}, a random model of {sizes.shape.layers} layers, {system}",
            "Before a hit SGLang's own caches are flushed; cold: the system's page cache, too.",
        ],
        title="What does a prefix hit from storage cost in SGLang?",
    )


def _measured(backend: str, place: Path, sizes: Sizes) -> dict[str, Any]:
    folder = place / backend.replace(" ", "-")
    folder.mkdir()
    extra: dict[str, Any] = {"prefetch_threshold": PAGE_TOKENS}
    if backend == KVLOOM:
        extra |= {
            "backend_name": "kvloom",
            "module_path": "kvloom.connectors.sglang",
            "class_name": "KVLoomStorage",
            "interface_v1": 1,
            "hicache_storage_pass_prefix_keys": True,
            "disk_path": str(folder),
            "model_id": "benchmark",
        }
    task = {
        "backend": "dynamic" if backend == KVLOOM else "file",
        "extra": extra,
        "folder": str(folder),
        "model": str(place / "model"),
        "rounds": sizes.rounds,
        "tokens": sizes.tokens,
        "vocabulary": sizes.shape.vocabulary,
    }
    command = [sys.executable, "-m", "kvloom.bench.sglang.served", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    last = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
    if last is None:
        raise RuntimeError(f"SGLang with {backend} does not run: {done.stderr[-2000:]}")
    measured: dict[str, Any] = json.loads(last.removeprefix("RESULT "))
    return measured


def _table(found: dict[str, dict[str, Any]], can_be_cold: bool) -> Table:
    ways = {"computed_s": "computed", **({"cold_s": "cold"} if can_be_cold else {}), "warm_s": "warm"}
    rows: list[Row] = []
    for backend, times in found.items():
        cells = [1000 * Metric.of_samples(times[way], unit="s").value for way in ways]
        rows.append([backend, *cells])
    return Table(["backend", *(f"{name} (ms)" for name in ways.values())], rows, "Time to the first token")
