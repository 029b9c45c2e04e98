"""Bodies that move on the connection's own socket, past the buffers of the server, which copy every byte twice.

The event loop reads headers and answers them. A body of some size goes from the store's memory to the socket, or from
the socket to the memory in which the chunk will lie, in one step for as much as the socket takes. What it does not take
at once is moved by a thread, without the interpreter's lock; a client that pauses costs no thread, but a wait of the
event loop for its socket.
"""

from __future__ import annotations

import asyncio
import logging
import os
import select
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

T = TypeVar("T")

_LOG = logging.getLogger("kvloom.service")
EXTENSION = "kvloom.body"  # of the ASGI scope

_AT_ONCE_BYTES = 1 << 22  # some hundred microseconds: the event loop may do that itself while nobody else waits for it
_BESIDE_OTHERS_BYTES = 1 << 17  # otherwise threads move what is longer, so that look-ups do not queue behind bodies
_SEND_BUFFER_BYTES = 1 << 22
_LEAST_SEND_BUFFER_BYTES = 1 << 20
_PIECE_BYTES = 1 << 24  # that a thread moves before it looks at the clock
_PAUSE_S = 0.02  # a thread waits for a socket no longer
_MOST_VECTORS = 512


class Body(Protocol):
    """How the body of a request, or of its answer, moves past the server: `BodySocket` says what each method does."""

    sent_bytes: int
    received_bytes: int
    is_received: bool

    @property
    def is_free(self) -> bool: ...

    def corked(self) -> AbstractContextManager[None]: ...

    async def send(self, buffers: Sequence[memoryview], threads: Executor, *, idle_s: float) -> bool: ...

    async def receive(self, view: memoryview, threads: Executor, *, idle_s: float, until_s: float) -> None: ...


def body_socket(scope: Mapping[str, Any]) -> Body | None:
    """The socket of a request; None if its bodies have to pass the server, such as encrypted ones."""
    found: Body | None = scope.get("extensions", {}).get(EXTENSION)
    return found


def widen(sock: Any) -> None:
    """Lets a connection take a chunk at once, where the system allows so much that this is more than it gives itself.

    Otherwise the sender is woken for every piece that the client has taken: for a megabyte that takes twice as long.
    """
    limit = Path("/proc/sys/net/core/wmem_max")
    try:
        most_bytes = int(limit.read_text())
    except (OSError, ValueError):
        return
    if most_bytes >= _LEAST_SEND_BUFFER_BYTES:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, min(most_bytes, _SEND_BUFFER_BYTES))


class BodySocket:
    """The socket of the connection on which a request has come; for the event loop's thread alone.

    Parameters
    ----------
    protocol, cycle : uvicorn's, of the connection and of the request.
    """

    def __init__(self, protocol: Any, cycle: Any) -> None:
        self._protocol = protocol
        self._cycle = cycle
        self._descriptor: int = protocol.transport.get_extra_info("socket").fileno()
        self.sent_bytes = 0
        self.received_bytes = 0
        self.is_received = False

    @property
    def is_free(self) -> bool:
        """Whether what was sent before has left the server's buffers, so that a body may follow."""
        return self._is_open and not self._protocol.transport.get_write_buffer_size()

    def is_all_here(self, most_bytes: int) -> bool:
        """Whether the whole body has come with its header, and is no longer than this."""
        return not self._cycle.more_body and len(self._cycle.body) <= most_bytes

    @property
    def _at_once_bytes(self) -> int:
        return _AT_ONCE_BYTES if len(self._protocol.tasks) <= 1 else _BESIDE_OTHERS_BYTES

    @property
    def _is_open(self) -> bool:
        return not (self._cycle.disconnected or self._protocol.transport.is_closing())

    @contextmanager
    def corked(self) -> Iterator[None]:
        """Within, what fills no packet waits for what follows: a header alone would wake the client in vain."""
        sock = self._protocol.transport.get_extra_info("socket")
        if not hasattr(socket, "TCP_CORK") or sock.family == getattr(socket, "AF_UNIX", None) or not self._is_open:
            yield
            return
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
        try:
            yield
        finally:
            if self._is_open:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)

    async def send(self, buffers: Sequence[memoryview], threads: Executor, *, idle_s: float) -> bool:
        """Sends the body of the answer, whose header has been sent.

        False if the client went away, or read nothing for `idle_s`: the connection is closed then.
        """
        left = [buffer for buffer in buffers if len(buffer)]
        total_bytes = sum(map(len, left))
        send_some = partial(_send, left)
        try:
            if send_some(self._descriptor, 0.0, self._at_once_bytes) < total_bytes:
                await self._move(send_some, lambda: not left, threads, select.POLLOUT, idle_s, float("inf"))
        except OSError as exc:
            _LOG.info("a client does not take the body: %s", exc or type(exc).__name__)
            await self._abort()
            return False
        self._cycle.expected_content_length -= total_bytes
        self.sent_bytes += total_bytes
        return True

    async def receive(self, view: memoryview, threads: Executor, *, idle_s: float, until_s: float) -> None:
        """Fills `view`, which is as long as the body is.

        Parameters
        ----------
        until_s : monotonic time by which all must be there.

        Raises
        ------
        TimeoutError : it was not, or nothing came for `idle_s`.
        ConnectionError : the client went away.
        """
        cycle = self._cycle
        if not self._is_open:
            raise ConnectionResetError("the client went away before the body")
        if cycle.waiting_for_100_continue:
            self._protocol.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            cycle.waiting_for_100_continue = False
        self._protocol.flow.pause_reading()
        early, cycle.body = cycle.body, bytearray()
        if len(early) > len(view):
            raise ValueError(f"{len(early)} bytes of a body of {len(view)}")
        view[: len(early)] = early
        self.received_bytes = len(early)
        if not cycle.more_body:
            self.is_received = len(early) == len(view)
            return
        left = [view[len(early) :]]
        receive_some = partial(_receive, left)
        receive_some(self._descriptor, 0.0, self._at_once_bytes)
        if left[0]:
            await self._move(receive_some, lambda: not left[0], threads, select.POLLIN, idle_s, until_s)
        self.received_bytes = len(view)
        self.is_received = True
        self._protocol.body_was_received(cycle)

    async def _move(
        self,
        move: Callable[[int, float, int], int],
        is_done: Callable[[], bool],
        threads: Executor,
        readiness: int,
        idle_s: float,
        until_s: float,
    ) -> None:
        """Has threads move bytes until all are, and waits without a thread while the socket is not ready."""
        loop = asyncio.get_running_loop()
        descriptor = os.dup(self._descriptor)  # stays this connection's, whatever becomes of the server's own
        try:
            moved_at_s = time.monotonic()
            while not is_done():
                if await ended(loop.run_in_executor(threads, move, descriptor, _PAUSE_S, _PIECE_BYTES)):
                    moved_at_s = time.monotonic()
                elif not is_done():
                    left_s = min(moved_at_s + idle_s, until_s) - time.monotonic()
                    await _ready(loop, descriptor, readiness, left_s)
                if time.monotonic() > until_s:
                    raise TimeoutError("the body takes too long")
        finally:
            os.close(descriptor)

    async def _abort(self) -> None:
        self._protocol.transport.abort()
        for _ in range(10):  # until the server has taken note
            if not self._cycle.disconnected:
                await asyncio.sleep(0)


