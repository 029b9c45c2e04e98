"""Bodies that move on the connection's own socket: whole, slow, cut off, and between other requests."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvloom.kvstore.format import to_bytes
from kvloom.kvstore.tiers.host import HostTier
from kvloom.service.transfer import body_socket
from kvloom.testing.chunks import make_blob, make_key, same_blob

from ..support.patience import LONG_S, eventually
from .serving import MIB, Service, service_in_thread

pytestmark = pytest.mark.slow
LARGE = make_blob(1, numbers=6 * MIB // 4)  # more than a socket takes at once


@pytest.fixture(params=[1, 2], ids=["alone", "workers"])
def service(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Service]:
    options = {"workers": request.param, "idle_timeout_s": 1.0, "request_timeout_s": 3.0, "max_transfers": 2}
    with service_in_thread(tmp_path, [HostTier(None)], **options) as service:
        yield service


def request(service: Service, method: str, number: int, *lines: str) -> bytes:
    head = [
        f"{method} /v1/chunks/{make_key(number).hex()} HTTP/1.1",
        "Host: x",
        f"Authorization: Bearer {service.token}",
    ]
    return "\r\n".join([*head, *lines, "", ""]).encode()


def answer(connection: socket.socket, rest: bytes = b"") -> tuple[int, bytes, bytes]:
    """Status and body of the next answer, and what came behind it."""
    data = rest
    while b"\r\n\r\n" not in data:
        piece = connection.recv(65536)
        assert piece, data
        data += piece
    head, _, data = data.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    lengths = [int(line.split(":")[1]) for line in lines if line.lower().startswith("content-length")]
    length = lengths[0] if lengths else 0
    while len(data) < length:
        piece = connection.recv(1 << 20)
        assert piece
        data += piece
    return int(lines[0].split()[1]), data[:length], data[length:]


def assert_nothing_is_under_way(service: Service) -> None:
    context = service.context
    assert eventually(lambda: context.limits.open_requests == 0) and context.uploads.used_bytes == 0


def test_requests_on_one_connection_follow_one_another(service: Service) -> None:
    """Large and small bodies both ways, with requests that are sent before the answers came."""
    large, small = to_bytes(make_key(1), LARGE), to_bytes(make_key(2), make_blob(2))
    puts = [
        request(service, "PUT", 1, f"Content-Length: {len(large)}") + large,
        request(service, "PUT", 2, f"Content-Length: {len(small)}", "Expect: 100-continue") + small,
    ]
    gets = [
        request(service, "GET", 1),
        request(service, "GET", 9),
        request(service, "GET", 2),
        request(service, "GET", 1),
    ]
    with socket.create_connection(("127.0.0.1", service.port)) as connection:
        connection.settimeout(LONG_S)
        rest = b""
        for put in puts:
            connection.sendall(put)
            status, _, rest = answer(connection, rest)
            if status == 100:
                status, _, rest = answer(connection, rest)
            assert status == 201
        connection.sendall(b"".join(gets))
        for expected in (large, None, small, large):
            status, body, rest = answer(connection, rest)
            assert (status, body) == (200, expected) if expected else status == 404
        assert rest == b""


@pytest.mark.parametrize("method", ["GET", "PUT"])
def test_the_event_loop_moves_large_bodies_for_nobody_but_a_lone_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Beside other requests threads move them, so that a look-up need not wait for the bodies before it."""
    name = "_send" if method == "GET" else "_receive"
    move, on_loop = getattr(body_socket, name), []

    def noted(left: list[memoryview], descriptor: int, pause_s: float, most_bytes: int) -> int:
        moved: int = move(left, descriptor, pause_s, most_bytes)
        if not threading.current_thread().name.startswith("kvloom-bodies"):
            on_loop.append((moved, most_bytes))
        return moved

    with service_in_thread(tmp_path, [HostTier(None)]) as service:
        data = to_bytes(make_key(1), LARGE)
        path = f"/v1/chunks/{make_key(1).hex()}"
        assert service.ask("PUT", path, data).status == 201
        monkeypatch.setattr(body_socket, name, noted)
        for is_alone in (True, False):
            on_loop.clear()
            with socket.create_connection(("127.0.0.1", service.port)) as other:
                if not is_alone:
                    other.sendall(request(service, "PUT", 2, "Content-Length: 1000000"))
                    # The other is alone as it begins: its own first move is not what is judged.
                    assert eventually(lambda: service.context.limits.open_requests and (on_loop or method == "GET"))
                    on_loop.clear()
                answered = service.ask(method, path, data if method == "PUT" else None)
                assert answered.status in (200, 204) and (method == "PUT" or answered.body == data)
            limit_bytes = 1 << 22 if is_alone else 1 << 17
            assert on_loop and all(moved <= most == limit_bytes for moved, most in on_loop)


