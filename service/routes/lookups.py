"""Which chunks are there, why others are not, and what the store has done so far."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from ...kvstore.stats import StoreStats, TierStats
from ..access.tenants import client_namespace
from ..context import Caller, Context, Reader, ServiceContext, parse_key
from ..problems import ProblemError
from ..served_store import COUNTERS

router = APIRouter(tags=["look-ups"])

KeyText = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Keys(BaseModel):
    """Keys of chunks, 64 lower-case hexadecimal digits each."""

    model_config = ConfigDict(extra="forbid")
    keys: list[KeyText] = Field(min_length=1)


class Match(BaseModel):
    """How many leading keys are stored, and the fastest tier of each of them."""

    matched: int
    tiers: list[str]


class Departure(BaseModel):
    tier: str
    why: str
    at_s: float


class Lookup(BaseModel):
    tier: str | None
    miss: str | None
    load_s: float
    nbytes: int
    at_s: float


class Explanation(BaseModel):
    """Where a chunk is, what its last look-up gave and cost, and why it is not where it was."""

    key: str
    tiers: list[str]
    lookup: Lookup | None
    departure: Departure | None
    load_s: float | None
    recompute_s: float | None
    word: str
    summary: str


class NamespaceBytes(BaseModel):
    namespace: str
    tier: str
    nbytes: int


class TierSummary(BaseModel):
    """Counts of a tier, as `TierStats` says what they mean; of the whole service, for operators."""

    name: str
    capacity_bytes: int | None
    used_bytes: int
    chunks: int
    counts: dict[str, int]


class WorkerStats(BaseModel):
    """Worker processes: how many there should be, how many accept connections, how often one was started again."""

    configured: int
    alive: int
    restarts: int


class ServiceStats(BaseModel):
    lookups: int
    hits: int
    misses: dict[str, int]
    puts: dict[str, int]
    pinned: int
    overdue_pins: int
    tiers: list[TierSummary]
    latencies: dict[str, dict[str, float]]
    workers: WorkerStats


class Stats(BaseModel):
    """What is stored for the tenant; for operators (`admin`) also what the whole service has done."""

    namespaces: list[NamespaceBytes]
    chunks: int
    service: ServiceStats | None


def stored_keys(context: ServiceContext, caller: Caller, keys: list[str]) -> list[Any]:
    """The store's keys of a request's keys. Raises `ProblemError` if there are too many."""
    if len(keys) > context.settings.max_keys:
        raise ProblemError(
            413, "too-many-keys", f"{len(keys)} keys; at most {context.settings.max_keys} in one request"
        )
    return [caller.keys.to_store(parse_key(key)) for key in keys]


@router.post("/v1/match", summary="How many leading chunks are stored")
async def match(body: Keys, context: Context, caller: Reader) -> Match:
    """In order: the first key that is not stored ends the match. Reads no chunk."""
    keys = stored_keys(context, caller, body.keys)

    def look_up() -> tuple[str, ...]:
        with context.store.use() as store:
            return store.locate_prefix(keys)

    tiers = context.store.locate_at_hand(keys)
    if tiers is None:
        tiers = await context.run(look_up)
    return Match(matched=len(tiers), tiers=list(tiers))


@router.post("/v1/explain", summary="What became of chunks")
async def explain(body: Keys, context: Context, caller: Reader) -> list[Explanation]:
    """Asks no tier and counts as no look-up."""
    keys = stored_keys(context, caller, body.keys)

    def look_up() -> list[Explanation]:
        with context.store.use() as store:
            found = store.explain(keys)
        return [
            Explanation(
                key=key,
                tiers=list(each.tiers),
                lookup=None
                if each.lookup is None
                else Lookup(
                    tier=each.lookup.tier,
                    miss=each.lookup.reason,
                    load_s=each.lookup.load_s,
                    nbytes=each.lookup.nbytes,
                    at_s=each.lookup.at_s,
                ),
                departure=None
                if each.departure is None
                else Departure(tier=each.departure.tier, why=each.departure.why, at_s=each.departure.at_s),
                load_s=each.load_s,
                recompute_s=each.recompute_s,
                word=each.word,
                summary=str(each).replace(each.key.hex()[:12], key[:12]),
            )
            for key, each in zip(body.keys, found, strict=True)
        ]

    return await context.run(look_up)


@router.get("/v1/stats", summary="What is stored, and what was done")
async def stats(context: Context, caller: Reader) -> Stats:
    """Bytes of the tenant's namespaces; hits and misses by cause of the whole service for operators."""
    found = await context.run(context.store.stats)
    pool = caller.tenant.pool
    namespaces = [
        NamespaceBytes(namespace=client_namespace(name)[1], tier=tier.name, nbytes=nbytes)
        for tier in found.tiers
        for name, nbytes in tier.namespace_bytes.items()
        if client_namespace(name)[0] == pool
    ]
    chunks = await context.run(lambda: context.index.count(pool))
    is_operator = "admin" in caller.credential.scopes
    return Stats(namespaces=namespaces, chunks=chunks, service=service_stats(context, found) if is_operator else None)


def service_stats(context: ServiceContext, found: StoreStats) -> ServiceStats:
    return ServiceStats(
        lookups=found.lookups,
        hits=found.hits,
        misses=dict(found.misses),
        puts=dict(found.puts),
        pinned=found.pinned,
        overdue_pins=found.overdue_pins,
        tiers=[tier_summary(tier) for tier in found.tiers],
        latencies=context.latencies.quantiles(),
        workers=WorkerStats(**asdict(context.workers)),
    )


def tier_summary(tier: TierStats) -> TierSummary:
    counts = {name: getattr(tier, name) for name in COUNTERS}
    return TierSummary(
        name=tier.name,
        capacity_bytes=tier.capacity_bytes,
        used_bytes=tier.used_bytes,
        chunks=tier.chunks,
        counts=counts,
    )