async def ended(work: asyncio.Future[T]) -> T:
    """What a thread, or a worker, has returned. A caller that is cancelled waits, too: its memory is in use."""
    cancelled: asyncio.CancelledError | None = None
    while not work.done():
        try:
            await asyncio.wait([work])
        except asyncio.CancelledError as exc:
            cancelled = exc
    if cancelled is not None:
        raise cancelled
    return work.result()


async def _ready(loop: asyncio.AbstractEventLoop, descriptor: int, readiness: int, timeout_s: float) -> None:
    """Returns when the socket can be read, or written. Raises `TimeoutError` if it cannot in time."""
    ready: asyncio.Future[None] = loop.create_future()
    add, remove = (
        (loop.add_reader, loop.remove_reader) if readiness == select.POLLIN else (loop.add_writer, loop.remove_writer)
    )

    def note() -> None:
        if not ready.done():
            ready.set_result(None)

    add(descriptor, note)
    try:
        async with asyncio.timeout(max(timeout_s, 0.0)):
            await ready
    finally:
        remove(descriptor)


def _send(left: list[memoryview], descriptor: int, pause_s: float, most_bytes: int) -> int:
    """Sends from the start of `left`, and takes out what was sent; the bytes sent."""
    sent = 0
    while left and sent < most_bytes:
        try:
            count = os.writev(descriptor, _first(left[:_MOST_VECTORS], most_bytes - sent))
        except BlockingIOError:
            if not _pause(descriptor, select.POLLOUT, pause_s):
                break
            continue
        sent += count
        while left and count >= len(left[0]):
            count -= len(left.pop(0))
        if count:
            left[0] = left[0][count:]
    return sent


def _first(buffers: Sequence[memoryview], nbytes: int) -> list[memoryview]:
    """The first `nbytes` of the buffers, or all."""
    found = []
    for buffer in buffers:
        if nbytes <= 0:
            break
        found.append(buffer[:nbytes])
        nbytes -= len(buffer)
    return found


def _receive(left: list[memoryview], descriptor: int, pause_s: float, most_bytes: int) -> int:
    """Receives into the start of `left[0]`, and cuts off what was received; the bytes received."""
    received = 0
    while left[0] and received < most_bytes:
        try:
            count = os.readv(descriptor, [left[0][: most_bytes - received]])
        except BlockingIOError:
            if not _pause(descriptor, select.POLLIN, pause_s):
                break
            continue
        if not count:
            raise ConnectionResetError("the client went away within the body")
        received += count
        left[0] = left[0][count:]
    return received


def _pause(descriptor: int, readiness: int, pause_s: float) -> bool:
    """Whether the socket has become ready within `pause_s`."""
    if not pause_s:
        return False
    waiting = select.poll()
    waiting.register(descriptor, readiness)
    return bool(waiting.poll(pause_s * 1000))
