"""Shows what this machine can do for kvloom: versions, devices, speeds, extras, engines and servers. A few seconds."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from ...evaluation.environment import BUNDLED_MODEL, devices, environment, memory_bytes, usable
from ...evaluation.page import Row, Table
from ...evaluation.report import BenchResult, Metric
from .integrations import look
from .reachable import reach

COPY_BYTES = 128 << 20
DISK_BYTES = 32 << 20
REPEATS = 5
BUDGET_S = 1.0  # a slow disk is asked fewer times
MEANING = (
    "Speeds: median (10th to 90th percentile) of bytes copied, written with fsync, and read back. Where the system "
    "keeps cached pages although it was asked to drop them, the read speed is that of memory, not of the disk."
)
SHOWN = ("kvloom", "python", "torch", "transformers", "system", "cpu", "cores")
EXTRAS = {  # modules that each brings
    "transformers": ("transformers", "tokenizers"),
    "compress": ("zstandard", "numba"),
    "retrieval": ("faiss", "numba"),
    "triton": ("triton",),
    "rag": ("transformers", "semantic_text_splitter", "pypdf", "bs4", "charset_normalizer"),
    "langchain": ("langchain_core",),
    "llamaindex": ("llama_index.core",),
    "haystack": ("haystack",),
    "service": ("fastapi", "uvicorn", "httptools", "pydantic_settings", "prometheus_client"),
    "events": ("zmq", "msgspec"),
    "telemetry": ("opentelemetry",),
    "redis": ("redis",),
    "s3": ("obstore",),
    "mooncake": ("mooncake",),
    "metrics": ("prometheus_client",),
    "bench": ("transformers", "tokenizers", "matplotlib"),
    "bench-peers": ("lmdb",),
    "testing": ("pytest",),
}


def diagnose(folder: Path, urls: Sequence[str] = (), *, speeds: bool = True) -> BenchResult:
    """Measure this machine, and see what is installed and reachable. No engine is imported.

    Parameters
    ----------
    folder : where the disk is measured; a file of 32 MiB is written there and removed.
    speeds : measure copies and the disk, too, which takes seconds.
    urls : of servers that are asked, see `reach`. `unreachable` counts those that cannot be used.

    Raises
    ------
    OSError : `folder` is not there or not writable.
    ValueError : a URL is none that `reach` knows.
    """
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder; name one whose disk can be measured")
    answers = [reach(url) for url in urls]
    metrics = machine_speeds(folder) if speeds else {}
    env, rows = environment(), [*_devices(), *_extras(), _model()]
    shown: list[Row] = [[name, str(env[name] or "not installed")] for name in SHOWN]
    shown.append(["memory", f"{(memory_bytes() or 0) / 2**30:.1f} GiB"])
    shown += [[str(row["subject"]), str(row["finding"])] for row in rows]
    for name, metric in metrics.items():
        interval = "" if metric.low is None else f"  ({metric.low:.2f} to {metric.high:.2f})"
        shown.append([name.replace("_", " "), f"{metric.value:.2f} {metric.unit}{interval}"])
    tables = [Table(["subject", "finding"], shown, "kvloom doctor", left=(0, 1))]
    found = look()
    rows += [{"subject": f"integration {each.name}", **asdict(each), "finding": each.text} for each in found]
    cells: list[Row] = [[each.name, each.package or "-", each.text, each.command] for each in found]
    heads = ["with", "package", "finding", "command that comes next"]
    tables.append(Table(heads, cells, "engines, frameworks and servers, in this environment", left=(0, 1, 2, 3)))
    if answers:
        rows += [{"subject": f"server {each.where}", **asdict(each), "finding": each.text} for each in answers]
        cells = [[each.where, "yes" if each.is_usable else "no", each.text, each.command] for each in answers]
        heads = ["server", "usable", "finding", "command that starts one"]
        tables.append(Table(heads, cells, "servers that were asked", left=(0, 1, 2, 3)))
        metrics["unreachable"] = Metric(sum(not each.is_usable for each in answers), unit="servers")
    return BenchResult("doctor", metrics, rows, tables, notes=[MEANING] if speeds else [])


def machine_speeds(folder: Path) -> dict[str, Metric]:
    """Speeds of copies and of the folder's disk, in GB/s, by name: takes some seconds."""
    source, target = torch.ones(COPY_BYTES, dtype=torch.uint8), torch.empty(COPY_BYTES, dtype=torch.uint8)
    metrics = {"host_copy_speed": _speed(COPY_BYTES, lambda: target.copy_(source))}
    if torch.cuda.is_available():
        metrics["device_copy_speed"] = _device_copy_speed(source)
    return metrics | _disk_speeds(folder, baseline=metrics["host_copy_speed"].value)


def _speed(size_bytes: int, work: Callable[[], object], *, before: Callable[[], object] = lambda: None) -> Metric:
    """Bytes a second of `work`, warmed up once; `before` is not timed."""
    before()
    work()
    found: list[float] = []
    began = time.perf_counter()
    while len(found) < REPEATS and (not found or time.perf_counter() - began < BUDGET_S):
        before()
        start = time.perf_counter()
        work()
        found.append(size_bytes / (time.perf_counter() - start) / 1e9)
    return Metric.of_samples(found, unit="GB/s")


def _device_copy_speed(source: torch.Tensor) -> Metric:
    pinned, target = source.pin_memory(), torch.empty_like(source, device="cuda")

    def copy() -> None:
        target.copy_(pinned, non_blocking=True)
        torch.cuda.synchronize()

    return _speed(len(source), copy)


def _disk_speeds(folder: Path, *, baseline: float) -> dict[str, Metric]:
    data, buffer = os.urandom(DISK_BYTES), bytearray(DISK_BYTES)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:

        def write() -> None:
            file.seek(0)
            written = 0
            while written < DISK_BYTES:
                written += file.write(memoryview(data)[written:]) or 0
            os.fsync(file.fileno())

        def forget() -> None:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

        def read() -> None:
            file.seek(0)
            got = 0
            while got < DISK_BYTES:
                got += file.readinto(memoryview(buffer)[got:]) or 0

        speeds = {
            "disk_write_speed": _speed(DISK_BYTES, write),
            "disk_read_speed": _speed(DISK_BYTES, read, before=forget),
        }
    return {name: Metric(m.value, m.low, m.high, m.unit, baseline) for name, m in speeds.items()}


def _devices() -> list[dict[str, object]]:
    found = [f"{device['name']}, {int(device['memory_bytes']) / 2**30:.0f} GiB" for device in devices()]
    return [{"subject": "device", "finding": text} for text in found or ["none; kvloom runs on the processor"]]


def _extras() -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for extra, modules in EXTRAS.items():
        missing = [module for module in modules if not usable(module)]
        finding = f'{", ".join(missing)} missing; run: pip install "kvloom[{extra}]"' if missing else "usable"
        rows.append({"subject": f"extra {extra}", "finding": finding})
    return rows


def _model() -> dict[str, object]:
    weights = BUNDLED_MODEL / "model.safetensors"
    finding = f"{weights.stat().st_size / 2**20:.1f} MiB" if weights.exists() else "missing; run: make reference"
    return {"subject": "reference model", "finding": finding}
