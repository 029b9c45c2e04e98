"""What stands around chunks: pins, prefetches, tenants, tiers, health, limits."""

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvloom.kvstore.format import to_bytes
from kvloom.kvstore.tiers.disk.tier import DiskTier
from kvloom.kvstore.tiers.host import HostTier
from kvloom.testing.chunks import make_blob, make_key, same_blob

from ..support.patience import LONG_S, eventually
from .serving import Service, service_in_thread

pytestmark = pytest.mark.slow

NBYTES = make_blob(0).nbytes


def hexes(*numbers: int) -> list[str]:
    return [make_key(number).hex() for number in numbers]


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Service]:
    """Room for four chunks in memory and nothing behind it."""
    with service_in_thread(tmp_path, [HostTier(4 * NBYTES)]) as service:
        yield service


def test_match_counts_leading_chunks_and_names_their_tiers(small: Service) -> None:
    with small.client() as client:
        for number in (1, 2, 4):
            client.put(make_key(number), make_blob(number))
        found = small.ask("POST", "/v1/match", {"keys": hexes(1, 2, 3, 4)}).json()
        assert found == {"matched": 2, "tiers": ["host", "host"]}
        assert client.match([make_key(9)]) == 0 and client.match([]) == 0
        assert small.ask("POST", "/v1/match", {"keys": []}).status == 422
        assert small.ask("POST", "/v1/match", {"keys": hexes(*range(4097))}).status == 413


def test_explain_says_why_under_the_clients_own_key(small: Service) -> None:
    with small.client() as client:
        for number in range(6):
            client.put(make_key(number), make_blob(number))
        client.get(make_key(5))
        explained = client.explain([make_key(number) for number in range(6)])
        assert [each["key"] for each in explained] == hexes(*range(6))
        evicted = [each for each in explained if not each["tiers"]]
        assert len(evicted) == 2 and all(each["departure"]["why"] == "evictions" for each in evicted)
        assert (explained[5]["word"], {each["word"] for each in evicted}) == ("stored", {"evicted"})
        assert explained[5]["lookup"]["tier"] == "host" and hexes(5)[0][:12] in explained[5]["summary"]


def test_pins_keep_chunks_until_they_end(small: Service) -> None:
    with small.client() as client:
        client.put(make_key(0), make_blob(0))
        pin = client.pin([make_key(0)], 30)
        assert pin.matched == 1 and small.ask("GET", f"/v1/pins/{pin.id}").json()["keys"] == 1
        for number in range(1, 9):
            client.put(make_key(number), make_blob(number))
        assert make_key(0) in client
        assert client.unpin(pin) and not client.unpin(pin)
        for number in range(10, 19):
            client.put(make_key(number), make_blob(number))
        assert make_key(0) not in client
        client.pin([make_key(18)], 0.05)
        longest = small.ask("POST", "/v1/pins", {"keys": hexes(1), "deadline_s": 1e300}).json()
        assert 3500 < longest["expires_at_s"] - time.time() <= 3600
        assert small.ask("DELETE", f"/v1/pins/{longest['id']}").status == 204
        assert eventually(lambda: small.ask("GET", "/v1/stats").json()["service"]["pinned"] == 0)


def test_a_repeated_request_is_done_once(small: Service) -> None:
    body = {"keys": hexes(1), "deadline_s": 5.0}
    headers = {"Idempotency-Key": "abc"}
    first, second = (small.ask("POST", "/v1/pins", body, headers=headers).json() for _ in range(2))
    assert first == second
    assert small.ask("POST", "/v1/pins", {**body, "deadline_s": 6.0}, headers=headers).status == 422
    assert small.ask("POST", "/v1/pins", body).json()["id"] != first["id"]


def test_prefetch_answers_at_once_and_is_polled(tmp_path: Path) -> None:
    tiers = [HostTier(4 * NBYTES), DiskTier(tmp_path / "disk")]
    with service_in_thread(tmp_path, tiers) as service, service.client() as client:
        for number in range(8):
            client.put(make_key(number), make_blob(number))
        cold = [
            make_key(int(each["key"], 16))
            for each in client.explain([make_key(n) for n in range(8)])
            if each["tiers"] == ["disk"]
        ]
        begun = service.ask("POST", "/v1/prefetches", {"keys": [key.hex() for key in cold[:2]]})
        assert begun.status == 202 and begun.headers["location"] == f"/v1/prefetches/{begun.json()['id']}"
        job = client.prefetch(cold[:2], wait=True)
        assert job["state"] == "finished" and job["in_first_tier"] == 2
        assert service.ask("DELETE", f"/v1/prefetches/{job['id']}").status == 204
        assert service.ask("GET", "/v1/prefetches/none").status == 404


