"""Requests that came to a worker, served by the application in the store's process."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, MutableMapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import Any

import torch
from starlette.types import ASGIApp, Scope

from ...kvstore.encoding.copies import copy_bytes
from ..transfer.body_socket import EXTENSION, ended
from ..transfer.pool_memory import PoolMemory
from .channel import INLINE_BYTES, Channel, Kind, frame, pairs_as_bytes, pairs_as_text

_LOG = logging.getLogger("kvloom.service")
_PIECE_BYTES = 1 << 18


class WorkerLink(Channel):
    """The store's end of a worker's channel. For the event loop's thread alone.

    Parameters
    ----------
    app : the ASGI application.
    memory : what the worker maps, too; None if bodies travel in frames.
    """

    def __init__(self, app: ASGIApp, memory: PoolMemory | None) -> None:
        super().__init__(self._take, self._lose)
        self._app = app
        self.memory = memory
        self.ready = asyncio.Event()
        self.lost = asyncio.Event()
        self.answered_at_s = time.monotonic()  # a frame has come
        self._open: dict[int, Exchange] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def tasks(self) -> set[asyncio.Task[None]]:
        """Of requests that are under way."""
        return self._tasks

    def _take(self, kind: Kind, request: int, head: Any, data: bytes) -> None:
        self.answered_at_s = time.monotonic()
        if kind == Kind.REQUEST:
            exchange = self._open[request] = Exchange(self, request, head, data)
            task = asyncio.get_running_loop().create_task(self._serve(exchange))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        elif kind == Kind.READY:
            self.ready.set()
        elif kind != Kind.PONG and (found := self._open.get(request)) is not None:
            found.take(kind, head, data)

    async def _serve(self, exchange: Exchange) -> None:
        try:
            await self._app(exchange.scope, exchange.receive, exchange.send)
        except Exception:  # noqa: BLE001  as a server does: the other requests go on
            _LOG.exception("a request of a worker failed")
        finally:
            del self._open[exchange.number]
            if not exchange.is_complete:
                self.send(frame(Kind.ABORT, exchange.number))

    def _lose(self) -> None:
        self.lost.set()
        for exchange in list(self._open.values()):
            exchange.lose()


class Exchange:
    """One request: the ASGI scope and its two functions."""

    def __init__(self, link: WorkerLink, number: int, head: dict[str, Any], body: bytes) -> None:
        self.number = number
        self.link = link
        self.is_complete = False
        self.is_lost = False
        self.early: bytes | None = body if head["whole"] else None
        self._start = b""  # goes together with the first of what follows
        self._asked: asyncio.Future[dict[str, Any]] | None = None
        self._taken: asyncio.Future[None] | None = None
        self._done: asyncio.Future[tuple[str, int]] | None = None
        self.scope: Scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": head["version"],
            "server": tuple(head["server"]) if head["server"] else None,
            "client": tuple(head["client"]) if head["client"] else None,
            "scheme": head["scheme"],
            "method": head["method"],
            "root_path": "",
            "path": head["path"],
            "raw_path": head["raw_path"].encode("latin-1"),
            "query_string": head["query"].encode("latin-1"),
            "headers": pairs_as_bytes(head["headers"]),
            "state": {},
        }
        if link.memory is not None:
            self.scope["extensions"] = {EXTENSION: WorkerBody(self, link.memory)}

    async def receive(self) -> MutableMapping[str, Any]:
        """The next ASGI message of the request."""
        if self.early is not None:
            body, self.early = self.early, None
            return {"type": "http.request", "body": body, "more_body": False}
        if self.is_lost:
            return {"type": "http.disconnect"}
        if self._asked is None:
            self._asked = asyncio.get_running_loop().create_future()
            self.link.send(frame(Kind.ASK, self.number))
        message = await asyncio.shield(self._asked)  # who gives up waiting may ask again
        self._asked = None
        return message

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """An ASGI message of the answer; returns when the client has taken it, unless it is the last one."""
        if message["type"] == "http.response.start":
            head = [message["status"], pairs_as_text(list(message.get("headers", [])))]
            self._start = frame(Kind.START, self.number, head)
            return
        more = message.get("more_body", False)
        self.is_complete = not more
        self._write(frame(Kind.BODY, self.number, {"more": more, "ack": more}, message.get("body", b"")))
        if more and not self.is_lost:
            self._taken = asyncio.get_running_loop().create_future()
            await self._taken

    def send_inline(self, body: bytes) -> None:
        """Part of the answer that is too short to wait until the client has taken it."""
        self._write(frame(Kind.BODY, self.number, {"more": True, "ack": False}, body))

    async def order(self, kind: Kind, head: object, data: bytes = b"") -> tuple[str, int]:
        """Has the worker move bytes of the shared memory: the result, and how many. Nobody else may use them meanwhile.

        Also a caller that is cancelled waits until the worker has let go of the memory, or is gone.
        """
        if self.is_lost:
            return "gone", 0
        self._done = asyncio.get_running_loop().create_future()
        self._write(frame(kind, self.number, head, data))
        return await ended(self._done)

    def take(self, kind: Kind, head: Any, data: bytes) -> None:
        """A frame of this request."""
        if kind == Kind.BODY and self._asked is not None:
            _settle(self._asked, {**head, "body": data})
        elif kind == Kind.TAKEN:
            _settle(self._taken, None)
        elif kind == Kind.DONE:
            _settle(self._done, (head["result"], head["nbytes"]))

    def lose(self) -> None:
        """The worker is gone, and so is the client."""
        self.is_lost = True
        _settle(self._asked, {"type": "http.disconnect"})
        _settle(self._taken, None)
        _settle(self._done, ("gone", 0))

    def _write(self, data: bytes) -> None:
        start, self._start = self._start, b""
        self.link.send(*((start, data) if start else (data,)))


def _settle(future: asyncio.Future[Any] | None, result: object) -> None:
    if future is not None and not future.done():
        future.set_result(result)


class WorkerBody:
    """Bodies of a request whose connection a worker has: what `BodySocket` does for one that this process has.

    What lies in the memory that the worker maps, the worker sends from there, and receives there. Anything else is
    copied there first, or from there; where that has no room, it travels in frames.
    """

    is_free = True

    def __init__(self, exchange: Exchange, memory: PoolMemory) -> None:
        self._exchange, self._memory = exchange, memory
        self.sent_bytes = 0
        self.received_bytes = 0
        self.is_received = False

    @contextmanager
    def corked(self) -> Iterator[None]:
        """The worker sends a header together with what follows."""
        yield

    async def send(self, buffers: Sequence[memoryview], threads: Executor, *, idle_s: float) -> bool:
        """As `BodySocket.send`."""
        total_bytes = sum(map(len, buffers))
        if total_bytes <= INLINE_BYTES:
            self._exchange.send_inline(b"".join(buffers))
        else:
            inline = [buffer if len(buffer) <= INLINE_BYTES // 4 else None for buffer in buffers]
            places, copied = await self._placed(
                [b for b, part in zip(buffers, inline, strict=True) if part is None], threads
            )
            if places is None:
                return await self._send_pieces(buffers)
            found = iter(places)
            parts = [[-1, len(part)] if part is not None else next(found) for part in inline]
            data = b"".join(part for part in inline if part is not None)
            result, _ = await self._exchange.order(Kind.SEND, {"parts": parts, "idle_s": idle_s}, data)
            del copied
            if result != "ok":
                _LOG.info("a client does not take the body: %s", result)
                return False
        self.sent_bytes += total_bytes
        return True

    async def receive(self, view: memoryview, threads: Executor, *, idle_s: float, until_s: float) -> None:
        """As `BodySocket.receive`."""
        exchange = self._exchange
        if exchange.early is not None:
            if len(exchange.early) > len(view):
                raise ValueError(f"{len(exchange.early)} bytes of a body of {len(view)}")
            view[: len(exchange.early)] = exchange.early
            self.received_bytes, exchange.early = len(exchange.early), None
            self.is_received = self.received_bytes == len(view)
            return
        offset, copied = self._memory.locate(view), None
        if offset is None:
            copied = self._memory.empty(len(view))
            if copied is None:
                await self._receive_pieces(view, idle_s, until_s)
                return
            offset = self._memory.locate(copied.numpy().data) or 0
        left_s = max(until_s - time.monotonic(), 0.0)
        head = {"offset": offset, "nbytes": len(view), "idle_s": idle_s, "left_s": left_s}
        result, self.received_bytes = await exchange.order(Kind.FILL, head)
        if result == "late":
            raise TimeoutError("the body takes too long")
        if result != "ok":
            raise ConnectionResetError("the client went away within the body")
        if copied is not None:
            await _in_thread(threads, view, copied.numpy().data)
        self.is_received = True

    async def _placed(
        self, buffers: list[memoryview], threads: Executor
    ) -> tuple[list[list[int]] | None, torch.Tensor | None]:
        """Where buffers lie in the shared memory, after those that lie elsewhere were copied; None without room."""
        offsets = [self._memory.locate(buffer) for buffer in buffers]
        absent = [buffer for buffer, offset in zip(buffers, offsets, strict=True) if offset is None]
        copied: torch.Tensor | None = None
        end = 0
        if absent:
            copied = self._memory.empty(sum(map(len, absent)))
            if copied is None:
                return None, None
            target = copied.numpy().data
            end = self._memory.locate(target) or 0
            at = 0
            for buffer in absent:
                await _in_thread(threads, target[at : at + len(buffer)], buffer)
                at += len(buffer)
        places = []
        for buffer, offset in zip(buffers, offsets, strict=True):
            places.append([end if offset is None else offset, len(buffer)])
            end += len(buffer) if offset is None else 0
        return places, copied

    async def _send_pieces(self, buffers: Sequence[memoryview]) -> bool:
        for buffer in buffers:
            for at in range(0, len(buffer), _PIECE_BYTES):
                piece = buffer[at : at + _PIECE_BYTES]
                await self._exchange.send({"type": "http.response.body", "body": piece, "more_body": True})
                self.sent_bytes += len(piece)
        return not self._exchange.is_lost

    async def _receive_pieces(self, view: memoryview, idle_s: float, until_s: float) -> None:
        more = True
        while more:
            async with asyncio.timeout(max(min(idle_s, until_s - time.monotonic()), 0.0)):
                message = await self._exchange.receive()
            if message["type"] == "http.disconnect":
                raise ConnectionResetError("the client went away within the body")
            piece, more = message["body"], message["more_body"]
            stop = self.received_bytes + len(piece)
            if stop > len(view):
                raise ValueError(f"{stop} bytes of a body of {len(view)}")
            view[self.received_bytes : stop] = piece
            self.received_bytes = stop
        self.is_received = self.received_bytes == len(view)


async def _in_thread(threads: Executor, target: memoryview, source: memoryview) -> None:
    await ended(asyncio.get_running_loop().run_in_executor(threads, copy_bytes, target, source))
