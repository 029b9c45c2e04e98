"""What those who use chunks need of a store, whoever keeps them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

from torch import Tensor

from ..core import ChunkKey, KVChunk, KVSpec
from .history import Explanation
from .store import Hit


@runtime_checkable
class ChunkStore(Protocol):
    """Chunks by key: a `KVStore`, whose methods say what these mean, or one tenant's part of a store that is served."""

    def put(
        self,
        key: ChunkKey,
        chunk: KVChunk,
        *,
        after: ChunkKey | None = None,
        namespace: str = "",
        ttl_s: float | None = None,
        recompute_s: float | None = None,
    ) -> None: ...
    def read(
        self,
        key: ChunkKey,
        positions: Tensor | None = None,
        *,
        layers: tuple[int, int] | None = None,
        timeout_s: float | None = None,
    ) -> Hit | None: ...
    def get(
        self,
        key: ChunkKey,
        positions: Tensor | None = None,
        *,
        layers: tuple[int, int] | None = None,
        timeout_s: float | None = None,
    ) -> KVChunk | None: ...
    def match(self, keys: Sequence[ChunkKey]) -> int: ...
    def locate(self, key: ChunkKey) -> str | None: ...
    def locate_prefix(self, keys: Sequence[ChunkKey]) -> tuple[str, ...]: ...
    def __contains__(self, key: ChunkKey) -> bool: ...
    def pinned(self, keys: Iterable[ChunkKey], *, deadline_s: float | None = None) -> AbstractContextManager[None]: ...
    def delete(self, key: ChunkKey) -> bool: ...
    def explain(self, keys: Iterable[ChunkKey]) -> list[Explanation]: ...
    def check_certificates(self, spec: KVSpec) -> None: ...
    def close(self) -> None: ...
