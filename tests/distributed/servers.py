"""Real servers for these tests, one of each kind for all of them, and skips where one cannot be had."""

import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kvloom.bench.harness.servers import (
    Server,
    make_bucket,
    missing_for,
    mooncake_master,
    mooncake_node,
    redis_server,
    s3_server,
)
from kvloom.kvstore.tiers.distributed.tier import DistributedTier, Sharing

BUCKET = "kvloom"
MIB = 1 << 20


def expect(kind: str) -> None:
    """Skip the test if the machine cannot run this server."""
    missing = missing_for(kind)
    if missing is not None:
        pytest.skip(f"{kind} cannot be run here: {missing}")


def a_prefix() -> str:
    """A prefix that nothing else uses: tests share a server."""
    return f"kvloom-{uuid.uuid4().hex[:12]}/"


def a_sharing(**changes: Any) -> Sharing:
    return Sharing(**{"name": "far", "prefix": a_prefix(), "recheck_s": 0.0, **changes})


@dataclass
class Cluster:
    """Mooncake's master and two nodes."""

    master: Server
    nodes: list[Server]

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.master.port}"


@pytest.fixture(scope="session")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    expect("redis")
    folder: Path = tmp_path_factory.mktemp("redis")
    with redis_server(folder) as server:
        yield server


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    expect("s3")
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        make_bucket(server, BUCKET)
        yield server


@pytest.fixture(scope="session")
def mooncake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    expect("mooncake")
    with a_cluster(tmp_path_factory.mktemp("mooncake")) as cluster:
        yield cluster


class a_cluster(ExitStack):  # noqa: N801  reads as a function
    """A cluster of its own."""

    def __init__(self, folder: Path, segment_bytes: int = 512 * MIB) -> None:
        super().__init__()
        self._folder, self._segment_bytes = folder, segment_bytes

    def __enter__(self) -> Any:
        super().__enter__()
        master = self.enter_context(mooncake_master(self._folder))
        nodes = [mooncake_node(self._folder, master, number, self._segment_bytes) for number in range(2)]
        return Cluster(master, [self.enter_context(node) for node in nodes])


def redis_tier(server: Server, sharing: Sharing, port: int | None = None) -> DistributedTier:
    from kvloom.kvstore.tiers.distributed.redis_tier import RedisTier

    return RedisTier(f"redis://127.0.0.1:{port or server.port}/0", sharing=sharing)


def s3_tier(
    server: Server, sharing: Sharing, port: int | None = None, multipart_bytes: int = 8 * MIB
) -> DistributedTier:
    from kvloom.kvstore.tiers.distributed.object_tier import ObjectStoreTier, s3_store

    endpoint = f"http://127.0.0.1:{port or server.port}"
    store = s3_store(BUCKET, endpoint=endpoint, access_key_id="a", secret_access_key="b", timeout_s=sharing.timeout_s)
    return ObjectStoreTier(store, sharing=sharing, multipart_bytes=multipart_bytes)


def mooncake_tier(cluster: Cluster, sharing: Sharing, replicas: int = 1) -> DistributedTier:
    from kvloom.kvstore.tiers.distributed.mooncake_tier import MooncakeOptions, MooncakeTier

    options = MooncakeOptions(replicas=replicas, staging_bytes=64 * MIB)
    return MooncakeTier(cluster.address, options=options, sharing=sharing)


OpenTier = Callable[[Sharing], DistributedTier]


@pytest.fixture(params=["redis", "s3", "folder", "memory", "mooncake"])
def open_tier(request: pytest.FixtureRequest, tmp_path: Path) -> OpenTier:
    """Opens a tier over one of the engines, as often as is wanted: what shares a prefix shares chunks."""
    kind = request.param
    if kind == "redis":
        server = request.getfixturevalue("redis")
        return lambda sharing: redis_tier(server, sharing)
    if kind == "mooncake":
        cluster = request.getfixturevalue("mooncake")
        return lambda sharing: mooncake_tier(cluster, sharing)
    if kind == "s3":
        server = request.getfixturevalue("s3")
        return lambda sharing: s3_tier(server, sharing)
    pytest.importorskip("obstore")
    from obstore.store import LocalStore, MemoryStore

    from kvloom.kvstore.tiers.distributed.object_tier import ObjectStoreTier

    store: Any = MemoryStore() if kind == "memory" else LocalStore(tmp_path / "objects", mkdir=True)
    return lambda sharing: ObjectStoreTier(store, sharing=sharing, multipart_bytes=8 * MIB)
