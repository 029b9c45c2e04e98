"""Workers: what they die of, what then is left, and that they give what one process gives."""

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from kvloom.core import ChunkKey, EncodedChunk
from kvloom.kvstore.format import to_bytes
from kvloom.kvstore.store import KVStore
from kvloom.kvstore.tiers.host import HostTier
from kvloom.kvstore.tiers.remote.client import KVLoomClient
from kvloom.kvstore.tiers.remote.tier import RemoteTier
from kvloom.service.workers import supervisor
from kvloom.testing.chunks import make_blob, make_chunk, make_key, same_blob, same_chunk

from ...support.patience import LONG_S, eventually
from ..serving import MIB, Certificate, Service, service_in_thread, service_process
from ..test_crashes import Load

pytestmark = pytest.mark.slow
LARGE = make_blob(1, numbers=6 * MIB // 4)
UPLOADED = make_key(900_000)
LARGE_BODY = to_bytes(UPLOADED, LARGE)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    options = {"workers": 2, "header_timeout_s": 1.0, "idle_timeout_s": 20.0, "shared_memory_bytes": 0}
    with service_in_thread(tmp_path, [HostTier(None)], **options) as service:
        yield service


def put_head(service: Service) -> bytes:
    head = f"PUT /v1/chunks/{UPLOADED.hex()} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {service.token}\r\n"
    return f"{head}Content-Length: {len(LARGE_BODY)}\r\n\r\n".encode()


def begun_put(service: Service, sent_bytes: int) -> socket.socket:
    """A connection on which a part of a large body has been sent."""
    connection = socket.create_connection(("127.0.0.1", service.port))
    connection.sendall(put_head(service) + LARGE_BODY[:sent_bytes])
    return connection


def upload_bytes(service: Service) -> float:
    """Of the bodies that are on their way in."""
    (line,) = re.findall(
        r"^kvloom_service_upload_bytes (.*)$", service.ask("GET", "/metrics").body.decode(), re.MULTILINE
    )
    return float(line)


def workers_of(process_id: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{process_id}/task/{process_id}/children").read_text().split()]


def assert_all_there(directory: Path, load: Load, others: dict[ChunkKey, EncodedChunk]) -> None:
    assert load.wrong == [] and load.acknowledged
    with service_process(directory, "--workers", "2") as service, service.client() as client:
        for number in load.acknowledged:
            found = client.get(make_key(number))
            assert found is not None and same_blob(found, make_blob(number, numbers=4000)), number
        for key, blob in others.items():
            found = client.get(key)
            assert found is not None and same_blob(found, blob)
        assert service.stop() == 0


def is_running(process_id: int) -> bool:
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_one_process_has_none(tmp_path: Path) -> None:
    for workers in (0, 1):
        with service_in_thread(tmp_path / str(workers), [HostTier(None)], workers=workers) as service:
            assert service.workers is None and service.context.worker_memory is None
            told = service.ask("GET", "/v1/stats").json()["service"]["workers"]
            assert told == {"configured": 0, "alive": 0, "restarts": 0}


def test_a_killed_worker_costs_its_own_requests_alone(service: Service) -> None:
    assert service.workers is not None
    memory, context = service.context.worker_memory, service.context
    with service.client(shared_memory=False) as client:
        client.put(make_key(5), make_blob(5, numbers=100_000))
    stored_bytes = memory.used_bytes
    uploads = [begun_put(service, 3 * MIB) for _ in range(4)]
    assert eventually(lambda: context.uploads.used_bytes == 4 * len(LARGE_BODY) and memory.used_bytes > 20 * MIB)
    wrong, ended = [], threading.Event()

    def use() -> None:
        with KVStore([RemoteTier(service.url, token=service.token, retries=0)]) as store:
            while not ended.is_set():
                found = store.get(make_key(7))
                if found is not None and not same_chunk(found, make_chunk(7)):
                    wrong.append(found)
                store.put(make_key(7), make_chunk(7))

    user = threading.Thread(target=use)
    user.start()
    before = service.workers.process_ids
    for killed in before:
        os.kill(killed, signal.SIGKILL)
        assert eventually(lambda killed=killed: not is_running(killed))
    assert eventually(lambda: context.workers.alive == 2 and not set(service.workers.process_ids) & set(before))
    ended.set()
    user.join()
    for connection in uploads:
        connection.settimeout(LONG_S)
        with suppress(ConnectionResetError):
            assert connection.recv(100) == b""
        connection.close()
    assert not wrong and context.workers.restarts == 2
    with service.client(shared_memory=False) as client:
        client.delete(make_key(7))
        assert client.get(UPLOADED) is None
        found = client.get(make_key(5))
        assert found is not None and same_blob(found, make_blob(5, numbers=100_000))
        del found
    assert eventually(lambda: memory.used_bytes == stored_bytes and context.limits.open_requests == 0)
    assert context.uploads.used_bytes == 0
    told = service.ask("GET", "/v1/stats").json()["service"]["workers"]
    assert told == {"configured": 2, "alive": 2, "restarts": 2}
    metrics = service.ask("GET", "/metrics").body.decode()
    assert "kvloom_service_workers 2.0" in metrics and "kvloom_service_worker_restarts_total 2.0" in metrics


def test_a_worker_that_does_not_answer_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_PING_S", 0.1)
    monkeypatch.setattr(supervisor, "_SILENT_S", 5.0)
    with service_in_thread(tmp_path, [HostTier(None)], workers=2) as service:
        assert service.workers is not None
        stopped = service.workers.process_ids[0]
        os.kill(stopped, signal.SIGSTOP)
        assert eventually(lambda: not is_running(stopped) and service.context.workers.alive == 2)
        assert service.ask("GET", "/readyz", token=None).status == 200


def test_what_has_no_room_in_shared_memory_travels_all_the_same(tmp_path: Path) -> None:
    sizes = {"host_bytes": 0, "max_upload_bytes": 8 * MIB, "shared_memory_bytes": 0}
    with (
        service_in_thread(tmp_path, [HostTier(None)], workers=2, **sizes) as service,
        service.client(shared_memory=False) as client,
    ):
        for number in (1, 2, 3):  # one of them has room
            client.put(make_key(number), LARGE)
        for number in (1, 2, 3):
            found = client.get(make_key(number))
            assert found is not None and same_blob(found, LARGE)
        body = service.ask("GET", f"/v1/chunks/{make_key(3).hex()}", headers={"Range": "bytes=100-5000000"}).body
        assert body == to_bytes(make_key(3), LARGE)[100:5_000_001]


def test_chunks_of_clients_on_this_host_are_there_for_others(tmp_path: Path) -> None:
    """Their memory is not the workers': it is copied."""
    with service_in_thread(tmp_path, [HostTier(None)], workers=2) as service:
        with service.client() as local, service.client(shared_memory=False) as other:
            local.match([make_key(1)])
            for number in range(3):
                local.put(make_key(number), LARGE)
                other.put(make_key(10 + number), LARGE)
            assert local._session is not None
            for number in range(3):
                for client, key in ((local, make_key(10 + number)), (other, make_key(number))):
                    found = client.get(key)
                    assert found is not None and same_blob(found, LARGE) and found.leased is (client is local)
        assert eventually(lambda: service.context.shared_memory.leases == 0)


def test_limits_hold_at_workers(service: Service) -> None:
    with socket.create_connection(("127.0.0.1", service.port)) as slow:
        slow.sendall(b"GET /v1/stats HTTP/1.1\r\nHost:")
        slow.settimeout(25)  # the limit is 1 s, and that of idle connections 30 s
        assert slow.recv(100) == b""
    with socket.create_connection(("127.0.0.1", service.port)) as long:
        long.settimeout(LONG_S)
        with suppress(ConnectionResetError, BrokenPipeError):
            long.sendall(b"GET / HTTP/1.1\r\nx: " + b"a" * 100_000)
            assert long.recv(100) == b""
    path = f"/v1/chunks/{UPLOADED.hex()}"
    too_large = service.ask("PUT", path, b"x", headers={"Content-Length": str(1 << 40)})
    assert too_large.status == 413 and too_large.headers["connection"] == "close"
    assert service.ask("POST", "/v1/match", b"x", headers={"Content-Length": str(2 * MIB)}).status == 413
    refused = service.ask("PUT", path, b"x", token=None, headers={"Content-Length": str(len(LARGE_BODY))})
    assert refused.status == 401 and refused.headers["connection"] == "close"
    assert service.ask("PUT", path, LARGE_BODY[:-1] + b"\0").status == 422
    memory = service.context.uploads, service.context.worker_memory
    assert eventually(lambda: all(each.used_bytes == 0 for each in memory)), "given back soon after the answer"


def test_bodies_are_encrypted_by_workers(tmp_path: Path) -> None:
    certificate = Certificate(tmp_path / "tls")
    options = ("--workers", "2", "--set", "idle_timeout_s=3", *certificate.options)
    with (
        service_process(tmp_path / "kv", *options, certificate=certificate) as service,
        KVLoomClient(
            service.url, token=service.token, ca_file=certificate.chain, shared_memory=False, timeout_s=30
        ) as client,
    ):
        client.put(make_key(1), LARGE)
        for _ in range(2):
            found = client.get(make_key(1))
            assert found is not None and same_blob(found, LARGE)
        part = client.get_layers(make_key(1), 1, 3)
        assert part is not None and same_blob(part, LARGE.layers(1, 3))
        assert service.tls is not None
        with service.tls.wrap_socket(
            socket.create_connection(("127.0.0.1", service.port)), server_hostname="127.0.0.1"
        ) as slow:
            slow.settimeout(LONG_S)
            slow.sendall(put_head(service) + LARGE_BODY[:MIB])
            assert slow.recv(100).startswith(b"HTTP/1.1 408")
        assert client.match([make_key(1)]) == 1 and UPLOADED not in client
        assert service.stop(timeout_s=25) == 0, "an idle client keeps no worker from its end, which may take 30 s"


def test_an_orderly_end_lets_workers_end_first(tmp_path: Path) -> None:
    with service_process(tmp_path / "kv", "--workers", "2", "--set", "durability=batch") as service:
        workers = workers_of(service.process.pid)
        load = Load(service)
        with begun_put(service, 4 * MIB) as upload:
            assert eventually(lambda: load.acknowledged and upload_bytes(service) >= len(LARGE_BODY))
            ended = threading.Thread(target=service.stop)
            ended.start()
            time.sleep(0.5)
            load.end()
            upload.sendall(LARGE_BODY[4 * MIB :])
            upload.settimeout(LONG_S)
            assert upload.recv(100).startswith(b"HTTP/1.1 201")
        ended.join()
        assert service.process.returncode == 0 and service.lines[-1].startswith("kvloom has stopped")
        assert len(workers) == 2 and not any(map(is_running, workers))
    assert_all_there(tmp_path / "kv", load, {UPLOADED: LARGE})


def test_a_killed_service_leaves_no_worker_and_a_new_one_has_what_was_acknowledged(tmp_path: Path) -> None:
    with service_process(tmp_path / "kv", "--workers", "2") as service:
        workers, load = workers_of(service.process.pid), Load(service)
        assert eventually(lambda: len(load.acknowledged) > 50)
        service.stop(signal.SIGKILL)
        load.end()
        assert len(workers) == 2 and eventually(lambda: not any(map(is_running, workers)))
    assert_all_there(tmp_path / "kv", load, {})
