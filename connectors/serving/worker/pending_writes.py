"""Chunks written into the engine's paged cache while the next ones are read. Imports no engine."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Protocol, Self

from torch import Tensor

_AHEAD = 3  # chunks of a load that are read and not written yet


class PagedCache(Protocol):
    """What transfers need of `PagedLayers`."""

    block_tokens: int

    def read(self, blocks: Sequence[int], start: int, stop: int) -> tuple[Tensor, Tensor]: ...
    def write(self, blocks: Sequence[int], start: int, keys: Tensor, values: Tensor) -> None: ...


class PendingWrites:
    """Chunks of one load on their way into its blocks, while the next ones are read. At the end all are there.

    Raises
    ------
    Exception : whatever writing one of them raised; nothing is being written any more.
    """

    def __init__(self, cache: PagedCache, writer: ThreadPoolExecutor) -> None:
        self._cache, self._writer = cache, writer
        self._under_way: deque[Future[None]] = deque()

    def add(self, blocks: Sequence[int], start: int, keys: Tensor, values: Tensor) -> None:
        """As `PagedCache.write`, but not yet done."""
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
