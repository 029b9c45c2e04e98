"""Chunks that stay, and chunks that are brought closer."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Header
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from ...kvstore.placement.prefetch import Prefetch
from ..context import Caller, Context, Reader, ServiceContext, Writer
from ..jobs import Job
from .lookups import KeyText, stored_keys

router = APIRouter(tags=["pins and prefetches"])

IdempotencyKey = Annotated[str | None, Header(alias="Idempotency-Key", min_length=1, max_length=128)]


class PinRequest(BaseModel):
    """Keys to pin, and for how many seconds."""

    model_config = ConfigDict(extra="forbid")
    keys: list[KeyText] = Field(min_length=1)
    deadline_s: float = Field(gt=0, allow_inf_nan=False)


class PinInfo(BaseModel):
    """A pin. `matched`: how many leading keys are stored."""

    id: str
    keys: int
    expires_at_s: float
    matched: int


class PrefetchRequest(BaseModel):
    """Keys to bring to the fastest tier, in order. After `deadline_s` no more are begun."""

    model_config = ConfigDict(extra="forbid")
    keys: list[KeyText] = Field(min_length=1)
    deadline_s: float | None = Field(None, ge=0, allow_inf_nan=False)


class JobInfo(BaseModel):
    """A job. Further members depend on its kind."""

    model_config = ConfigDict(extra="allow")
    id: str
    kind: str
    state: str
    began_at_s: float


@router.post("/v1/pins", status_code=201, summary="Pin chunks")
async def add_pin(
    body: PinRequest, context: Context, caller: Writer, response: Response, idempotency_key: IdempotencyKey = None
) -> PinInfo:
    """No tier evicts them before the deadline, or the longest that the service allows; `expires_at_s` says which."""
    deadline_s = min(body.deadline_s, context.settings.max_pin_s)
    keys = stored_keys(context, caller, body.keys)

    def pin() -> PinInfo:
        made = context.pins.add(caller.tenant.pool, keys, deadline_s)
        with context.store.use() as store:
            return PinInfo(id=made.id, keys=len(keys), expires_at_s=made.expires_at_s, matched=store.match(keys))

    found = await context.once(caller, "pins", idempotency_key, body, pin)
    response.headers["Location"] = f"/v1/pins/{found.id}"
    return found


@router.get("/v1/pins/{pin_id}", summary="A pin")
async def get_pin(pin_id: str, context: Context, caller: Reader) -> PinInfo:
    """404 once it has ended."""
    pin = context.pins.get(caller.tenant.pool, pin_id)

    def look_up() -> PinInfo:
        with context.store.use() as store:
            matched = store.match(pin.keys)
        return PinInfo(id=pin.id, keys=len(pin.keys), expires_at_s=pin.expires_at_s, matched=matched)

    return await context.run(look_up)


@router.delete("/v1/pins/{pin_id}", status_code=204, summary="Release a pin")
async def release_pin(pin_id: str, context: Context, caller: Writer) -> Response:
    """Its chunks may be evicted again, unless others pin them."""
    await context.run(lambda: context.pins.release(caller.tenant.pool, pin_id))
    return Response(status_code=204)


@router.post("/v1/prefetches", status_code=202, summary="Bring chunks to the fastest tier")
async def add_prefetch(
    body: PrefetchRequest, context: Context, caller: Writer, response: Response, idempotency_key: IdempotencyKey = None
) -> JobInfo:
    """Answers at once; poll the job that `Location` names."""
    keys = stored_keys(context, caller, body.keys)
    found = await context.once(
        caller,
        "prefetches",
        idempotency_key,
        body,
        lambda: JobInfo(**begin_prefetch(context, caller, keys, body.deadline_s).as_json()),
    )
    response.headers["Location"] = f"/v1/prefetches/{found.id}"
    return found


@router.get("/v1/prefetches/{job_id}", summary="How far a prefetch is")
async def get_prefetch(job_id: str, context: Context, caller: Reader) -> JobInfo:
    """`state` is running, finished, failed or cancelled; `in_first_tier` says how many chunks are there by now."""
    return JobInfo(**context.jobs.get(caller.tenant.pool, job_id, "prefetch").as_json())


@router.delete("/v1/prefetches/{job_id}", status_code=204, summary="Cancel a prefetch")
async def cancel_prefetch(job_id: str, context: Context, caller: Writer) -> Response:
    """Ends it after the chunk that is under way. What was brought stays."""
    context.jobs.get(caller.tenant.pool, job_id, "prefetch").cancel()
    return Response(status_code=204)


def begin_prefetch(context: ServiceContext, caller: Caller, keys: list[Any], deadline_s: float | None) -> Job:
    """Starts a prefetch, and a job that follows it."""
    prefetches: list[Prefetch] = []
    job = context.jobs.add(
        caller.tenant.pool, "prefetch", lambda: [each.cancel() for each in prefetches], keys=len(keys), in_first_tier=0
    )
    with context.store.use() as store:
        prefetch = store.prefetch(keys, deadline_s=deadline_s)
    prefetches.append(prefetch)

    def follow() -> None:
        try:
            found = prefetch.result()
        except BaseException as exc:  # noqa: BLE001  the job says so
            context.jobs.update(job, "failed", outcome="failed", error=type(exc).__name__)
            return
        outcome = prefetch.outcome or "finished"
        state = {"cancelled": "cancelled", "refused": "failed", "failed": "failed"}.get(outcome, "finished")
        context.jobs.update(job, state, outcome=outcome, in_first_tier=found)  # type: ignore[arg-type]

    context.followers.submit(follow)
    return job
