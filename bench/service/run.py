"""How fast is the service, beside a copy, a socket, Redis and LMCache; what does it lose? `kvloom bench service`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.progress import Progress

from ...errors import KVLoomError
from ...evaluation.page import Table
from ...evaluation.report import BenchResult, Metric, Target
from ...evaluation.screen import progress
from ...kvstore.encoding.copies import copy_bytes
from ...kvstore.format import to_bytes
from ...kvstore.tiers.remote.client import KVLoomClient
from ..harness.peer import INSTALL, Peer, PeerError, find_python
from ..harness.rounds import Comparison, interleave, size_text, speed_table, timed
from ..harness.samples import encoded, sample_chunk, sample_key
from .load import load_metrics, run_load
from .servers import BareSocket, kvloom_server, redis_server

KIB, MIB = 1 << 10, 1 << 20
COPY, SHM, HTTP = "a plain copy", "kvloom, shared memory", "kvloom, HTTP"
WORKERS = 2
WORKED = f"kvloom, HTTP, {WORKERS} workers"
SOCKET, REDIS, LMCACHE = "a bare socket", "Redis", "LMCache's server"
TITLE = "How fast is the service, beside a copy, a bare socket, Redis and LMCache, and does it lose anything?"
MEANING = (
    "Medians over the rounds, in which the ways take turns, in an order drawn by lot; a share is the median of the "
    "ratios within each round. Shares over HTTP are the worst from 1 MiB on; those over shared memory are of the "
    "largest chunk, because a request costs as much as copying megabytes; every size has a figure of its own. "
    "kvloom verifies every byte, the others none. A plain copy and a bare socket are one thread's, with the "
    "system's buffers. Clients and service share the machine's processors."
)
TARGETS = (
    Target("shm_get_vs_copy", ">=", 0.7),
    Target("http_get_vs_socket", ">=", 0.6),
    Target("http_get_vs_redis", ">=", 1.0),
    Target("http_get_vs_lmcache", ">=", 1.0),
    Target("match_256_p99_s", "<", 0.005),
    Target("errors_under_load", "<", 1),
    Target("acknowledged_lost", "<", 1),
    Target("load_memory_growth", "<=", 1.1),
)


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured."""

    chunks: tuple[int, ...]
    rounds: int
    clients: int
    load_s: float
    sync_load_s: float


FULL = Sizes((64 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB, 32 * MIB), 20, 64, 120.0, 10.0)
QUICK = Sizes((64 * KIB, MIB), 2, 4, 2.0, 1.0)


def run(*, quick: bool = False, lmcache_python: Path | None = None) -> BenchResult:
    """Measure transfers one at a time, then a full load, its end by SIGTERM, and what is there afterwards.

    Parameters
    ----------
    lmcache_python : interpreter of an environment that has LMCache; None for that of `make engines`, if it is there.

    Raises
    ------
    ValueError : `lmcache_python` is not there.
    """
    sizes, python = QUICK if quick else FULL, find_python(lmcache_python)
    with tempfile.TemporaryDirectory() as folder, progress() as bar:
        found, notes = _transfers(Path(folder), sizes, python, bar)
        task = bar.add_task("load", total=3)
        load = run_load(Path(folder, "batch"), durability="batch", clients=sizes.clients, load_s=sizes.load_s)
        bar.advance(task)
        synced = run_load(Path(folder, "sync"), durability="sync", clients=sizes.clients, load_s=sizes.sync_load_s)
        bar.advance(task)
        served = run_load(
            Path(folder, "load of workers"),
            durability="batch",
            clients=sizes.clients,
            load_s=sizes.load_s,
            workers=WORKERS,
        )
        bar.advance(task)
    metrics = _figures(found) | load_metrics(load, synced, served)
    rows = [row for comparison in found for row in comparison.rows()] + load.rows() + synced.rows() + served.rows()
    tables: list[Table] = [speed_table([c for c in found if c.what == what]) for what in ("get", "put")]
    return BenchResult("service", metrics, rows, tables, targets=TARGETS, notes=[*notes, MEANING], title=TITLE)


