"""A computation that tells its result piece by piece, as an iterator."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")
_END = object()


class LeftError(Exception):
    """Nobody reads the pieces any more."""


def pieces_of(run: Callable[[Callable[[str], None]], T]) -> Iterator[str | T]:
    """What `run` tells piece by piece, computed in a thread, and at the end its result.

    Leaving the loop early ends the computation at the next piece.
    """
    pieces: queue.Queue[Any] = queue.Queue()
    left = threading.Event()

    def tell(piece: str) -> None:
        if left.is_set():
            raise LeftError
        pieces.put(piece)

    def work() -> None:
        try:
            pieces.put((_END, run(tell)))
        except BaseException as error:  # noqa: BLE001  raised where the pieces are read
            pieces.put(error)

    thread = threading.Thread(target=work, name="kvloom-answer", daemon=True)
    thread.start()
    try:
        while True:
            piece = pieces.get()
            if isinstance(piece, BaseException):
                raise piece
            if isinstance(piece, tuple):
                yield piece[1]
                return
            yield piece
    finally:
        left.set()
        thread.join()


async def pieces_async(run: Callable[[Callable[[str], None]], T]) -> AsyncIterator[str | T]:
    """`pieces_of` without blocking the event loop."""
    loop = asyncio.get_running_loop()
    iterator = pieces_of(run)
    end = object()
    try:
        while (piece := await loop.run_in_executor(None, next, iterator, end)) is not end:
            yield piece  # type: ignore[misc]  # `end` is never given on
    finally:
        await loop.run_in_executor(None, iterator.close)  # type: ignore[attr-defined]  # a generator
