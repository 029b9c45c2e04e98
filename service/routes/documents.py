"""Documents for the embedded engine: register, precompute, list, delete, compose."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Path, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response, StreamingResponse

from ..context import Caller, Context, Reader, ServiceContext, Writer
from ..documents.engine import BACKGROUND, URGENT
from ..documents.registry import StoredDocument
from ..jobs import Job
from ..problems import ProblemError, not_found
from .pins import IdempotencyKey, JobInfo

if TYPE_CHECKING:  # a service without an embedded engine has no transformers
    from ...connectors.hf.answering import Generation

router = APIRouter(tags=["documents"])

DocumentId = Annotated[str, Path(pattern="^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
JobId = Annotated[str, Path(pattern="^[0-9a-f]{32}$")]
ModelName = Annotated[str | None, Query(max_length=64)]
_PROGRESS_INTERVAL_S = 15.0


class NewDocument(BaseModel):
    """A text, and the name under which the tenant finds it again; None for one made of the text."""

    model_config = ConfigDict(extra="forbid")
    text: str = Field(min_length=1)
    id: str | None = Field(None, pattern="^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")


class Registration(BaseModel):
    """Documents for one model; None for the only model."""

    model_config = ConfigDict(extra="forbid")
    documents: list[NewDocument] = Field(min_length=1, max_length=1000)
    model: str | None = Field(None, max_length=64)
    precompute: bool = True


class DocumentInfo(BaseModel):
    """A document. `state` is registered, ready (precomputed, though it may have been evicted since) or failed."""

    id: str
    model: str
    tokens: int
    state: str
    error: str
    created_at_s: float
    uses: int
    used_at_s: float
    tiers: list[str]


class Registered(BaseModel):
    """The documents, and the job that precomputes them."""

    documents: list[DocumentInfo]
    job: JobInfo | None


class DocumentList(BaseModel):
    """A page of documents, by ID; `next` continues it."""

    documents: list[DocumentInfo]
    next: str | None


class DocumentRef(BaseModel):
    """A registered document, or a text."""

    model_config = ConfigDict(extra="forbid")
    id: str | None = Field(None, max_length=64)
    text: str | None = None


class Composition(BaseModel):
    """Documents in order, and what follows them. With `answer` false: what another engine needs to load them."""

    model_config = ConfigDict(extra="forbid")
    documents: list[DocumentRef] = Field(min_length=1, max_length=256)
    question: str = Field(min_length=1)
    model: str | None = Field(None, max_length=64)
    max_tokens: int = Field(64, ge=1)
    answer: bool = True


class UsageInfo(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    reused_tokens: int
    recomputed_tokens: int
    saved_s: float
    prompt_s: float


class LoadInfo(BaseModel):
    """What an engine must load: the prompt's tokens, where documents lie in it, their keys, and vLLM's parameters."""

    prompt_token_ids: list[int]
    spans: list[tuple[int, int]]
    keys: list[str]
    kv_transfer_params: dict[str, Any]


class Composed(BaseModel):
    answer: str | None
    finish_reason: str | None
    usage: UsageInfo | None
    load: LoadInfo | None


@router.post("/v1/documents", status_code=202, summary="Register documents")
async def register(
    body: Registration, context: Context, caller: Writer, idempotency_key: IdempotencyKey = None
) -> Registered:
    """Equal texts are one document. Precomputing goes on in the background; follow the job."""
    model = context.engine.name_of(body.model)
    pool = caller.tenant.pool
    if context.documents.count(pool) + len(body.documents) > context.settings.max_documents:
        raise ProblemError(507, "full", f"at most {context.settings.max_documents} documents may be registered")

    def encode() -> list[StoredDocument]:
        connector = context.engine.connector(model, pool)
        found = {}
        for number, each in enumerate(body.documents):
            try:
                ids = connector.encode_document(each.text)
            except (TypeError, ValueError) as exc:
                raise ProblemError(422, "invalid", f"documents[{number}]: {exc}") from exc
            name = each.id or "doc-" + hashlib.blake2b(each.text.encode(), digest_size=16).hexdigest()
            chunk = caller.keys.to_store(connector.key_of(ids))
            found[name] = StoredDocument(pool, model, name, each.text, len(ids), chunk, "registered")
        context.documents.add(found.values())
        return list(found.values())

    def work() -> Registered:
        documents = context.engine.submit(encode, urgency=URGENT).result()
        job = precompute(context, documents) if body.precompute else None
        told = [_info(context, each) for each in documents]
        return Registered(documents=told, job=None if job is None else JobInfo(**job.as_json()))

    return await context.once(caller, "documents", idempotency_key, body, work, is_slow=True)


@router.get("/v1/documents", summary="List documents")
async def list_documents(
    context: Context,
    caller: Reader,
    model: ModelName = None,
    after: Annotated[str, Query(max_length=64)] = "",
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> DocumentList:
    """Of the tenant, by ID."""

    def look_up() -> DocumentList:
        found = context.documents.all(caller.tenant.pool, model, after=after, limit=limit)
        told = [_info(context, each) for each in found]
        return DocumentList(documents=told, next=found[-1].id if len(found) == limit else None)

    return await context.run(look_up)


@router.get("/v1/documents/{document_id}", summary="A document")
async def get_document(
    document_id: DocumentId, context: Context, caller: Reader, model: ModelName = None
) -> DocumentInfo:
    """Its state, and which tiers hold its KV."""
    return await context.run(lambda: _info(context, _document(context, caller, document_id, model)))


@router.delete("/v1/documents/{document_id}", status_code=204, summary="Delete a document")
async def delete_document(
    document_id: DocumentId, context: Context, caller: Writer, model: ModelName = None
) -> Response:
    """With its KV, unless another document has the same text."""

    def delete() -> None:
        document = _document(context, caller, document_id, model)
        context.documents.delete(document)
        if not context.documents.is_shared(document):
            with context.store.use() as store:
                store.delete(document.chunk)  # type: ignore[arg-type]

    await context.run(delete)
    return Response(status_code=204)


@router.get("/v1/jobs/{job_id}", summary="How far a job is")
async def get_job(job_id: JobId, context: Context, caller: Reader) -> JobInfo:
    """Of any kind."""
    return JobInfo(**context.jobs.get(caller.tenant.pool, job_id).as_json())


@router.delete("/v1/jobs/{job_id}", status_code=204, summary="Cancel a job")
async def cancel_job(job_id: JobId, context: Context, caller: Writer) -> Response:
    """After the document that it is at."""
    context.jobs.get(caller.tenant.pool, job_id).cancel()
    return Response(status_code=204)


@router.get(
    "/v1/jobs/{job_id}/events",
    summary="Follow a job",
    response_class=Response,
    responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
)
async def follow_job(job_id: JobId, context: Context, caller: Reader) -> Response:
    """Server-sent events: the job as JSON whenever it changes, until it ends."""
    job = context.jobs.get(caller.tenant.pool, job_id)

    async def events() -> AsyncIterator[str]:
        version = -1
        while True:
            known, version = version, job.version
            if version != known:
                yield f"event: {job.state}\ndata: {json.dumps(job.as_json())}\n\n"
            else:
                yield ": still at it\n\n"
            if job.state != "running" or context.is_draining:
                return
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(
                context.followers, partial(context.jobs.wait, job, version, _PROGRESS_INTERVAL_S)
            )

    return StreamingResponse(events(), media_type="text/event-stream")


@router.post("/v1/compose", summary="Answer over documents, or say what an engine must load")
async def compose(body: Composition, request: Request, context: Context, caller: Reader) -> Composed:
    """The documents are fused in this order; what is not stored is computed. Greedy."""
    model = context.engine.name_of(body.model)
    texts = await context.run(lambda: document_texts(context, caller, model, body.documents))
    pool = caller.tenant.pool
    if not body.answer:
        load = context.engine.submit(
            lambda: _load_info(context.engine.connector(model, pool), texts, body.question), urgency=URGENT
        )
        return Composed(answer=None, finish_reason=None, usage=None, load=await finished(request, load, None))
    from ...connectors.hf.answering import Generation, Prompt, Sampling

    generation = Generation(
        partial(context.engine.connector, model, pool),
        texts,
        Prompt(body.question),
        Sampling(min(body.max_tokens, context.settings.max_new_tokens)),
    )
    answer = await finished(request, context.engine.submit(generation.run, urgency=URGENT), generation)
    return Composed(answer=answer, finish_reason=generation.finish, usage=usage_info(generation), load=None)


def document_texts(context: ServiceContext, caller: Caller, model: str, given: list[DocumentRef]) -> list[str]:
    """The texts of documents that a request names, or gives."""
    texts = []
    for number, each in enumerate(given):
        if (each.id is None) == (each.text is None):
            raise ProblemError(422, "invalid", f"documents[{number}] needs either id or text")
        if each.id is None:
            texts.append(each.text or "")
            continue
        document = context.documents.get(caller.tenant.pool, model, each.id)
        if document is None:
            raise not_found(f"document {each.id!r}")
        context.documents.used(document)
        texts.append(document.text)
    return texts


async def finished(request: Request, future: Future[Any], generation: Generation | None) -> Any:
    """The result of the engine; cancelled if the client goes away meanwhile."""
    waiting = asyncio.wrap_future(future)
    try:
        while True:
            done, _ = await asyncio.wait({waiting}, timeout=0.5)
            if done:
                return waiting.result()
            if await request.is_disconnected():
                raise ProblemError(503, "gone", "the client went away")
    except ValueError as exc:
        raise ProblemError(422, "invalid", str(exc)) from exc
    finally:
        if generation is not None:
            generation.cancel()
        waiting.cancel()


def usage_info(generation: Generation) -> UsageInfo:
    usage = generation.usage
    return UsageInfo(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        reused_tokens=usage.reused_tokens,
        recomputed_tokens=usage.recomputed_tokens,
        saved_s=round(usage.saved_s, 6),
        prompt_s=round(usage.prompt_s, 6),
    )


def precompute(context: ServiceContext, documents: list[StoredDocument]) -> Job:
    """Starts a job that precomputes documents, one at a time, so that questions come in between."""
    cancelled = False

    def cancel() -> None:
        nonlocal cancelled
        cancelled = True

    job = context.jobs.add(documents[0].pool, "precompute", cancel, total=len(documents), done=0, failed=0, computed=0)

    def work() -> None:
        failed = computed = 0
        for done, document in enumerate(documents, 1):
            if cancelled or context.is_draining:
                context.jobs.update(job, "cancelled")
                return
            try:
                found = context.engine.submit(partial(_precompute_one, context, document), urgency=BACKGROUND).result()
                computed += found.computed
                context.documents.set_state(document, "ready")
            except Exception as exc:  # noqa: BLE001  the job and the document say so
                failed += 1
                context.documents.set_state(document, "failed", type(exc).__name__)
            context.jobs.update(job, done=done, failed=failed, computed=computed)
        context.jobs.update(job, "failed" if failed == len(documents) else "finished")

    context.followers.submit(work)
    return job


def _precompute_one(context: ServiceContext, document: StoredDocument) -> Any:
    return context.engine.connector(document.model, document.pool).precompute([document.text])


def _load_info(connector: Any, texts: list[str], question: str) -> LoadInfo:
    ids = list(connector.lead_ids)
    spans, keys = [], []
    for text in texts:
        tokens = connector.encode_document(text)
        spans.append((len(ids), len(ids) + len(tokens)))
        keys.append(connector.key_of(tokens).hex())
        ids += tokens
    ids += connector.encode_question(question)
    return LoadInfo(
        prompt_token_ids=ids,
        spans=spans,
        keys=keys,
        kv_transfer_params={"kvloom": {"documents": [list(span) for span in spans]}},
    )


def _document(context: ServiceContext, caller: Caller, document_id: str, model: str | None) -> StoredDocument:
    found = context.documents.get(caller.tenant.pool, context.engine.name_of(model), document_id)
    if found is None:
        raise not_found("the document")
    return found


def _info(context: ServiceContext, document: StoredDocument) -> DocumentInfo:
    with context.store.use() as store:
        (explained,) = store.explain([document.chunk])  # type: ignore[list-item]
    return DocumentInfo(
        id=document.id,
        model=document.model,
        tokens=document.tokens,
        state=document.state,
        error=document.error,
        created_at_s=document.created_at_s,
        uses=document.uses,
        used_at_s=document.used_at_s,
        tiers=list(explained.tiers),
    )
