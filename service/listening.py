"""How the service listens, speaks HTTP and logs: the same in one process and in workers."""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
from typing import Any

import uvicorn

from .access.certificate import Certificate
from .settings import ServiceSettings
from .transfer.body_socket import widen
from .transfer.protocol import limited_protocol


def certificate_of(settings: ServiceSettings) -> Certificate | None:
    """None without TLS. Raises as `Certificate`."""
    if settings.tls_certificate is None or settings.tls_key is None:
        return None
    password = settings.tls_key_password
    return Certificate(
        settings.tls_certificate, settings.tls_key, None if password is None else password.get_secret_value()
    )


def server_config(settings: ServiceSettings, app: Any, *, is_worker: bool = False) -> uvicorn.Config:
    """How uvicorn serves the application, within the limits of the settings; a worker has its share of connections."""
    processes = settings.workers if is_worker else 1
    return uvicorn.Config(
        app,
        http=limited_protocol(
            max_header_bytes=settings.max_header_bytes,
            header_timeout_s=settings.header_timeout_s,
            max_connections=-(-settings.max_connections // processes),
        ),
        interface="asgi3",
        ws="none",
        lifespan="off" if is_worker else "on",
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
