"""uvicorn's HTTP protocol, with the limits on headers and connections that it leaves to a proxy."""

from __future__ import annotations

import asyncio
from typing import Any

from httptools import HttpRequestParser
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from .body_socket import EXTENSION, BodySocket


def limited_protocol(*, max_header_bytes: int, header_timeout_s: float, max_connections: int) -> type[asyncio.Protocol]:
    """A protocol class that closes connections whose headers are too long or too slow, and those above the limit."""

    class LimitedProtocol(HttpToolsProtocol):
        def __init__(
            self,
            config: Config,
            server_state: ServerState,
            app_state: dict[str, Any],
            _loop: asyncio.AbstractEventLoop | None = None,
        ) -> None:
            super().__init__(config, server_state, app_state, _loop)
            self._header_bytes = 0
            self._in_header = True
            self._header_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > max_connections:
                transport.abort()
                return
            self._await_header()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self._in_header:
                if self._header_timer is None:
                    self._await_header()
                self._header_bytes += len(data)
            super().data_received(data)
            # A read may end within the body: what exceeds the limit is counted only while the header is not complete.
            if self._in_header and self._header_bytes > max_header_bytes and not self.transport.is_closing():
                self.transport.abort()

        def on_message_begin(self) -> None:
            self._in_header = True
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self._in_header = False
            self._header_bytes = 0
            self._stop_timer()
            if sum(len(name) + len(value) for name, value in self.headers) + len(self.url) > max_header_bytes:
                self.transport.abort()
                return
            super().on_headers_complete()
            if self.scheme == "http":  # what is encrypted has to pass the server
                self.scope["extensions"] = {EXTENSION: BodySocket(self, self.cycle)}  # type: ignore[dict-item]

        def body_was_received(self, cycle: RequestResponseCycle) -> None:
            """A body has been taken from the socket past the parser, which would go on to wait for it."""
            cycle.more_body = False
            self._in_header = True
            self.parser = HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does

        def on_message_complete(self) -> None:
            self._in_header = True
            super().on_message_complete()

        def _await_header(self) -> None:
            self._header_timer = self.loop.call_later(header_timeout_s, self._header_is_late)

        def _header_is_late(self) -> None:
            if self._in_header and not self.transport.is_closing():
                self.transport.abort()

        def _stop_timer(self) -> None:
            if self._header_timer is not None:
                self._header_timer.cancel()
                self._header_timer = None

    return LimitedProtocol
