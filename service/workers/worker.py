"""A worker: connections, TLS, HTTP and the bytes of bodies. It knows no token, no chunk and no tenant.

Every request goes to the store's process as it is, and the answer back to the client. Bodies of chunks go between the
client's socket and the shared memory, as the store's process says. Imports neither torch nor the application.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import json
import logging
import mmap
import os
import signal
import socket
import time
from collections.abc import MutableMapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import uvicorn
from starlette.types import Receive, Scope, Send

from ..access.certificate import Certificate
from ..listening import certificate_of, configure_log, server_config
from ..settings import ServiceSettings
from ..transfer.body_socket import BodySocket, body_socket
from .channel import INLINE_BYTES, Channel, Kind, frame, pairs_as_bytes, pairs_as_text

_LOG = logging.getLogger("kvloom.service")
_PIECE_BYTES = 1 << 18
_TICKS = 20  # of a tenth of a second
_ACCEPT_AGAIN_S = 0.1
_TLS_END_S = 2.0  # an idle client answers no good-bye: how long the end waits for it, which by default is 30 s
_LENGTH_BYTES = 4


def main(control: int, listener: int, memory: int) -> None:
    """Serves until the store's process asks for an end, or is gone.

    Parameters
    ----------
    control, listener, memory : descriptors of the channel, of the socket that is listened to, and of the shared memory.
    """
    channel_socket = socket.socket(fileno=control)
    settings = told_settings(channel_socket)
    os.umask(0o077)
    configure_log(settings)
    view = memoryview(mmap.mmap(memory, os.fstat(memory).st_size))
    os.close(memory)
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, lambda *_: None)  # uvicorn raises them again after an orderly end
    front = Front(settings, view)
    config = server_config(settings, front.serve, is_worker=True)
    server = _WorkerServer(config, front, certificate_of(settings), channel_socket, socket.socket(fileno=listener))
    server.run(sockets=[])
    os._exit(0)  # no thread is waited for: what they moved has ended with its connection


def tell_settings(sock: socket.socket, settings: ServiceSettings) -> None:
    """Writes the settings that `told_settings` reads: what else they hold no worker needs to know."""
    values = settings.model_dump(mode="json", exclude={"remote_tiers", "models", "tls_key_password"})
    if settings.tls_key_password is not None:
        values["tls_key_password"] = settings.tls_key_password.get_secret_value()
    text = json.dumps(values).encode()
    sock.sendall(len(text).to_bytes(_LENGTH_BYTES, "little") + text)


def told_settings(sock: socket.socket) -> ServiceSettings:
    """Raises `OSError` if the other end is gone."""
    nbytes = int.from_bytes(_exactly(sock, _LENGTH_BYTES), "little")
    return ServiceSettings(**json.loads(_exactly(sock, nbytes)))


def _exactly(sock: socket.socket, nbytes: int) -> bytes:
    data = b""
    while len(data) < nbytes:
        piece = sock.recv(nbytes - len(data))
        if not piece:
            raise ConnectionResetError("the store's process is gone")
        data += piece
    return data


class Front:
    """The ASGI application of a worker, which has the store's process answer. For the event loop's thread alone."""

    def __init__(self, settings: ServiceSettings, memory: memoryview) -> None:
        self._settings = settings
        self._memory = memory
        self._threads = ThreadPoolExecutor(2 * settings.max_transfers, "kvloom-bodies")
        self._numbers = itertools.count(1)
        self._open: dict[int, asyncio.Queue[tuple[Kind, Any, bytes]]] = {}
        self.channel = Channel(self._take, self._lose)
        self.is_draining = False

    def _take(self, kind: Kind, request: int, head: Any, data: bytes) -> None:
        if kind == Kind.PING:
            self.channel.send(frame(Kind.PONG))
        elif kind == Kind.DRAIN:
            self.is_draining = True
        elif (queue := self._open.get(request)) is not None:
            queue.put_nowait((kind, head, data))

    def _lose(self) -> None:
        os._exit(1)  # without the store's process no request can be answered, and none that is open can end

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, to the end of its answer."""
        number = next(self._numbers)
        queue = self._open[number] = asyncio.Queue()
        found = body_socket(scope)
        body = found if isinstance(found, BodySocket) else None
        try:
            whole = await _whole_body(body, receive)
            self.channel.send(frame(Kind.REQUEST, number, _told(scope, is_whole=whole is not None), whole or b""))
            await _Answer(self, number, queue, body, receive, send).follow()
        finally:
            del self._open[number]


