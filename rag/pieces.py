"""An answer as an iterator over its pieces, plain and asynchronous."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Generator
from concurrent.futures import ThreadPoolExecutor

from ..connectors.hf.answering import Generation


def pieces_of(generation: Generation, run: Callable[[Generation], str]) -> Generator[str, None, None]:
    """Pieces of an answer as they come; together they are the text that `run` gives.

    It is computed in a thread. Leaving the loop early cancels it: it ends at the next token.

    Parameters
    ----------
    run : computes the answer of the generation, whose `on_text` is set here.
    """
    pieces: queue.Queue[str | BaseException | None] = queue.Queue()
    generation.on_text = pieces.put

    def work() -> None:
        try:
            run(generation)
        except BaseException as error:  # noqa: BLE001  raised where the pieces are read
            pieces.put(error)
        else:
            pieces.put(None)

    thread = threading.Thread(target=work, name="kvloom-answer", daemon=True)
    thread.start()
    try:
        while (piece := pieces.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            yield piece
    finally:
        generation.cancel()
        thread.join()


async def pieces_async(generation: Generation, run: Callable[[Generation], str]) -> AsyncIterator[str]:
    """`pieces_of` without blocking the event loop."""
    loop = asyncio.get_running_loop()
    pieces = pieces_of(generation, run)
    # One thread: a cancelled reader leaves a call for the next piece behind, which must end before the iterator does.
    with ThreadPoolExecutor(1, thread_name_prefix="kvloom-pieces") as reader:
        try:
            while (piece := await loop.run_in_executor(reader, next, pieces, None)) is not None:
                yield piece
        finally:
            generation.cancel()
            await loop.run_in_executor(reader, pieces.close)
