"""How fast is the service, beside a copy, a bare socket and Redis; does it lose anything? `kvloom bench service`."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ...core import ChunkKey, EncodedChunk
from ...errors import KVLoomError
from ...evaluation.page import Table
from ...evaluation.report import BenchResult, Metric, Target
from ...kvstore.format import to_bytes
from ...kvstore.tiers.remote.client import KVLoomClient
from ..harness.rounds import Comparison, size_text, speed_table
from ..harness.samples import encoded, sample_chunk, sample_key
from .servers import BareSocket, ServedAt, kvloom_server, redis_server

KIB, MIB = 1 << 10, 1 << 20
COPY, SHM, HTTP, SOCKET, REDIS = "a plain copy", "kvloom, shared memory", "kvloom, HTTP", "a bare socket", "Redis"
MATCHED_KEYS = 256
TITLE = "How fast is the service, beside a copy, a bare socket and Redis, and does it lose anything?"
MEANING = (
    "Medians over the rounds, in which the ways take turns; a share is the median of the ratios within each round, the "
    "worst from 1 MiB on. kvloom verifies every byte, the others none. LMCache's server is not compared yet."
)
TARGETS = (
    Target("shm_get_vs_copy", ">=", 0.7),
    Target("http_get_vs_socket", ">=", 0.6),
    Target("http_get_vs_redis", ">=", 1.0),
    Target("match_256_p99_s", "<", 0.005),
    Target("errors_under_load", "<", 1),
    Target("acknowledged_lost", "<", 1),
)


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured."""

    chunks: tuple[int, ...]
    rounds: int
    clients: int
    load_s: float


FULL = Sizes((64 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB, 32 * MIB), 20, 64, 120.0)
QUICK = Sizes((64 * KIB, MIB), 2, 4, 1.0)


def run(*, quick: bool = False) -> BenchResult:
    """Measure transfers one at a time, then a full load, its end by SIGTERM, and what is there afterwards."""
    sizes = QUICK if quick else FULL
    with tempfile.TemporaryDirectory() as folder:
        found, notes = _transfers(Path(folder), sizes)
        load = _load(Path(folder, "load"), sizes)
    metrics = _figures(found) | load
    rows = [row for comparison in found for row in comparison.rows()]
    tables: list[Table] = [speed_table([c for c in found if c.what == what]) for what in ("get", "put")]
    return BenchResult("service", metrics, rows, tables, targets=TARGETS, notes=[*notes, MEANING], title=TITLE)


def _transfers(folder: Path, sizes: Sizes) -> tuple[list[Comparison], list[str]]:
    found, notes = [], []
    with (
        kvloom_server(folder / "transfers", host_bytes=1 << 30) as (served, _),
        redis_server(folder) as redis_port,
        KVLoomClient(served.url, token=served.token) as shared,
        KVLoomClient(served.url, token=served.token, shared_memory=False) as plain,
    ):
        redis = _redis(redis_port)
        if redis is None:
            notes.append("Redis is left out: it needs redis-server and the Python package redis.")
        bare = BareSocket(2 * sizes.chunks[-1])
        try:
            for nbytes in sizes.chunks:
                key = sample_key(nbytes)
                (blob,) = encoded({key: sample_chunk(nbytes, seed=1)}).values()
                found += _compared(key, blob, nbytes, sizes.rounds, shared, plain, bare, redis)
        finally:
            bare.close()
    return found, notes


def _compared(
    key: ChunkKey,
    blob: EncodedChunk,
    nbytes: int,
    rounds: int,
    shared: KVLoomClient,
    plain: KVLoomClient,
    bare: BareSocket,
    redis: Any,
) -> list[Comparison]:
    data = bytearray(to_bytes(key, blob))
    source, target = torch.frombuffer(data, dtype=torch.uint8), torch.empty(len(data), dtype=torch.uint8)
    view: memoryview = target.numpy().data
    puts: dict[str, Callable[[], object]] = {
        COPY: lambda: target.copy_(source),
        SHM: lambda: shared.put(key, blob),
        HTTP: lambda: plain.put(key, blob),
        SOCKET: lambda: bare.put(memoryview(data)),
    }
    gets: dict[str, Callable[[], object]] = {
        COPY: lambda: target.copy_(source),
        SHM: lambda: shared.get(key),
        HTTP: lambda: plain.get(key),
        SOCKET: lambda: bare.get(view),
    }
    if redis is not None:
        puts[REDIS] = lambda: redis.set(key, memoryview(data))
        gets[REDIS] = lambda: redis.get(key)
    return [Comparison(what, nbytes, 1, COPY, _timed(ways, rounds)) for what, ways in (("put", puts), ("get", gets))]


