"""Real servers for these tests, one of each kind for all of them, and skips where one cannot be had."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvloom.bench.harness.servers import Server, missing_for, redis_server


def expect(kind: str) -> None:
    """Skip the test if the machine cannot run this server."""
    missing = missing_for(kind)
    if missing is not None:
        pytest.skip(f"{kind} cannot be run here: {missing}")


def a_prefix() -> str:
    """A prefix that nothing else uses: tests share a server."""
    return f"kvloom-{uuid.uuid4().hex[:12]}:"


@pytest.fixture(scope="session")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    expect("redis")
    folder: Path = tmp_path_factory.mktemp("redis")
    with redis_server(folder) as server:
        yield server
