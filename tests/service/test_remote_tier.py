"""A service as a tier: the contract of tiers, deadlines, and what a node that is down costs."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvloom.compress.raw import RawCodec
from kvloom.core import Tier
from kvloom.errors import ChunkCorruptError, TierTimeoutError, TierUnavailableError
from kvloom.kvstore.format import to_bytes
from kvloom.kvstore.store import KVStore
from kvloom.kvstore.tiers.host import HostTier
from kvloom.kvstore.tiers.remote.client import AsyncKVLoomClient, KVLoomClient, ServiceError
from kvloom.kvstore.tiers.remote.tier import RemoteTier
from kvloom.service.access.credentials import TokenFile
from kvloom.testing.chunks import make_blob, make_chunk, make_key, same_blob, same_chunk
from kvloom.testing.tier import TierContract

from ..support.patience import LONG_S, eventually
from .serving import Service, service_in_thread

pytestmark = pytest.mark.slow


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with service_in_thread(tmp_path) as service:
        yield service


class TestRemoteTier(TierContract):
    service: Service

    @pytest.fixture(autouse=True)
    def served(self, service: Service) -> None:
        self.service = service

    def make_tier(self, capacity_bytes: int | None) -> Tier:
        if capacity_bytes is not None:
            pytest.skip("the service evicts on its own: a client's tier has no capacity")
        return RemoteTier(self.service.url, token=self.service.token)


def test_what_one_engine_puts_another_finds(service: Service) -> None:
    tiers = [RemoteTier(service.url, token=service.token, poll_interval_s=0.0) for _ in range(2)]
    with KVStore([HostTier(None), tiers[0]]) as one, KVStore([HostTier(None), tiers[1]]) as other:
        assert other.get(make_key(1)) is None
        one.put(make_key(1), make_chunk(1), namespace="rag")
        assert other.match([make_key(1)]) == 1
        found = other.get(make_key(1))
        assert found is not None and same_chunk(found, make_chunk(1))
        part = other.get(make_key(1), layers=(1, 2))
        assert part is not None and part.first_layer == 1
        one.delete(make_key(1))
        other.delete(make_key(1))
        one.put(make_key(2), make_chunk(2))
        service.client().delete(make_key(2))
        assert other.get(make_key(2)) is None
        for store in (one, other):
            assert [each for each in store.check() if "disagrees" not in each] == []


def test_a_node_that_is_down_is_a_miss_and_comes_back(tmp_path: Path) -> None:
    with service_in_thread(tmp_path / "first") as service:
        tier = RemoteTier(service.url, token=service.token, timeout_s=5.0, poll_interval_s=0.0)
        store = KVStore([tier], timeout_s=10.0)
        store.put(make_key(1), make_chunk(1))
    began_s = time.monotonic()
    assert store.get(make_key(1)) is None and store.match([make_key(1)]) in (0, 1)
    with pytest.raises(TierUnavailableError):
        store.put(make_key(2), make_chunk(2))
    assert time.monotonic() - began_s < LONG_S / 2
    stats = store.stats()
    assert stats.misses.get("unavailable") == 1 and stats.tiers[0].errors >= 1
    store.close()


def test_a_server_that_does_not_answer_costs_the_deadline_and_no_more() -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        client = KVLoomClient(f"http://127.0.0.1:{deaf.getsockname()[1]}", token="t", timeout_s=0.3)
        for request in (
            lambda: client.get(make_key(1)),
            lambda: client.put(make_key(1), make_blob(1, numbers=1_000_000)),
        ):
            began_s = time.monotonic()
            with pytest.raises(TierTimeoutError):
                request()
            assert time.monotonic() - began_s < 8  # the client's own choice would be 10 s


def test_a_server_that_drips_costs_the_deadline_and_no_more() -> None:
    def drip(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection:
            connection.recv(65536)
            try:
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
                for _ in range(400):
                    connection.sendall(b"x")
                    time.sleep(0.05)
            except OSError:
                pass

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=drip, args=(server,), daemon=True).start()
        client = KVLoomClient(f"http://127.0.0.1:{server.getsockname()[1]}", token="t", timeout_s=0.5)
        began_s = time.monotonic()
        with pytest.raises(TierTimeoutError):
            client.get(make_key(1))
        assert time.monotonic() - began_s < 8


def answering(*answers: bytes) -> Iterator[tuple[str, list[bytes]]]:
    """A server that gives these answers, one a connection, and what it was asked."""
    asked: list[bytes] = []

    def serve(server: socket.socket) -> None:
        for answer in answers:
            connection, _ = server.accept()
            with connection:
                asked.append(connection.recv(1 << 20))
                connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, args=(server,), daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", asked


BUSY = b"HTTP/1.1 503 x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


def ok(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body) + body


def test_a_busy_server_is_asked_again() -> None:
    body = to_bytes(make_key(1), make_blob(1))
    for url, asked in answering(BUSY, BUSY, ok(body)):
        found = KVLoomClient(url, token="t").get(make_key(1))
        assert found is not None and same_blob(found, make_blob(1)) and len(asked) == 3
    for url, _ in answering(BUSY, BUSY):
        with pytest.raises(TierUnavailableError, match="503"):
            KVLoomClient(url, token="t", retries=1).get(make_key(1))


def test_what_a_server_sends_is_verified() -> None:
    body = bytearray(to_bytes(make_key(1), make_blob(1)))
    body[-1] ^= 1
    for answer in (ok(bytes(body)), ok(to_bytes(make_key(2), make_blob(1))), ok(b"hello"), ok(b"")):
        for url, _ in answering(answer):
            with pytest.raises(ChunkCorruptError):
                KVLoomClient(url, token="t").get(make_key(1))
    for url, _ in answering(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n"):
        with pytest.raises(ServiceError, match="at most"):
            KVLoomClient(url, token="t").get(make_key(1))
    for broken in (b"", b"SMTP ready\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nabc"):
        for url, _ in answering(broken, broken, broken):
            with pytest.raises(TierUnavailableError):
                KVLoomClient(url, token="t").get(make_key(1))


def test_wrong_tokens_and_wrong_arguments(service: Service, tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match="bearer token"):
        service.client("kvl_no").get(make_key(1))
    tier = RemoteTier(service.url, token=service.new_token(scopes=["read"]))
    with pytest.raises(TierUnavailableError, match="scope 'write'"):
        tier.put(make_key(1), make_blob(1))
    for url in ("ftp://x", "127.0.0.1:80", "http://", "http://h/path"):
        with pytest.raises(ValueError, match="url is"):
            KVLoomClient(url, token="t")
    with pytest.raises(ValueError, match="one of token"):
        KVLoomClient(service.url)


def test_a_token_file_may_be_replaced(service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvloom.kvstore.tiers.remote.client._TOKEN_CHECK_S", 0.0)
    file = tmp_path / "token"
    file.write_text(service.token + "\n")
    client = KVLoomClient(service.url, token_file=file)
    assert client.get(make_key(1)) is None
    file.write_text("kvl_other")
    with pytest.raises(ServiceError):
        client.get(make_key(1))
    file.unlink()
    with pytest.raises(TierUnavailableError, match="cannot be read"):
        client.get(make_key(1))


def test_the_asynchronous_client_does_the_same(service: Service) -> None:
    async def work() -> None:
        async with AsyncKVLoomClient(service.url, token=service.token) as client:
            await asyncio.gather(*(client.put(make_key(n), make_blob(n)) for n in range(20)))
            found = await asyncio.gather(*(client.get(make_key(n)) for n in range(20)))
            assert all(each is not None and same_blob(each, make_blob(n)) for n, each in enumerate(found))
            assert await client.match([make_key(n) for n in range(30)]) == 20
            pin = await client.pin([make_key(1)], 5)
            assert await client.unpin(pin) and await client.contains(make_key(1)) and await client.delete(make_key(1))
            assert (await client.stats())["chunks"] == 19

    asyncio.run(work())


def test_a_store_opens_without_its_service_and_finds_it_later(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    token = TokenFile(tmp_path / "tokens.json").create("default", ("read", "write"))
    tier = RemoteTier(f"http://127.0.0.1:{port}", token=token, timeout_s=5.0, poll_interval_s=0.0)
    with KVStore([HostTier(None), tier], timeout_s=10.0) as store:
        store.put(make_key(1), make_chunk(1))
        assert store.match([make_key(2)]) == 0
        with service_in_thread(tmp_path, on_port=port) as service:
            service.client().put(make_key(2), RawCodec().encode(make_chunk(2)))
            assert eventually(lambda: store.match([make_key(2)]) == 1)
            found = store.get(make_key(2))
            assert found is not None and same_chunk(found, make_chunk(2))
            assert store.stats().tiers[1].recoveries >= 1 or store.stats().tiers[1].errors >= 1