def _transfers(folder: Path, sizes: Sizes, python: Path | None, bar: Progress) -> tuple[list[Comparison], list[str]]:
    found, notes = [], []
    with (
        kvloom_server(folder / "transfers", host_bytes=1 << 30) as (served, _),
        redis_server(folder) as redis_port,
        KVLoomClient(served.url, token=served.token) as shared,
        KVLoomClient(served.url, token=served.token, shared_memory=False) as plain,
        kvloom_server(folder / "transfers of workers", host_bytes=1 << 30, workers=WORKERS) as (working, _),
        KVLoomClient(working.url, token=working.token, shared_memory=False) as worked,
        closing(BareSocket(2 * sizes.chunks[-1])) as bare,
        ExitStack() as stack,
    ):
        redis = _redis(redis_port)
        if redis is None:
            notes.append("Redis is left out: it needs redis-server and the Python package redis.")
        peer: Peer | None = None
        if python is None:
            notes.append(f"LMCache is not installed, its figures are left out. To have them: {INSTALL}")
        else:
            try:
                peer = Peer(python.absolute(), 1 << 30, module="bench.service.lmcache_peer")
                stack.enter_context(closing(peer))
                notes.append(
                    f"LMCache {peer.version}: its own server and its storage manager's remote backend (lm://)."
                )
            except PeerError as exc:
                notes.append(f"LMCache could not be measured, its figures are left out: {exc}")
        for _ in range(2):  # the first answer lets the client ask for shared memory
            shared.get(sample_key("absent"))
        for nbytes in sizes.chunks:
            puts, gets = _ways(nbytes, shared, plain, worked, bare, redis, peer)
            for what, ways in (("put", puts), ("get", gets)):
                seconds = interleave(ways, sizes.rounds, bar, f"{what}, {size_text(nbytes)}")
                found.append(Comparison(what, nbytes, 1, COPY, seconds))
    return found, notes


def _ways(
    nbytes: int,
    shared: KVLoomClient,
    plain: KVLoomClient,
    worked: KVLoomClient,
    bare: BareSocket,
    redis: Any,
    peer: Peer | None,
) -> tuple[dict[str, Callable[[], float]], dict[str, Callable[[], float]]]:
    """Each way of putting and of getting a chunk, as seconds."""
    key = sample_key(nbytes)
    (blob,) = encoded({key: sample_chunk(nbytes, seed=1)}).values()
    source = bytearray(to_bytes(key, blob))
    target = memoryview(bytearray(len(source)))
    data = memoryview(source)
    puts: dict[str, Callable[[], float]] = {
        COPY: partial(timed, lambda: copy_bytes(target, data)),
        SHM: partial(timed, lambda: shared.put(key, blob)),
        HTTP: partial(timed, lambda: plain.put(key, blob)),
        WORKED: partial(timed, lambda: worked.put(key, blob)),
        SOCKET: partial(timed, lambda: bare.put(data)),
    }
    gets: dict[str, Callable[[], float]] = {
        COPY: puts[COPY],
        SHM: partial(timed, lambda: _present(shared.get(key))),
        HTTP: partial(timed, lambda: _present(plain.get(key))),
        WORKED: partial(timed, lambda: _present(worked.get(key))),
        SOCKET: partial(timed, lambda: bare.get(target)),
    }
    if redis is not None:
        puts[REDIS] = partial(timed, lambda: redis.set(key, data))
        gets[REDIS] = partial(timed, lambda: _present(redis.get(key)))
    if peer is not None:
        puts[LMCACHE] = partial(peer.ask, "put", size_bytes=nbytes)
        gets[LMCACHE] = partial(peer.ask, "get")
    return puts, gets


def _present(found: object) -> object:
    if found is None:
        raise KVLoomError("a chunk that was put is not there: what took no time was no transfer")
    return found


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
        "http_get_vs_lmcache": ("get", HTTP, LMCACHE),
        f"http_get_vs_socket_{WORKERS}_workers": ("get", WORKED, SOCKET),
        f"http_put_vs_socket_{WORKERS}_workers": ("put", WORKED, SOCKET),
        f"http_get_vs_lmcache_{WORKERS}_workers": ("get", WORKED, LMCACHE),
    }
    metrics = {}
    for name, (what, way, of) in shares.items():
        large = [c for c in found if c.what == what and c.size_bytes >= MIB and of in c.seconds]
        if large:
            of_all = large[-1:] if way == SHM else large
            metrics[name] = min((c.share(way, of) for c in of_all), key=lambda metric: metric.value)
            for comparison in (c for c in found if c.what == what and of in c.seconds):
                metrics[f"{name}_{size_text(comparison.size_bytes).replace(' ', '')}"] = comparison.share(way, of)
    return metrics
