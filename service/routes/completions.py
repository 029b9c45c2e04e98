"""OpenAI's chat completions and completions, answered by the embedded engine, over documents if a request has some."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import JSONResponse, Response, StreamingResponse

from ..context import Caller, Context, Reader, ServiceContext
from ..documents.engine import URGENT
from ..problems import ProblemError, problem_of
from .documents import DocumentRef, document_texts, finished

if TYPE_CHECKING:  # a service without an embedded engine has no transformers
    from ...connectors.hf.answering import Generation, Prompt

router = APIRouter(tags=["OpenAI-compatible"])


class StreamOptions(BaseModel):
    include_usage: bool = False


class CompletionOptions(BaseModel):
    """What both kinds have in common. Fields of OpenAI's that are not listed are ignored; `documents` is kvloom's."""

    model_config = ConfigDict(extra="ignore")
    model: str = Field(max_length=64)
    documents: list[DocumentRef | str] = Field(default_factory=list, max_length=256)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**53), le=2**53)
    stop: (
        Annotated[str, Field(min_length=1, max_length=100)]
        | list[Annotated[str, Field(min_length=1, max_length=100)]]
        | None
    ) = None
    n: Literal[1] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None


class ContentPart(BaseModel):
    """Text is the only kind."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ContentPart]


class ChatRequest(CompletionOptions):
    messages: list[Message] = Field(min_length=1, max_length=1000)
    max_completion_tokens: int | None = Field(None, ge=1)


class CompletionRequest(CompletionOptions):
    prompt: str = Field(min_length=1)


class ModelInfo(BaseModel):
    id: str
    object: str = "model"
    created: int = 0
    owned_by: str = "kvloom"


class ModelList(BaseModel):
    object: str = "list"
    data: list[ModelInfo]


@router.get("/v1/models", summary="Models of the embedded engine")
async def list_models(context: Context, caller: Reader) -> ModelList:
    """By the names that the operator gave them."""
    del caller
    return ModelList(data=[ModelInfo(id=name) for name in context.engine.models])


@router.post("/v1/chat/completions", summary="Chat completion", response_class=Response, responses={200: {}})
async def chat(body: ChatRequest, request: Request, context: Context, caller: Reader) -> Response:
    """As OpenAI's, greedy unless a temperature is given. Documents stand in front of the first user message."""
    model = context.engine.name_of(body.model)
    messages = [
        {
            "role": "system" if each.role == "developer" else each.role,
            "content": each.content if isinstance(each.content, str) else "".join(part.text for part in each.content),
        }
        for each in body.messages
    ]
    has_documents = bool(body.documents)
    if body.max_completion_tokens is not None:
        body.max_tokens = body.max_completion_tokens

    def prompt() -> Prompt:
        from ...connectors.hf.answering import chat_prompt

        tokenizer = context.engine.connector(model, caller.tenant.pool).tokenizer
        return chat_prompt(tokenizer, messages, has_documents=has_documents)

    made = asyncio.wrap_future(context.engine.submit(prompt, urgency=URGENT))
    return await _answer(body, await made, request, context, caller, model, "chat.completion")


@router.post("/v1/completions", summary="Completion", response_class=Response, responses={200: {}})
async def complete(body: CompletionRequest, request: Request, context: Context, caller: Reader) -> Response:
    """As OpenAI's, greedy unless a temperature is given. Documents stand in front of the prompt."""
    model = context.engine.name_of(body.model)
    from ...connectors.hf.answering import Prompt

    return await _answer(body, Prompt(body.prompt), request, context, caller, model, "text_completion")


