"""Frames between the store's process and a worker, on a socket pair that no other process can reach.

A frame is its kind, the number of its request (0 for none), a JSON value and bytes. A request is an ASGI exchange: the
worker parses HTTP and calls nothing but the other side, which runs the application. The store's process never waits
for a worker to read: at most one piece of a body of each request is on its way in either direction.
"""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Callable
from enum import IntEnum
from typing import Any, TypeAlias

_PREFIX = struct.Struct("<BIII")  # kind, request, bytes of the JSON, bytes behind it
INLINE_BYTES = 1 << 16  # of a body that travels in frames rather than through shared memory


class Kind(IntEnum):
    """What a frame says. `w` from a worker to the store's process, `s` the other way."""

    READY = 1  # w: accepts connections
    REQUEST = 2  # w: the ASGI scope; bytes of the whole body if it is short and has come already
    BODY = 3  # w: an ASGI message, as asked for by ASK.  s: a piece of an answer, `more` and `ack`
    TAKEN = 4  # w: the client has taken the piece that wanted an `ack`
    DONE = 5  # w: a FILL or SEND has ended: its `result` and the bytes moved
    PONG = 6  # w
    START = 7  # s: status and headers of the answer
    ASK = 8  # s: the next ASGI message is wanted
    FILL = 9  # s: receive the body into a range of the shared memory
    SEND = 10  # s: send ranges of the shared memory, and bytes, as the next part of the answer
    ABORT = 11  # s: the answer ends here, incomplete
    DRAIN = 12  # s: accept nothing more, let requests end, and exit
    PING = 13  # s


OnFrame: TypeAlias = Callable[[Kind, int, Any, bytes], None]


class Channel(asyncio.Protocol):
    """One end. For the event loop's thread alone.

    Parameters
    ----------
    on_frame : called for each frame in order.
    on_lost : called once, when the other end is gone.
    """

    def __init__(self, on_frame: OnFrame, on_lost: Callable[[], None]) -> None:
        self._on_frame, self._on_lost = on_frame, on_lost
        self._transport: asyncio.Transport | None = None
        self._early = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self._transport = None
        self._on_lost()

    def data_received(self, data: bytes) -> None:
        early = self._early
        early += data
        at = 0
        while len(early) - at >= _PREFIX.size:
            kind, request, head_bytes, data_bytes = _PREFIX.unpack_from(early, at)
            begin = at + _PREFIX.size
            stop = begin + head_bytes + data_bytes
            if stop > len(early):
                break
            head = json.loads(early[begin : begin + head_bytes]) if head_bytes else None
            rest = bytes(memoryview(early)[begin + head_bytes : stop])
            at = stop
            self._on_frame(Kind(kind), request, head, rest)
        del early[:at]

    def send(self, *frames: bytes) -> None:
        """Sends frames; nothing if the other end is gone."""
        if self._transport is not None:
            self._transport.write(frames[0] if len(frames) == 1 else b"".join(frames))

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


def frame(kind: Kind, request: int = 0, head: object = None, data: bytes | memoryview = b"") -> bytes:
    """The bytes of a frame."""
    text = b"" if head is None else json.dumps(head, separators=(",", ":")).encode()
    return b"".join((_PREFIX.pack(kind, request, len(text), len(data)), text, data))


def pairs_as_text(headers: list[tuple[bytes, bytes]]) -> list[list[str]]:
    """Headers as JSON can hold them."""
    return [[name.decode("latin-1"), value.decode("latin-1")] for name, value in headers]


def pairs_as_bytes(headers: list[list[str]]) -> list[tuple[bytes, bytes]]:
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
