"""The dashboard: one page, its script and style, and the figures that it shows."""

from __future__ import annotations

import time
from collections import Counter
from importlib.resources import files

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.responses import Response

from ..access.tenants import client_namespace
from ..context import Context, Reader, ServiceContext
from ..recent import Moment
from .lookups import TierSummary, tier_summary

router = APIRouter(tags=["dashboard"])

_SHOWN = 20
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    )
}


class TierState(TierSummary):
    """A tier. `is_healthy`: nothing has failed there in the last half minute."""

    is_healthy: bool


class NamespaceState(BaseModel):
    """`nbytes` of its chunks, each counted once; `reads` over HTTP since the service started."""

    namespace: str
    nbytes: int
    reads: int


class DocumentHeat(BaseModel):
    id: str
    uses: int
    state: str


class ServiceState(BaseModel):
    """Of the whole service, for operators."""

    lookups: int
    hits: int
    misses: dict[str, int]
    pinned: int
    open_requests: int
    shared_memory_clients: int
    tiers: list[TierState]
    latencies: dict[str, dict[str, float]]
    recent: list[Moment]


class Figures(BaseModel):
    """What the dashboard shows. `namespaces` and `documents` are the tenant's; for operators, of all tenants."""

    at_s: float
    is_draining: bool
    chunks: int
    namespaces: list[NamespaceState]
    documents: list[DocumentHeat]
    service: ServiceState | None


@router.get("/", summary="The dashboard", response_class=Response, responses={200: {"content": {"text/html": {}}}})
async def page() -> Response:
    """One page that needs nothing from elsewhere. It asks for a token itself."""
    return _asset("index.html", "text/html; charset=utf-8")


@router.get("/dashboard.js", include_in_schema=False)
async def script() -> Response:
    return _asset("dashboard.js", "text/javascript; charset=utf-8")


@router.get("/dashboard.css", include_in_schema=False)
async def style() -> Response:
    return _asset("dashboard.css", "text/css; charset=utf-8")


@router.get("/v1/dashboard", summary="The figures of the dashboard")
async def figures(context: Context, caller: Reader) -> Figures:
    """With the scope `admin` of the whole service, otherwise of the tenant."""
    is_operator = "admin" in caller.credential.scopes
    pool = None if is_operator else caller.tenant.pool
    return await context.run(lambda: _figures(context, pool))


def _figures(context: ServiceContext, pool: str | None) -> Figures:
    """Of one tenant's pool; None for all."""
    stats = context.store.stats()
    sizes: dict[str, int] = {}
    for tier in stats.tiers:
        for name, nbytes in tier.namespace_bytes.items():
            owner, namespace = client_namespace(name)
            if pool in (None, owner):
                shown = namespace if pool is not None else name
                sizes[shown] = max(sizes.get(shown, 0), nbytes)  # the same chunks lie in several tiers
    reads: Counter[str] = Counter()
    for name, count in context.index.namespace_reads(pool).items():
        reads[name if pool is None else client_namespace(name)[1]] += count
    hottest = sorted(sizes, key=lambda name: (-reads[name], -sizes[name]))[:_SHOWN]
    documents = context.documents.hottest(_SHOWN, pool)
    service = None
    if pool is None:
        service = ServiceState(
            lookups=stats.lookups,
            hits=stats.hits,
            misses=dict(stats.misses),
            pinned=stats.pinned,
            open_requests=context.limits.open_requests,
            shared_memory_clients=context.shared_memory.sessions,
            tiers=[
                TierState(
                    **tier_summary(tier).model_dump(), is_healthy=context.health.is_healthy(tier, time.monotonic())
                )
                for tier in stats.tiers
            ],
            latencies=context.latencies.quantiles(),
            recent=context.recent.all(),
        )
    return Figures(
        at_s=time.time(),
        is_draining=context.is_draining,
        chunks=len(context.index) if pool is None else context.index.count(pool),
        namespaces=[NamespaceState(namespace=name, nbytes=sizes[name], reads=reads[name]) for name in hottest],
        documents=[DocumentHeat(id=each.id, uses=each.uses, state=each.state) for each in documents],
        service=service,
    )


def _asset(name: str, media_type: str) -> Response:
    return Response(
        (files(__package__.rpartition(".")[0]) / "dashboard" / name).read_bytes(), 200, _HEADERS, media_type
    )
