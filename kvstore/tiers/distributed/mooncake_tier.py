"""Chunks in a Mooncake Store cluster, through Mooncake's own client."""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

try:
    from mooncake.store import MooncakeDistributedStore, ReplicateConfig
except ImportError as exc:
    raise ImportError(
        "MooncakeTier needs Mooncake: pip install 'kvloom[mooncake]' (with CUDA: mooncake-transfer-engine), "
        f"and libibverbs1 of the system: {exc}"
    ) from exc
from torch import Tensor

from ....errors import ChunkUnreachableError, TierFullError, TierUnavailableError
from .byte_store import Arriving, Found, Outgoing
from .registered_memory import RegisteredMemory
from .tier import DistributedTier, Sharing

_NOT_FOUND, _TOO_SMALL, _NO_SPACE = -704, -600, (-200, -201)
_TRANSFER_FAILED = range(-899, -799)
_SUSPECT_S = 10.0  # after which Mooncake's master drops a node that does not answer, unless told otherwise
_LATE_S = 1.0  # a transfer that takes longer casts doubt on the nodes that hold the object
_CONNECT_S = 1.0
_CLOSE_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MooncakeOptions:
    """How this process takes part in a cluster.

    Attributes
    ----------
    metadata : `P2PHANDSHAKE`, or the URL of Mooncake's metadata server.
    local_hostname : under which others reach this process; None: the address from which it reaches the master.
    protocol, devices : of the transfer engine: `tcp`, or `rdma` with its devices.
    replicas : asked for; Mooncake stores fewer, and says nothing, where there are not so many nodes.
    segment_bytes : memory that this process gives to the cluster; what lies there is gone when the process ends.
    staging_bytes : registered memory through which chunks go.
    """

    metadata: str = "P2PHANDSHAKE"
    local_hostname: str | None = None
    protocol: str = "tcp"
    devices: str = ""
    replicas: int = 1
    segment_bytes: int = 0
    staging_bytes: int = 256 << 20


class MooncakeTier(DistributedTier):
    """Chunks in the memory of a Mooncake cluster, one object a chunk, shared by all that use cluster and prefix.

    What Mooncake does not do, this makes misses that are counted. A node that has died keeps its objects in the
    master's list for 10 s, and readers do not turn to another replica meanwhile: such a chunk is `unreachable`, at once
    after the first that failed. A master that was restarted has forgotten all objects: they count as departures.
    Replicas that could not be made are counted as `fewer_replicas`. Mooncake's calls have no deadline of their own (a
    frozen node holds one for 30 s); a store waits for its `timeout_s`.

    Parameters
    ----------
    master : `host:port` of the master. It need not be there yet.
    options, sharing : None for the defaults.

    Raises
    ------
    ValueError : a number is out of range.
    """

    def __init__(self, master: str, *, options: MooncakeOptions | None = None, sharing: Sharing | None = None) -> None:
        options = options or MooncakeOptions()
        if not _is_address(master):
            raise ValueError(f"master is {master!r}; expected host:port")
        if options.replicas < 1:
            raise ValueError(f"replicas is {options.replicas}; expected 1 or more")
        if options.segment_bytes < 0 or options.staging_bytes < 1:
            raise ValueError(
                f"segment_bytes is {options.segment_bytes}, staging_bytes {options.staging_bytes}; expected 0 or more, "
                "and 1 or more"
            )
        super().__init__(_Cluster(master, options), sharing or Sharing(name="mooncake"))