def test_tiers_come_and_go_while_the_service_runs(tmp_path: Path) -> None:
    with service_in_thread(tmp_path, [HostTier(4 * NBYTES)]) as service, service.client() as client:
        client.pin([make_key(0)], 60)
        for number in range(3):
            client.put(make_key(number), make_blob(number))
        assert service.ask("PUT", "/v1/tiers/cold", {"kind": "disk", "capacity_bytes": "64MiB"}).status == 201
        assert service.ask("PUT", "/v1/tiers/cold", {"kind": "disk", "capacity_bytes": 1}).status == 409
        assert [tier["name"] for tier in service.ask("GET", "/v1/tiers").json()] == ["host", "cold"]
        for number in range(3, 9):
            client.put(make_key(number), make_blob(number))
        assert client.match([make_key(number) for number in range(9)]) == 9
        assert service.ask("DELETE", "/v1/tiers/host").status == 204
        assert service.ask("DELETE", "/v1/tiers/host").status == 404
        assert service.ask("DELETE", "/v1/tiers/cold").status == 409
        for number in range(9):
            found = client.get(make_key(number))
            assert found is not None and same_blob(found, make_blob(number))
        stats = service.ask("GET", "/v1/stats").json()["service"]
        assert stats["lookups"] == 9 and stats["puts"]["stored"] >= 9 and stats["pinned"] == 1
        assert service.context.store.tiers[0].path.is_relative_to(tmp_path)
        with service.context.store.use() as store:
            assert store.check() == []


def test_quotas_of_tenants_and_namespaces_count_at_once(tmp_path: Path) -> None:
    with service_in_thread(tmp_path, [HostTier(10 * NBYTES)]) as service:
        flood = service.client(service.new_token("flood"))
        careful = service.client(service.new_token("careful"))
        assert service.ask("PUT", "/v1/tenants/careful", {"reserve_ratio": 0.4}).status == 204
        assert service.ask("PUT", "/v1/tenants/flood", {"limit_ratio": 0.8, "reserve_ratio": 0.7}).status == 409
        for number in range(4):
            careful.put(make_key(number), make_blob(number))
        for number in range(100):
            flood.put(make_key(number), make_blob(number + 1000))
        assert careful.match([make_key(number) for number in range(4)]) == 4
        assert service.ask("PUT", "/v1/namespaces/small", {"limit_ratio": 0.2, "ttl_s": 60}).status == 204
        admin = service.client()
        for number in range(5):
            service.ask(
                "PUT",
                f"/v1/chunks/{make_key(number).hex()}",
                to_bytes(make_key(number), make_blob(number)),
                headers={"KVLoom-Namespace": "small"},
            )
        assert len(admin.entries()[0]) == 2
        assert all(50 < entry.info.expires_at_s - time.time() <= 60 for entry in admin.entries()[0])
        (listed,) = service.ask("GET", "/v1/namespaces").json()
        assert listed["name"] == "small" and listed["tier_bytes"] == {"host": 2 * NBYTES}
        assert service.ask("DELETE", "/v1/namespaces/small").status == 204 and admin.entries()[0] == []
        assert {each["name"] for each in service.ask("GET", "/v1/tenants").json()} >= {"careful", "flood", "default"}


def test_health_and_metrics(small: Service) -> None:
    assert small.ask("GET", "/healthz", token=None).json() == {"status": "ok"}
    assert small.ask("GET", "/readyz", token=None).status == 200
    small.context.is_draining = True
    ready = small.ask("GET", "/readyz", token=None)
    assert ready.status == 503 and ready.json() == {"status": "draining"}
    small.context.is_draining = False
    text = small.ask("GET", "/metrics").body.decode()
    assert 'kvloom_tier_used_bytes{tier="host"} 0.0' in text and "kvloom_service_ready 1.0" in text
    assert 'kvloom_service_request_seconds_count{method="GET",route="/healthz",status="200"} 1.0' in text


