"""What do tiers on other machines cost beside a bare client of the same server, and when it fails?

`kvloom bench distributed`.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from rich.progress import Progress

from ...connectors.tier_url import open_tier
from ...core import ChunkKey, EncodedChunk, Tier
from ...errors import TierError
from ...evaluation.page import Table
from ...evaluation.report import BenchResult, Metric, Target
from ...evaluation.screen import progress
from ...kvstore.format import to_bytes
from ...kvstore.store import KVStore
from ..harness.peer import INSTALL, PeerError, find_python
from ..harness.rounds import Comparison, interleave, size_text, speed_table, timed
from ..harness.samples import encoded, sample_chunk, sample_key
from ..harness.servers import (
    Server,
    make_bucket,
    missing_for,
    mooncake_master,
    mooncake_node,
    redis_server,
    s3_server,
)
from .lmcache_l2 import FS, KVLOOM, NATIVE, L2Sizes, compare

MIB = 1 << 20
BARE, TIER, STORE = "bare client", "tier", "store"
KINDS = ("redis", "mooncake", "s3")
BUCKET = "kvloom"
STALL_TIMEOUT_S = 1.0
TITLE = "What do tiers on other machines cost beside a bare client of the same server, and when it fails?"
MEANING = (
    "Servers of the same machine, over loopback. Medians over rounds in which the ways take turns; a share is the "
    "median of the ratios within each round, the worst of the sizes. The tier makes every checksum that it stores and "
    "verifies every byte that it returns; the bare client does neither: redis-py's set and get, obstore's put and get, "
    "Mooncake's upsert_from and get_into with registered buffers. The stall is the longest call of a store "
    f"beyond its timeout of {STALL_TIMEOUT_S} s while the server, or one of two Mooncake nodes, is frozen and goes on. "
    "LMCache's own benchmark stores and loads through kvloom's L2 adapter and LMCache's two for files, on one disk, "
    "from the page cache; kvloom verifies what it reads, the others compare nothing. A share is the median of pairs of "
    "processes; LMCache itself compares what came back with what it stored."
)
TARGETS = (
    Target("mooncake_put_vs_bare", ">=", 0.85),
    Target("mooncake_get_vs_bare", ">=", 0.85),
    Target("redis_put_vs_bare", ">=", 0.85),
    Target("redis_get_vs_bare", ">=", 0.85),
    Target("s3_get_vs_bare", ">=", 0.85),
    Target("lmcache_l2_store_vs_fs", ">=", 1.0),
    Target("lmcache_l2_load_vs_fs", ">=", 1.0),
    Target("longest_stall_over_deadline_s", "<=", 0.5),
    Target("wrong_bytes", "<=", 0.0),
)

Bare: TypeAlias = tuple[Callable[[], object], Callable[[], object]]
"""Puts one object, and gets it, with the engine's own client."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured."""

    chunks: tuple[int, ...]
    rounds: int
    frozen_s: float
    lmcache: L2Sizes


