"""What an operator settles: namespaces, tenants, tiers."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Path
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from ...connectors.tier_url import open_tier
from ...core import Tier
from ...kvstore.tiers.disk.tier import DiskTier
from ...kvstore.tiers.host import HostTier
from ..access.namespaces import NamespaceRules, quotas_of
from ..access.tenants import client_namespace, store_namespace
from ..context import Admin, Caller, Context, Reader, ServiceContext, Writer
from ..problems import ProblemError, not_found
from ..settings import Bytes
from .lookups import TierSummary, tier_summary

router = APIRouter(tags=["administration"])

NamespaceName = Annotated[str, Path(min_length=1, max_length=180, pattern="^[^/]+$")]
TierName = Annotated[str, Path(pattern="^[a-z][a-z0-9-]{0,30}$")]
TenantName = Annotated[str, Path(pattern="^[a-z0-9][a-z0-9-]{0,62}$")]
Ratio = Annotated[float, Field(ge=0, le=1)]


class Rules(BaseModel):
    """Rules of a namespace: how long its chunks live at most, and its share of every tier."""

    model_config = ConfigDict(extra="forbid")
    ttl_s: float | None = Field(None, gt=0, le=1e10)
    reserve_ratio: Ratio | None = None
    limit_ratio: Ratio | None = None


class NamespaceInfo(Rules):
    """A namespace: its rules, and what it takes in each tier."""

    name: str
    tier_bytes: dict[str, int]


class TenantRules(BaseModel):
    """Rules of a tenant. `pool`: tenants of one pool share their chunks."""

    model_config = ConfigDict(extra="forbid")
    pool: str | None = Field(None, pattern="^[a-z0-9][a-z0-9-]{0,62}$")
    reserve_ratio: Ratio | None = None
    limit_ratio: Ratio | None = None
    requests_per_s: float | None = Field(None, gt=0, le=1e9)


class TenantInfo(TenantRules):
    name: str


class TierRequest(BaseModel):
    """A tier to attach. Folders are the service's own; `position` 0 is the fastest.

    One of kind `remote` lies on other machines; the service's settings (`remote_tiers`) say where, under its name: no
    request may name an address.
    """

    model_config = ConfigDict(extra="forbid")
    kind: Literal["host", "disk", "remote"]
    capacity_bytes: Bytes | None = None
    position: int | None = Field(None, ge=0, le=16)


@router.get("/v1/namespaces", summary="The tenant's namespaces")
async def list_namespaces(context: Context, caller: Reader) -> list[NamespaceInfo]:
    """Those with chunks or rules; the one without a name is `""`."""
    stats = await context.run(context.store.stats)
    pool = caller.tenant.pool
    rules = {name: each for name, each in context.namespaces.all().items() if client_namespace(name)[0] == pool}
    names = {name for tier in stats.tiers for name in tier.namespace_bytes if client_namespace(name)[0] == pool}
    return [
        NamespaceInfo(
            name=client_namespace(name)[1],
            tier_bytes={tier.name: tier.namespace_bytes.get(name, 0) for tier in stats.tiers},
            ttl_s=rules.get(name, NamespaceRules()).ttl_s,
            reserve_ratio=rules.get(name, NamespaceRules()).reserve_ratio,
            limit_ratio=rules.get(name, NamespaceRules()).limit_ratio,
        )
        for name in sorted(names | rules.keys())
    ]


@router.put("/v1/namespaces/{name}", status_code=204, summary="Set the rules of a namespace")
async def set_namespace(name: NamespaceName, body: Rules, context: Context, caller: Admin) -> Response:
    """The quota counts at once; the time to live for chunks that are put from now on."""
    stored = _stored(caller, name)
    before = context.namespaces.all().get(stored)
    context.namespaces.set(stored, NamespaceRules(body.ttl_s, body.reserve_ratio, body.limit_ratio))
    try:
        await context.run(lambda: apply_quotas(context))
    except ValueError as exc:
        context.namespaces.set(stored, before)
        raise ProblemError(409, "quota", str(exc)) from exc
    return Response(status_code=204)


@router.delete("/v1/namespaces/{name}", status_code=204, summary="Delete the chunks of a namespace")
async def delete_namespace(name: NamespaceName, context: Context, caller: Writer) -> Response:
    """Its rules stay."""
    stored = _stored(caller, name)

    def delete() -> None:
        for key in context.index.keys_in(stored):
            with context.store.use() as store:
                store.delete(key)
        context.index.catch_up()

    await context.run(delete)
    return Response(status_code=204)


@router.get("/v1/tenants", summary="All tenants")
async def list_tenants(context: Context, caller: Admin) -> list[TenantInfo]:
    """Names and rules; secrets are never shown."""
    del caller
    return [
        TenantInfo(
            name=each.name,
            pool=each.pool,
            reserve_ratio=each.reserve_ratio,
            limit_ratio=each.limit_ratio,
            requests_per_s=each.requests_per_s,
        )
        for each in context.tenants.all()
    ]


@router.put("/v1/tenants/{name}", status_code=204, summary="Set the rules of a tenant")
async def set_tenant(name: TenantName, body: TenantRules, context: Context, caller: Admin) -> Response:
    """Makes the tenant if it is new. Moving it to another pool leaves its chunks in the old one."""
    del caller
    old = context.tenants.get(name)
    rules = {
        "reserve_ratio": body.reserve_ratio,
        "limit_ratio": body.limit_ratio,
        "requests_per_s": body.requests_per_s,
    }
    context.tenants.update(name, pool=body.pool or old.pool, **rules)
    try:
        await context.run(lambda: apply_quotas(context))
    except ValueError as exc:
        undo = {field: getattr(old, field) for field in ("pool", *rules)}
        context.tenants.update(name, **undo)
        raise ProblemError(409, "quota", str(exc)) from exc
    return Response(status_code=204)


@router.get("/v1/tiers", summary="The tiers, fastest first")
async def list_tiers(context: Context, caller: Admin) -> list[TierSummary]:
    """With their counts since the service started."""
    del caller
    stats = await context.run(context.store.stats)
    return [tier_summary(tier) for tier in stats.tiers]


@router.put("/v1/tiers/{name}", status_code=201, summary="Attach a tier")
async def attach_tier(name: TierName, body: TierRequest, context: Context, caller: Admin) -> Response:
    """Requests wait for the moment that it takes. 409 if there is one of this name."""
    del caller
    await context.run(lambda: _attach(context, name, body))
    return Response(status_code=201)


@router.delete("/v1/tiers/{name}", status_code=204, summary="Detach a tier")
async def detach_tier(name: TierName, context: Context, caller: Admin) -> Response:
    """Chunks that it alone holds move to the other tiers, as far as they have room. The last tier stays."""
    del caller

    def detach() -> None:
        tiers = [tier for tier in context.store.tiers if tier.name != name]
        if len(tiers) == len(context.store.tiers):
            raise not_found("the tier")
        if not tiers:
            raise ProblemError(409, "last-tier", "this is the last tier; attach another before")
        context.store.replace(tiers=tiers)
        _follow(context)

    await context.run(detach)
    return Response(status_code=204)


def apply_quotas(context: ServiceContext) -> None:
    """Quotas as the tenants and namespaces have them now. Raises `ValueError` for reserves above everything."""
    context.store.replace(quotas=quotas_of(context.settings, context.tenants, context.namespaces.all()))
    _follow(context)


def _attach(context: ServiceContext, name: str, body: TierRequest) -> None:
    if any(tier.name == name for tier in context.store.tiers):
        raise ProblemError(409, "exists", f"there is a tier {name!r} already")
    is_remote = body.kind == "remote"
    if is_remote == (body.capacity_bytes is not None):
        raise ProblemError(
            422, "invalid", "a tier of kind host or disk has capacity_bytes, one of kind remote has none"
        )
    tier: Tier
    if is_remote:
        url = context.settings.remote_tiers.get(name)
        if url is None:
            raise ProblemError(422, "invalid", f"the service's settings have no {name!r} among remote_tiers")
        try:
            tier = open_tier(url.get_secret_value(), name=name, timeout_s=context.settings.tier_timeout_s)
        except (ValueError, ImportError, OSError) as exc:
            raise ProblemError(422, "invalid", f"remote tier {name!r} cannot be opened: {exc}") from exc
    elif body.kind == "host":
        tier = HostTier(body.capacity_bytes, name=name, pinned=False)
    else:
        folder = context.settings.directory / "tiers" / name
        folder.parent.mkdir(mode=0o700, exist_ok=True)
        tier = DiskTier(folder, body.capacity_bytes, name=name, durability=context.settings.durability)
    tiers = list(context.store.tiers)
    tiers.insert(len(tiers) if body.position is None else body.position, tier)
    try:
        context.store.replace(tiers=tiers)
    except BaseException:
        tier.close()
        raise
    _follow(context)


def _follow(context: ServiceContext) -> None:
    context.pins.follow()
    context.index.catch_up()


def _stored(caller: Caller, name: str) -> str:
    try:
        return store_namespace(caller.tenant.pool, name)
    except ValueError as exc:
        raise ProblemError(422, "invalid", str(exc)) from exc
