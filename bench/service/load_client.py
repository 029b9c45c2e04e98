"""Clients at full tilt in a process of their own: `load` starts some and asks them.

    python -m kvloom.bench.service.load_client

The first line in is JSON: `url`, `token`, and `clients` (numbers of those that put and get) or `match` (true for one
that looks up keys). It answers `ready`, begins with the next line, and ends with the one after that, when it says what
it has seen.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from contextlib import closing

from ...errors import KVLoomError
from ...kvstore.tiers.remote.client import KVLoomClient
from ..harness.samples import encoded, sample_chunk, sample_key
from .servers import BareSocket

CHUNK_BYTES = 1 << 20
KEYS_OF_A_CLIENT = 4
MATCHED_KEYS = 256
_MATCH_PAUSE_S = 0.01
_BYTES_OF_A_KEY = 68  # in JSON
_TIMEOUT_S = 60.0


class Load:
    """What the clients of this process have done."""

    def __init__(self, url: str, token: str) -> None:
        self._url, self._token = url, token
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self.acknowledged: dict[tuple[int, int], int] = {}
        self.errors: list[str] = []
        self.operations = 0
        self.match_s: list[float] = []
        self.bare_s: list[float] = []

    def put_and_get(self, client_number: int) -> None:
        """Puts its own few chunks over and over, and gets them: what is stored stays small, and nothing is evicted."""
        (blob,) = encoded({sample_key(0): sample_chunk(CHUNK_BYTES, seed=client_number)}).values()
        with self._client() as client:
            turn = 0
            while not self._ended.is_set():
                name = client_number, turn % KEYS_OF_A_CLIENT
                turn += 1
                try:
                    client.put(sample_key("load", *name), blob)
                    with self._lock:
                        self.acknowledged[name] = turn
                    found = client.get(sample_key("load", *name))
                    error = "a chunk that was put was not there" if found is None else ""
                except KVLoomError as exc:
                    error = str(exc)
                with self._lock:
                    self.operations += 2
                    if error:
                        self.errors.append(error)

    def match(self) -> None:
        """Looks up keys that are there, again and again, and measures it; and as many bytes to a bare socket beside it.

        The latter is what the machine takes to have another process answer at all, with all its clients at work.
        """
        keys = [sample_key("match", number) for number in range(MATCHED_KEYS)]
        asked = memoryview(bytearray(_BYTES_OF_A_KEY * MATCHED_KEYS))
        with self._client() as client, closing(BareSocket(len(asked))) as bare:
            (blob,) = encoded({keys[0]: sample_chunk(1 << 14, seed=0)}).values()
            for key in keys:
                client.put(key, blob)
            while not self._ended.is_set():
                began_s = time.perf_counter()
                try:
                    if client.match(keys) != MATCHED_KEYS:
                        self.errors.append("a look-up did not find what was put")
                except KVLoomError as exc:
                    self.errors.append(str(exc))
                self.match_s.append(time.perf_counter() - began_s)
                began_s = time.perf_counter()
                bare.put(asked)
                self.bare_s.append(time.perf_counter() - began_s)
                time.sleep(_MATCH_PAUSE_S)

    def end(self) -> None:
        self._ended.set()

    def _client(self) -> KVLoomClient:
        return KVLoomClient(self._url, token=self._token, shared_memory=False, timeout_s=_TIMEOUT_S)


def main() -> None:
    told = json.loads(sys.stdin.readline())
    load = Load(told["url"], told["token"])
    numbers = told.get("clients", [])
    threads = [threading.Thread(target=load.put_and_get, args=(number,)) for number in numbers]
    if told.get("match"):
        threads.append(threading.Thread(target=load.match))
    print("ready", flush=True)
    sys.stdin.readline()
    for thread in threads:
        thread.start()
    sys.stdin.readline()
    load.end()
    for thread in threads:
        thread.join()
    seen = {
        "acknowledged": list(load.acknowledged),
        "errors": load.errors,
        "operations": load.operations,
        "match_s": load.match_s,
        "bare_s": load.bare_s,
    }
    print(json.dumps(seen), flush=True)


if __name__ == "__main__":
    main()
