"""The bodies of chunks on their way between clients and memory, by whatever way is shortest."""

from __future__ import annotations

import time

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..context import Caller, ServiceContext
from ..problems import ProblemError
from .body_socket import Body, body_socket
from .containers import MEDIA_TYPE, Container, IncomingContainer


class ContainerResponse(Response):
    """A container, or bytes `[start, stop)` of it, sent from where it lies. Waits for its turn to move bytes."""

    def __init__(
        self,
        context: ServiceContext,
        container: Container,
        start: int,
        stop: int,
        status: int,
        headers: dict[str, str],
        *,
        is_head: bool = False,
    ) -> None:
        super().__init__(None, status, {**headers, "Content-Length": str(stop - start)}, media_type=MEDIA_TYPE)
        self._context = context
        self._container = container
        self._start, self._stop = (0, 0) if is_head else (start, stop)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        del receive
        body = body_socket(scope)
        async with self._context.transfers.turn():
            if body is None:
                await self._begin(send)
                await self._send_pieces(send)
            else:
                with body.corked():
                    await self._begin(send)
                    if body.is_free:
                        parts = self._container.parts(self._start, self._stop)
                        idle_s = self._context.settings.idle_timeout_s
                        if not await body.send(parts, self._context.movers, idle_s=idle_s):
                            return
                    else:
                        await self._send_pieces(send)
            await send({"type": "http.response.body", "body": b""})

    async def _begin(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})

    async def _send_pieces(self, send: Send) -> None:
        for piece in self._container.pieces(self._start, self._stop):
            await send({"type": "http.response.body", "body": piece, "more_body": True})


async def received(request: Request, context: ServiceContext, caller: Caller) -> IncomingContainer:
    """The body in one buffer. Waits for its turn before it reads, so that few clients fill memory at a time."""
    length = request.headers.get("content-length")
    if length is None or not length.isdigit():
        raise ProblemError(411, "length-required", "a chunk needs a Content-Length")
    total_bytes = int(length)
    with context.uploads.taking(caller.tenant.name, total_bytes):
        async with context.transfers.turn():
            incoming = IncomingContainer(context.memory_of(caller.tenant.pool), total_bytes)
            body = body_socket(request.scope)
            if body is not None:
                await _receive(body, incoming, context)
            else:
                async for piece in request.stream():
                    try:
                        incoming.append(piece)
                    except ValueError as exc:
                        raise ProblemError(400, "length", str(exc)) from exc
    if incoming.filled_bytes != total_bytes:
        raise ProblemError(400, "length", f"{incoming.filled_bytes} bytes came of {total_bytes} that were announced")
    return incoming


async def _receive(body: Body, incoming: IncomingContainer, context: ServiceContext) -> None:
    settings = context.settings
    until_s = time.monotonic() + settings.request_timeout_s
    try:
        await body.receive(incoming.view, context.movers, idle_s=settings.idle_timeout_s, until_s=until_s)
    except TimeoutError as exc:
        raise ProblemError(408, "too-slow", "the body did not arrive in time") from exc
    except ConnectionError as exc:
        raise ProblemError(400, "length", "the connection ended within the body") from exc
    incoming.filled_bytes = body.received_bytes


async def taken(context: ServiceContext, caller: Caller, session_id: str, text: str) -> IncomingContainer:
    """A copy of what the client has written to shared memory, `OFFSET-LENGTH`."""
    offset, nbytes = map(int, text.split("-"))
    if nbytes > context.settings.max_body_bytes:
        raise ProblemError(413, "too-large", f"the chunk is larger than {context.settings.max_body_bytes} bytes")
    session = context.shared_memory.session(caller.tenant.pool, session_id)
    memory = context.memory_of(caller.tenant.pool)
    with context.uploads.taking(caller.tenant.name, nbytes):
        async with context.transfers.turn():
            return await context.run(lambda: context.shared_memory.take(session, offset, nbytes, memory))
