"""HTTP/1.1 to one service: pooled connections, and a deadline that bounds every wait of a request.

The standard library's client parses an answer as if it were an e-mail, which takes longer than moving a megabyte, and
sends a header before its body. What this one lacks: redirects, proxies, cookies, compression; the service has none.
"""

from __future__ import annotations

import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias
from urllib.parse import urlsplit

from ....errors import TierTimeoutError, TierUnavailableError

_IDLE_CONNECTIONS = 16
_IDLE_S = 20.0  # below the service's own limit, so that few requests meet a connection that is just being closed
_MOST_HEADER_BYTES = 64 << 10
_MOST_BODY_BYTES = 64 << 20
_MOST_VECTORS = 512
_READ_BYTES = 16 << 10
_STATUS = re.compile(r"HTTP/1\.([01]) ([1-9]\d\d)(?: .*)?")
_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;|$)")
_BREAKS_LINES = re.compile(r"[\r\n\0]")

ReadAt: TypeAlias = Callable[[memoryview, int], None]
"""Fills the buffer with the bytes of a body from that offset on, which must be where the last call has ended."""

TakeBody: TypeAlias = Callable[[Mapping[str, str], int, ReadAt], Any]
"""Given headers, length and the body of a successful answer: what becomes of it. Has to read all of it."""


class ProtocolError(OSError):
    """What came is no HTTP/1.1, or ends before it should."""


@dataclass(slots=True)
class Answer:
    """What a service has answered; `taken` is what the caller has made of the body, which then is empty here."""

    status: int
    headers: Mapping[str, str]
    body: bytes = b""
    taken: Any = None


