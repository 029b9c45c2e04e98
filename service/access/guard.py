"""What every request passes before any route sees it: who it is from, how large and slow it may be, how many at a time.

A plain ASGI middleware, so that bodies stream through it. Nothing of a body is read before the token is verified.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import MutableMapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..context import ServiceContext
from ..problems import ProblemError
from ..transfer.body_socket import body_socket
from .credentials import Credential
from .quantum import sleep_to_multiple

_LOG = logging.getLogger("kvloom.service")
_ACCESS = logging.getLogger("kvloom.service.access")

PUBLIC = frozenset({"/healthz", "/readyz", "/openapi.json", "/", "/dashboard.js", "/dashboard.css"})
_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"referrer-policy", b"no-referrer"),
]


class Guard:
    """Verifies, limits, names and counts requests."""

    def __init__(self, app: ASGIApp, context: ServiceContext) -> None:
        self._app = app
        self._context = context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = _Request(self._context, scope, receive, send)
        await request.serve(self._app)


class _Request:
    """One request on its way through the guard."""

    def __init__(self, context: ServiceContext, scope: Scope, receive: Receive, send: Send) -> None:
        self._context = context
        self._scope = scope
        self._receive = receive
        self._send = send
        self._headers = dict(scope["headers"])
        self._began_s = time.monotonic()
        self._status = 0
        self._received_bytes = 0
        self._sent_bytes = 0
        self._is_read = False
        self._most_bytes = context.settings.max_json_bytes
        self._id = secrets.token_hex(8)
        scope["request_id"] = self._id

    async def serve(self, app: ASGIApp) -> None:
        """To the end of the answer."""
        with self._context.telemetry.request(self._scope["method"], self._headers) as told:
            credential = await self._serve(app)
            told["http.route"] = getattr(self._scope.get("route"), "path", "unknown")
            told["http.response.status_code"] = self._status
            told["http.request.body.size"] = self._received_bytes
            told["http.response.body.size"] = self._sent_bytes
            if credential is not None:
                told["kvloom.tenant"] = credential.tenant

    async def _serve(self, app: ASGIApp) -> Credential | None:
        credential: Credential | None = None
        tenant: str | None = None
        try:
            if self._scope["path"] not in PUBLIC:
                credential = self._verified()
                known = self._context.tenants.get(credential.tenant)
                rate = known.requests_per_s or self._context.settings.tenant_requests_per_s
                self._context.limits.enter(known.name, rate)
                tenant = known.name
                self._scope["credential"] = credential
                self._scope["tenant"] = known
            self._check_size()
            await app(self._scope, self._bounded_receive, self._marked_send)
        except ProblemError as problem:
            await self._refuse(problem)
        finally:
            if tenant is not None:
                self._context.limits.leave(tenant)
            self._note(credential)
        return credential

    def _verified(self) -> Credential:
        scheme, _, token = self._headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        credential = self._context.tokens.verify(token.strip()) if scheme.lower() == "bearer" else None
        if credential is None:
            raise ProblemError(
                401,
                "unauthorized",
                "a valid bearer token is needed",
                headers={"WWW-Authenticate": 'Bearer realm="kvloom"'},
            )
        return credential

    def _check_size(self) -> None:
        if self._scope["method"] == "PUT" and self._scope["path"].startswith("/v1/chunks/"):
            self._most_bytes = self._context.settings.max_body_bytes
        length = self._headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._most_bytes:
            raise ProblemError(413, "too-large", f"the body is larger than {self._most_bytes} bytes")

    async def _bounded_receive(self) -> Message:
        settings = self._context.settings
        if self._is_read:
            return await self._receive()  # waits for the client to go away
        left_s = self._began_s + settings.request_timeout_s - time.monotonic()
        try:
            async with asyncio.timeout(min(max(left_s, 0.001), settings.idle_timeout_s)):
                message = await self._receive()
        except TimeoutError as exc:
            raise ProblemError(408, "too-slow", "the body did not arrive in time") from exc
        self._received_bytes += len(message.get("body", b""))
        self._is_read = message["type"] == "http.disconnect" or not message.get("more_body", False)
        if self._received_bytes > self._most_bytes:
            raise ProblemError(413, "too-large", f"the body is larger than {self._most_bytes} bytes")
        return message

    async def _marked_send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            if quantum_s := self._context.settings.latency_quantum_s:
                await sleep_to_multiple(self._began_s, quantum_s)
            self._status = message["status"]
            headers = list(message.get("headers", []))
            known = {name for name, _ in headers}
            headers += [pair for pair in _HEADERS if pair[0] not in known]
            headers.append((b"kvloom-request-id", self._id.encode()))
            if not self._body_is_read and self._scope["method"] in ("PUT", "POST", "PATCH"):
                headers.append((b"connection", b"close"))  # a body that nobody reads must not be taken for a request
            message = {**message, "headers": headers}
        elif message["type"] == "http.response.body":
            self._sent_bytes += len(message.get("body", b""))
        try:
            async with asyncio.timeout(self._context.settings.idle_timeout_s):
                await self._send(message)  # waits while the client reads nothing
        except TimeoutError as exc:
            raise ConnectionAbortedError(f"request {self._id} was given up: its client reads nothing") from exc

    @property
    def _body_is_read(self) -> bool:
        body = body_socket(self._scope)
        return self._is_read or (body is not None and body.is_received)

    async def _refuse(self, problem: ProblemError) -> None:
        if self._status:
            raise ConnectionAbortedError(f"request {self._id} was given up within its answer")  # the server closes it
        await problem.response()(self._scope, self._receive, self._marked_send)

    def _note(self, credential: Credential | None) -> None:
        spent_s = time.monotonic() - self._began_s
        body = body_socket(self._scope)
        if body is not None:
            self._received_bytes += body.received_bytes
            self._sent_bytes += body.sent_bytes
        route = getattr(self._scope.get("route"), "path", "unknown")
        method = self._scope["method"]
        self._context.latencies.observe(method, route, self._status, spent_s)
        _ACCESS.debug(
            "%s %s %d %.4f s", method, route, self._status, spent_s,
            extra={"request_id": self._id, "received_bytes": self._received_bytes, "sent_bytes": self._sent_bytes},
        )  # fmt: skip
        is_change = method not in ("GET", "HEAD", "OPTIONS") and route not in _LOOKUPS
        if is_change or self._status in (401, 403, 429):
            audit = self._context.audit
            (audit.write_stranger if credential is None else audit.write)(
                request=self._id,
                token=None if credential is None else credential.token_id,
                tenant=None if credential is None else credential.tenant,
                method=method,
                route=route,
                status=self._status,
            )


_LOOKUPS = frozenset({"/v1/match", "/v1/explain"})