def _timed(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    for work in ways.values():
        work()  # warm: connections, memory that was touched
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, work in ways.items():
            began_s = time.perf_counter()
            work()
            seconds[way].append(time.perf_counter() - began_s)
    return seconds


def _redis(port: int | None) -> Any:
    if port is None or find_spec("redis") is None:
        return None
    from redis import Redis

    return Redis("127.0.0.1", port)


def _figures(found: list[Comparison]) -> dict[str, Metric]:
    shares = {
        "shm_get_vs_copy": ("get", SHM, COPY),
        "shm_put_vs_copy": ("put", SHM, COPY),
        "http_get_vs_socket": ("get", HTTP, SOCKET),
        "http_put_vs_socket": ("put", HTTP, SOCKET),
        "http_get_vs_redis": ("get", HTTP, REDIS),
    }
    metrics = {}
    for name, (what, way, of) in shares.items():
        large = [c for c in found if c.what == what and c.size_bytes >= MIB and of in c.seconds]
        if large:
            metrics[name] = min((c.share(way, of) for c in large), key=lambda metric: metric.value)
            for comparison in (c for c in found if c.what == what and of in c.seconds):
                metrics[f"{name}_{size_text(comparison.size_bytes).replace(' ', '')}"] = comparison.share(way, of)
    return metrics


def _load(folder: Path, sizes: Sizes) -> dict[str, Metric]:
    """All clients at once for a while, look-ups beside them; then SIGTERM, and every acknowledged put is asked for."""
    acknowledged: dict[ChunkKey, int] = {}
    errors: list[str] = []
    spent_s: list[float] = []
    ended = threading.Event()
    with kvloom_server(folder, host_bytes=2 << 30, disk=True) as (served, process):
        threads = [
            threading.Thread(target=_client, args=(served, number, ended, acknowledged, errors))
            for number in range(sizes.clients)
        ]
        threads.append(threading.Thread(target=_matches, args=(served, ended, spent_s, errors)))
        for thread in threads:
            thread.start()
        time.sleep(sizes.load_s)
        ended.set()
        for thread in threads:
            thread.join()
        process.terminate()
        process.wait(60.0)
    with (
        kvloom_server(folder, host_bytes=2 << 30, disk=True) as (served, _),
        KVLoomClient(served.url, token=_new_token(folder)) as client,
    ):
        lost = sum(client.get(key) is None for key in acknowledged)
    spent_s.sort()
    p99_s = spent_s[int(len(spent_s) * 0.99)] if spent_s else float("nan")
    return {
        "match_256_p99_s": Metric(p99_s, p99_s, p99_s, "s"),
        "errors_under_load": Metric(len(errors), len(errors), len(errors), ""),
        "acknowledged_lost": Metric(lost, lost, lost, "", baseline=f"{len(acknowledged)} puts"),
    }


def _client(
    served: ServedAt, number: int, ended: threading.Event, acknowledged: dict[ChunkKey, int], errors: list[str]
) -> None:
    """Puts its own few chunks over and over, and gets them: what is stored stays small, so that nothing is evicted."""
    (blob,) = encoded({sample_key(number): sample_chunk(MIB, seed=number)}).values()
    with KVLoomClient(served.url, token=served.token, shared_memory=False, timeout_s=30.0) as client:
        turn = 0
        while not ended.is_set():
            key = sample_key("load", number, turn % 4)
            turn += 1
            try:
                acknowledged[key] = client.put(key, blob)
                if client.get(key) is None:
                    errors.append("a chunk that was put was not there")
            except KVLoomError as exc:
                errors.append(str(exc))


def _matches(served: ServedAt, ended: threading.Event, spent_s: list[float], errors: list[str]) -> None:
    keys = [sample_key("match", number) for number in range(MATCHED_KEYS)]
    with KVLoomClient(served.url, token=served.token, shared_memory=False) as client:
        while not ended.is_set():
            began_s = time.perf_counter()
            try:
                client.match(keys)
            except KVLoomError as exc:
                errors.append(str(exc))
            spent_s.append(time.perf_counter() - began_s)
            time.sleep(0.01)


def _new_token(folder: Path) -> str:
    command = [sys.executable, "-m", f"{__package__.split('.')[0]}.cli", "token", "create", "--directory", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
