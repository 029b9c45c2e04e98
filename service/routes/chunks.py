"""Chunks: put, get, look at, delete, list, and follow what changes."""

from __future__ import annotations

import base64
import hashlib
import re
import time
from array import array
from collections.abc import Sequence
from typing import Annotated, Any

import torch
from fastapi import APIRouter, Header, Path, Query, Request
from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ...core import ChunkInfo, ChunkKey, EncodedChunk
from ..access.tenants import client_namespace, store_namespace
from ..chunk_index import ListedChunk, listed_bytes
from ..containers import MEDIA_TYPE, Container, IncomingContainer, layers_container, num_layers
from ..context import Caller, Context, Reader, ServiceContext, Writer, parse_key
from ..problems import ProblemError, not_found

router = APIRouter(tags=["chunks"])

_KEY = "^[0-9a-f]{64}$"
Key = Annotated[str, Path(pattern=_KEY, description="64 lower-case hexadecimal digits.")]
SessionId = Annotated[
    str | None,
    Header(alias="KVLoom-Shared-Memory", pattern="^[0-9a-f]{32}$", description="Session of shared memory to use."),
]
LEASE_MEDIA_TYPE = "application/vnd.kvloom.lease+json"
_CURSOR = r"^[0-9a-f]{8}\.[0-9]{1,15}$"
_CURSOR_OR_NONE = r"^([0-9a-f]{8}\.[0-9]{1,15})?$"
_RANGE = re.compile(r"(bytes|layers)=(\d*)-(\d*)")
_DIGEST = re.compile(r"(sha-256|sha-512)=:([A-Za-z0-9+/=]+):")
_BODY: dict[str, Any] = {"content": {MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}}}


class ChunkEntry(BaseModel):
    """A chunk of a list. `nbytes` counts its container in steps of 4 KiB; `tiers` are those that hold it."""

    key: str
    namespace: str
    nbytes: int
    after: str | None
    expires_at_s: float | None
    recompute_s: float | None
    tiers: list[str]


class LeaseInfo(BaseModel):
    """Where a container lies in the session's shared memory, until the client gives the lease back."""

    lease: int
    offset: int
    nbytes: int


class ChunkList(BaseModel):
    """Chunks, least recently written first. `cursor` continues the list, or says where changes begin."""

    chunks: list[ChunkEntry]
    cursor: str
    is_complete: bool


class ChangeList(BaseModel):
    """What was written or went away since a cursor, in order: an entry, or the key of what is gone."""

    changes: list[ChunkEntry | str]
    cursor: str


@router.put(
    "/v1/chunks/{key}",
    status_code=201,
    summary="Store a chunk",
    openapi_extra={"requestBody": {"required": True, **_BODY}},
    responses={201: {"description": "Stored."}, 204: {"description": "Replaced."}},
)
async def put_chunk(
    key: Key,
    request: Request,
    context: Context,
    caller: Writer,
    namespace: Annotated[str, Header(alias="KVLoom-Namespace", max_length=180)] = "",
    ttl_s: Annotated[float | None, Header(alias="KVLoom-TTL", gt=0, le=1e10)] = None,
    expires_at_s: Annotated[float | None, Header(alias="KVLoom-Expires-At", ge=0, le=1e12)] = None,
    after: Annotated[str | None, Header(alias="KVLoom-After", pattern=_KEY)] = None,
    recompute_s: Annotated[float | None, Header(alias="KVLoom-Recompute-Seconds", ge=0, le=1e9)] = None,
    if_none_match: Annotated[str | None, Header()] = None,
    content_digest: Annotated[str | None, Header()] = None,
    session_id: SessionId = None,
    shared_range: Annotated[str | None, Header(alias="KVLoom-Range", pattern="^[0-9]{1,15}-[0-9]{1,15}$")] = None,
) -> Response:
    """The body is a container of kvloom's format under this key. It is stored whole and verified, or not at all."""
    client_key = parse_key(key)
    stored_key = caller.keys.to_store(client_key)
    name = _namespace(caller, namespace)
    deadlines = [expires_at_s, None if ttl_s is None else time.time() + ttl_s, context.namespaces.expiry(name)]
    expiry = min((each for each in deadlines if each is not None), default=None)
    info = ChunkInfo(None if after is None else caller.keys.to_store(parse_key(after)), name, expiry, recompute_s)
    existed = await context.run(lambda: _located(context, stored_key)) is not None
    if if_none_match is not None and existed:
        raise ProblemError(412, "exists", "the chunk is stored already")
    if session_id is not None and shared_range is not None:
        incoming = await _taken(context, caller, session_id, shared_range)
    else:
        incoming = await _received(request, context, caller)
    if content_digest is not None:
        await context.run(lambda: _check_digest(content_digest, incoming.view[: incoming.filled_bytes]))

    def store() -> str:
        blob, header = incoming.chunk(client_key)
        etag = context.containers.note(stored_key, blob, header)
        context.index.expect(stored_key, info, _token_ids(blob))
        try:
            with context.store.use() as kvstore:
                kvstore.put_encoded(stored_key, blob, info)
        except BaseException:
            context.index.not_written(stored_key)
            raise
        context.index.written(stored_key, listed_bytes(incoming.filled_bytes), info, etag)
        return etag

    etag = await context.run(store)
    return Response(status_code=204 if existed else 201, headers={"ETag": etag})


