"""A service as one more tier of a store."""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ....core import NOTHING, ChunkInfo, ChunkKey, EncodedChunk, Entry
from ....errors import TierUnavailableError
from .client import KVLoomClient, RemoteEntry, ServiceError

_SIZE_STEP_BYTES = 4096


class RemoteTier:
    """Chunks in a kvloom service, which evicts on its own. What other clients put there is found, too.

    A service that is down, slow, or refuses the token is an unavailable tier: a store makes misses of that, counts it,
    and leaves the tier alone for a while. Every chunk that comes back is verified.

    Parameters
    ----------
    url, token, token_file, timeout_s, retries, ca_file, tls : as for `KVLoomClient`.
    poll_interval_s : the service is asked what others have changed at most so often.

    Raises
    ------
    ValueError : as `KVLoomClient`.
    """

    may_stall = True
    capacity_bytes = None

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        token_file: str | Path | None = None,
        name: str = "remote",
        timeout_s: float = 5.0,
        retries: int = 1,
        ca_file: str | Path | None = None,
        tls: ssl.SSLContext | None = None,
        poll_interval_s: float = 0.05,
    ) -> None:
        self.name = name
        self.client = KVLoomClient(
            url,
            token=token,
            token_file=token_file,
            timeout_s=timeout_s,
            retries=retries,
            ca_file=ca_file,
            tls=tls,
        )
        self.cached = _ChangesOnly(poll_interval_s)
        self._lock = threading.Lock()  # of what follows
        self._nbytes: dict[ChunkKey, int] = {}
        self._used_bytes = 0
        self._closed = False
        self._cursor: str | None = None
        self._own: dict[ChunkKey, int] = {}  # writes of this process that the service has not yet told of

    @property
    def used_bytes(self) -> int:
        """Of the tenant's chunks in the service, as far as this process has heard."""
        return self._used_bytes

    def get(self, key: ChunkKey) -> EncodedChunk | None:
        with self._refusals():
            return self.client.get(key)

    def get_layers(self, key: ChunkKey, start: int, stop: int) -> EncodedChunk | None:
        with self._refusals():
            return self.client.get_layers(key, start, stop)

    def put(self, key: ChunkKey, blob: EncodedChunk, info: ChunkInfo = NOTHING) -> int:
        with self._refusals():
            container_bytes = self.client.put(key, blob, info)
        nbytes = -(-container_bytes // _SIZE_STEP_BYTES) * _SIZE_STEP_BYTES
        with self._lock:
            self._enter(key, nbytes)
            self._own[key] = self._own.get(key, 0) + 1
        return nbytes

    def delete(self, key: ChunkKey) -> bool:
        with self._refusals():
            found = self.client.delete(key)
        with self._lock:
            self._remove(key)
        return found

    def __contains__(self, key: object) -> bool:
        with self._lock:
            if self._cursor is not None or key in self._nbytes:  # known to the last poll, which follows soon
                return key in self._nbytes
        with self._refusals():
            return key in self.client

    def entries(self) -> list[Entry]:
        """A service that cannot be reached when a store opens has nothing yet: `changes` tells it all later."""
        try:
            return self._list()
        except TierUnavailableError:
            if self._cursor is not None or self._closed:
                raise
            return []

    def _list(self) -> list[Entry]:
        with self._refusals():
            found, cursor = self.client.entries()
        with self._lock:
            self._cursor = cursor
            self._nbytes.clear()
            self._used_bytes = 0
            self._own.clear()
            for entry in found:
                self._enter(entry.key, entry.nbytes)
        return [Entry(entry.key, entry.nbytes, entry.info) for entry in found]

    def changes(self) -> list[Entry | ChunkKey]:
        """What others put or removed, and what the service evicted, since the last call, in order."""
        with self._lock:
            cursor = self._cursor
        self.cached.asked()
        with self._refusals():
            found = None if cursor is None else self.client.changes(cursor)
        if found is None:
            return self._all_changes()
        changes, cursor = found
        with self._lock:
            self._cursor = cursor
            return [told for change in changes if (told := self._told(change)) is not None]

    def close(self) -> None:
        self._closed = True
        self.client.close()

    def _told(self, change: RemoteEntry | ChunkKey) -> Entry | ChunkKey | None:
        if not isinstance(change, RemoteEntry):
            self._remove(change)
            return change
        self._enter(change.key, change.nbytes)
        own = self._own.pop(change.key, 0)
        if own:  # the store knows of its own writes
            if own > 1:
                self._own[change.key] = own - 1
            return None
        return Entry(change.key, change.nbytes, change.info)

    def _all_changes(self) -> list[Entry | ChunkKey]:
        """The difference to a new list: the service has started anew, or too much has changed."""
        with self._lock:
            before = set(self._nbytes)
        entries = self._list()
        gone = before - {entry.key for entry in entries}
        return [*sorted(gone), *(entry for entry in entries if entry.key not in before)]

    def _enter(self, key: ChunkKey, nbytes: int) -> None:
        self._remove(key)
        self._nbytes[key] = nbytes
        self._used_bytes += nbytes

    def _remove(self, key: ChunkKey) -> None:
        self._used_bytes -= self._nbytes.pop(key, 0)

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        """A service that refuses requests of this tier cannot be used, which is for people to mend, not for a store."""
        try:
            yield
        except ServiceError as exc:
            raise TierUnavailableError(f"tier {self.name!r}: {exc}") from exc


class _ChangesOnly:
    """What the tier can say without asking the service: whether it is time to ask. Reads nothing."""

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._asked_at_s = float("-inf")

    def asked(self) -> None:
        self._asked_at_s = time.monotonic()

    def has_changes(self) -> bool:
        return time.monotonic() - self._asked_at_s >= self._interval_s

    def get(self, key: ChunkKey) -> EncodedChunk | None:
        raise BlockingIOError(f"chunk {key.hex()} is not in this process")
