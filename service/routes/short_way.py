"""Gets and puts of whole chunks without the framework, which takes longer over a request than moving a megabyte does.

A request that has nothing unusual about it calls the very functions of `chunks` with the very arguments that the
framework would have given them. Every other one goes the framework's way, which describes and checks it all.
"""

from __future__ import annotations

import math
import re
from typing import Any

from starlette.datastructures import URLPath
from starlette.requests import Request
from starlette.routing import BaseRoute, Match, NoMatchFound
from starlette.types import Receive, Scope, Send

from ..context import ServiceContext, caller_of
from .chunks import get_chunk, put_chunk

_PREFIX = "/v1/chunks/"
_KEY = re.compile("[0-9a-f]{64}")
_SESSION = re.compile("[0-9a-f]{32}")
_RANGE = re.compile("[0-9]{1,15}-[0-9]{1,15}")
_NUMBER = re.compile(r"[0-9]{1,8}(\.[0-9]{1,17})?(e-[0-9]{1,2})?")
_MOST_RECOMPUTE_S = 1e9
_MOST_NAMESPACE = 180
_UNUSUAL = {
    "GET": frozenset({b"if-none-match", b"if-range", b"range", b"want-content-digest"}),
    "PUT": frozenset({b"if-none-match", b"content-digest", b"kvloom-ttl", b"kvloom-expires-at"}),
}


class ShortWay(BaseRoute):
    """A route before all others, which takes what it can answer and leaves the rest."""

    path = "/v1/chunks/{key}"

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        if scope["type"] == "http" and scope["path"].startswith(_PREFIX) and not scope["query_string"]:
            arguments = _arguments(scope)
            if arguments is not None:
                return Match.FULL, {"route": self, "kvloom.arguments": arguments}
        return Match.NONE, {}

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        context: ServiceContext = scope["app"].state.context
        function, needed = (get_chunk, "read") if scope["method"] == "GET" else (put_chunk, "write")
        response = await function(
            request=Request(scope, receive),
            context=context,
            caller=caller_of(scope, needed),
            **scope["kvloom.arguments"],
        )
        await response(scope, receive, send)

    def url_path_for(self, name: str, /, **path_params: Any) -> URLPath:
        raise NoMatchFound(name, path_params)


def _arguments(scope: Scope) -> dict[str, Any] | None:
    """Those of the function that answers the request; None if the framework has to read them."""
    unusual = _UNUSUAL.get(scope["method"])
    key = scope["path"][len(_PREFIX) :]
    if unusual is None or not _KEY.fullmatch(key):
        return None
    found: dict[str, Any] = {"key": key}
    for name, value in scope["headers"]:
        if name in unusual:
            return None
        reader = _READERS.get(name)
        if reader is not None:
            argument, pattern = reader
            text = value.decode("latin-1")
            if argument in found or not pattern.fullmatch(text):
                return None
            found[argument] = text
    if scope["method"] == "GET":
        return {name: found[name] for name in ("key", "session_id") if name in found}
    if "recompute_s" in found:
        found["recompute_s"] = float(found["recompute_s"])
        if not math.isfinite(found["recompute_s"]) or found["recompute_s"] > _MOST_RECOMPUTE_S:
            return None
    return found


_READERS = {
    b"kvloom-shared-memory": ("session_id", _SESSION),
    b"kvloom-range": ("shared_range", _RANGE),
    b"kvloom-after": ("after", _KEY),
    b"kvloom-recompute-seconds": ("recompute_s", _NUMBER),
    b"kvloom-namespace": ("namespace", re.compile(f"[!-~]{{1,{_MOST_NAMESPACE}}}")),
}