@router.get(
    "/v1/chunks/{key}",
    summary="A chunk, or some of its layers",
    response_class=Response,
    responses={200: _BODY, 206: _BODY, 304: {"description": "Not modified."}},
)
@router.head("/v1/chunks/{key}", summary="Whether a chunk is there", response_class=Response)
async def get_chunk(
    key: Key,
    request: Request,
    context: Context,
    caller: Reader,
    if_none_match: Annotated[str | None, Header()] = None,
    if_range: Annotated[str | None, Header()] = None,
    part: Annotated[str | None, Header(alias="Range", description="`layers=0-3`, or `bytes=...`")] = None,
    want_digest: Annotated[str | None, Header(alias="Want-Content-Digest")] = None,
    session_id: SessionId = None,
) -> Response:
    """Its container. `Range: layers=A-B` gives a container of these layers alone, verified like a whole one."""
    client_key = parse_key(key)
    stored_key = caller.keys.to_store(client_key)
    known = context.index.get(stored_key)
    is_head = request.method == "HEAD"
    if known is not None and known.etag is not None and is_head and part is None:
        if await context.run(lambda: _located(context, stored_key)) is None:
            raise not_found("the chunk")
        headers = {"ETag": known.etag, "Accept-Ranges": "bytes, layers", "KVLoom-Chunk-Bytes": str(known.nbytes)}
        return Response(None, 200, headers, media_type=MEDIA_TYPE)

    def fetch() -> tuple[Container, int]:
        with context.store.use() as kvstore:
            blob = kvstore.get_encoded(stored_key)
        if blob is None:
            raise not_found("the chunk")
        if known is not None:
            context.index.read(known)
        layers = num_layers(blob)
        span = _span(part, "layers", layers)
        if span is not None:
            return layers_container(client_key, blob, *span), layers
        return context.containers.container(stored_key, client_key, blob), layers

    try:
        container, layers = await context.run(fetch)
    except ValueError as exc:
        raise ProblemError(416, "range", str(exc)) from exc
    if known is not None and known.etag is None and part is None:
        known.etag = container.etag
    headers = {"ETag": container.etag, "Accept-Ranges": "bytes, layers"}
    if if_none_match is not None and _matches(if_none_match, container.etag) and part is None:
        return Response(None, 304, headers)
    status, start, stop = 200, 0, container.total_bytes
    layer_span = _span(part, "layers", layers)
    if layer_span is not None:
        status = 206
        headers["Content-Range"] = f"layers {layer_span[0]}-{layer_span[1] - 1}/{layers}"
    elif part is not None and (if_range is None or if_range == container.etag):
        try:
            span = _span(part, "bytes", container.total_bytes)
        except ValueError as exc:
            raise ProblemError(
                416, "range", str(exc), headers={"Content-Range": f"bytes */{container.total_bytes}"}
            ) from exc
        if span is not None:
            status, (start, stop) = 206, span
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{container.total_bytes}"
    if session_id is not None and (start, stop) == (0, container.total_bytes) and not is_head:
        session = context.shared_memory.session(caller.tenant.pool, session_id)
        async with context.transfers.turn():
            lease = await context.run(lambda: context.shared_memory.lend(session, container))
        if lease is not None:
            told = LeaseInfo(lease=lease.id, offset=lease.offset, nbytes=lease.nbytes)
            return Response(told.model_dump_json(), status, headers, media_type=LEASE_MEDIA_TYPE)
    if want_digest is not None and "sha-256" in want_digest:
        pieces = container.pieces(start, stop)
        headers["Content-Digest"] = await context.run(lambda: _digest(pieces))
    return ContainerResponse(context, container, start, stop, status, headers, is_head=is_head)


@router.delete("/v1/chunks/{key}", status_code=204, summary="Delete a chunk")
async def delete_chunk(key: Key, context: Context, caller: Writer) -> Response:
    """Removes the chunk from every tier."""
    stored_key = caller.keys.to_store(parse_key(key))

    def delete() -> bool:
        with context.store.use() as kvstore:
            found = kvstore.delete(stored_key)
        context.index.catch_up()
        return found

    if not await context.run(delete):
        raise not_found("the chunk")
    return Response(status_code=204)


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


