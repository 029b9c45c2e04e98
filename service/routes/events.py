"""What engines and routers tell and are told: hints for chunks, and events of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Header
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.responses import Response, StreamingResponse

from ..context import Caller, Context, Reader, ServiceContext, Writer
from ..problems import ProblemError
from .lookups import KeyText, stored_keys
from .pins import begin_prefetch

router = APIRouter(tags=["hints and events"])

_VERSION = "0.1"
_POLL_S = 0.1
_HEARTBEAT_S = 15.0


class HintPayload(BaseModel):
    """What every action is about; `deadline_s` for prefetch and pin."""

    model_config = ConfigDict(extra="forbid")
    keys: list[KeyText] = Field(min_length=1)
    deadline_s: float | None = Field(None, gt=0, allow_inf_nan=False)


class HintAction(BaseModel):
    """One action: `prefetch`, `pin` or `evict`."""

    action_id: str = Field(min_length=1, max_length=128)
    action_type: str = Field(max_length=64)
    action_version: str = Field(max_length=16)
    payload: dict[str, Any]


class Hints(BaseModel):
    """An envelope of kv_hints 0.1."""

    protocol_version: str = Field(max_length=16)
    message_id: str = Field(min_length=1, max_length=128)
    actions: list[HintAction] = Field(min_length=1, max_length=100)


class HintResult(BaseModel):
    """What came of an action: accepted, with the job or pin that it has become, or refused and why."""

    action_id: str
    status: str
    detail: str
    resource: str | None


class HintResults(BaseModel):
    protocol_version: str
    message_id: str
    results: list[HintResult]


@router.post("/v1/hints", summary="Hints for chunks (kv_hints 0.1)")
async def take_hints(body: Hints, context: Context, caller: Writer) -> HintResults:
    """Each action by itself: those that are not known, or not right, are refused, and the others are done."""
    if body.protocol_version != _VERSION:
        raise ProblemError(
            409, "protocol", f"protocol_version is {body.protocol_version[:16]!r}; this service takes {_VERSION!r}"
        )
    results = await context.run(lambda: [_act(context, caller, action) for action in body.actions])
    return HintResults(protocol_version=_VERSION, message_id=body.message_id, results=results)


@router.get(
    "/v1/events",
    summary="Follow KV events",
    response_class=Response,
    responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
)
async def follow_events(
    context: Context,
    caller: Reader,
    last_event_id: Annotated[str | None, Header(pattern=r"^[0-9a-f]{8}\.[0-9]{1,15}$")] = None,
) -> Response:
    """Server-sent events: `BlockStored` and `BlockRemoved` of the tenant's chunks, with vLLM's fields.

    `AllBlocksCleared` comes where events since `Last-Event-ID` are forgotten: list the chunks anew then.
    """
    pool = caller.tenant.pool

    async def events() -> AsyncIterator[str]:
        run, _, number = (last_event_id or "").partition(".")
        last = context.events.sequence(pool)
        if last_event_id is not None:
            last = int(number) if run == context.index.epoch else -1  # of another run of the service
        quiet_s = 0.0
        yield ": following\n\n"
        while not context.is_draining:
            found = context.events.since(last, pool)
            for each in found:
                last = each.sequence
                name = f"id: {context.index.epoch}.{last}\nevent: {each.fields['type']}"
                yield f"{name}\ndata: {json.dumps(each.as_json())}\n\n"
            quiet_s = 0.0 if found else quiet_s + _POLL_S
            if quiet_s >= _HEARTBEAT_S:
                quiet_s = 0.0
                yield ": nothing new\n\n"
            await asyncio.sleep(_POLL_S)

    return StreamingResponse(events(), media_type="text/event-stream")


def _act(context: ServiceContext, caller: Caller, action: HintAction) -> HintResult:
    try:
        if action.action_type not in ("prefetch", "pin", "evict"):
            raise ProblemError(422, "unknown", "unknown action_type; known are prefetch, pin, evict")
        if action.action_version != _VERSION:
            raise ProblemError(422, "unknown", f"unknown action_version; known is {_VERSION}")
        payload = HintPayload(**action.payload)
        keys = stored_keys(context, caller, payload.keys)
        resource = None
        if action.action_type == "prefetch":
            job = begin_prefetch(context, caller, keys, payload.deadline_s)
            resource = f"/v1/prefetches/{job.id}"
        elif action.action_type == "pin":
            deadline_s = min(payload.deadline_s or context.settings.max_pin_s, context.settings.max_pin_s)
            resource = f"/v1/pins/{context.pins.add(caller.tenant.pool, keys, deadline_s).id}"
        else:
            with context.store.use() as store:
                for key in keys:
                    store.delete(key)
            context.index.catch_up()
    except ValidationError as exc:
        told = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in exc.errors()[:5])
        return HintResult(action_id=action.action_id, status="refused", detail=f"payload: {told}", resource=None)
    except (ProblemError, TypeError) as exc:
        detail = exc.detail if isinstance(exc, ProblemError) else "payload is not an object with keys"
        return HintResult(action_id=action.action_id, status="refused", detail=str(detail), resource=None)
    return HintResult(action_id=action.action_id, status="accepted", detail="", resource=resource)
