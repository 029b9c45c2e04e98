"""All clients at once: errors, look-ups beside them, memory over time, and what is there after the service ended."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal, TypeAlias

from ...core import ChunkKey
from ...evaluation.report import Metric
from ...kvstore.tiers.remote.client import KVLoomClient
from ..harness.samples import sample_key
from .load_client import CHUNK_BYTES
from .servers import PACKAGE, ServedAt, kvloom_server, new_token

KVLoomServer: TypeAlias = AbstractContextManager[tuple[ServedAt, subprocess.Popen[str]]]

_PROCESSES = 4
_SAMPLE_S = 0.5
_WARM_SHARE = 0.25  # of the time, in which buffers and tiers fill
_STOP_S = 120.0


@dataclass(frozen=True, slots=True)
class LoadResult:
    """What a load has shown. `rss`: seconds since it began, and bytes of the service's memory, in order."""

    durability: str
    workers: int
    clients: int
    spent_s: float
    operations: int
    errors: Sequence[str]
    match_s: Sequence[float]
    bare_s: Sequence[float]
    rss: Sequence[tuple[float, int]]
    acknowledged: int
    lost: int

    @property
    def growth(self) -> float:
        """Memory in the last quarter over that in the second one."""
        warm = [nbytes for at_s, nbytes in self.rss if at_s >= _WARM_SHARE * self.spent_s]
        if len(warm) < 3:
            return float("nan")
        third = max(1, len(warm) // 3)
        return median(warm[-third:]) / median(warm[:third])

    def match_quantile(self, share: float) -> float:
        return _quantile(self.match_s, share)

    def bare_quantile(self, share: float) -> float:
        return _quantile(self.bare_s, share)

    def rows(self) -> list[dict[str, object]]:
        """The memory over time, and what was done, as plain values."""
        done = {"what": "load", "durability": self.durability, "clients": self.clients, "spent_s": self.spent_s}
        done |= {"workers": self.workers}
        done |= {"operations": self.operations, "errors": len(self.errors), "first_errors": list(self.errors[:5])}
        done |= {"acknowledged": self.acknowledged, "lost": self.lost}
        done |= {"match_p50_s": self.match_quantile(0.5), "match_p99_s": self.match_quantile(0.99)}
        done |= {"bare_p50_s": self.bare_quantile(0.5), "bare_p99_s": self.bare_quantile(0.99)}
        memory = [{"what": "memory", "durability": self.durability, "at_s": at_s, "bytes": n} for at_s, n in self.rss]
        return [done, *memory]


def _quantile(seconds: Sequence[float], share: float) -> float:
    times = sorted(seconds)
    return times[min(len(times) - 1, int(len(times) * share))] if times else float("nan")


def run_load(
    folder: Path, *, durability: Literal["batch", "sync"], clients: int, load_s: float, workers: int = 1
) -> LoadResult:
    """Clients at full tilt for `load_s`, then SIGTERM; a new service is asked for everything that was acknowledged."""
    serve = partial(
        kvloom_server, folder, host_bytes=2 << 30, disk_bytes=4 << 30, durability=durability, workers=workers
    )
    if folder.exists():
        raise ValueError(f"{folder} is there already; expected a folder for this load alone, whose token is shown once")
    with serve() as (served, process), ExitStack() as stack:
        numbers = range(clients)
        shares = [[n for n in numbers if n % _PROCESSES == part] for part in range(min(_PROCESSES, clients))]
        told: list[dict[str, Any]] = [*({"clients": share} for share in shares), {"match": True}]
        processes = [stack.enter_context(_client_process(served, each)) for each in told]
        began_s = time.monotonic()
        for each in processes:
            _say(each, "begin")
        rss = []
        while time.monotonic() - began_s < load_s:
            rss.append((round(time.monotonic() - began_s, 2), _memory_bytes(process.pid)))
            time.sleep(_SAMPLE_S)
        for each in processes:
            _say(each, "end")
        seen = [json.loads(_line(each)) for each in processes]
        spent_s = time.monotonic() - began_s
        process.terminate()
        process.wait(_STOP_S)
    acknowledged = {tuple(name) for each in seen for name in each["acknowledged"]}
    lost = _lost(folder, [sample_key("load", *name) for name in sorted(acknowledged)], serve)
    return LoadResult(
        durability,
        workers,
        clients,
        spent_s,
        sum(each["operations"] for each in seen),
        [error for each in seen for error in each["errors"]],
        [spent for each in seen for spent in each["match_s"]],
        [spent for each in seen for spent in each["bare_s"]],
        rss,
        len(acknowledged),
        lost,
    )


def load_metrics(load: LoadResult, *others: LoadResult) -> dict[str, Metric]:
    """The figures of a load; errors and losses of others are added, and speeds of those with workers stand beside."""
    growth, loads = load.growth, (load, *others)
    errors, lost = sum(len(each.errors) for each in loads), sum(each.lost for each in loads)
    asked = ", ".join(f"{each.acknowledged} keys of class {each.durability}" for each in loads)
    operations = sum(each.operations for each in loads)
    metrics = {
        "errors_under_load": Metric(errors, errors, errors, "", f"{operations} operations"),
        "acknowledged_lost": Metric(lost, lost, lost, "", asked),
        "load_memory_growth": Metric(growth, growth, growth, "times", "the second quarter of the time"),
    }
    for each in (load, *(other for other in others if other.workers > 1)):
        name = "" if each is load else f"_{each.workers}_workers"
        p99_s, bare_s = each.match_quantile(0.99), each.bare_quantile(0.99)
        beside = f"{len(each.match_s)} look-ups; as many bytes to a bare socket beside them take {bare_s:.3g} s"
        gb_s = each.operations * CHUNK_BYTES / each.spent_s / 1e9
        metrics[f"match_256_p99_s{name}"] = Metric(p99_s, p99_s, p99_s, "s", beside)
        metrics[f"bare_256_p99_s{name}"] = Metric(bare_s, bare_s, bare_s, "s", f"{len(each.bare_s)} exchanges")
        metrics[f"load_gb_s{name}"] = Metric(gb_s, gb_s, gb_s, "GB/s", f"{each.clients} clients")
    return metrics


def _lost(folder: Path, keys: Sequence[ChunkKey], serve: Callable[[], KVLoomServer]) -> int:
    with (
        serve() as (served, _),
        KVLoomClient(served.url, token=new_token(folder), shared_memory=False) as client,
    ):
        return sum(client.get(key) is None for key in keys)


@contextmanager
def _client_process(served: ServedAt, told: dict[str, Any]) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", f"{PACKAGE}.bench.service.load_client"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            _say(process, json.dumps({"url": served.url, "token": served.token, **told}))
            if _line(process) != "ready":
                raise OSError("a process of clients did not start")
            yield process
        finally:
            process.kill()


def _say(process: subprocess.Popen[str], line: str) -> None:
    if process.stdin is not None:
        process.stdin.write(line + "\n")
        process.stdin.flush()


def _line(process: subprocess.Popen[str]) -> str:
    return "" if process.stdout is None else process.stdout.readline().strip()


def _memory_bytes(pid: int) -> int:
    """What the process takes for itself: files that it maps are left out."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("RssAnon:", "RssShmem:")))