async def _answer(
    body: CompletionOptions,
    prompt: Prompt,
    request: Request,
    context: ServiceContext,
    caller: Caller,
    model: str,
    kind: str,
) -> Response:
    refs = [DocumentRef(id=None, text=each) if isinstance(each, str) else each for each in body.documents]
    texts = await context.run(lambda: document_texts(context, caller, model, refs))
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    from ...connectors.hf.answering import Generation, Sampling

    sampling = Sampling(
        min(body.max_tokens or context.settings.max_new_tokens, context.settings.max_new_tokens),
        body.temperature or 0.0,
        body.top_p or 1.0,
        body.seed,
        stop,
    )
    generation = Generation(partial(context.engine.connector, model, caller.tenant.pool), texts, prompt, sampling)
    frame = _Frame(kind, model, generation)
    if body.stream:
        events = _stream(context, generation, frame, bool(body.stream_options and body.stream_options.include_usage))
        return StreamingResponse(events, media_type="text/event-stream")
    text = await finished(request, context.engine.submit(generation.run, urgency=URGENT), generation)
    return JSONResponse(frame.whole(text))


async def _stream(
    context: ServiceContext, generation: Generation, frame: _Frame, include_usage: bool
) -> AsyncIterator[str]:
    loop = asyncio.get_running_loop()
    pieces: asyncio.Queue[str | None] = asyncio.Queue()

    def tell(piece: str | None) -> None:
        loop.call_soon_threadsafe(pieces.put_nowait, piece)

    generation.on_text = tell
    future = context.engine.submit(generation.run, urgency=URGENT)
    future.add_done_callback(lambda _: tell(None))
    try:
        yield _event(frame.start())
        while (piece := await pieces.get()) is not None:
            yield _event(frame.piece(piece))
        error = future.exception()
        if error is not None:
            problem = problem_of(error) if isinstance(error, Exception) else ProblemError(500, "internal", "failed")
            yield _event({"error": {"message": problem.detail, "type": problem.kind, "code": problem.status_code}})
            return
        yield _event(frame.end())
        if include_usage:
            yield _event(frame.usage_only())
        yield "data: [DONE]\n\n"
    finally:
        generation.cancel()
        future.cancel()


class _Frame:
    """The JSON around an answer, whole or piece by piece."""

    def __init__(self, kind: str, model: str, generation: Generation) -> None:
        self._is_chat = kind == "chat.completion"
        self._kind = kind
        self._model = model
        self._generation = generation
        self._id = ("chatcmpl-" if self._is_chat else "cmpl-") + secrets.token_hex(12)
        self._created = int(time.time())

    def whole(self, text: str) -> dict[str, Any]:
        shown = {"message": {"role": "assistant", "content": text}} if self._is_chat else {"text": text}
        return {**self._common(self._kind), "choices": [self._choice(shown, self._finish())], "usage": self._usage()}

    def start(self) -> dict[str, Any]:
        return self._chunk({"role": "assistant", "content": ""}, None)

    def piece(self, text: str) -> dict[str, Any]:
        return self._chunk({"content": text}, None)

    def end(self) -> dict[str, Any]:
        return self._chunk({}, self._finish())

    def usage_only(self) -> dict[str, Any]:
        return {**self._common(self._chunk_kind), "choices": [], "usage": self._usage()}

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self._is_chat else self._kind

    def _chunk(self, delta: dict[str, str], finish: str | None) -> dict[str, Any]:
        shown: dict[str, Any] = {"delta": delta} if self._is_chat else {"text": delta.get("content", "")}
        return {**self._common(self._chunk_kind), "choices": [self._choice(shown, finish)]}

    def _choice(self, shown: dict[str, Any], finish: str | None) -> dict[str, Any]:
        return {"index": 0, **shown, "logprobs": None, "finish_reason": finish}

    def _common(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _finish(self) -> str:
        return "length" if self._generation.finish == "length" else "stop"

    def _usage(self) -> dict[str, Any]:
        usage = self._generation.usage
        return {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.reused_tokens},
            "kvloom": {
                "reused_tokens": usage.reused_tokens,
                "recomputed_tokens": usage.recomputed_tokens,
                "saved_s": round(usage.saved_s, 6),
                "prompt_s": round(usage.prompt_s, 6),
            },
        }


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"