class Connection:
    """A connection whose every operation ends at `until_s` (monotonic) at the latest."""

    def __init__(self, address: tuple[str, int], tls: ssl.SSLContext | None, until_s: float) -> None:
        self.until_s = until_s
        self.used_at_s = 0.0
        self._socket = socket.create_connection(address, self._left_s())
        try:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if tls is not None:
                self._socket = tls.wrap_socket(self._socket, server_hostname=address[0])
        except BaseException:
            self._socket.close()
            raise
        self._is_encrypted = tls is not None
        self._early = bytearray()  # received, and not yet part of an answer

    def send(self, pieces: Sequence[bytes | memoryview]) -> None:
        views = [memoryview(piece).cast("B") for piece in pieces if len(piece)]
        while views:
            self._socket.settimeout(self._left_s())
            sent = self._socket.send(views[0]) if self._is_encrypted else self._socket.sendmsg(views[:_MOST_VECTORS])
            while views and sent >= len(views[0]):
                sent -= len(views.pop(0))
            if sent:
                views[0] = views[0][sent:]

    def receive(self, method: str, take: TakeBody | None) -> tuple[Answer, bool]:
        """The answer to a request of this method, and whether the connection can be used again."""
        version, status, headers = self._head()
        while status < 200:
            version, status, headers = self._head()
        stays = version == "1" and "close" not in headers.get("connection", "").lower()
        answer = Answer(status, headers)
        length = _length(method, status, headers)
        if take is not None and status in (200, 206) and method != "HEAD":
            if length is None:
                raise ProtocolError("an answer without a length")
            answer.taken = take(headers, length, self._body_reader(length))
        elif length is not None:
            if length > _MOST_BODY_BYTES:
                raise ProtocolError(f"an answer of more than {_MOST_BODY_BYTES} bytes")
            data = bytearray(length)
            self._fill(memoryview(data))
            answer.body = bytes(data)
        elif headers.get("transfer-encoding", "").lower() == "chunked":
            answer.body = self._chunked()
        else:
            answer.body, stays = self._rest(), False
        return answer, stays and not self._early

    def is_quiet(self) -> bool:
        """Whether the service has neither closed it nor sent what nobody has asked for."""
        if self._is_encrypted:
            return True  # records of the encryption itself may lie there
        try:
            self._socket.settimeout(0)
            self._socket.recv(1, socket.MSG_PEEK)
        except OSError as exc:
            return isinstance(exc, BlockingIOError)
        return False

    def end(self) -> None:
        self._socket.close()

    def _left_s(self) -> float:
        left_s = self.until_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("the deadline of the request has passed")
        return min(left_s, 3600.0)

    def _read_into(self, view: memoryview) -> int:
        self._socket.settimeout(self._left_s())
        return self._socket.recv_into(view)

    def _read_more(self) -> None:
        piece = bytearray(_READ_BYTES)
        count = self._read_into(memoryview(piece))
        if not count:
            raise ConnectionResetError("the service has closed the connection")
        self._early += memoryview(piece)[:count]

    def _fill(self, view: memoryview) -> None:
        if self._early:
            count = min(len(view), len(self._early))
            view[:count] = self._early[:count]
            del self._early[:count]
            view = view[count:]
        while view:
            count = self._read_into(view)
            if not count:
                raise ProtocolError(f"the answer ends {len(view)} bytes too early")
            view = view[count:]

    def _line(self, end: bytes) -> bytes:
        """What comes before `end`, which is taken, too."""
        searched = 0
        while (at := self._early.find(end, searched)) < 0:
            if len(self._early) > _MOST_HEADER_BYTES:
                raise ProtocolError("a header that is too long")
            searched = max(len(self._early) - len(end), 0)
            self._read_more()
        found = bytes(self._early[:at])
        del self._early[: at + len(end)]
        return found

    def _head(self) -> tuple[str, int, dict[str, str]]:
        first, *lines = self._line(b"\r\n\r\n").decode("latin-1").split("\r\n")
        match = _STATUS.fullmatch(first)
        if match is None:
            raise ProtocolError(f"{first[:80]!r} is not how HTTP/1.1 answers")
        headers: dict[str, str] = {}
        for line in lines:
            name, colon, value = line.partition(":")
            if not colon or not _NAME.fullmatch(name):
                raise ProtocolError(f"{line[:80]!r} is no header")
            name, value = name.lower(), value.strip()
            headers[name] = f"{headers[name]}, {value}" if name in headers else value
        return match[1], int(match[2]), headers

    def _body_reader(self, length: int) -> ReadAt:
        at = 0

        def read_at(buffer: memoryview, offset: int) -> None:
            nonlocal at
            if offset != at or offset + len(buffer) > length:
                raise ProtocolError(f"bytes {offset} to {offset + len(buffer)} of {length} are read behind byte {at}")
            self._fill(buffer)
            at += len(buffer)

        return read_at

    def _chunked(self) -> bytes:
        body = bytearray()
        while True:
            match = _CHUNK_SIZE.match(self._line(b"\r\n"))
            size = _MOST_BODY_BYTES + 1 if match is None else int(match[1], 16)
            if size > _MOST_BODY_BYTES - len(body):
                raise ProtocolError(f"an answer of more than {_MOST_BODY_BYTES} bytes, or in broken pieces")
            if not size:
                while self._line(b"\r\n"):
                    """A trailer."""
                return bytes(body)
            piece = bytearray(size)
            self._fill(memoryview(piece))
            body += piece
            if self._line(b"\r\n"):
                raise ProtocolError("a piece that is longer than it says")

    def _rest(self) -> bytes:
        try:
            while len(self._early) <= _MOST_BODY_BYTES:
                self._read_more()
        except ConnectionResetError:
            body, self._early = bytes(self._early), bytearray()
            return body
        raise ProtocolError(f"an answer of more than {_MOST_BODY_BYTES} bytes")


def _length(method: str, status: int, headers: Mapping[str, str]) -> int | None:
    """Bytes of the body; None if it says so itself, or ends with the connection."""
    if method == "HEAD" or status in (204, 304):
        return 0
    if "transfer-encoding" in headers:
        return None
    text = headers.get("content-length")
    if text is not None and not (text.isascii() and text.isdigit() and len(text) < 20):
        raise ProtocolError(f"a length of {text[:80]!r}")
    return None if text is None else int(text)


