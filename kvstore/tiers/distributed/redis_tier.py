"""Chunks in Redis or Valkey, through redis-py."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import cast
from urllib.parse import urlsplit

try:
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry
except ImportError as exc:
    raise ImportError("RedisTier needs redis-py: pip install 'kvloom[redis]'") from exc
from torch import Tensor

from ....errors import ChunkTooLargeError, TierFullError, TierTimeoutError, TierUnavailableError
from ...encoding.buffer_pool import BufferPool
from .byte_store import Arriving, Found, Outgoing
from .tier import DistributedTier, Sharing

_MOST_BYTES = 512 << 20  # of a value: `proto-max-bulk-len`, unless the server has another
_LINE_BYTES = 4096  # read at a time while a line is awaited; what comes of the payload with it is copied
_SMALL_BYTES = 1 << 14  # parts below are sent together
_NO_COUNTS: Mapping[str, int] = MappingProxyType({})


class RedisTier(DistributedTier):
    """Chunks in Redis (6.2 or later) or Valkey, one value a chunk, shared by all that use the server and the prefix.

    The server bounds its memory: `maxmemory` with `maxmemory-policy allkeys-lru` makes it evict on its own. With
    `noeviction` it refuses, and the store evicts chunks that it knows by its own policy. One server, or a proxy that
    looks like one; no cluster.

    Parameters
    ----------
    url : `redis://`, `rediss://` (TLS) or `unix://`, as redis-py takes it.
    password_file : a file with the password, instead of one in the URL.
    ttl_s : the server removes a chunk so long after it was put; None for never. What `put` is told counts as well.
    sharing : None for the defaults.

    Raises
    ------
    ValueError : the URL is none that redis-py takes, or a number is out of range.
    OSError : the password file cannot be read.
    """

    def __init__(
        self,
        url: str,
        *,
        password_file: str | os.PathLike[str] | None = None,
        ttl_s: float | None = None,
        sharing: Sharing | None = None,
    ) -> None:
        sharing = sharing or Sharing(name="redis")
        if ttl_s is not None and not ttl_s > 0:
            raise ValueError(f"ttl_s is {ttl_s}; expected seconds above 0, or None")
        password = None if password_file is None else Path(password_file).expanduser().read_text().strip()
        super().__init__(_Values(url, password, ttl_s, sharing.timeout_s), sharing)


class _Values:
    """Values by key, as a `ByteStore`."""

    lends = False
    counts = _NO_COUNTS

    def __init__(self, url: str, password: str | None, ttl_s: float | None, timeout_s: float) -> None:
        parts = urlsplit(url)
        self._where = f"{parts.hostname or parts.path}" + (f":{parts.port}" if parts.port else "")  # without a password
        self._ttl_s = ttl_s
        self._timeout_s = timeout_s
        options = {} if password is None else {"password": password}
        self._pool = redis.ConnectionPool.from_url(
            url,
            protocol=2,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),  # a store asks again when it needs to
            **options,
        )
        self._client = redis.Redis(connection_pool=self._pool)
        self._buffers = BufferPool()

    def put(self, name: str, outgoing: Outgoing, expires_at_s: float | None) -> None:
        nbytes = outgoing.nbytes
        if nbytes > _MOST_BYTES:
            raise ChunkTooLargeError(
                f"Redis takes no value of {nbytes} bytes; at most {_MOST_BYTES}", needed_bytes=nbytes
            )
        options: list[bytes] = []
        if self._ttl_s is not None:
            expires_at_s = min(expires_at_s or float("inf"), time.time() + self._ttl_s)
        if expires_at_s is not None:
            options = [b"PXAT", str(max(1, int(expires_at_s * 1000))).encode()]
        command = [b"*%d\r\n" % (3 + len(options)), _bulk(b"SET"), _bulk(name.encode()), b"$%d\r\n" % nbytes]
        end = b"\r\n" + b"".join(map(_bulk, options))
        with self._failures(nbytes), self._connection() as connection:
            connection.send_packed_command(_joined([*command, *outgoing.parts(), end]))
            connection.read_response()

    @contextmanager
    def reading(self, name: str, nbytes: int | None) -> Iterator[Arriving | None]:
        with self._failures(), self._connection() as connection:
            replies = self._ask(connection, [[b"GET", name.encode()]])
            arriving = replies.arriving(self._buffers)
            yield arriving
            if arriving is not None:
                arriving.until(len(arriving.data))

    def get_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> Sequence[memoryview] | None:
        key = name.encode()
        commands = [[b"GETRANGE", key, b"%d" % start, b"%d" % (stop - 1)] for start, stop in ranges]
        found: list[memoryview] = []
        with self._failures(), self._connection() as connection:
            replies = self._ask(connection, commands)
            for _ in ranges:
                data = replies.bulk(self._buffers)
                found.append(memoryview(b"") if data is None else data.numpy().data)
        return None if ranges and not any(map(len, found)) else found

    def delete(self, name: str) -> bool:
        with self._failures():
            return bool(self._client.unlink(name))

    def find(self, names: Sequence[str], head_bytes: int) -> list[Found | None]:
        with self._failures():
            pipeline = self._client.pipeline(transaction=False)
            for name in names:
                pipeline.strlen(name)
                if head_bytes:
                    pipeline.getrange(name, 0, head_bytes - 1)
            replies = pipeline.execute()
        step = 2 if head_bytes else 1
        heads = replies[1::2] if head_bytes else [b""] * len(names)
        return [Found(nbytes, head) if nbytes else None for nbytes, head in zip(replies[::step], heads, strict=True)]

    def close(self) -> None:
        self._pool.disconnect()

    def _ask(self, connection: redis.Connection, commands: Sequence[Sequence[bytes]]) -> _Replies:
        packed = b"".join(b"*%d\r\n" % len(words) + b"".join(map(_bulk, words)) for words in commands)
        connection.send_packed_command([packed])
        return _Replies(connection, time.monotonic() + self._timeout_s)

    @contextmanager
    def _connection(self) -> Iterator[redis.Connection]:
        """A connection of the pool; after an error it is closed, since replies may still be under way."""
        connection = self._pool.get_connection()
        try:
            yield connection
        except BaseException:
            connection.disconnect()
            raise
        finally:
            self._pool.release(connection)

    @contextmanager
    def _failures(self, nbytes: int = 0) -> Iterator[None]:
        try:
            yield
        except redis.exceptions.OutOfMemoryError as exc:
            raise TierFullError(f"Redis at {self._where} has no room for {nbytes} bytes", needed_bytes=nbytes) from exc
        except (redis.TimeoutError, TimeoutError) as exc:
            raise TierTimeoutError(
                f"Redis at {self._where} has not answered within {self._timeout_s:.3g} s", begun=True
            ) from exc
        except (redis.RedisError, OSError) as exc:
            raise TierUnavailableError(f"Redis at {self._where}: {exc}") from exc


class _Replies:
    """Replies that are bulk strings, received into lent memory: redis-py itself makes three copies of each.

    Parameters
    ----------
    until_s : when to give up, monotonic.
    """

    def __init__(self, connection: redis.Connection, until_s: float) -> None:
        self._socket = cast("socket.socket", connection._sock)  # noqa: SLF001  redis-py shows it to its parsers alone
        self._until_s = until_s
        self._rest = b""  # received, not looked at yet

    def bulk(self, buffers: BufferPool) -> Tensor | None:
        """The next reply; None for a null."""
        arriving = self.arriving(buffers)
        if arriving is None:
            return None
        arriving.until(len(arriving.data))
        return arriving.data

    def arriving(self, buffers: BufferPool) -> Arriving | None:
        """As `bulk`, while its bytes are under way; it must have arrived whole before the next is asked for."""
        line = self._line()
        if line[:1] == b"-":
            raise redis.ResponseError(line[1:].decode(errors="replace"))
        if line[:1] != b"$":
            raise redis.ConnectionError(f"an answer that begins with {line[:20]!r}")
        nbytes = int(line[1:])
        if nbytes < 0:
            return None
        data = buffers.empty(nbytes + 2)  # and the end of the line
        view: memoryview = data.numpy().data
        filled = min(len(self._rest), len(view))
        view[:filled] = self._rest[:filled]
        self._rest = self._rest[filled:]

        def until(count: int) -> None:
            nonlocal filled
            stop = count + 2 if count == nbytes else count  # the end of the line with the last byte
            while filled < stop:
                filled += self._received(self._socket.recv_into(view[filled:]))

        return Arriving(data[:nbytes], until)

    def _line(self) -> bytes:
        while b"\r\n" not in self._rest:
            more = self._socket.recv(_LINE_BYTES)
            self._received(len(more))
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\r\n")
        return line

    def _received(self, count: int) -> int:
        if not count:
            raise redis.ConnectionError("the server has closed the connection")
        if time.monotonic() > self._until_s:
            raise redis.TimeoutError("too late")
        return count


def _bulk(data: bytes) -> bytes:
    return b"$%d\r\n%s\r\n" % (len(data), data)


def _joined(parts: Sequence[bytes | memoryview]) -> list[bytes | memoryview]:
    """The same bytes, small neighbours joined: each part is a system call."""
    joined: list[bytes | memoryview] = []
    small = b""
    for part in parts:
        if len(part) < _SMALL_BYTES:
            small += part
        else:
            joined += [small, part] if small else [part]
            small = b""
    return [*joined, small] if small else joined
