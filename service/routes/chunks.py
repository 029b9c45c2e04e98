"""Chunks: put, get, look at, delete."""

from __future__ import annotations

import base64
import hashlib
import re
import time
from array import array
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from fastapi import APIRouter, Header, Path, Request
from pydantic import BaseModel
from starlette.responses import Response

from ...core import ChunkInfo, ChunkKey, EncodedChunk
from ..access.tenants import store_namespace
from ..chunk_index import listed_bytes
from ..context import Caller, Context, Reader, ServiceContext, Writer, parse_key
from ..problems import ProblemError, not_found
from ..transfer.chunk_bodies import ContainerResponse, received, taken
from ..transfer.containers import MEDIA_TYPE, Container, layers_container, num_layers

router = APIRouter(tags=["chunks"])

_KEY = "^[0-9a-f]{64}$"
Key = Annotated[str, Path(pattern=_KEY, description="64 lower-case hexadecimal digits.")]
SessionId = Annotated[
    str | None,
    Header(alias="KVLoom-Shared-Memory", pattern="^[0-9a-f]{32}$", description="Session of shared memory to use."),
]
LEASE_MEDIA_TYPE = "application/vnd.kvloom.lease+json"
_RANGE = re.compile(r"(bytes|layers)=(\d*)-(\d*)")
_DIGEST = re.compile(r"(sha-256|sha-512)=:([A-Za-z0-9+/=]+):")
_BODY: dict[str, Any] = {"content": {MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}}}


class LeaseInfo(BaseModel):
    """Where a container lies until the client gives the lease back: in the session's memory, or in its pool's."""

    lease: int
    offset: int
    nbytes: int
    memory: Literal["session", "pool"]


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
    known = context.index.get(stored_key)
    existed = known is not None and bool(known.tiers)
    if if_none_match is not None:
        existed = await context.run(lambda: _located(context, stored_key)) is not None
    if if_none_match is not None and existed:
        raise ProblemError(412, "exists", "the chunk is stored already")
    if session_id is not None and shared_range is not None:
        incoming = await taken(context, caller, session_id, shared_range)
    else:
        incoming = await received(request, context, caller)
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

    at_hand = None if part is not None else _at_hand(context, stored_key)
    if at_hand is not None:
        container, layers = at_hand, 0
        if known is not None:
            known.reads += 1
    else:
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
        lease = context.shared_memory.lend_in_place(session, container)
        if lease is None:
            async with context.transfers.turn():
                lease = await context.run(lambda: context.shared_memory.lend(session, container))
        if lease is not None:
            told = LeaseInfo(lease=lease.id, offset=lease.offset, nbytes=lease.nbytes, memory=lease.memory)
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


def _token_ids(blob: EncodedChunk) -> Sequence[int]:
    """Those of the chunk, for events; none if it has no row of them."""
    tokens = blob.tensors.get("token_ids")
    if tokens is None or tokens.ndim != 1 or tokens.dtype != torch.int64:
        return ()
    return array("q", tokens.numpy().tobytes())  # a fourth of a list of integers


def _at_hand(context: ServiceContext, key: ChunkKey) -> Container | None:
    """A whole chunk that nothing has to be waited for, and nothing summed."""
    blob = context.store.get_at_hand(key)
    return None if blob is None else context.containers.known(key, blob)


def _located(context: ServiceContext, key: ChunkKey) -> str | None:
    with context.store.use() as kvstore:
        return kvstore.locate(key)


def _namespace(caller: Caller, namespace: str) -> str:
    try:
        text = namespace.encode("latin-1").decode()  # headers are bytes; names are UTF-8
        return store_namespace(caller.tenant.pool, text)
    except (UnicodeError, ValueError) as exc:
        raise ProblemError(422, "invalid", f"KVLoom-Namespace is no name: {exc}") from exc


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
