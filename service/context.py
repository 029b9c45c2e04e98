"""What the routes of one application share."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated, TypeVar

from fastapi import Depends, Request
from pydantic import BaseModel
from starlette.types import Scope
from torch import Tensor

from ..core import ChunkKey
from ..kvstore.encoding.buffer_pool import BufferPool
from .access.audit import AuditLog
from .access.credentials import Credential, TokenFile
from .access.limits import RequestLimits, TransferTurns, UploadBudget
from .access.namespaces import NamespaceFile
from .access.tenants import KeySpace, Tenant, TenantFile
from .chunk_index import ChunkIndex
from .documents.engine import EmbeddedEngine
from .documents.registry import DocumentRegistry
from .idempotency import Idempotency
from .jobs import Jobs
from .kv_events import EventPublisher, KVEvents
from .latencies import Latencies
from .pins import Pins
from .problems import ProblemError
from .recent import RecentMoments
from .served_store import ServedStore
from .settings import ServiceSettings
from .telemetry import Telemetry
from .tier_health import TierHealth
from .transfer.containers import ContainerCache
from .transfer.pool_memory import PoolMemory
from .transfer.shared_memory import SharedMemory

T = TypeVar("T")


@dataclass(slots=True)
class WorkerStatus:
    """How many worker processes there should be, how many accept connections, and how often one was started again."""

    configured: int = 0
    alive: int = 0
    restarts: int = 0


@dataclass(eq=False)
class ServiceContext:
    """The parts of a running service. `is_draining`: it has been asked to stop, and takes no new work."""

    settings: ServiceSettings
    store: ServedStore
    index: ChunkIndex
    tokens: TokenFile
    tenants: TenantFile
    limits: RequestLimits
    latencies: Latencies
    audit: AuditLog
    pins: Pins
    jobs: Jobs
    threads: ThreadPoolExecutor
    followers: ThreadPoolExecutor
    movers: ThreadPoolExecutor
    transfers: TransferTurns
    uploads: UploadBudget
    namespaces: NamespaceFile
    shared_memory: SharedMemory
    events: KVEvents
    publisher: EventPublisher | None
    engine: EmbeddedEngine
    documents: DocumentRegistry
    worker_memory: PoolMemory | None = None  # None for a service of one process
    workers: WorkerStatus = field(default_factory=WorkerStatus)
    buffers: BufferPool = field(default_factory=BufferPool)
    containers: ContainerCache = field(default_factory=ContainerCache)
    telemetry: Telemetry = field(default_factory=lambda: Telemetry(None))
    health: TierHealth = field(default_factory=TierHealth)
    recent: RecentMoments = field(default_factory=RecentMoments)
    idempotency: Idempotency = field(default_factory=Idempotency)
    is_draining: bool = False
    problems: list[str] = field(default_factory=list)

    @property
    def readiness(self) -> str:
        """`ok`, `draining`, or `failed`: a self-check has failed, or no worker accepts connections."""
        if self.is_draining:
            return "draining"
        has_workers = self.workers.alive or self.worker_memory is None
        return "ok" if has_workers and not self.problems else "failed"

    def memory_of(self, pool: str) -> Callable[[int], Tensor]:
        """Where the memory of a pool's chunks comes from: what its clients, or workers, map, where there is room."""
        shared = self.shared_memory.pool_memory(pool) or self.worker_memory

        def empty(nbytes: int) -> Tensor:
            found = None if shared is None else shared.empty(nbytes)
            return self.buffers.empty(nbytes) if found is None else found

        return empty

    async def once(
        self,
        caller: Caller,
        route: str,
        key: str | None,
        body: BaseModel,
        function: Callable[[], T],
        *,
        is_slow: bool = False,
    ) -> T:
        """As `run`, but an `Idempotency-Key` that comes again is given the first answer again."""
        if key is None:
            return await self.run(function, is_slow=is_slow)
        pool, text = caller.tenant.pool, body.model_dump_json()
        return await self.idempotency.once(pool, route, key, text, lambda: self.run(function, is_slow=is_slow))

    async def run(self, function: Callable[[], T], *, is_slow: bool = False) -> T:
        """What a function returns that may wait for a tier, run beside the event loop.

        Parameters
        ----------
        is_slow : it may wait for a model; it then takes no thread away from others.
        """
        threads = self.followers if is_slow else self.threads
        return await asyncio.get_running_loop().run_in_executor(threads, function)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, and in which key space."""

    credential: Credential
    tenant: Tenant
    keys: KeySpace


async def context_of(request: Request) -> ServiceContext:  # async: FastAPI would run it in a thread
    context: ServiceContext = request.app.state.context
    return context


def caller_of(scope: Scope, needed: str) -> Caller:
    """Who has sent a request that the guard has let through.

    Raises
    ------
    ProblemError : 401 without a token, 403 if it does not have the scope `needed`.
    """
    credential: Credential | None = scope.get("credential")
    if credential is None:
        raise ProblemError(401, "unauthorized", "a valid bearer token is needed")
    if needed not in credential.scopes:
        raise ProblemError(403, "forbidden", f"the token does not have the scope {needed!r}")
    tenant: Tenant = scope["tenant"]
    return Caller(credential, tenant, scope["app"].state.context.tenants.key_space(tenant.pool))


def _needs(scope: str) -> Callable[[Request], Awaitable[Caller]]:
    async def caller(request: Request) -> Caller:
        return caller_of(request.scope, scope)

    caller.__name__ = f"needs_{scope}"
    return caller


Context = Annotated[ServiceContext, Depends(context_of)]
Reader = Annotated[Caller, Depends(_needs("read"))]
Writer = Annotated[Caller, Depends(_needs("write"))]
Admin = Annotated[Caller, Depends(_needs("admin"))]


def parse_key(text: str, name: str = "key") -> ChunkKey:
    """A key as clients write it: 64 lower-case hexadecimal digits."""
    if len(text) != 64 or text.lower() != text:
        raise ProblemError(422, "invalid", f"{name} is {text[:80]!r}; expected 64 lower-case hexadecimal digits")
    try:
        return ChunkKey(bytes.fromhex(text))
    except ValueError as exc:
        raise ProblemError(
            422, "invalid", f"{name} is {text[:80]!r}; expected 64 lower-case hexadecimal digits"
        ) from exc
