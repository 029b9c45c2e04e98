"""`kvloom serve`: a safe start, one process or several, and an orderly end."""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from .access.credentials import TokenFile
from .app import create_app
from .context import ServiceContext
from .listening import certificate_of, configure_log, listen, server_config
from .self_check import check_settings
from .settings import ServiceSettings
from .workers.supervisor import Workers

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
    """Serves on a socket that is listened to: in this process, or through workers."""
    server = Server(settings, create_app(settings), sock)
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, lambda *_: None)  # uvicorn raises them again after an orderly end
    server.run()


class Server(uvicorn.Server):
    """uvicorn's, on one socket, in this process or, with the application here, through workers.

    Says that it drains as soon as it is asked to end, and looks for a new certificate every two seconds.
    """

    def __init__(self, settings: ServiceSettings, app: FastAPI, sock: socket.socket) -> None:
        super().__init__(server_config(settings, app))
        self._drain_timeout_s = settings.drain_timeout_s
        self._sock = sock
        self._context: ServiceContext = app.state.context
        self._certificate = certificate_of(settings)
        memory = self._context.worker_memory
        self.workers = None if memory is None else Workers(settings, sock, app, memory, self._context.workers)

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        super().run(sockets=sockets or ([self._sock] if self.workers is None else []))

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.workers is not None:
            self.started = False
            await self.workers.start()
            self.started = True
        if self.should_exit and self.started:  # asked to end meanwhile, after which uvicorn forgets to
            await self.shutdown(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self.workers is not None:
            self._sock.close()
            await self.workers.drain(self._drain_timeout_s)
        await super().shutdown(sockets)

    async def on_tick(self, counter: int) -> bool:
        if self._certificate is not None and self.config.ssl is not None and counter % _TICKS == 0:
            self._certificate.renew(self.config.ssl)
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._context.is_draining = True
        if self.workers is not None:
            self.workers.is_ending = True
        super().handle_exit(sig, frame)
