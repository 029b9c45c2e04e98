"""KV events in vLLM's schema: which chunks enter and leave which tiers, for routers.

A chunk is one block whose hash is its key as the client names it. `medium` is `CPU` for memory and `STORAGE` for disks,
as in vLLM's own offloading. Every tenant can follow its own events over HTTP; a ZeroMQ socket on this host publishes
those of one tenant exactly as vLLM does: topic, sequence number, and an `EventBatch` in msgpack.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from ..kvstore.tiers.disk.tier import DiskTier
from .access.tenants import TenantFile
from .chunk_index import ListedChunk
from .served_store import ServedStore

_REMEMBERED = 1 << 12  # of each pool


@dataclass(frozen=True, slots=True)
class KVEvent:
    """One event; `fields` as vLLM names them, with keys as bytes and tokens as any sequence of integers."""

    sequence: int
    at_s: float
    fields: Mapping[str, Any]

    def as_vllm(self) -> dict[str, Any]:
        """As vLLM encodes it."""
        found = dict(self.fields)
        if "token_ids" in found:
            found["token_ids"] = list(found["token_ids"])
        return found

    def as_json(self) -> dict[str, Any]:
        """With keys as hexadecimal digits."""
        found = self.as_vllm()
        if "block_hashes" in found:
            found["block_hashes"] = [key.hex() for key in found["block_hashes"]]
        if found.get("parent_block_hash") is not None:
            found["parent_block_hash"] = found["parent_block_hash"].hex()
        return found


class _Pool:
    """The events of late of one pool, numbered by themselves: the numbers tell nothing of others."""

    def __init__(self) -> None:
        self.events: deque[KVEvent] = deque(maxlen=_REMEMBERED)
        self.sequence = 0


class KVEvents:
    """The events of late. Every method may be called from any thread."""

    def __init__(self, store: ServedStore, tenants: TenantFile) -> None:
        self._store = store
        self._tenants = tenants
        self._lock = threading.Lock()
        self._pools: defaultdict[str, _Pool] = defaultdict(_Pool)

    def sequence(self, pool: str) -> int:
        """Of the pool's last event."""
        with self._lock:
            return self._pools[pool].sequence

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
                "token_ids": token_ids,
                "block_size": len(token_ids),
                "lora_id": None,
                "lora_name": None,
            }
        else:
            fields = {"type": "BlockRemoved", **fields}
        with self._lock:
            pool = self._pools[chunk.pool]
            pool.sequence += 1
            pool.events.append(KVEvent(pool.sequence, time.time(), fields))

    def since(self, sequence: int, pool: str) -> list[KVEvent]:
        """Events of a pool after this one.

        If some of them are forgotten, or `sequence` is of another run of the service, the first says that all is
        cleared: whoever follows knows nothing any more, rather than something wrong.
        """
        with self._lock:
            known = self._pools[pool]
            if sequence == known.sequence:
                return []
            if sequence > known.sequence or not known.events or known.events[0].sequence > sequence + 1:
                first = known.events[0].sequence if known.events else known.sequence + 1
                return [KVEvent(first - 1, time.time(), {"type": "AllBlocksCleared"}), *known.events]
            start = sequence + 1 - known.events[0].sequence
            return list(islice(known.events, start, None))

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
        last, number = self._events.sequence(self._pool), 0
        while not self._ended.wait(self._interval_s):
            found = self._events.since(last, self._pool)
            if found:
                last = found[-1].sequence
                batch = [time.time(), [each.as_vllm() for each in found], None]
                self._socket.send_multipart((b"", number.to_bytes(8, "big"), self._encode(batch)))
                number += 1