class HttpPool:
    """Requests to one service. Every method may be called from any thread.

    Parameters
    ----------
    url : `http://host:port` or `https://host:port`.
    tls : None for the system's certificates, where the URL is https.

    Raises
    ------
    ValueError : the URL is not one of these.
    """

    def __init__(self, url: str, *, tls: ssl.SSLContext | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path not in ("", "/") or parts.query:
            raise ValueError(f"url is {url!r}; expected http://host:port or https://host:port")
        self.url = url.rstrip("/")
        self._address = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
        self._host = parts.netloc.rpartition("@")[2]
        self._tls = (tls or ssl.create_default_context()) if parts.scheme == "https" else None
        self._lock = threading.Lock()
        self._idle: list[Connection] = []
        self._closed = False

    def request(
        self,
        method: str,
        path: str,
        *,
        headers: Mapping[str, str],
        body: Sequence[memoryview | bytes] = (),
        body_bytes: int | None = None,
        take: TakeBody | None = None,
        until_s: float,
    ) -> Answer:
        """One request and its answer.

        Parameters
        ----------
        body_bytes : length of the body; None for none.
        take : takes the body of an answer with status 200 or 206. What it raises ends the connection.
        until_s : monotonic time by which all must be done.

        Raises
        ------
        ValueError : a header has a line break in it.
        TierTimeoutError : it was not done in time.
        TierUnavailableError : the service cannot be reached, or broke the connection off.
        """
        lines = [f"{method} {path} HTTP/1.1", f"Host: {self._host}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        if body_bytes is not None:
            lines.append(f"Content-Length: {body_bytes}")
        if any(map(_BREAKS_LINES.search, lines)):
            raise ValueError(f"headers of {method} {path} have line breaks in them")
        sent = ["\r\n".join([*lines, "", ""]).encode("latin-1"), *body]
        while True:
            connection: Connection | None = None
            is_fresh = True
            try:
                connection, is_fresh = self._take(until_s)
                answer, stays = _exchange(connection, method, sent, take)
            except TimeoutError as exc:
                _end(connection)
                raise TierTimeoutError(f"service {self.url} did not answer in time", begun=True) from exc
            except OSError as exc:
                _end(connection)
                if not is_fresh and isinstance(exc, ConnectionError):
                    continue  # an idle connection that the service has closed meanwhile
                raise TierUnavailableError(
                    f"service {self.url} cannot be reached: {exc or type(exc).__name__}"
                ) from exc
            except BaseException:
                _end(connection)
                raise
            if stays:
                self._give_back(connection)
            else:
                connection.end()
            return answer

    def close(self) -> None:
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.end()

    def _take(self, until_s: float) -> tuple[Connection, bool]:
        oldest_s = time.monotonic() - _IDLE_S
        with self._lock:
            if self._closed:
                raise TierUnavailableError(f"the client of {self.url} is closed")
            connection = self._idle.pop() if self._idle else None
        if connection is not None and connection.used_at_s > oldest_s and connection.is_quiet():
            connection.until_s = until_s
            return connection, False
        if connection is not None:
            connection.end()
        return Connection(self._address, self._tls, until_s), True

    def _give_back(self, connection: Connection) -> None:
        connection.used_at_s = time.monotonic()
        with self._lock:
            if not self._closed and len(self._idle) < _IDLE_CONNECTIONS:
                self._idle.append(connection)
                return
        connection.end()


def _exchange(
    connection: Connection, method: str, sent: Sequence[memoryview | bytes], take: TakeBody | None
) -> tuple[Answer, bool]:
    try:
        connection.send(sent)
    except ConnectionError:
        if len(sent) == 1:
            raise
        # A service that refuses a body answers, and closes: what it has answered says why.
        answer, _ = connection.receive(method, take)
        return answer, False
    return connection.receive(method, take)


def _end(connection: Connection | None) -> None:
    if connection is not None:
        connection.end()
