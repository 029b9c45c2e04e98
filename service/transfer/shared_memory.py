"""Shared memory for clients on this host: chunks are copied into it once, and read where they lie.

A client asks for a session over HTTP, with its token, and is told an abstract Unix socket and a ticket. On the socket
it shows the ticket and gets the descriptor of a memory file that has no name and whose size is sealed. The first half
is the service's: it copies chunks there, and lends each range until the client gives it back on the socket. The second
half is the client's, for chunks that it puts. A second descriptor is of the memory in which the chunks of its pool lie
(`PoolMemory`): those are lent without a copy. The kernel closes the socket when the client dies, however it dies, and
that ends the session and all its leases. No session uses the memory of another, and the service trusts nothing that it
finds there: what a client puts is copied before it is verified.
"""

from __future__ import annotations

import asyncio
import fcntl
import hmac
import logging
import mmap
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from ...kvstore.encoding.copies import copy_bytes
from ...kvstore.tiers.arena import Arena
from ..problems import ProblemError
from .containers import Container, IncomingContainer
from .pool_memory import F_ADD_SEALS, SEAL_NOTHING_MORE, SEAL_SIZE, PoolMemory

_LOG = logging.getLogger("kvloom.service")
_TICKET_BYTES = 32
_TICKET_S = 10.0
_LEASE_BYTES = 8


@dataclass(eq=False)
class Session:
    """The memory that one client shares with the service. `lock` guards `arena`, `leases` and `borrowed_bytes`.

    A lease is of a range of the session's memory, or of a container where it lies in that of the pool.
    """

    id: str
    pool: str
    ticket: bytes
    memory: memoryview
    descriptor: int
    arena: Arena
    opened_at_s: float
    lock: threading.Lock = field(default_factory=threading.Lock)
    leases: dict[int, tuple[int, Container | None]] = field(default_factory=dict)
    borrowed_bytes: int = 0
    next_lease: int = 1
    connection: socket.socket | None = None


@dataclass(frozen=True, slots=True)
class Lease:
    """Bytes `[offset, offset + nbytes)` of a session's memory or its pool's, the client's until it gives them back."""

    id: int
    offset: int
    nbytes: int
    memory: Literal["session", "pool"]


