"""LMCache's server for vLLM engines: LMCache from an environment of its own, all that it needs beside from vLLM's."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

from ..harness.peer import OF_THIS_ENVIRONMENT, PeerError
from .engine import CLOSE_S

START_S = 120.0
CHUNK_TOKENS = 256  # as kvloom's; vLLM's blocks of 128 tokens must fit in
_HOST = "127.0.0.1"


class LMCacheServer:
    """`lmcache server` with its cache in memory.

    Parameters
    ----------
    python : interpreter of the environment that has LMCache, of the same version as this one.
    memory_gib : of its cache.
    log : file for what it prints.

    Attributes
    ----------
    path : folder of LMCache's package, for engines to import its client from.
    version : of LMCache.

    Raises
    ------
    PeerError : it does not start.
    """

    def __init__(self, python: Path, memory_gib: int, log: Path) -> None:
        own = {name: value for name, value in os.environ.items() if name not in OF_THIS_ENVIRONMENT}
        self.path, self.version = _package_of(python, own)
        self._port, http_port, metrics_port = _free_ports(3)
        options = {
            "host": _HOST,
            "port": self._port,
            "http-port": http_port,
            "prometheus-port": metrics_port,
            "l1-size-gb": memory_gib,
            "l1-init-size-gb": memory_gib,
            "eviction-policy": "LRU",
            "chunk-size": CHUNK_TOKENS,
            "supported-transfer-mode": "auto",  # the default has no handler for processors
            "shm-name": f"kvloom-bench-{os.getpid()}",
        }
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    f"import sys; sys.path.append({self.path!r}); from lmcache.cli.main import main; main()",
                    "server",
                    *(part for name, value in options.items() for part in (f"--{name}", str(value))),
                ],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=own | {"LMCACHE_TRACK_USAGE": "false"},
            )
        self._log = log
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    @property
    def connector(self) -> dict[str, object]:
        """Fields of `KVTransferConfig` for engines that are to use it."""
        extra = {"lmcache.mp.host": f"tcp://{_HOST}", "lmcache.mp.port": self._port}
        return {"kv_connector": "LMCacheMPConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}

    def close(self) -> None:
        """Ends the server."""
        self._process.terminate()
        try:
            self._process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wait(self) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if (code := self._process.poll()) is not None:
                words = self._log.read_text(errors="replace").strip().splitlines()
                last = words[-1] if words else "without a word"
                raise PeerError(f"LMCache's server ended with exit code {code}: {last}")
            try:
                socket.create_connection((_HOST, self._port), timeout=1.0).close()
            except OSError:
                time.sleep(0.2)
            else:
                return
        raise PeerError(f"LMCache's server did not listen after {START_S:g} s")


_TELL = """
import sysconfig
from importlib.metadata import version
print(sysconfig.get_path("purelib"))
print(version("lmcache"))
"""


def _package_of(python: Path, environment: dict[str, str]) -> tuple[str, str]:
    """Where its packages lie, and the version of LMCache."""
    told = subprocess.run(
        [str(python), "-c", _TELL], capture_output=True, text=True, check=False, env=environment, timeout=START_S
    )
    words = (told.stdout if told.returncode == 0 else told.stderr).strip().splitlines() or ["without a word"]
    if told.returncode or len(words) != 2:
        raise PeerError(f"{python} does not tell of LMCache: {words[-1]}")
    return words[0], words[1]


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind((_HOST, 0))
        return [int(each.getsockname()[1]) for each in sockets]
    finally:
        for each in sockets:
            each.close()