class _Answer:
    """What the store's process says of one request, done in order."""

    def __init__(
        self,
        front: Front,
        number: int,
        queue: asyncio.Queue[tuple[Kind, Any, bytes]],
        body: BodySocket | None,
        receive: Receive,
        send: Send,
    ) -> None:
        self._front = front
        self._settings, self._memory, self._threads = front._settings, front._memory, front._threads  # noqa: SLF001
        self._number = number
        self._queue = queue
        self._body = body
        self._receive, self._send = receive, send

    async def follow(self) -> None:
        asked: asyncio.Task[None] | None = None
        start: dict[str, Any] | None = None
        try:
            while True:
                kind, head, data = await self._queue.get()
                if kind == Kind.ASK:  # beside what follows: the next message may be that the client has gone
                    asked = asyncio.create_task(self._answer_ask())
                elif kind == Kind.START:
                    start = {"type": "http.response.start", "status": head[0], "headers": pairs_as_bytes(head[1])}
                elif kind == Kind.BODY:
                    await self._pass_on(start, {"type": "http.response.body", "body": data, "more_body": head["more"]})
                    start = None
                    if head["ack"]:
                        self._tell(Kind.TAKEN)
                    if not head["more"]:
                        return
                elif kind == Kind.SEND:
                    await self._send_parts(start, head, data)
                    start = None
                elif kind == Kind.FILL:
                    await self._fill(head)
                else:
                    return  # the server closes the connection within an answer
        finally:
            if asked is not None:
                asked.cancel()

    def _tell(self, kind: Kind, head: object = None, data: bytes = b"") -> None:
        self._front.channel.send(frame(kind, self._number, head, data))

    async def _answer_ask(self) -> None:
        message = await self._receive()
        head = {"type": message["type"], "more_body": message.get("more_body", False)}
        self._tell(Kind.BODY, head, message.get("body", b""))

    async def _pass_on(self, *messages: MutableMapping[str, Any] | None) -> None:
        for message in messages:
            if message is not None:
                async with asyncio.timeout(self._settings.idle_timeout_s):
                    await self._send(message)  # waits while the client reads nothing

    async def _send_parts(self, start: dict[str, Any] | None, head: Any, data: bytes) -> None:
        parts, at, nbytes, result = [], 0, 0, "ok"
        for offset, length in head["parts"]:
            parts.append(memoryview(data)[at : at + length] if offset < 0 else self._memory[offset : offset + length])
            at += length if offset < 0 else 0
            nbytes += length
        try:
            if self._body is None:
                await self._pass_on(start)
                await self._send_pieces(parts)
            else:
                with self._body.corked():
                    await self._pass_on(start)
                    if not self._body.is_free:
                        await self._send_pieces(parts)
                    elif not await self._body.send(parts, self._threads, idle_s=head["idle_s"]):
                        result = "late"
        except TimeoutError:
            result = "late"
        finally:  # also if the answer is given up: the memory is the store's again
            self._tell(Kind.DONE, {"result": result, "nbytes": nbytes})

    async def _send_pieces(self, parts: list[memoryview]) -> None:
        for part in parts:
            for at in range(0, len(part), _PIECE_BYTES):
                piece = part[at : at + _PIECE_BYTES]
                await self._pass_on({"type": "http.response.body", "body": piece, "more_body": True})

    async def _fill(self, head: Any) -> None:
        view = self._memory[head["offset"] : head["offset"] + head["nbytes"]]
        until_s, idle_s, result, nbytes = time.monotonic() + head["left_s"], head["idle_s"], "ok", 0
        try:
            if self._body is None:
                nbytes = await self._receive_pieces(view, idle_s, until_s)
            else:
                await self._body.receive(view, self._threads, idle_s=idle_s, until_s=until_s)
                nbytes = self._body.received_bytes
        except TimeoutError:
            result = "late"
        except (OSError, ValueError):
            result = "gone"
        except BaseException:
            result = "gone"
            raise
        finally:
            self._tell(Kind.DONE, {"result": result, "nbytes": nbytes})

    async def _receive_pieces(self, view: memoryview, idle_s: float, until_s: float) -> int:
        at, more = 0, True
        while more:
            async with asyncio.timeout(max(min(idle_s, until_s - time.monotonic()), 0.0)):
                message = await self._receive()
            if message["type"] != "http.request":
                raise ConnectionResetError("the client went away within the body")
            piece, more = message.get("body", b""), message.get("more_body", False)
            view[at : at + len(piece)] = piece  # a ValueError if it is longer than was announced
            at += len(piece)
        return at


