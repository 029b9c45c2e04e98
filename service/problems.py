"""Errors as `application/problem+json` (RFC 9457): what went wrong and what to do, and nothing about the server.

Each document has a member `error` as well, where OpenAI's clients look for what to show.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ..errors import (
    ChunkCorruptError,
    CodecError,
    KVLoomError,
    SpecMismatchError,
    TierFullError,
    TierTimeoutError,
    TierUnavailableError,
    UncertifiedError,
)

_LOG = logging.getLogger("kvloom.service")
MEDIA_TYPE = "application/problem+json"


class ProblemError(HTTPException):
    """Ends a request with a problem.

    Parameters
    ----------
    kind : last part of the problem's type, such as `not-found`.
    extra : further members of the problem.
    """

    def __init__(
        self, status: int, kind: str, detail: str, *, headers: Mapping[str, str] | None = None, **extra: Any
    ) -> None:
        super().__init__(status, detail, dict(headers or {}))
        self.kind = kind
        self.extra = extra

    def response(self) -> Response:
        title = HTTPStatus(self.status_code).phrase
        fields = {"type": f"urn:kvloom:problem:{self.kind}", "title": title, "status": self.status_code}
        openai = {"error": {"message": self.detail, "type": self.kind, "code": str(self.status_code)}}
        body = json.dumps({**fields, "detail": self.detail, **self.extra, **openai})
        return Response(body, self.status_code, self.headers, media_type=MEDIA_TYPE)


PROBLEM_SCHEMA = {
    "type": "object",
    "required": ["type", "title", "status", "detail"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
    },
}


def not_found(what: str) -> ProblemError:
    return ProblemError(404, "not-found", f"{what} is not here")


def problem_of(error: Exception) -> ProblemError:
    """What a client is told of an error. What no client can have caused is told without its text."""
    match error:
        case ProblemError():
            return error
        case TierFullError():
            return ProblemError(507, "full", "no tier has room for the chunk; free some, or raise the quota")
        case TierTimeoutError() | TierUnavailableError():
            return ProblemError(
                503, "unavailable", "the tiers do not answer now; try again later", headers={"Retry-After": "1"}
            )
        case ChunkCorruptError():
            return ProblemError(422, "corrupt", f"the container is damaged: {error}")
        case SpecMismatchError() | CodecError() | UncertifiedError():
            return ProblemError(422, "unusable", str(error))
        case KVLoomError():
            return ProblemError(500, "internal", "the service failed; its log says why")
        case ValueError():
            return ProblemError(422, "invalid", str(error))
        case _:
            return ProblemError(500, "internal", "the service failed; its log says why")


def install(app: FastAPI) -> None:
    """Every error of the application becomes a problem."""

    async def invalid(_: Request, exc: Exception) -> Response:
        errors = exc.errors() if isinstance(exc, RequestValidationError) else []
        found = [{"at": ".".join(map(str, each["loc"])), "problem": each["msg"]} for each in errors[:20]]
        return ProblemError(422, "invalid", "the request is not as described; see errors", errors=found).response()

    async def plain(_: Request, exc: Exception) -> Response:
        if isinstance(exc, ProblemError):
            return exc.response()
        status = exc.status_code if isinstance(exc, HTTPException) else 500
        headers = getattr(exc, "headers", None)
        kind = {404: "not-found", 405: "method-not-allowed"}.get(status, "refused")
        detail = {404: "there is no such route", 405: "the route does not know this method"}.get(status)
        return ProblemError(status, kind, detail or HTTPStatus(status).phrase, headers=headers).response()

    async def own(_: Request, exc: Exception) -> Response:
        return problem_of(exc).response()

    async def unexpected(request: Request, exc: Exception) -> Response:
        _LOG.error("request %s failed", request.scope.get("request_id", "?"), exc_info=exc)
        return problem_of(RuntimeError()).response()

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, plain)
    app.add_exception_handler(KVLoomError, own)
    app.add_exception_handler(Exception, unexpected)