class _Cluster:
    """Objects by name, as a `ByteStore`."""

    lends = True

    def __init__(self, master: str, options: MooncakeOptions) -> None:
        self._master = master
        self._options = options
        self._connecting = threading.Lock()  # of the next two
        self._client: MooncakeDistributedStore | None = None
        self._memory: RegisteredMemory | None = None
        self._config = ReplicateConfig()
        self._config.replica_num = options.replicas
        self._one_replica = ReplicateConfig()
        self._lock = threading.Lock()  # of what follows
        self._counts: Counter[str] = Counter()
        self._running: dict[int, tuple[str, float]] = {}  # reads by thread: of what, since when
        self._calls = 0
        self._suspects: dict[str, float] = {}  # nodes, until when
        self._closed = False

    @property
    def counts(self) -> Mapping[str, int]:
        return dict(self._counts)

    def put(self, name: str, outgoing: Outgoing, expires_at_s: float | None) -> None:
        nbytes = outgoing.nbytes
        with self._calling() as (client, memory), self._registered(memory, nbytes) as data:
            view: memoryview = data.numpy().data
            outgoing.copy_into(view)
            until_s = time.monotonic() + _LATE_S
            status = client.upsert_from(name, data.data_ptr(), nbytes, self._config)
            # A dead node is chosen until the master drops it: one replica may find another node, two cannot avoid it.
            while status in _TRANSFER_FAILED and time.monotonic() < until_s:
                status = client.upsert_from(name, data.data_ptr(), nbytes, self._one_replica)
            if status in _NO_SPACE:
                raise TierFullError(f"Mooncake has no room for {nbytes} bytes", needed_bytes=nbytes)
            self._expect(status, "put")
            if self._options.replicas > 1 and len(client.get_replica_desc(name)) < self._options.replicas:
                with self._lock:
                    self._counts["fewer_replicas"] += 1

    @contextmanager
    def reading(self, name: str, nbytes: int | None) -> Iterator[Arriving | None]:
        data = self._get(name, nbytes)  # Mooncake says nothing before all of it is there
        yield None if data is None else Arriving(data, lambda _: None)

    def _get(self, name: str, nbytes: int | None) -> Tensor | None:
        with self._calling() as (client, memory), self._reading(client, name):
            for size in (nbytes, None):
                if size is None:
                    size = client.get_size(name)
                    if size == _NOT_FOUND:
                        return None
                    self._expect(size, "get_size")
                with self._registered(memory, size) as data:
                    count = client.get_into(name, data.data_ptr(), size)
                if count != _TOO_SMALL:
                    break
            if count == _NOT_FOUND:
                return None
            self._expect_read(client, name, count)
            return data[:count]

    def get_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> Sequence[memoryview] | None:
        sizes = [stop - start for start, stop in ranges]
        offsets = [sum(sizes[:number]) for number in range(len(sizes))]
        with self._calling() as (client, memory), self._reading(client, name):
            with self._registered(memory, sum(sizes)) as data:
                starts = [start for start, _ in ranges]
                ((counts,),) = client.get_into_ranges([data.data_ptr()], [[name]], [[offsets]], [[starts]], [[sizes]])
            if _NOT_FOUND in counts:
                return None
            for count in counts:
                self._expect_read(client, name, count)
        view: memoryview = data.numpy().data
        return [view[at : at + count] for at, count in zip(offsets, counts, strict=True)]

    def delete(self, name: str) -> bool:
        with self._calling() as (client, _):
            status = client.remove(name, True)  # whoever reads it finds out by its checksums
        if status == _NOT_FOUND:
            return False
        self._expect(status, "remove")
        return True

    def find(self, names: Sequence[str], head_bytes: int) -> list[Found | None]:
        with self._calling() as (client, _):
            there = client.batch_is_exist(list(names))
            for status in there:
                self._expect(status, "is_exist")
            known = [name for name, status in zip(names, there, strict=True) if status]
            replicas = client.batch_get_replica_desc(known) if known else {}
        found: list[Found | None] = []
        for name in names:
            first = next(iter(replicas.get(name, ())), None)  # the one that would be read
            nbytes = None if first is None or self._is_suspect(first) else _memory_bytes(first)
            found.append(None if nbytes is None else Found(nbytes, None))
        return found

    def close(self) -> None:
        """A client that still waits for a node is left to itself: closing it would end the process."""
        self._closed = True
        until_s = time.monotonic() + _CLOSE_S
        while self._calls and time.monotonic() < until_s:
            time.sleep(0.01)
        with self._connecting:
            client, self._client = self._client, None
        if client is not None and not self._calls:
            client.close()

    @contextmanager
    def _calling(self) -> Iterator[tuple[MooncakeDistributedStore, RegisteredMemory]]:
        with self._lock:
            self._calls += 1
        try:
            yield self._connected()
        finally:
            with self._lock:
                self._calls -= 1

    def _connected(self) -> tuple[MooncakeDistributedStore, RegisteredMemory]:
        with self._connecting:
            if self._closed:
                raise TierUnavailableError("the client of Mooncake is closed")
            if self._client is None or self._memory is None:
                own_address = _own_address(self._master)  # fails at once where the client would wait for 90 s
                client, options = MooncakeDistributedStore(), self._options
                status = client.setup(
                    options.local_hostname or own_address,
                    options.metadata,
                    options.segment_bytes,
                    16 << 20,
                    options.protocol,
                    options.devices,
                    self._master,
                )
                if status:
                    raise TierUnavailableError(f"Mooncake's master at {self._master} cannot be used: status {status}")
                self._memory = RegisteredMemory(options.staging_bytes, client.register_buffer, client.unregister_buffer)
                self._client = client
            return self._client, self._memory

    @contextmanager
    def _registered(self, memory: RegisteredMemory, nbytes: int) -> Iterator[Tensor]:
        data, is_made = memory.empty(nbytes)
        try:
            yield data
        finally:
            if is_made:
                memory.release(data)

    @contextmanager
    def _reading(self, client: MooncakeDistributedStore, name: str) -> Iterator[None]:
        """Keeps away from nodes that do not answer. Raises `ChunkUnreachableError` for what would be read from one."""
        self._suspect_late(client)
        if self._suspects and any(map(self._is_suspect, client.get_replica_desc(name)[:1])):
            raise ChunkUnreachableError(f"the node of Mooncake that holds {name} does not answer")
        this = threading.get_ident()
        with self._lock:
            self._running[this] = name, time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                self._running.pop(this, None)

    def _suspect_late(self, client: MooncakeDistributedStore) -> None:
        late_s = time.monotonic() - _LATE_S
        with self._lock:
            late = [name for name, since_s in self._running.values() if since_s < late_s]
        for name in late:
            self._suspect(client, name)

    def _suspect(self, client: MooncakeDistributedStore, name: str) -> None:
        """The node that a client reads this object from, the first, does not answer."""
        until_s = time.monotonic() + _SUSPECT_S
        nodes = [_node(each) for each in client.get_replica_desc(name)[:1]]
        with self._lock:
            self._suspects.update((node, until_s) for node in nodes if node is not None)

    def _is_suspect(self, replica: Any) -> bool:
        with self._lock:
            until_s = self._suspects.get(_node(replica) or "")
            if until_s is not None and until_s <= time.monotonic():
                self._suspects = {node: at_s for node, at_s in self._suspects.items() if at_s > time.monotonic()}
                return False
            return until_s is not None

    def _expect_read(self, client: MooncakeDistributedStore, name: str, count: int) -> None:
        if count in _TRANSFER_FAILED:
            self._suspect(client, name)
            raise ChunkUnreachableError(f"the node of Mooncake that holds {name} does not answer: status {count}")
        self._expect(count, "get")

    def _expect(self, status: int, what: str) -> None:
        if status < 0:
            raise TierUnavailableError(f"Mooncake at {self._master}: {what} gave status {status}")


def _own_address(master: str) -> str:
    """The address from which this machine reaches the master. Raises `TierUnavailableError`."""
    host, _, port = master.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S) as connection:
            return str(connection.getsockname()[0])
    except OSError as exc:
        raise TierUnavailableError(f"Mooncake's master at {master} cannot be reached: {exc}") from exc


def _memory_descriptor(replica: Any) -> Any:
    """Where in which node's memory it lies; None if it is on a disk."""
    return replica.get_memory_descriptor().buffer_descriptor if replica.is_memory_replica() else None


def _memory_bytes(replica: Any) -> int | None:
    descriptor = _memory_descriptor(replica)
    return None if descriptor is None else int(descriptor.size)


def _node(replica: Any) -> str | None:
    descriptor = _memory_descriptor(replica)
    return None if descriptor is None else str(descriptor.transport_endpoint)


def _is_address(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return bool(host) and port.isdecimal() and 0 < int(port) < 65536
