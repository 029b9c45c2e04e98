"""The client's HTTP: answers in any pieces, answers that are none, and connections that are used again."""

import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

import pytest

from kvloom.errors import TierTimeoutError, TierUnavailableError
from kvloom.kvstore.tiers.remote.http import Answer, HttpPool, ReadAt

from ..support.patience import LONG_S


@contextmanager
def server(serve: Callable[[socket.socket], None], connections: int = 1) -> Iterator[HttpPool]:
    """A pool of a server that does `serve` with each of its first connections."""

    def accept(listener: socket.socket) -> None:
        for _ in range(connections):
            connection, _ = listener.accept()
            with connection, suppress(EOFError):
                serve(connection)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=accept, args=(listener,), daemon=True)
        thread.start()
        pool = HttpPool(f"http://127.0.0.1:{listener.getsockname()[1]}")
        yield pool
        pool.close()
        thread.join(LONG_S)


def read_request(connection: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        piece = connection.recv(65536)
        if not piece:
            raise EOFError
        data += piece
    return data


def ask(pool: HttpPool, method: str = "GET", **options: object) -> Answer:
    return pool.request(method, "/x", **{"headers": {}, "until_s": time.monotonic() + LONG_S, **options})  # type: ignore[arg-type]


def take(headers: Mapping[str, str], nbytes: int, read_at: ReadAt) -> bytes:
    data = bytearray(nbytes)
    for begin in range(0, nbytes, 7):
        read_at(memoryview(data)[begin : begin + 7], begin)
    return bytes(data)


CONTINUED = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
PLAIN = b"HTTP/1.1 200 OK\r\nContent-Length: 20\r\nX-A: 1\r\nx-a: 2\r\n\r\n" + b"0123456789" * 2
CHUNKED = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"a\r\n0123456789\r\n5 ;name=value\r\n01234\r\n5\r\n56789\r\n0\r\nTrailer: x\r\n\r\n"
)
TO_THE_END = b"HTTP/1.0 200 OK\r\n\r\n" + b"0123456789" * 2


@pytest.mark.parametrize("answer", [PLAIN, CONTINUED + PLAIN, CHUNKED, TO_THE_END])
@pytest.mark.parametrize("piece_bytes", [1, 7, 10_000])
def test_an_answer_may_come_in_any_pieces(answer: bytes, piece_bytes: int) -> None:
    def serve(connection: socket.socket) -> None:
        read_request(connection)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for begin in range(0, len(answer), piece_bytes):
            connection.sendall(answer[begin : begin + piece_bytes])

    with server(serve) as pool:
        found = ask(pool)
        assert (found.status, found.body) == (200, b"0123456789" * 2)
        assert found.headers.get("x-a", "1, 2") == "1, 2"
    if answer is PLAIN:
        with server(serve) as pool:
            assert ask(pool, take=take).taken == b"0123456789" * 2


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200",
        b"HTTP/2 200 OK\r\n\r\n",
        b"HTTP/1.1 20x OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n: no name\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1_0\r\n\r\n0123456789",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n012345",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n012",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\n01234\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffff\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n0123\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n012\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000,
    ],
)
def test_what_is_no_answer_is_an_unavailable_service(answer: bytes) -> None:
    def serve(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(answer)

    with server(serve) as pool, pytest.raises(TierUnavailableError):
        ask(pool)


def test_a_body_without_a_length_is_not_taken() -> None:
    def serve(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(CHUNKED)

    with server(serve) as pool, pytest.raises(TierUnavailableError, match="without a length"):
        ask(pool, take=take)


def test_connections_are_used_again_and_what_was_closed_is_opened_anew() -> None:
    ports: list[int] = []

    def serve(connection: socket.socket) -> None:
        for _ in range(2):
            read_request(connection)
            ports.append(connection.getpeername()[1])
            connection.sendall(PLAIN)

    with server(serve, connections=2) as pool:
        for _ in range(3):
            assert ask(pool).body == b"0123456789" * 2
            time.sleep(0.05)
    assert ports[0] == ports[1] != ports[2] and len(ports) == 3


@pytest.mark.parametrize(
    "answer",
    [
        PLAIN.replace(b"X-A", b"Connection: close\r\nX-A"),
        PLAIN.replace(b"HTTP/1.1", b"HTTP/1.0"),
        PLAIN + b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil",  # an answer that nobody has asked for
    ],
)
def test_connections_that_must_not_be_used_again_are_not(answer: bytes) -> None:
    asked, sent = list[int](), threading.Event()

    def serve(connection: socket.socket) -> None:
        asked.append(connection.getpeername()[1])
        read_request(connection)
        connection.sendall(answer[:-20])
        time.sleep(0.05)
        connection.sendall(answer[-20:])
        sent.set()
        connection.settimeout(LONG_S)
        assert connection.recv(100) == b""

    with server(serve, connections=2) as pool:
        for _ in range(2):
            sent.clear()
            assert ask(pool).body == b"0123456789" * 2
            assert sent.wait(LONG_S)
    assert len(set(asked)) == 2


def test_a_refused_body_gives_the_answer_that_says_why() -> None:
    def serve(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(b"HTTP/1.1 413 x\r\nContent-Length: 3\r\nConnection: close\r\n\r\nbig")
        connection.shutdown(socket.SHUT_WR)
        time.sleep(0.2)

    body = [memoryview(bytes(1 << 20))] * 30
    with server(serve) as pool:
        found = ask(pool, "PUT", body=body, body_bytes=30 << 20)
        assert (found.status, found.body) == (413, b"big")


def test_what_a_taker_raises_ends_the_connection() -> None:
    def serve(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(PLAIN)

    def refuse(headers: Mapping[str, str], nbytes: int, read_at: ReadAt) -> None:
        raise KeyError(nbytes)

    def skip(headers: Mapping[str, str], nbytes: int, read_at: ReadAt) -> None:
        read_at(memoryview(bytearray(1)), 5)

    with server(serve, connections=3) as pool:
        with pytest.raises(KeyError):
            ask(pool, take=refuse)
        with pytest.raises(TierUnavailableError):
            ask(pool, take=skip)
        assert ask(pool).body == b"0123456789" * 2


def test_headers_with_line_breaks_are_refused() -> None:
    pool = HttpPool("http://127.0.0.1:9")
    for value in ("a\r\nX-Evil: 1", "a\nb", "a\0b", "\u20ac"):
        with pytest.raises(ValueError):
            ask(pool, headers={"KVLoom-Namespace": value})


def test_a_body_that_nobody_reads_costs_the_deadline() -> None:
    release = threading.Event()

    def serve(connection: socket.socket) -> None:
        release.wait(LONG_S)

    with server(serve) as pool:
        began_s = time.monotonic()
        with pytest.raises(TierTimeoutError):
            ask(pool, "PUT", body=[bytes(100 << 20)], body_bytes=100 << 20, until_s=began_s + 0.3)
        assert time.monotonic() - began_s < LONG_S / 2
        release.set()
