"""Chunks written into the engine's paged cache while the next ones are read. Imports no engine."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Protocol, Self

from torch import Tensor

_AHEAD = 3  # chunks of a load that are read and not written yet


class PagedCache(Protocol):
    """An engine's paged KV cache, as transfers use it; `PagedLayers` is vLLM's.

    Tokens of a request lie in a row of blocks, token `t` in block `blocks[t // block_tokens]`. Keys are `[L, H, T, D]`,
    values `[L, H, T, Dv]`.
    """

    block_tokens: int

    def read(self, blocks: Sequence[int], start: int, stop: int) -> tuple[Tensor, Tensor]: ...
    def write(self, blocks: Sequence[int], start: int, keys: Tensor, values: Tensor) -> None: ...


class PendingWrites:
    """Writes of one load, done by threads while the next chunks are read. Leaving the context waits for all of them.

    Raises
    ------
    Exception : whatever a write raised; no write is under way any more.
    """

    def __init__(self, cache: PagedCache, writer: ThreadPoolExecutor) -> None:
        self._cache, self._writer = cache, writer
        self._under_way: deque[Future[None]] = deque()

    def add(self, blocks: Sequence[int], start: int, keys: Tensor, values: Tensor) -> None:
        """Begin a `PagedCache.write`. Waits if too many are under way."""
        while len(self._under_way) >= _AHEAD:
            self._under_way.popleft().result()
        self._under_way.append(self._writer.submit(self._cache.write, blocks, start, keys, values))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        wait(self._under_way)
        if kind is None:
            for write in self._under_way:
                write.result()