def test_a_body_may_come_in_small_pieces(service: Service) -> None:
    data = to_bytes(make_key(3), make_blob(3, numbers=20_000))
    with socket.create_connection(("127.0.0.1", service.port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(request(service, "PUT", 3, f"Content-Length: {len(data)}"))
        for begin in range(0, len(data), 20_001):
            connection.sendall(data[begin : begin + 20_001])
            time.sleep(0.05)
        assert answer(connection)[0] == 201
        connection.sendall(request(service, "GET", 3, "Range: bytes=10-19"))
        status, body, _ = answer(connection)
        assert (status, body) == (206, data[10:20])


@pytest.mark.parametrize("workers", [1, 2], ids=["alone", "workers"])
@pytest.mark.parametrize(
    ("drip_s", "limits"),
    [
        (LONG_S, {"idle_timeout_s": 1.0, "request_timeout_s": LONG_S}),
        (0.5, {"idle_timeout_s": LONG_S, "request_timeout_s": 3.0}),
    ],
    ids=["stops", "drips"],
)
def test_a_body_that_stops_or_drips_is_given_up(
    tmp_path: Path, workers: int, drip_s: float, limits: dict[str, float]
) -> None:
    """Nothing for `idle_timeout_s`, or not all within `request_timeout_s`; nothing is stored, and others go on."""
    data = to_bytes(make_key(1), LARGE)
    with (
        service_in_thread(tmp_path, [HostTier(None)], workers=workers, max_transfers=2, **limits) as service,
        socket.create_connection(("127.0.0.1", service.port)) as connection,
        service.client() as client,
    ):
        connection.settimeout(0.05)
        connection.sendall(request(service, "PUT", 1, f"Content-Length: {len(data)}") + data[:300_000])
        client.put(make_key(2), make_blob(2))  # the slow ones leave turns to others
        began_s, at, came = time.monotonic(), 300_000, b""
        while b"408" not in came and time.monotonic() - began_s < LONG_S / 2:
            try:
                came += connection.recv(65536)
                if not came:
                    break
            except TimeoutError:
                if time.monotonic() - began_s > drip_s * (at - 299_999):
                    connection.sendall(data[at : at + 1])
                    at += 1
        assert came.startswith(b"HTTP/1.1 408")
        assert client.get(make_key(1)) is None and client.get(make_key(2)) is not None
        assert_nothing_is_under_way(service)


def test_a_client_that_goes_within_a_body_leaves_nothing(service: Service) -> None:
    data = to_bytes(make_key(1), LARGE)
    with service.client() as client:
        client.put(make_key(4), LARGE)
        for _ in range(10):
            with socket.create_connection(("127.0.0.1", service.port)) as connection:
                connection.sendall(request(service, "PUT", 1, f"Content-Length: {len(data)}") + data[:500_000])
            with socket.create_connection(("127.0.0.1", service.port)) as connection:
                connection.sendall(request(service, "GET", 4))
                connection.recv(1000)
        assert_nothing_is_under_way(service)
        assert client.get(make_key(1)) is None
        found = client.get(make_key(4))
        assert found is not None and same_blob(found, LARGE)


def test_clients_that_read_nothing_are_given_up_and_cost_no_others(service: Service) -> None:
    with service.client(timeout_s=LONG_S / 2) as client:
        client.put(make_key(1), make_blob(1, numbers=16 * MIB // 4))
        stuck = [socket.create_connection(("127.0.0.1", service.port)) for _ in range(8)]
        for connection in stuck:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(request(service, "GET", 1))
        for number in range(5):
            client.put(make_key(2), make_blob(number))
            found = client.get(make_key(2))
            assert found is not None and same_blob(found, make_blob(number))
        assert_nothing_is_under_way(service)
        for connection in stuck:
            connection.close()


def test_the_short_way_refuses_as_the_long_way_does(service: Service) -> None:
    """What the short way takes gives the answers that the framework would give."""
    path = f"/v1/chunks/{make_key(1).hex()}"
    data = to_bytes(make_key(1), make_blob(1))
    reader = service.new_token(scopes=["read"])
    writer = service.new_token(scopes=["write"])
    assert service.ask("PUT", path, data, token=reader).status == 403
    assert service.ask("PUT", path, data, token=None).status == 401
    assert service.ask("PUT", path, data, headers={"KVLoom-Namespace": "rag", "KVLoom-After": "0" * 64}).status == 201
    assert service.ask("GET", path, token=writer).status == 403
    assert service.ask("GET", path, token=None).status == 401
    plain = service.ask("GET", path)
    long = service.ask("GET", path, headers={"Want-Content-Digest": "sha-256=1"})  # goes the framework's way
    assert plain.status == long.status == 200 and plain.body == long.body == data
    ignored = {"date", "kvloom-request-id", "content-digest"}
    assert {k: v for k, v in plain.headers.items() if k not in ignored} == {
        k: v for k, v in long.headers.items() if k not in ignored
    }
    for headers in ({"KVLoom-After": "zz"}, {"KVLoom-Recompute-Seconds": "-1"}, {"KVLoom-Namespace": "a/" + "b" * 200}):
        refused = service.ask("PUT", path, data, headers=headers)
        assert refused.status == 422 and "problem" in refused.headers["content-type"], headers
    (listed,) = json.loads(service.ask("GET", "/v1/chunks").body)["chunks"]
    assert (listed["namespace"], listed["after"]) == ("rag", "0" * 64)
    assert service.ask("GET", path[:-1] + "G").status == 422
    assert service.ask("GET", path + "0").status == 422
