"""`kvloom serve`: a safe start, one process or several, and an orderly end."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from .access.certificate import Certificate
from .access.credentials import TokenFile
from .app import create_app
from .self_check import check_settings
from .settings import ServiceSettings
from .transfer.body_socket import widen
from .transfer.protocol import limited_protocol

_LOG = logging.getLogger("kvloom.service")
_TICKS = 20  # of a tenth of a second


def serve(settings: ServiceSettings, *, say: Callable[[str], None]) -> None:
    """Serves until SIGTERM or SIGINT; open requests then have `drain_timeout_s` to end.

    Parameters
    ----------
    say : prints a line for whoever started the service.

    Raises
    ------
    ValueError : the settings are not safe, or another service uses the directory.
    OSError : the address cannot be used.
    """
    directory = settings.directory
    os.umask(0o077)  # whatever this process writes is its owner's alone
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    configure_log(settings)
    with open(directory / ".service.lock", "a+") as lock:  # noqa: PTH123  held as long as the process lives
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise ValueError(f"another service uses {directory}; stop it, or give another --directory") from exc
        tokens = TokenFile(directory / "tokens.json")
        is_first = not tokens.entries()
        check_settings(settings, has_tokens=not is_first)
        certificate_of(settings)
        with listen(settings.host, settings.port) as sock:
            scheme = "https" if settings.uses_tls else "http"
            host, port = sock.getsockname()[:2]
            everywhere = host in ("0.0.0.0", "::")  # noqa: S104  only said
            name = socket.gethostname() if everywhere else f"[{host}]" if ":" in host else host
            url = f"{scheme}://{name}:{port}"
            at = " at every address of this host" if everywhere else ""
            say(f"kvloom serves {url}{at}, chunks and tokens in {directory}")
            say(f"dashboard: {url}/")
            if is_first:
                token = tokens.create("default", ("read", "write", "admin"))
                say(f"token, shown only now: {token}")
                say(f'try: curl -H "Authorization: Bearer {token}" {url}/v1/stats')
            else:
                say("another token: kvloom token create --scope read --scope write")
            run(settings, sock)
            say("kvloom has stopped: requests have ended, chunks are on disk")


def run(settings: ServiceSettings, sock: socket.socket) -> None:
    """Serves in this process, on a socket that is listened to."""
    app = create_app(settings)
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, lambda *_: None)  # uvicorn raises them again after an orderly end
    _Server(server_config(settings, app), certificate_of(settings)).run(sockets=[sock])


def certificate_of(settings: ServiceSettings) -> Certificate | None:
    """None without TLS. Raises as `Certificate`."""
    if settings.tls_certificate is None or settings.tls_key is None:
        return None
    password = settings.tls_key_password
    return Certificate(
        settings.tls_certificate, settings.tls_key, None if password is None else password.get_secret_value()
    )


class _Server(uvicorn.Server):
    """Says that it drains as soon as it is asked to end, and looks for a new certificate every two seconds."""

    def __init__(self, config: uvicorn.Config, certificate: Certificate | None) -> None:
        super().__init__(config)
        self._certificate = certificate

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.should_exit and self.started:  # asked to end meanwhile, after which uvicorn forgets to
            await self.shutdown(sockets)

    async def on_tick(self, counter: int) -> bool:
        if self._certificate is not None and self.config.ssl is not None and counter % _TICKS == 0:
            self._certificate.renew(self.config.ssl)
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        app: Any = self.config.app
        app.state.context.is_draining = True
        super().handle_exit(sig, frame)


def server_config(settings: ServiceSettings, app: FastAPI) -> uvicorn.Config:
    """How uvicorn serves the application, within the limits of the settings."""
    return uvicorn.Config(
        app,
        http=limited_protocol(
            max_header_bytes=settings.max_header_bytes,
            header_timeout_s=settings.header_timeout_s,
            max_connections=settings.max_connections,
        ),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=int(settings.keep_alive_s),
        timeout_graceful_shutdown=max(1, round(settings.drain_timeout_s)),
        backlog=256,
        ssl_certfile=None if settings.tls_certificate is None else str(settings.tls_certificate),
        ssl_keyfile=None if settings.tls_key is None else str(settings.tls_key),
        ssl_keyfile_password=(
            None if settings.tls_key_password is None else settings.tls_key_password.get_secret_value()
        ),
    )


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises `OSError` with address and port if it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    widen(sock)  # and the connections that it accepts
    try:
        sock.bind((host, port))
        sock.listen(256)
    except OSError as exc:
        sock.close()
        raise OSError(exc.errno, f"cannot listen on {host}:{port}: {exc.strerror}; give another --port") from exc
    return sock


def configure_log(settings: ServiceSettings) -> None:
    """The log of kvloom and of the server, to stderr, as text or as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    if settings.log_format == "json":
        handler.setFormatter(_JsonFormatter())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    level = settings.log_level.upper()
    for name in ("kvloom", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(level if name == "kvloom" else "WARNING")
        logger.propagate = False


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "at": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "process": os.getpid(),
        }
        for name in ("request_id", "received_bytes", "sent_bytes"):
            if hasattr(record, name):
                fields[name] = getattr(record, name)
        if record.exc_info:
            fields["error"] = self.formatException(record.exc_info)
        return json.dumps(fields)
