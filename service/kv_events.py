"""KV events in vLLM's schema: which chunks enter and leave which tiers, for routers.

A chunk is one block whose hash is its key as the client names it. `medium` is `CPU` for memory and `STORAGE` for disks,
as in vLLM's own offloading. Every tenant can follow its own events over HTTP; a ZeroMQ socket on this host publishes
those of one tenant exactly as vLLM does: topic, sequence number, and an `EventBatch` in msgpack.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..kvstore.tiers.disk.tier import DiskTier
from .access.tenants import TenantFile
from .chunk_index import ListedChunk
from .served_store import ServedStore

_REMEMBERED = 1 << 14


@dataclass(frozen=True, slots=True)
class KVEvent:
    """One event of a tenant's pool; `fields` as vLLM names them, with keys as bytes."""

    sequence: int
    pool: str
    at_s: float
    fields: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """With keys as hexadecimal digits."""
        parent = self.fields.get("parent_block_hash")
        told = {**self.fields, "block_hashes": [key.hex() for key in self.fields["block_hashes"]]}
        return {**told, "parent_block_hash": parent.hex()} if parent is not None else told


class KVEvents:
    """The events of late. Every method may be called from any thread."""

    def __init__(self, store: ServedStore, tenants: TenantFile) -> None:
        self._store = store
        self._tenants = tenants
        self._lock = threading.Lock()
        self._events: deque[KVEvent] = deque(maxlen=_REMEMBERED)
        self._sequence = 0

    @property
    def sequence(self) -> int:
        """Of the last event."""
        return self._sequence

    def moved(self, chunk: ListedChunk, tier: str, token_ids: Sequence[int], *, is_there: bool) -> None:
        """A chunk has entered a tier, or left it. `token_ids` may be empty: they are known when it is put."""
        try:
            keys = self._tenants.key_space(chunk.pool)
        except KeyError:  # a pool that was removed by hand
            return
        key = keys.to_client(chunk.key)
        medium = "STORAGE" if self._is_disk(tier) else "CPU"
        fields: dict[str, Any] = {"block_hashes": [key], "medium": medium, "group_idx": 0}
        if is_there:
            after = chunk.info.after
            fields = {
                "type": "BlockStored",
                **fields,
                "parent_block_hash": None if after is None else keys.to_client(after),
                "token_ids": list(token_ids),
                "block_size": len(token_ids),
                "lora_id": None,
                "lora_name": None,
            }
        else:
            fields = {"type": "BlockRemoved", **fields}
        with self._lock:
            self._sequence += 1
            self._events.append(KVEvent(self._sequence, chunk.pool, time.time(), fields))

    def since(self, sequence: int, pool: str | None = None) -> list[KVEvent]:
        """Events after this one, of one pool or of all; what is forgotten is left out."""
        with self._lock:
            return [each for each in self._events if each.sequence > sequence and pool in (None, each.pool)]

    def _is_disk(self, name: str) -> bool:
        return any(isinstance(tier, DiskTier) for tier in self._store.tiers if tier.name == name)


class EventPublisher:
    """Publishes one tenant's events on a ZeroMQ socket of this host, as vLLM's `ZmqEventPublisher` does.

    Parameters
    ----------
    endpoint : `tcp://127.0.0.1:PORT` or `ipc://PATH`: events tell tokens, so they stay on this host.

    Raises
    ------
    ValueError : the endpoint can be reached from elsewhere.
    ImportError : pyzmq or msgspec is not installed.
    """

    def __init__(self, events: KVEvents, pool: str, endpoint: str, *, interval_s: float = 0.05) -> None:
        if not endpoint.startswith(("tcp://127.0.0.1:", "tcp://[::1]:", "ipc://")):
            raise ValueError(f"events_endpoint is {endpoint!r}; expected tcp://127.0.0.1:PORT or ipc://PATH")
        try:
            import msgspec
            import zmq
        except ImportError as exc:
            raise ImportError("KV events need pyzmq and msgspec: pip install 'kvloom[events]'") from exc
        self._events, self._pool, self._interval_s = events, pool, interval_s
        self._encode = msgspec.msgpack.Encoder().encode
        self._socket: Any = zmq.Context.instance().socket(zmq.PUB)
        self._socket.set_hwm(100_000)
        self._socket.bind(endpoint)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._publish, name="kvloom-events", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._ended.set()
        self._thread.join(5.0)
        self._socket.close(linger=200)

    def _publish(self) -> None:
        last, number = self._events.sequence, 0
        while not self._ended.wait(self._interval_s):
            found = self._events.since(last, self._pool)
            if found:
                last = found[-1].sequence
                batch = [time.time(), [each.fields for each in found], None]
                self._socket.send_multipart((b"", number.to_bytes(8, "big"), self._encode(batch)))
                number += 1
