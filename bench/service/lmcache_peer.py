"""LMCache's own server, and a client of it: one JSON object a line in and out. Runs in LMCache's own environment.

    python -m kvloom.bench.service.lmcache_peer POOL_BYTES THREADS

    {"do": "put", "size_bytes": N}   store a chunk in the server, and wait until it is there; the seconds it took
    {"do": "get"}                    fetch it from the server; the seconds until its bytes are in the client's memory

Every answer is `{"seconds": ...}` or `{"error": ...}`; the first line, before any question, is `{"version": ...}`.
What comes back is compared with what was put, after the clock has stopped.
"""

from __future__ import annotations

import ctypes
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from lmcache.utils import CacheEngineKey
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.memory_management import MemoryFormat

from ..harness.lmcache_process import GIB, HIDDEN, LAYERS, serve, storage_manager

BACKEND = "RemoteBackend"
POLL_S, START_S, DRAIN_S = 0.001, 60.0, 60.0


class Peer:
    """A server of LMCache on this host, and the storage manager that LMCache's engines reach it with.

    Parameters
    ----------
    pool_bytes : of memory that the client takes when it starts.
    """

    def __init__(self, pool_bytes: int) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "lmcache.v1.server", "127.0.0.1", str(port)]
        self._server = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            preexec_fn=_end_with_parent,  # noqa: PLW1509  no other thread is there yet
        )
        _await(port, self._server)
        config = LMCacheEngineConfig.from_defaults(
            chunk_size=256,
            local_cpu=False,
            max_local_cpu_size=pool_bytes / GIB,
            remote_url=f"lm://127.0.0.1:{port}",
            remote_serde="naive",
        )
        self._manager = storage_manager(config)
        self._remote = self._manager.storage_backends[BACKEND]
        self._numbers = iter(range(sys.maxsize))
        self._source = torch.empty(0)
        self._key: CacheEngineKey | None = None

    def put(self, size_bytes: int) -> float:
        """Seconds until the server has it; its protocol acknowledges nothing, so it is asked."""
        shape = torch.Size([2, LAYERS, size_bytes // (4 * LAYERS * HIDDEN), HIDDEN])
        generator = torch.Generator().manual_seed(0)
        words = torch.randint(-(1 << 62), 1 << 62, (shape.numel() // 4,), generator=generator)
        self._source = words.view(torch.bfloat16).view(shape)
        key = self._key = CacheEngineKey("bench", 1, 0, next(self._numbers), torch.bfloat16)
        start = time.perf_counter()
        (stored,) = self._manager.batched_allocate(shape, torch.bfloat16, 1, MemoryFormat.KV_2LTD)
        stored.tensor.copy_(self._source)
        self._manager.batched_put([key], [stored], location=BACKEND)
        while not self._remote.contains(key):
            if time.perf_counter() > start + DRAIN_S:
                raise RuntimeError(f"LMCache's server has no chunk after {DRAIN_S:.0f} s")
            time.sleep(POLL_S)
        return time.perf_counter() - start

    def get(self) -> float:
        """Seconds until the client has the chunk of the last put in its memory."""
        start = time.perf_counter()
        (found,) = self._manager.batched_get([self._key], location=BACKEND)
        spent = time.perf_counter() - start
        if found is None:
            raise RuntimeError("LMCache's server does not give back what it was given")
        if not torch.equal(found.tensor.view(torch.uint8), self._source.view(torch.uint8)):
            raise RuntimeError("LMCache's server gave back other bytes than were put")
        found.ref_count_down()
        return spent

    def close(self) -> None:
        self._manager.close()
        self._server.terminate()
        self._server.wait(10)


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: whoever kills this process leaves no server behind


def _await(port: int, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < until:
        try:
            socket.create_connection(("127.0.0.1", port), 1.0).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise RuntimeError(f"LMCache's server on port {port} did not start")


def start(pool_bytes: str) -> tuple[dict[str, Callable[..., float]], Callable[[], None]]:
    peer = Peer(int(pool_bytes))
    return {"put": peer.put, "get": peer.get}, peer.close


if __name__ == "__main__":
    serve(start)
