"""The servers that are measured, each a process of its own on loopback: kvloom's, Redis, and one that copies bytes."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PACKAGE = __package__.split(".")[0]
_START_S = 60.0
_BARE = """
import socket, sys
server = socket.create_server(("127.0.0.1", int(sys.argv[1])))
kept = bytearray(int(sys.argv[2]))
connection, _ = server.accept()
connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
while order := connection.recv(9, socket.MSG_WAITALL):
    view = memoryview(kept)[:int.from_bytes(order[1:], "little")]
    if order[:1] == b"g":
        connection.sendall(view)
    else:
        while view:
            view = view[connection.recv_into(view):]
        connection.sendall(b"k")
"""


@dataclass(frozen=True, slots=True)
class ServedAt:
    """Where a service answers, and the token for it."""

    url: str
    token: str


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextmanager
def kvloom_server(
    folder: Path, *, host_bytes: int, disk_bytes: int = 0, durability: str = "batch", workers: int = 1
) -> Iterator[tuple[ServedAt, subprocess.Popen[str]]]:
    """`kvloom serve`, in memory alone unless there are `disk_bytes`; it is asked to end at the end."""
    command = [sys.executable, "-m", f"{PACKAGE}.cli", "serve", "--directory", str(folder)]
    options = [f"host_bytes={host_bytes}", f"disk_bytes={disk_bytes}", f"durability={durability}", "audit=false"]
    options.append(f"workers={workers}")
    command += ["--port", str(port := free_port()), *(part for each in options for part in ("--set", each))]
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    is_first = not (folder / "tokens.json").exists()  # only then is a token shown
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        try:
            token = ""
            for line in process.stdout or ():
                if line.startswith("token, shown only now: "):
                    token = line.split()[-1]
                    break
                if not is_first:
                    break
            _await(port, process)
            yield ServedAt(f"http://127.0.0.1:{port}", token), process
        finally:
            process.terminate()
            process.wait(_START_S)


@contextmanager
def redis_server(folder: Path) -> Iterator[int | None]:
    """Port of a redis-server without persistence; None if there is none."""
    program = shutil.which("redis-server")
    if program is None:
        yield None
        return
    port = free_port()
    command = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    with subprocess.Popen([*command, "--dir", str(folder)], stdout=subprocess.DEVNULL) as process:
        try:
            _await(port, process)
            yield port
        finally:
            process.terminate()
            process.wait(_START_S)


def new_token(folder: Path) -> str:
    """A token for the service of a folder."""
    command = [sys.executable, "-m", f"{PACKAGE}.cli", "token", "create", "--directory", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


class BareSocket:
    """A server that keeps bytes and gives them back, without keys, checks or a protocol: what a socket alone can do."""

    def __init__(self, most_bytes: int) -> None:
        port = free_port()
        self._process = subprocess.Popen([sys.executable, "-c", _BARE, str(port), str(most_bytes)])
        until_s = time.monotonic() + _START_S
        while True:
            try:
                self._socket = socket.create_connection(("127.0.0.1", port))
                break
            except OSError:
                if time.monotonic() > until_s:
                    raise
                time.sleep(0.02)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def put(self, data: memoryview) -> None:
        self._socket.sendall(b"p" + len(data).to_bytes(8, "little"))
        self._socket.sendall(data)
        self._socket.recv(1, socket.MSG_WAITALL)

    def get(self, into: memoryview) -> None:
        self._socket.sendall(b"g" + len(into).to_bytes(8, "little"))
        while into:
            into = into[self._socket.recv_into(into) :]

    def close(self) -> None:
        self._socket.close()
        self._process.wait(_START_S)


def _await(port: int, process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> None:
    until_s = time.monotonic() + _START_S
    while process.poll() is None and time.monotonic() < until_s:
        try:
            socket.create_connection(("127.0.0.1", port), 1.0).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise OSError(f"the server on port {port} did not start")
