"""A service for tests: in a thread of this process, or in a process of its own; and bare requests to it."""

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPSConnection
from pathlib import Path
from typing import Any

from kvloom.core import Tier
from kvloom.kvstore.tiers.remote.client import KVLoomClient
from kvloom.service.access.credentials import TokenFile
from kvloom.service.app import create_app
from kvloom.service.listening import listen
from kvloom.service.server import Server
from kvloom.service.settings import ServiceSettings
from kvloom.service.workers.supervisor import Workers

from ..support.patience import LONG_S

MIB = 1 << 20


class Reply:
    def __init__(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body

    def json(self) -> Any:
        return json.loads(self.body)


class Service:
    """A service that runs; `token` has all scopes for the tenant `default`."""

    def __init__(self, port: int, directory: Path, token: str) -> None:
        self.port, self.directory, self.token = port, directory, token
        self.url = f"http://127.0.0.1:{port}"
        self.tls: ssl.SSLContext | None = None
        self.context: Any = None
        self.workers: Workers | None = None

    def new_token(self, tenant: str = "default", scopes: Sequence[str] = ("read", "write")) -> str:
        return TokenFile(self.directory / "tokens.json").create(tenant, scopes)

    def client(self, token: str | None = None, **options: Any) -> KVLoomClient:
        return KVLoomClient(self.url, token=token or self.token, **options)

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | dict[str, Any] | None = None,
        *,
        token: str | None = "",
        headers: Mapping[str, str] = {},
    ) -> Reply:
        """One request; `token` None for none, empty for the service's own."""
        connection = (
            HTTPConnection("127.0.0.1", self.port, timeout=LONG_S)
            if self.tls is None
            else HTTPSConnection("127.0.0.1", self.port, timeout=LONG_S, context=self.tls)
        )
        sent = dict(headers)
        if token is not None:
            sent["Authorization"] = f"Bearer {token or self.token}"
        if isinstance(body, dict):
            body = json.dumps(body).encode()
            sent.setdefault("Content-Type", "application/json")
        try:
            connection.request(method, path, body, sent)
            answer = connection.getresponse()
            is_endless = (answer.getheader("Content-Type") or "").startswith("text/event-stream")
            data = answer.read1() if is_endless else answer.read()
            return Reply(answer.status, {name.lower(): value for name, value in answer.getheaders()}, data)
        finally:
            connection.close()


def small_settings(directory: Path, **changes: Any) -> ServiceSettings:
    return ServiceSettings(
        **{"directory": directory, "port": 0, "host_bytes": 64 * MIB, "disk_bytes": 256 * MIB, **changes}
    )


@contextmanager
def service_in_thread(
    directory: Path, tiers: Sequence[Tier] | None = None, *, on_port: int = 0, **changes: Any
) -> Iterator[Service]:
    settings = small_settings(directory, **changes)
    app = create_app(settings, tiers)
    token = TokenFile(directory / "tokens.json").create("default", ("read", "write", "admin"))
    sock = listen("127.0.0.1", on_port)
    server = Server(settings, app, sock)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    service = Service(sock.getsockname()[1], directory, token)
    service.context = app.state.context
    service.workers = server.workers
    try:
        until_s = time.monotonic() + LONG_S
        while not server.started:
            assert thread.is_alive() and time.monotonic() < until_s, "the service did not start"
            time.sleep(0.01)
        yield service
    finally:
        server.should_exit = True
        thread.join(LONG_S)
        assert not thread.is_alive()


class ServiceProcess(Service):
    """`kvloom serve` as a user runs it."""

    def __init__(
        self,
        directory: Path,
        *options: str,
        env: Mapping[str, str] = {},
        certificate: "Certificate | None" = None,
        port: int | None = None,
    ) -> None:
        if port is None:
            with socket.create_server(("127.0.0.1", 0)) as probe:
                port = probe.getsockname()[1]
        command = [sys.executable, "-c", "from kvloom.cli import main; main()", "serve", "--directory", str(directory)]
        self.process = subprocess.Popen(
            [*command, "--port", str(port), *options],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **env},
        )
        self.lines: list[str] = []
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            if "serves http" in line:
                break
        token = TokenFile(directory / "tokens.json").create("default", ("read", "write", "admin"))
        super().__init__(port, directory, token)
        if certificate is not None:
            self.url = f"https://127.0.0.1:{port}"
            self.tls = ssl.create_default_context(cafile=str(certificate.chain))
        self.wait_until_ready()

    def wait_until_ready(self, timeout_s: float = 60.0) -> None:
        until_s = time.monotonic() + timeout_s
        while True:
            assert self.process.poll() is None, f"the service ended: {self.lines}"
            try:
                if self.ask("GET", "/readyz", token=None).status == 200:
                    return
            except OSError:
                pass
            assert time.monotonic() < until_s, "the service was not ready in time"
            time.sleep(0.05)

    def stop(self, sign: int = signal.SIGTERM, timeout_s: float = 60.0) -> int:
        if self.process.poll() is None:
            self.process.send_signal(sign)
        code = self.process.wait(timeout_s)
        if self.process.stdout is not None and not self.process.stdout.closed:
            self.lines += self.process.stdout.read().splitlines()
            self.process.stdout.close()
        return code


@contextmanager
def service_process(
    directory: Path, *options: str, env: Mapping[str, str] = {}, certificate: "Certificate | None" = None
) -> Iterator[ServiceProcess]:
    """`certificate`: that the settings among `options` name."""
    service = ServiceProcess(directory, *options, env=env, certificate=certificate)
    try:
        yield service
    finally:
        service.stop(signal.SIGKILL)


class Certificate:
    """A self-made certificate and its key, by openssl; it replaces what the folder has."""

    def __init__(self, folder: Path, names: str = "DNS:localhost,IP:127.0.0.1,IP:127.0.0.2") -> None:
        folder.mkdir(exist_ok=True)
        self.chain, self.key = folder / "tls.crt", folder / "tls.key"
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        command += ["-days", "30", "-subj", "/CN=kvloom", "-addext", f"subjectAltName={names}"]
        command += ["-keyout", str(self.key), "-out", str(self.chain)]
        subprocess.run(command, check=True, capture_output=True)

    @property
    def options(self) -> list[str]:
        """For `kvloom serve`."""
        return ["--set", f"tls_certificate={self.chain}", "--set", f"tls_key={self.key}"]
