"""The FastAPI application: its parts, its routes, its life."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from .. import __version__
from ..connectors.serving.worker.threads import compute_alone
from ..core import Tier
from ..kvstore.tiers.disk.tier import DiskTier
from ..kvstore.tiers.host import HostTier
from . import problems
from .access.audit import AuditLog
from .access.credentials import TokenFile
from .access.guard import PUBLIC, Guard
from .access.json_file import JsonFile
from .access.limits import RequestLimits, TransferTurns, UploadBudget
from .access.namespaces import NamespaceFile, quotas_of
from .access.tenants import TenantFile
from .chunk_index import ChunkIndex
from .context import ServiceContext
from .documents.engine import EmbeddedEngine
from .documents.registry import DocumentRegistry
from .jobs import Jobs
from .kv_events import EventPublisher, KVEvents
from .latencies import Latencies
from .pins import Pins
from .routes import (
    administration,
    chunks,
    completions,
    dashboard,
    documents,
    events,
    health,
    lists,
    lookups,
    pins,
    shared_memory,
)
from .routes.short_way import ShortWay
from .self_check import check_directory, problems_of
from .served_store import ServedStore
from .settings import ServiceSettings
from .telemetry import Telemetry
from .transfer.pool_memory import PoolMemory
from .transfer.shared_memory import SharedMemory

_LOG = logging.getLogger("kvloom.service")
_UPKEEP_INTERVAL_S = 0.5

_ROUTES = (
    chunks,
    lists,
    lookups,
    pins,
    shared_memory,
    documents,
    completions,
    events,
    administration,
    health,
    dashboard,
)
_DESCRIPTION = (
    "Keeps the KV caches of long contexts in tiers, for engines and for people without one. Every answer that is not a "
    "success is an application/problem+json document."
)


def open_tiers(settings: ServiceSettings) -> list[Tier]:
    """The tiers that the settings ask for, fastest first.

    Raises
    ------
    ValueError : neither memory nor disk.
    TierError : the folder on disk cannot be used.
    """
    tiers: list[Tier] = []
    if settings.host_bytes:
        tiers.append(HostTier(settings.host_bytes, pinned=False))
    if settings.disk_bytes:
        folder = settings.directory / "chunks"
        folder.mkdir(mode=0o700, exist_ok=True)
        tiers.append(DiskTier(folder, settings.disk_bytes, durability=settings.durability))
    if not tiers:
        raise ValueError("host_bytes and disk_bytes are 0; give room in memory or on disk")
    return tiers


def worker_memory(settings: ServiceSettings) -> PoolMemory | None:
    """Memory for the chunks of the fastest tier and for bodies on their way; None for a service of one process.

    Raises
    ------
    ValueError : the system has no memory that processes can share without a name.
    """
    if settings.workers <= 1:
        return None
    try:
        return PoolMemory(settings.host_bytes + settings.max_upload_bytes, for_workers=True)
    except (AttributeError, OSError) as exc:
        raise ValueError(
            f"workers is {settings.workers}, and this system cannot share memory with them ({exc}); expected 1"
        ) from exc


def create_app(settings: ServiceSettings, tiers: Sequence[Tier] | None = None) -> FastAPI:
    """The service as an ASGI application, which owns its tiers.

    Parameters
    ----------
    tiers : fastest first; None for those that the settings ask for.

    Raises
    ------
    ValueError, TierError : see `open_tiers`; or the reserves are more than everything.
    """
    directory = settings.directory
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_directory(directory)
    tenants = TenantFile(directory / "tenants.json")
    namespaces = NamespaceFile(JsonFile(directory / "namespaces.json"))
    store = ServedStore(
        open_tiers(settings) if tiers is None else tiers,
        quotas=quotas_of(settings, tenants, namespaces.all()),
        timeout_s=settings.tier_timeout_s,
    )
    index, kv_events, publisher = ChunkIndex(store), KVEvents(store, tenants), None
    index.follow(kv_events.moved)
    if settings.events_endpoint is not None:
        pool = tenants.get(settings.events_tenant).pool
        publisher = EventPublisher(kv_events, pool, settings.events_endpoint)
    context = ServiceContext(
        settings=settings,
        store=store,
        index=index,
        events=kv_events,
        publisher=publisher,
        telemetry=Telemetry(settings.telemetry_endpoint),
        tokens=TokenFile(directory / "tokens.json"),
        tenants=tenants,
        namespaces=namespaces,
        limits=RequestLimits(settings.max_requests, settings.max_tenant_requests),
        latencies=Latencies(),
        audit=AuditLog(directory / "audit.jsonl" if settings.audit else None),
        pins=Pins(store, settings.max_pinned_keys),
        jobs=Jobs(),
        threads=ThreadPoolExecutor(16, "kvloom-service", compute_alone),
        followers=ThreadPoolExecutor(512, "kvloom-jobs"),
        movers=ThreadPoolExecutor(2 * settings.max_transfers, "kvloom-bodies"),
        transfers=TransferTurns(settings.max_transfers),
        engine=EmbeddedEngine(settings.models, store, tenants, recompute_ratio=settings.recompute_ratio),
        documents=DocumentRegistry(directory / "documents.sqlite"),
        shared_memory=SharedMemory(
            settings.shared_memory_bytes, settings.shared_memory_clients, pool_bytes=settings.shared_chunk_bytes
        ),
        worker_memory=worker_memory(settings),
        uploads=UploadBudget(settings.max_upload_bytes, max(settings.max_upload_bytes // 2, settings.max_body_bytes)),
    )
    app = FastAPI(
        title="kvloom",
        version=__version__,
        description=_DESCRIPTION,
        docs_url=None,  # FastAPI's pages load scripts from elsewhere
        redoc_url=None,
        lifespan=_life,
        redirect_slashes=False,
    )
    app.state.context = context
    app.router.routes.insert(0, ShortWay())
    for each in _ROUTES:
        app.include_router(each.router)
    problems.install(app)
    app.add_middleware(Guard, context=context)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


@asynccontextmanager
async def _life(app: FastAPI) -> AsyncIterator[None]:
    context: ServiceContext = app.state.context
    context.problems += await context.run(lambda: problems_of(context.store))
    for problem in context.problems:
        _LOG.error("self-check: %s", problem)
    context.shared_memory.start()
    upkeep = asyncio.create_task(_upkeep(context))
    try:
        yield
    finally:
        context.is_draining = True
        upkeep.cancel()
        with suppress(asyncio.CancelledError):
            await upkeep
        await context.shared_memory.close()
        await asyncio.get_running_loop().run_in_executor(None, close, context)


async def _upkeep(context: ServiceContext) -> None:
    """What must happen also if nobody asks: pins that end, changes that are noted."""
    while True:
        await asyncio.sleep(_UPKEEP_INTERVAL_S)
        try:
            await context.run(context.pins.follow)
            await context.run(context.index.catch_up)
            await context.run(lambda: context.recent.note(context.store.stats, time.time()))
        except Exception:  # noqa: BLE001  the next round may do better
            _LOG.exception("upkeep failed")


def close(context: ServiceContext) -> None:
    """Ends all work and closes the store: what was acknowledged is on disk afterwards, by its durability."""
    context.jobs.cancel_all()
    context.pins.close()
    context.engine.close()
    context.threads.shutdown(wait=True, cancel_futures=True)
    context.movers.shutdown(wait=True, cancel_futures=True)
    context.store.close()
    context.followers.shutdown(wait=False, cancel_futures=True)
    if context.publisher is not None:
        context.publisher.close()
    context.telemetry.close()
    context.documents.close()
    if context.worker_memory is not None:
        context.worker_memory.close()
    context.audit.close()


def _openapi(app: FastAPI) -> dict[str, Any]:
    """OpenAPI 3.1, with the problems and the token that every route has in common."""
    if app.openapi_schema:
        return app.openapi_schema
    schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    components = schema.setdefault("components", {})
    components.setdefault("schemas", {})["Problem"] = problems.PROBLEM_SCHEMA
    components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    for unused in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(unused, None)
    problem = {
        "description": "A problem.",
        "content": {problems.MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
    }
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            operation["responses"]["default"] = problem
            if path not in PUBLIC:
                operation["security"] = [{"token": []}]
            for parameter in operation.get("parameters", ()):
                _forbid_null(parameter)
    app.openapi_schema = schema
    return schema


def _forbid_null(parameter: dict[str, Any]) -> None:
    """Takes `null` out of the schema of an optional header or query, which can be left out but is always text."""
    kinds = [kind for kind in parameter["schema"].get("anyOf", ()) if kind != {"type": "null"}]
    if len(kinds) == 1:
        parameter["schema"] = {name: value for name, value in parameter["schema"].items() if name != "anyOf"} | kinds[0]