FULL = Sizes((MIB, 4 * MIB, 16 * MIB), 15, 3.0, L2Sizes(4 * MIB, 16, 7, 7))
QUICK = Sizes((MIB,), 2, 4.0, L2Sizes(MIB // 4, 8, 1, 1))


@dataclass(frozen=True, slots=True)
class Engine:
    """A server that runs. `frozen` is what stops in the middle."""

    url: str
    frozen: Server
    bare: Callable[[bytes], Bare]


def run(*, quick: bool = False, folder: Path = Path(), lmcache_python: Path | None = None) -> BenchResult:
    """Measure each engine that this machine has.

    Parameters
    ----------
    folder : whose disk is measured below LMCache.
    lmcache_python : interpreter of an environment that has LMCache; None for that of `make engines`, if it is there.

    Raises
    ------
    ValueError : `lmcache_python` is not there.
    """
    sizes, python = QUICK if quick else FULL, find_python(lmcache_python)
    found: list[Comparison] = []
    notes: list[str] = []
    metrics: dict[str, Metric] = {}
    wrong_bytes, stalls = 0, []
    for kind in KINDS:
        missing = missing_for(kind)
        if missing is not None:
            notes.append(f"{kind} is left out; it needs: {missing}")
            continue
        with tempfile.TemporaryDirectory() as place, _engine(kind, Path(place)) as engine:
            comparisons, wrong = _speeds(kind, engine, sizes)
            stall_s, wrong_in_stall = _stall(engine, sizes)
        found += comparisons
        wrong_bytes += wrong + wrong_in_stall
        stalls.append(stall_s)
        metrics[f"{kind}_stall_over_deadline_s"] = Metric(stall_s, unit="s")
        for what in ("put", "get"):
            ours = [each for each in comparisons if each.what == f"{kind} {what}"]
            metrics[f"{kind}_{what}_vs_bare"] = min((c.share(TIER) for c in ours), key=lambda share: share.value)
            for each in ours:
                metrics[f"{kind}_{what}_vs_bare_{size_text(each.size_bytes).replace(' ', '')}"] = each.share(TIER)
    below_lmcache, reason = _below_lmcache(python, folder, sizes)
    notes += [reason] if reason else []
    for name in ("store", "load"):
        shares = [each.share(KVLOOM) for each in below_lmcache if each.what == f"LMCache {name}"]
        metrics[f"lmcache_l2_{name}_vs_fs"] = shares[0] if shares else Metric(float("nan"), unit="times", baseline=FS)
        for each in below_lmcache:
            if each.what == f"LMCache {name}":
                metrics[f"lmcache_l2_{name}_vs_fs_native"] = each.share(KVLOOM, NATIVE)
    found += below_lmcache
    metrics["longest_stall_over_deadline_s"] = Metric(max(stalls, default=float("nan")), unit="s")
    metrics["wrong_bytes"] = Metric(float(wrong_bytes), unit="bytes")
    tables: list[Table] = [
        speed_table([each for each in found if each.what == what]) for what in dict.fromkeys(c.what for c in found)
    ]
    rows = [row for comparison in found for row in comparison.rows()]
    return BenchResult("distributed", metrics, rows, tables, targets=TARGETS, notes=[*notes, MEANING], title=TITLE)


def _below_lmcache(python: Path | None, folder: Path, sizes: Sizes) -> tuple[list[Comparison], str]:
    """What LMCache's own benchmark says; or nothing, and why."""
    if python is None:
        return [], f"LMCache is not installed, its figures are left out. To have them, {INSTALL}"
    try:
        with progress() as bar:
            return compare(python, folder, sizes.lmcache, bar), ""
    except PeerError as exc:
        return [], f"LMCache's figures are left out: {exc}"


def _speeds(kind: str, engine: Engine, sizes: Sizes) -> tuple[list[Comparison], int]:
    """Puts and gets of each size, and how many bytes came back wrong."""
    found, wrong_bytes = [], 0
    tier, behind = open_tier(engine.url, name="tier"), open_tier(engine.url, name="behind")
    with KVStore([behind], timeout_s=60.0) as store, progress() as bar:
        for nbytes in sizes.chunks:
            comparisons, wrong = _compared(kind, engine, tier, store, nbytes, sizes.rounds, bar)
            found += comparisons
            wrong_bytes += wrong
    tier.close()
    return found, wrong_bytes


def _compared(
    kind: str, engine: Engine, tier: Tier, store: KVStore, nbytes: int, rounds: int, bar: Progress
) -> tuple[list[Comparison], int]:
    key, other = sample_key(kind, nbytes), sample_key(kind, nbytes, "store")
    (blob,) = encoded({key: sample_chunk(nbytes, seed=1)}).values()
    bare_put, bare_get = engine.bare(to_bytes(key, blob))
    wrong_bytes = [0]

    def reading(get: Callable[[ChunkKey], EncodedChunk | None], key: ChunkKey) -> Callable[[], float]:
        def work() -> float:
            began_s = time.perf_counter()
            got = get(key)
            spent_s = time.perf_counter() - began_s
            wrong_bytes[0] += blob.nbytes if got is None else _differences(got, blob)
            return spent_s

        return work

    ways: dict[str, dict[str, Callable[[], float]]] = {
        "put": {
            BARE: lambda: timed(bare_put),
            TIER: lambda: timed(lambda: tier.put(key, blob)),
            STORE: lambda: timed(lambda: store.put_encoded(other, blob)),
        },
        "get": {
            BARE: lambda: timed(bare_get),
            TIER: reading(tier.get, key),
            STORE: reading(store.get_encoded, other),
        },
    }
    found = []
    for what, each in ways.items():
        seconds = interleave(each, rounds, bar, f"{kind} {what} {size_text(nbytes)}")
        found.append(Comparison(f"{kind} {what}", nbytes, 1, BARE, seconds))
    return found, wrong_bytes[0]


def _differences(found: EncodedChunk, expected: EncodedChunk) -> int:
    """Bytes that differ."""
    wrong = 0
    for name, tensor in expected.tensors.items():
        one, other = (each.contiguous().view(-1).view(torch.uint8) for each in (tensor, found.tensors[name]))
        wrong += tensor.nbytes if one.shape != other.shape else int((one != other).sum())
    return wrong


def _stall(engine: Engine, sizes: Sizes) -> tuple[float, int]:
    """The longest call beyond the deadline while the server is frozen and goes on, and wrong bytes meanwhile."""
    blobs = encoded({sample_key("stall", n): sample_chunk(MIB, seed=n) for n in range(8)})
    tier: Tier = open_tier(engine.url, name="stall", timeout_s=STALL_TIMEOUT_S)
    store = KVStore([tier], timeout_s=STALL_TIMEOUT_S)
    for key, blob in blobs.items():
        _tried(store, key, blob)
    ended, longest_s, wrong_bytes = threading.Event(), [0.0], [0]

    def work() -> None:
        while not ended.is_set():
            for key, blob in blobs.items():
                began_s = time.monotonic()
                found = store.get_encoded(key)
                longest_s[0] = max(longest_s[0], time.monotonic() - began_s)
                wrong_bytes[0] += 0 if found is None else _differences(found, blob)
                began_s = time.monotonic()
                _tried(store, key, blob)
                longest_s[0] = max(longest_s[0], time.monotonic() - began_s)
                time.sleep(0.01)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    engine.frozen.pause()
    time.sleep(sizes.frozen_s)
    engine.frozen.resume()
    time.sleep(1.0)
    ended.set()
    for thread in threads:
        thread.join()
    store.close()
    return max(0.0, longest_s[0] - STALL_TIMEOUT_S), wrong_bytes[0]


def _tried(store: KVStore, key: ChunkKey, blob: EncodedChunk) -> None:
    with suppress(TierError):  # the server is frozen: what counts is how long it took to say so
        store.put_encoded(key, blob)


@contextmanager
def _engine(kind: str, folder: Path) -> Iterator[Engine]:
    with ExitStack() as stack:
        if kind == "redis":
            server = stack.enter_context(redis_server(folder))
            yield Engine(f"redis://{server.host}:{server.port}/0", server, _bare_redis(server))
        elif kind == "s3":
            server = stack.enter_context(s3_server(folder))
            make_bucket(server, BUCKET)
            secret = folder / "credentials"
            secret.write_text("access\nsecret\n")
            endpoint = f"http://{server.host}:{server.port}"
            url = f"s3://{BUCKET}?endpoint={endpoint}&credentials_file={secret}"
            yield Engine(url, server, _bare_s3(endpoint, *secret.read_text().split()))
        else:
            master = stack.enter_context(mooncake_master(folder))
            nodes = [stack.enter_context(mooncake_node(folder, master, n, 512 * MIB)) for n in range(2)]
            address = f"{master.host}:{master.port}"
            yield Engine(f"mooncake://{address}", nodes[0], _bare_mooncake(address))


def _bare_redis(server: Server) -> Callable[[bytes], Bare]:
    from redis import Redis

    client = Redis(server.host, server.port or 0)
    return lambda data: (lambda: client.set("bare", data), lambda: client.get("bare"))


def _bare_s3(endpoint: str, access_key_id: str, secret_access_key: str) -> Callable[[bytes], Bare]:
    import obstore

    from ...kvstore.tiers.distributed.object_tier import s3_store

    secrets = {"access_key_id": access_key_id, "secret_access_key": secret_access_key}
    store = s3_store(BUCKET, endpoint=endpoint, **secrets, timeout_s=60.0)

    def bare(data: bytes) -> Bare:
        name = f"bare-{len(data)}"
        return lambda: obstore.put(store, name, data, use_multipart=False), lambda: obstore.get(store, name).bytes()

    return bare


def _bare_mooncake(address: str) -> Callable[[bytes], Bare]:
    from mooncake.store import MooncakeDistributedStore

    client = MooncakeDistributedStore()
    if client.setup(address.partition(":")[0], "P2PHANDSHAKE", 0, 16 * MIB, "tcp", "", address):
        raise OSError("a bare client of Mooncake could not be set up")

    def bare(data: bytes) -> Bare:
        source = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        target = torch.empty_like(source)
        for each in (source, target):
            client.register_buffer(each.data_ptr(), each.nbytes)
        name = f"bare-{len(data)}"
        return (
            lambda: client.upsert_from(name, source.data_ptr(), source.nbytes),
            lambda: client.get_into(name, target.data_ptr(), target.nbytes),
        )

    return bare