class SharedMemory:
    """The sessions of a service. `start` and `close` on the event loop; all else from any thread.

    Parameters
    ----------
    session_bytes : of the memory of a session, both halves; 0 for none.
    most_sessions : at a time.
    pool_bytes : of the memory of a pool's chunks; 0 for none.
    """

    def __init__(self, session_bytes: int, most_sessions: int, *, pool_bytes: int = 0) -> None:
        self.session_bytes = session_bytes // (2 * mmap.PAGESIZE) * 2 * mmap.PAGESIZE
        self.name = f"kvloom-{secrets.token_hex(16)}"
        self._most_sessions = most_sessions
        self._pool_bytes = pool_bytes
        self._pools: dict[str, PoolMemory] = {}
        self._lock = threading.Lock()
        self._sessions: dict[str, Session] = {}
        self._listener: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def sessions(self) -> int:
        return len(self._sessions)

    @property
    def leases(self) -> int:
        return sum(len(session.leases) for session in list(self._sessions.values()))

    def start(self) -> None:
        """Listens, where the system has what this takes."""
        if not self.session_bytes or not hasattr(os, "memfd_create"):
            return
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind("\0" + self.name)
        self._listener.listen(16)
        self._listener.setblocking(False)
        self._spawn(self._accept(self._listener))

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()
        for session in list(self._sessions.values()):
            self._end(session)
        for memory in self._pools.values():
            memory.close()

    def pool_memory(self, pool: str) -> PoolMemory | None:
        """The memory of a pool that has, or had, clients on this host."""
        return self._pools.get(pool)

    def open(self, pool: str) -> Session:
        """A session of a tenant, whose ticket is good for ten seconds.

        Raises
        ------
        ProblemError : there is no shared memory here, or too many clients have some.
        """
        if self._listener is None:
            raise ProblemError(501, "no-shared-memory", "this service offers no shared memory; transfer over HTTP")
        with self._lock:
            late_s = time.monotonic() - _TICKET_S
            unclaimed = [s for s in self._sessions.values() if s.connection is None and s.opened_at_s < late_s]
        for session in unclaimed:
            self._end(session)
        with self._lock:
            if len(self._sessions) >= self._most_sessions:
                raise ProblemError(429, "too-many-sessions", "all shared memory is taken; transfer over HTTP")
            descriptor = os.memfd_create("kvloom", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(descriptor, self.session_bytes)
            fcntl.fcntl(descriptor, F_ADD_SEALS, SEAL_SIZE | SEAL_NOTHING_MORE)
            memory = memoryview(mmap.mmap(descriptor, self.session_bytes))
            session = Session(
                secrets.token_hex(16),
                pool,
                secrets.token_bytes(_TICKET_BYTES),
                memory,
                descriptor,
                Arena(self.session_bytes // 2),
                time.monotonic(),
            )
            self._sessions[session.id] = session
            if self._pool_bytes and pool not in self._pools and len(self._pools) < self._most_sessions:
                with suppress(OSError):  # a system that cannot seal it: chunks are copied into the session's memory
                    self._pools[pool] = PoolMemory(self._pool_bytes)
        return session

    def session(self, pool: str, session_id: str) -> Session:
        """Raises `ProblemError` if there is none, or not of this tenant."""
        found = self._sessions.get(session_id)
        if found is None or found.pool != pool or found.connection is None:
            raise ProblemError(410, "no-session", "the session of shared memory has ended; open another")
        return found

    def lend_in_place(self, session: Session, container: Container) -> Lease | None:
        """Lends a container where it lies; None if that is not its pool's memory, or the client holds enough."""
        pool = self._pools.get(session.pool)
        offset = None if pool is None else pool.offset_of(container)
        if offset is None:
            return None
        with session.lock:
            if session.borrowed_bytes + container.total_bytes > self.session_bytes // 2:
                return None
            session.borrowed_bytes += container.total_bytes
            lease = Lease(session.next_lease, offset, container.total_bytes, "pool")
            session.next_lease += 1
            session.leases[lease.id] = offset, container  # keeps its place
        return lease

    def lend(self, session: Session, container: Container) -> Lease | None:
        """As `lend_in_place`; copies what lies elsewhere into the session's memory. None if that has no room now."""
        lease = self.lend_in_place(session, container)
        if lease is not None:
            return lease
        with session.lock:
            offset = session.arena.allocate(container.total_bytes)
            if offset is None:
                return None
            lease = Lease(session.next_lease, offset, container.total_bytes, "session")
            session.next_lease += 1
            session.leases[lease.id] = offset, None
        end = offset
        for buffer in container.buffers:
            copy_bytes(session.memory[end : end + len(buffer)], buffer)
            end += len(buffer)
        return lease

    def take(self, session: Session, offset: int, nbytes: int, memory: Callable[[int], Tensor]) -> IncomingContainer:
        """A copy of what a client has put into its half. Raises `ProblemError` if it is not within that."""
        if not self.session_bytes // 2 <= offset <= offset + nbytes <= self.session_bytes:
            raise ProblemError(422, "range", "the range is not within the client's half of the shared memory")
        incoming = IncomingContainer(memory, nbytes)
        copy_bytes(incoming.view, session.memory[offset : offset + nbytes])
        incoming.filled_bytes = nbytes
        return incoming

    # ---------------------------------------------------------------------------------------------- sockets

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(listener)
            connection.setblocking(False)
            self._spawn(self._serve(connection))

    async def _serve(self, connection: socket.socket) -> None:
        """One client: its ticket, then what it gives back, until it goes."""
        loop = asyncio.get_running_loop()
        session: Session | None = None
        try:
            async with asyncio.timeout(_TICKET_S):
                ticket = await _receive(loop, connection, _TICKET_BYTES)
            session = self._claimed(ticket, connection)
            if session is None:
                return
            pool = self._pools.get(session.pool)
            descriptors = [session.descriptor, *([] if pool is None else [pool.descriptor])]
            socket.send_fds(connection, [b"\1"], descriptors)
            rest = b""
            while piece := await loop.sock_recv(connection, 4096):
                rest += piece
                whole = len(rest) // _LEASE_BYTES * _LEASE_BYTES
                for at in range(0, whole, _LEASE_BYTES):
                    _give_back(session, int.from_bytes(rest[at : at + _LEASE_BYTES], "little"))
                rest = rest[whole:]
        except (OSError, TimeoutError):
            pass
        finally:
            connection.close()
            if session is not None:
                self._end(session)

    def _claimed(self, ticket: bytes, connection: socket.socket) -> Session | None:
        with self._lock:
            for session in self._sessions.values():
                if session.connection is None and hmac.compare_digest(session.ticket, ticket):
                    session.connection = connection
                    return session
        return None

    def _end(self, session: Session) -> None:
        with self._lock:
            if self._sessions.pop(session.id, None) is None:
                return
        if session.leases:
            _LOG.info("a client of shared memory went with %d leases", len(session.leases))
            with session.lock:
                session.leases.clear()
        os.close(session.descriptor)
        if session.connection is not None:
            session.connection.close()


async def _receive(loop: asyncio.AbstractEventLoop, connection: socket.socket, nbytes: int) -> bytes:
    data = b""
    while len(data) < nbytes:
        piece = await loop.sock_recv(connection, nbytes - len(data))
        if not piece:
            raise ConnectionResetError("the client went before its ticket was whole")
        data += piece
    return data


def _give_back(session: Session, lease_id: int) -> None:
    with session.lock:
        offset, container = session.leases.pop(lease_id, (None, None))
        if container is not None:
            session.borrowed_bytes -= container.total_bytes
        elif offset is not None:
            session.arena.release(offset)
