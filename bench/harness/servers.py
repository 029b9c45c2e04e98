"""Servers of others that benchmarks and tests measure and break, each a process of its own on loopback."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Self

_START_S = 60.0
_NODE = """
import sys, time
from mooncake.store import MooncakeDistributedStore
store = MooncakeDistributedStore()
host, segment_bytes, master = sys.argv[1], int(sys.argv[2]), sys.argv[3]
status = store.setup(host, "P2PHANDSHAKE", segment_bytes, 16 << 20, "tcp", "", master)
print("ready" if status == 0 else f"status {status}", flush=True)
while status == 0:
    time.sleep(1)
"""


def free_port(host: str = "127.0.0.1") -> int:
    return free_ports(1, host)[0]


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """Different ones."""
    probes = [socket.create_server((host, 0)) for _ in range(count)]
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


class Server:
    """A process that can be stopped, started again, and frozen; ended with its `with`.

    Parameters
    ----------
    command : what starts it.
    port : on which it answers when it is ready; None: it prints `ready`.
    log : file for what it prints.
    """

    def __init__(self, command: Sequence[str], port: int | None, log: Path, host: str = "127.0.0.1") -> None:
        self.command = list(command)
        self.port = port
        self.host = host
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns when it is ready. Raises `OSError` if it does not become so within a minute."""
        with self._log.open("ab") as log:
            begin = log.tell()
            self._process = subprocess.Popen(self.command, stdout=log, stderr=subprocess.STDOUT)
        until_s = time.monotonic() + _START_S
        while self._process.poll() is None and time.monotonic() < until_s:
            if self._is_ready(begin):
                return
            time.sleep(0.05)
        self.kill()
        said = self._log.read_text(errors="replace")[-1000:]
        raise OSError(f"{self.command[0]} did not start: {said}")

    def kill(self) -> None:
        """SIGKILL, also if it is frozen."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def pause(self) -> None:
        """SIGSTOP: connections stay open, and nothing answers."""
        if self._process is not None:
            self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def _is_ready(self, begin: int) -> bool:
        if self.port is None:
            return b"ready" in self._log.read_bytes()[begin:]
        try:
            socket.create_connection((self.host, self.port), 1.0).close()
        except OSError:
            return False
        return True


def redis_server(folder: Path, *options: str, host: str = "127.0.0.1") -> Server:
    """Redis without persistence; `options` as on its command line."""
    port = free_port(host)
    command = ["redis-server", "--port", str(port), "--bind", host, "--protected-mode", "no"]
    command += ["--save", "", "--appendonly", "no", "--dir", str(folder), *options]
    return Server(command, port, folder / "redis.log", host)


def s3_server(folder: Path, host: str = "127.0.0.1") -> Server:
    """Moto's S3. It has no bucket yet."""
    port = free_port(host)
    return Server([str(_program("moto_server")), "-H", host, "-p", str(port)], port, folder / "moto.log", host)


def make_bucket(server: Server, bucket: str) -> None:
    """A bucket in Moto's S3, which needs no credentials for it."""
    import urllib.request

    request = urllib.request.Request(f"http://{server.host}:{server.port}/{bucket}", method="PUT")
    urllib.request.urlopen(request, timeout=10.0).close()  # noqa: S310


def mooncake_master(folder: Path, host: str = "127.0.0.1") -> Server:
    """Mooncake's master. Without nodes it stores nothing."""
    port, metrics_port = free_ports(2, host)
    command = [str(_program("mooncake_master")), f"-rpc_address={host}", f"-rpc_port={port}"]
    command += [f"-metrics_host={host}", f"-metrics_port={metrics_port}"]
    return Server(command, port, folder / "mooncake-master.log", host)


def mooncake_node(folder: Path, master: Server, number: int, segment_bytes: int, host: str = "127.0.0.1") -> Server:
    """A process that gives a Mooncake cluster `segment_bytes` of memory."""
    command = [sys.executable, "-c", _NODE, host, str(segment_bytes), f"{master.host}:{master.port}"]
    return Server(command, None, folder / f"mooncake-node-{number}.log", host)


def missing_for(kind: str) -> str | None:
    """What the machine lacks to run Redis (`redis`), Moto's S3 (`s3`) or Mooncake (`mooncake`); None if nothing."""
    if kind == "redis":
        return None if shutil.which("redis-server") and find_spec("redis") else "redis-server, or pip install redis"
    if kind == "s3":
        return None if _program("moto_server") and find_spec("obstore") else "pip install 'moto[s3,server]' obstore"
    if not (_program("mooncake_master") and find_spec("mooncake")):
        return "pip install mooncake-transfer-engine-non-cuda"
    try:
        import mooncake.store
    except ImportError as exc:
        return f"{exc} (Debian: apt-get install libibverbs1)"
    del mooncake
    return None


def _program(name: str) -> Path | None:
    """A program of this environment, or of the system."""
    beside = Path(sys.executable).with_name(name)
    found = beside if beside.exists() else shutil.which(name)
    return None if found is None else Path(found)
