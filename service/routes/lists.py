"""Which chunks are there, and what changes among them."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import BaseModel

from ..access.tenants import client_namespace
from ..chunk_index import ListedChunk
from ..context import Caller, Context, Reader
from ..problems import ProblemError

router = APIRouter(tags=["chunks"])

_CURSOR = r"^[0-9a-f]{8}\.[0-9]{1,15}$"
_CURSOR_OR_NONE = r"^([0-9a-f]{8}\.[0-9]{1,15})?$"


class ChunkEntry(BaseModel):
    """A chunk of a list. `nbytes` counts its container in steps of 4 KiB; `tiers` are those that hold it."""

    key: str
    namespace: str
    nbytes: int
    after: str | None
    expires_at_s: float | None
    recompute_s: float | None
    tiers: list[str]


class ChunkList(BaseModel):
    """Chunks, least recently written first. `cursor` continues the list, or says where changes begin."""

    chunks: list[ChunkEntry]
    cursor: str
    is_complete: bool


class ChangeList(BaseModel):
    """What was written or went away since a cursor, in order: an entry, or the key of what is gone."""

    changes: list[ChunkEntry | str]
    cursor: str


@router.get("/v1/chunks", summary="List chunks")
async def list_chunks(
    context: Context,
    caller: Reader,
    cursor: Annotated[str, Query(pattern=_CURSOR_OR_NONE)] = "",
    limit: Annotated[int, Query(ge=1, le=10000)] = 1000,
) -> ChunkList:
    """The tenant's chunks, in pages. The cursor of the last page is where `/v1/changes` goes on."""
    epoch, after = _cursor(cursor)
    if cursor and epoch != context.index.epoch:
        raise ProblemError(410, "gone", "the service has started anew since; list from the beginning")
    up_to = context.index.sequence(caller.tenant.pool)
    chunks = await context.run(lambda: context.index.chunks(caller.tenant.pool, after=after, limit=limit))
    is_complete = len(chunks) < limit
    last = up_to if is_complete else chunks[-1].sequence
    return ChunkList(
        chunks=[_entry(caller, chunk) for chunk in chunks],
        cursor=f"{context.index.epoch}.{last}",
        is_complete=is_complete,
    )


@router.get("/v1/changes", summary="What was written or went away since a cursor")
async def list_changes(
    context: Context,
    caller: Reader,
    cursor: Annotated[str, Query(pattern=_CURSOR)],
    limit: Annotated[int, Query(ge=1, le=10000)] = 1000,
) -> ChangeList:
    """In order. 410 if the cursor is too old: list the chunks anew then."""
    epoch, after = _cursor(cursor)
    found = None
    if epoch == context.index.epoch:
        found = await context.run(lambda: context.index.changes(caller.tenant.pool, after, limit=limit))
    if found is None:
        raise ProblemError(410, "gone", "changes since then are forgotten; list the chunks anew")
    changes, last = found
    return ChangeList(
        changes=[
            caller.keys.to_client(change.key).hex() if change.chunk is None else _entry(caller, change.chunk)
            for change in changes
        ],
        cursor=f"{context.index.epoch}.{last}",
    )


def _entry(caller: Caller, chunk: ListedChunk) -> ChunkEntry:
    info = chunk.info
    return ChunkEntry(
        key=caller.keys.to_client(chunk.key).hex(),
        namespace=client_namespace(info.namespace)[1],
        nbytes=chunk.nbytes,
        after=None if info.after is None else caller.keys.to_client(info.after).hex(),
        expires_at_s=info.expires_at_s,
        recompute_s=info.recompute_s,
        tiers=sorted(chunk.tiers),
    )


def _cursor(text: str) -> tuple[str, int]:
    epoch, _, number = text.partition(".")
    return epoch, int(number or 0)