def test_rates_and_requests_at_a_time_are_limited(tmp_path: Path) -> None:
    with service_in_thread(tmp_path, [HostTier(1000)], tenant_requests_per_s=0.2) as service:
        answers = [service.ask("GET", "/v1/chunks") for _ in range(4)]
        assert [each.status for each in answers] == [200, 200, 429, 429] and int(
            answers[-1].headers["retry-after"]
        ) >= 1
        assert service.ask("GET", "/v1/chunks", token=service.new_token("other")).status == 200  # per tenant
    with service_in_thread(tmp_path / "two", [HostTier(1000)], max_tenant_requests=1) as service:
        path = f"/v1/chunks/{hexes(1)[0]}"
        with socket.create_connection(("127.0.0.1", service.port)) as slow:
            head = (
                f"PUT {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {service.token}\r\nContent-Length: 10\r\n\r\n"
            )
            slow.sendall(head.encode())
            assert eventually(lambda: service.ask("GET", "/v1/chunks").status == 503)
            assert service.ask("GET", "/v1/chunks", token=service.new_token("other")).status == 200
        assert eventually(lambda: service.ask("GET", "/v1/chunks").status == 200)


def test_bodies_that_are_too_large_too_slow_or_too_short(tmp_path: Path) -> None:
    limits = {"max_body_bytes": 2000, "max_json_bytes": 1000, "idle_timeout_s": 1.0, "header_timeout_s": 1.0}
    with service_in_thread(tmp_path, [HostTier(None)], **limits) as service:
        path = f"/v1/chunks/{hexes(1)[0]}"
        assert service.ask("PUT", path, b"x" * 2001).status == 413
        assert service.ask("POST", "/v1/match", b"[" * 1001).status == 413
        auth = f"Authorization: Bearer {service.token}\r\n"
        cases = {
            f"PUT {path} HTTP/1.1\r\nHost: x\r\n{auth}Content-Length: 100\r\n\r\nabc": b"HTTP/1.1 408",
            f"PUT {path} HTTP/1.1\r\nHost: x\r\n{auth}Transfer-Encoding: chunked\r\n\r\n": b"HTTP/1.1 411",
            f"POST /v1/match HTTP/1.1\r\nHost: x\r\n{auth}Transfer-Encoding: chunked\r\n\r\n"
            "400\r\n" + "x" * 1024: b"HTTP/1.1 413",
            f"GET / HTTP/1.1\r\nHost: x\r\nX: {'y' * 20000}\r\n": b"",
            "GET / HTTP/1.1\r\nHost: x\r\nX: y": b"",
            "": b"",
            "\x00nonsense\r\n\r\n": b"HTTP/1.1 400",
        }
        for text, expected in cases.items():
            with socket.create_connection(("127.0.0.1", service.port), timeout=LONG_S) as sock:
                sock.sendall(text.encode())
                answer = b""
                try:
                    while piece := sock.recv(4096):
                        answer += piece
                except ConnectionResetError:
                    pass
                assert answer[: len(expected)] == expected and (answer or not expected), (text[:60], answer)
        assert service.ask("GET", "/healthz", token=None).status == 200


def test_a_client_that_reads_nothing_is_given_up(tmp_path: Path) -> None:
    blob = make_blob(1, numbers=4_000_000)
    with service_in_thread(tmp_path, [HostTier(None)], idle_timeout_s=1.0, max_transfers=1) as service:
        service.client().put(make_key(1), blob)
        with socket.create_connection(("127.0.0.1", service.port)) as sock:
            head = f"GET /v1/chunks/{hexes(1)[0]} HTTP/1.1\r\nHost: x\r\n"
            sock.sendall(f"{head}Authorization: Bearer {service.token}\r\n\r\n".encode())
            assert eventually(lambda: service.context.limits.open_requests == 1)
            found = service.client(timeout_s=LONG_S).get(make_key(1))
            assert found is not None and same_blob(found, blob)
            assert eventually(lambda: service.context.limits.open_requests == 0)


def test_many_threads_put_and_get(tmp_path: Path) -> None:
    with service_in_thread(tmp_path) as service, service.client() as client:
        wrong: list[object] = []

        def work(thread: int) -> None:
            for number in range(10):
                key, blob = make_key(100 * thread + number), make_blob(100 * thread + number, numbers=5000)
                client.put(key, blob)
                found = client.get(key)
                if found is None or not same_blob(found, blob):
                    wrong.append(key)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == [] and len(client.entries()[0]) == 80
        with service.context.store.use() as store:
            assert store.check() == []