class ContainerResponse(Response):
    """A container, or bytes `[start, stop)` of it, streamed from where it lies. Waits for its turn to move bytes."""

    def __init__(
        self,
        context: ServiceContext,
        container: Container,
        start: int,
        stop: int,
        status: int,
        headers: dict[str, str],
        *,
        is_head: bool = False,
    ) -> None:
        super().__init__(None, status, {**headers, "Content-Length": str(stop - start)}, media_type=MEDIA_TYPE)
        self._context = context
        self._pieces = [] if is_head else container.pieces(start, stop)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        del scope, receive
        async with self._context.transfers.turn():
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            for piece in self._pieces:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b""})


async def _received(request: Request, context: ServiceContext, caller: Caller) -> IncomingContainer:
    """The body in one buffer. Waits for its turn before it reads, so that few clients fill memory at a time."""
    length = request.headers.get("content-length")
    if length is None or not length.isdigit():
        raise ProblemError(411, "length-required", "a chunk needs a Content-Length")
    with context.uploads.taking(caller.tenant.name, int(length)):
        async with context.transfers.turn():
            incoming = IncomingContainer(context.buffers, int(length))
            async for piece in request.stream():
                try:
                    incoming.append(piece)
                except ValueError as exc:
                    raise ProblemError(400, "length", str(exc)) from exc
    if incoming.filled_bytes != int(length):
        raise ProblemError(400, "length", f"{incoming.filled_bytes} bytes came of {length} that were announced")
    return incoming


async def _taken(context: ServiceContext, caller: Caller, session_id: str, text: str) -> IncomingContainer:
    """A copy of what the client has written to shared memory, `OFFSET-LENGTH`."""
    offset, nbytes = map(int, text.split("-"))
    if nbytes > context.settings.max_body_bytes:
        raise ProblemError(413, "too-large", f"the chunk is larger than {context.settings.max_body_bytes} bytes")
    session = context.shared_memory.session(caller.tenant.pool, session_id)
    with context.uploads.taking(caller.tenant.name, nbytes):
        async with context.transfers.turn():
            return await context.run(lambda: context.shared_memory.take(session, offset, nbytes, context.buffers))


def _token_ids(blob: EncodedChunk) -> Sequence[int]:
    """Those of the chunk, for events; none if it has no row of them."""
    tokens = blob.tensors.get("token_ids")
    if tokens is None or tokens.ndim != 1 or tokens.dtype != torch.int64:
        return ()
    return array("q", tokens.numpy().tobytes())  # a fourth of a list of integers


def _located(context: ServiceContext, key: ChunkKey) -> str | None:
    with context.store.use() as kvstore:
        return kvstore.locate(key)


def _namespace(caller: Caller, namespace: str) -> str:
    try:
        text = namespace.encode("latin-1").decode()  # headers are bytes; names are UTF-8
        return store_namespace(caller.tenant.pool, text)
    except (UnicodeError, ValueError) as exc:
        raise ProblemError(422, "invalid", f"KVLoom-Namespace is no name: {exc}") from exc


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


def _span(part: str | None, unit: str, length: int) -> tuple[int, int] | None:
    """`[start, stop)` of a range in this unit; None for none, or for one that is not understood and so ignored.

    Raises
    ------
    ValueError : it lies beyond the end.
    """
    match = None if part is None else _RANGE.fullmatch(part.strip())
    if match is None or match[1] != unit or not (match[2] or match[3]):
        return None
    if not match[2]:
        start, stop = max(length - int(match[3]), 0), length
    else:
        start, stop = int(match[2]), min(int(match[3]) + 1 if match[3] else length, length)
        if match[3] and int(match[3]) < start:
            return None
    if not start < stop:
        raise ValueError(f"range is {part}; the chunk has {length} {unit}")
    return start, stop


def _matches(header: str, etag: str) -> bool:
    return header.strip() == "*" or etag in [each.strip().removeprefix("W/") for each in header.split(",")]


def _check_digest(header: str, data: memoryview) -> None:
    found = _DIGEST.findall(header)
    if not found:
        raise ProblemError(400, "digest", "Content-Digest names no algorithm that is known: sha-256, sha-512")
    for name, value in found:
        true = hashlib.new(name.replace("-", ""), data).digest()
        if base64.b64encode(true).decode() != value:
            raise ProblemError(400, "digest", f"the body is not what Content-Digest says ({name})")


def _digest(pieces: list[memoryview]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return f"sha-256=:{base64.b64encode(digest.digest()).decode()}:"
