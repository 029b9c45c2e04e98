"""HTTP/1.1 to one service: pooled connections, and a deadline that bounds every wait of a request.

The standard library's client reads a body straight into the caller's memory, which no other client does. What it lacks
is here: a deadline for the whole request rather than a timeout for each read, and connections that are used again.
"""

from __future__ import annotations

import http.client
import io
import socket
import ssl
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from ....errors import TierTimeoutError, TierUnavailableError

_IDLE_CONNECTIONS = 16
_IDLE_S = 20.0  # below the service's own limit, so that few requests meet a connection that is just being closed
_MOST_JSON_BYTES = 64 << 20


class DeadlineSocket(io.RawIOBase):
    """A connected socket whose every operation ends at `until_s` (monotonic) at the latest."""

    def __init__(self, sock: socket.socket) -> None:
        self.until_s = float("inf")
        self._sock = sock

    def sendall(self, data: memoryview | bytes) -> None:
        view = memoryview(data).cast("B")
        while view:
            self._sock.settimeout(self._left_s())
            view = view[self._sock.send(view) :]

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        self._sock.settimeout(self._left_s())
        return self._sock.recv_into(buffer)

    def readable(self) -> bool:
        return True

    def makefile(self, *_: object) -> io.BufferedReader:
        """What `http.client` reads answers from."""
        return io.BufferedReader(self, 1 << 16)

    def close(self) -> None:
        """Leaves the socket open: `http.client` closes its file after every answer."""

    def end(self) -> None:
        """Closes the connection."""
        self._sock.close()

    def _left_s(self) -> float:
        left_s = self.until_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("the deadline of the request has passed")
        return min(left_s, 3600.0)


class Connection(http.client.HTTPConnection):
    """A connection that waits no longer than the deadline of its request."""

    def __init__(self, host: str, port: int, tls: ssl.SSLContext | None, until_s: float) -> None:
        super().__init__(host, port)
        self._tls = tls
        self.raw: DeadlineSocket | None = None
        self.until_s = until_s
        self.used_at_s = 0.0

    def connect(self) -> None:
        sock = socket.create_connection((self.host, self.port), max(self.until_s - time.monotonic(), 0.001))
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls is not None:
                sock = self._tls.wrap_socket(sock, server_hostname=self.host)
        except BaseException:
            sock.close()
            raise
        self.raw = DeadlineSocket(sock)
        self.raw.until_s = self.until_s
        self.sock = self.raw

    def end(self) -> None:
        """Closes the connection for good. `close` is what `http.client` calls while an answer is still to be read."""
        self.close()
        if self.raw is not None:
            self.raw.end()
            self.raw = None

    def use_until(self, until_s: float) -> None:
        self.until_s = until_s
        if self.raw is not None:
            self.raw.until_s = until_s


@dataclass(slots=True)
class Answer:
    """What a service has answered; `body` is empty if it was read into a buffer of the caller."""

    status: int
    headers: Mapping[str, str]
    body: bytes = b""
    into: memoryview | None = field(default=None)


class BodyBuffer:
    """Where the body of a successful answer is to go: memory that is asked for when its length is known."""

    def memory(self, nbytes: int) -> memoryview:
        raise NotImplementedError


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
        self._host = parts.hostname
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
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
        body: Iterable[memoryview | bytes] = (),
        body_bytes: int | None = None,
        buffer: BodyBuffer | None = None,
        until_s: float,
    ) -> Answer:
        """One request and its answer.

        Parameters
        ----------
        body_bytes : length of the body, which is sent piece by piece; None for none.
        buffer : takes the body of an answer with status 200 or 206.
        until_s : monotonic time by which all must be done.

        Raises
        ------
        TierTimeoutError : it was not.
        TierUnavailableError : the service cannot be reached, or broke the connection off.
        """
        while True:
            connection, is_fresh = self._take(until_s)
            try:
                answer = self._exchange(connection, method, path, headers, body, body_bytes, buffer)
            except (TimeoutError, ssl.SSLWantReadError) as exc:
                connection.end()
                raise TierTimeoutError(f"service {self.url} did not answer in time", begun=True) from exc
            except (OSError, http.client.HTTPException) as exc:
                connection.end()
                if not is_fresh and isinstance(exc, ConnectionError | http.client.RemoteDisconnected):
                    continue  # an idle connection that the service has closed meanwhile
                raise TierUnavailableError(
                    f"service {self.url} cannot be reached: {exc or type(exc).__name__}"
                ) from exc
            except BaseException:
                connection.end()
                raise
            return answer

    def close(self) -> None:
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.end()

    def _exchange(
        self,
        connection: Connection,
        method: str,
        path: str,
        headers: Mapping[str, str],
        body: Iterable[memoryview | bytes],
        body_bytes: int | None,
        buffer: BodyBuffer | None,
    ) -> Answer:
        connection.putrequest(method, path, skip_accept_encoding=True)
        for name, value in headers.items():
            connection.putheader(name, value)
        if body_bytes is not None:
            connection.putheader("Content-Length", str(body_bytes))
        connection.endheaders()
        try:
            for piece in body:
                connection.send(piece)
        except ConnectionError:
            pass  # a service that refuses a body answers, and closes: what it has answered says why
        response = connection.getresponse()
        answer = Answer(response.status, {name.lower(): value for name, value in response.getheaders()})
        length = response.length
        if buffer is not None and response.status in (200, 206):
            if length is None:
                raise http.client.HTTPException("an answer without a length")
            into = buffer.memory(length)
            filled = 0
            while filled < length:
                count = response.readinto(into[filled:])
                if not count:
                    raise http.client.IncompleteRead(b"", length - filled)
                filled += count
            answer.into = into
        elif method != "HEAD":
            answer.body = response.read(_MOST_JSON_BYTES)
            if not response.isclosed():
                raise http.client.HTTPException(f"an answer of more than {_MOST_JSON_BYTES} bytes")
        response.close()
        if response.will_close:
            connection.end()
        else:
            self._give_back(connection)
        return answer

    def _take(self, until_s: float) -> tuple[Connection, bool]:
        oldest_s = time.monotonic() - _IDLE_S
        with self._lock:
            if self._closed:
                raise TierUnavailableError(f"the client of {self.url} is closed")
            connection = self._idle.pop() if self._idle else None
        if connection is not None and connection.used_at_s > oldest_s:
            connection.use_until(until_s)
            return connection, False
        if connection is not None:
            connection.end()
        return Connection(self._host, self._port, self._tls, until_s), True

    def _give_back(self, connection: Connection) -> None:
        connection.used_at_s = time.monotonic()
        with self._lock:
            if not self._closed and len(self._idle) < _IDLE_CONNECTIONS:
                self._idle.append(connection)
                return
        connection.end()
