"""LMCache's real server with kvloom below, driven by LMCache's own client: a restart, and damage on disk."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip(
    "lmcache.v1", reason="stock LMCache is not installed here; `make test-engines` runs this in its own environment"
)

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(400)]

LMCACHE = str(Path(sys.executable).with_name("lmcache"))
REQUESTS = 3


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


class Server:
    """A running server."""

    def __init__(self, rpc: int, http: int) -> None:
        self._rpc, self._http = rpc, http

    def status(self) -> dict[str, Any]:
        """What kvloom's adapter reports within the server's status."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self._http}/status", timeout=5) as answer:
            whole: dict[str, Any] = json.load(answer)
        stack: list[Any] = [whole]
        while stack:
            each = stack.pop()
            if isinstance(each, dict):
                if each.get("type") == "KVLoomL2Adapter":
                    return each
                stack += each.values()
            elif isinstance(each, list):
                stack += each
        raise AssertionError(f"the server's status does not mention kvloom: {whole}")

    def run_requests(self) -> dict[str, Any]:
        """Have LMCache's client store and retrieve a few requests; its metrics."""
        command = [
            *(LMCACHE, "bench", "server", "--mode", "cpu", "--rpc-url", f"tcp://127.0.0.1:{self._rpc}"),
            *("--url", f"http://127.0.0.1:{self._http}", "--num-tokens", "256", "--end", str(REQUESTS)),
            *("--kvcache-shape-spec", "(2,64,16,2,32):float16:4", "--interval", "0.1", "--format", "json"),
        ]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        text = ended.stdout
        metrics: dict[str, Any] = json.JSONDecoder().raw_decode(text[text.index("\n{") + 1 :])[0]
        return metrics


@contextmanager
def server(folder: Path, name: str) -> Iterator[Server]:
    rpc, http, prometheus = free_ports(3)
    adapter = {
        "type": "plugin",
        "module_path": "kvloom.connectors.lmcache",
        "class_name": "KVLoomL2Adapter",
        "adapter_params": {"disk_path": str(folder)},
    }
    command = [
        *(LMCACHE, "server", "--host", "127.0.0.1", "--port", str(rpc), "--http-port", str(http)),
        *("--prometheus-port", str(prometheus), "--l1-size-gb", "1", "--l1-init-size-gb", "1"),
        *("--eviction-policy", "LRU", "--chunk-size", "64", "--supported-transfer-mode", "auto"),
        *("--shm-name", f"kvloom_test_{os.getpid()}_{name}", "--l2-adapter", json.dumps(adapter)),
    ]
    with (folder.parent / f"{name}.log").open("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        running = Server(rpc, http)
        try:
            deadline_s = time.monotonic() + 90
            while True:
                try:
                    running.status()
                    break
                except OSError:
                    log.seek(0)
                    assert process.poll() is None and time.monotonic() < deadline_s, log.read()[-3000:]
                    time.sleep(0.5)
            yield running
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                raise


def test_a_restarted_server_finds_what_was_stored_and_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMCACHE_TRACK_USAGE", "false")
    folder = tmp_path / "kv"
    with server(folder, "one") as running:
        metrics = running.run_requests()
        deadline_s = time.monotonic() + 30
        while (stored := running.status().get("saved_objects", 0)) < 4 * REQUESTS and time.monotonic() < deadline_s:
            time.sleep(0.2)
    assert stored == 4 * REQUESTS, "four chunks of 64 tokens each"
    assert f'"checksum_ok": {REQUESTS}' in json.dumps(metrics)

    with server(folder, "two") as running:
        running.run_requests()
        found = running.status()
    assert found["hit_objects"] == found["lookup_objects"] > 0 and found["lost_objects"] == 0
    assert found["loaded_objects"] >= 4 * REQUESTS and "saved_objects" not in found and "errors" not in found

    (segment,) = (folder / "segments").glob("*.seg")
    content = bytearray(segment.read_bytes())
    for at in range(len(content) // 8, len(content), max(1, len(content) // 64)):
        content[at] ^= 0x55
    segment.write_bytes(content)
    with server(folder, "three") as running:
        running.run_requests()
        damaged = running.status()
    assert damaged["is_healthy"] and damaged["lost_objects"] > 0 and damaged["misses"].get("corrupt", 0) > 0