async def _whole_body(body: BodySocket | None, receive: Receive) -> bytes | None:
    """The body of a request, if it is short and has come together with its header; None otherwise."""
    if body is None or not body.is_all_here(INLINE_BYTES):
        return None
    message = await receive()
    found: bytes = message.get("body", b"")
    return found


def _told(scope: Scope, *, is_whole: bool) -> dict[str, Any]:
    return {
        "whole": is_whole,
        "version": scope["http_version"],
        "server": scope["server"],
        "client": scope["client"],
        "scheme": scope["scheme"],
        "method": scope["method"],
        "path": scope["path"],
        "raw_path": scope["raw_path"].decode("latin-1"),
        "query": scope["query_string"].decode("latin-1"),
        "headers": pairs_as_text(scope["headers"]),
    }


class _WorkerServer(uvicorn.Server):
    """Accepts one connection at a time, so that workers share them, until the store's process says to drain."""

    def __init__(
        self,
        config: uvicorn.Config,
        front: Front,
        certificate: Certificate | None,
        control: socket.socket,
        listener: socket.socket,
    ) -> None:
        super().__init__(config)
        self._front, self._certificate, self._control, self._listener = front, certificate, control, listener
        self._connecting: set[asyncio.Task[Any]] = set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        loop = asyncio.get_running_loop()
        await loop.create_unix_connection(lambda: self._front.channel, sock=self._control)
        loop.add_reader(self._listener.fileno(), self._accept)
        self._front.channel.send(frame(Kind.READY))

    def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            connection, _ = self._listener.accept()
        except OSError as exc:
            if exc.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                loop.remove_reader(self._listener.fileno())
                loop.call_later(_ACCEPT_AGAIN_S, self._accept_again)
            return  # another worker was first, or the client has gone again
        connection.setblocking(False)
        task = loop.create_task(self._connect(loop, connection))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    def _accept_again(self) -> None:
        if not self.should_exit:
            asyncio.get_running_loop().add_reader(self._listener.fileno(), self._accept)

    async def _connect(self, loop: asyncio.AbstractEventLoop, connection: socket.socket) -> None:
        def protocol() -> asyncio.Protocol:
            kind: Any = self.config.http_protocol_class
            made: asyncio.Protocol = kind(config=self.config, server_state=self.server_state, app_state={}, _loop=loop)
            return made

        tls: dict[str, Any] = {}
        if self.config.ssl is not None:
            tls = {"ssl": self.config.ssl, "ssl_shutdown_timeout": _TLS_END_S}
        try:
            await loop.connect_accepted_socket(protocol, connection, **tls)
        except OSError as exc:  # no TLS came of it
            _LOG.debug("a connection was not made: %s", exc)

    async def on_tick(self, counter: int) -> bool:
        if self._certificate is not None and self.config.ssl is not None and counter % _TICKS == 0:
            self._certificate.renew(self.config.ssl)
        self.should_exit = self.should_exit or self._front.is_draining
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().remove_reader(self._listener.fileno())
        self._listener.close()
        await super().shutdown(sockets)
