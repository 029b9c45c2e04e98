"""The service's store as the embedded engine of one tenant uses it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from torch import Tensor

from ...core import ChunkKey, KVChunk, KVSpec
from ...kvstore.history import Explanation
from ...kvstore.store import Hit
from ..access.tenants import KeySpace
from ..served_store import ServedStore


class TenantStore:
    """Every call goes to the store that is served at that moment, by keys of the tenant's space and into its namespace.

    So another engine that names the same tenant's token, model and document finds what this one has precomputed. It
    holds no chunk itself: it is a `ChunkStore` over the service's.
    """

    def __init__(self, served: ServedStore, keys: KeySpace, namespace: str) -> None:
        self._served = served
        self._keys = keys
        self._namespace = namespace

    def put(
        self,
        key: ChunkKey,
        chunk: KVChunk,
        *,
        after: ChunkKey | None = None,
        namespace: str = "",
        ttl_s: float | None = None,
        recompute_s: float | None = None,
    ) -> None:
        with self._served.use() as store:
            store.put(
                self._keys.to_store(key),
                chunk,
                after=None if after is None else self._keys.to_store(after),
                namespace=namespace or self._namespace,
                ttl_s=ttl_s,
                recompute_s=recompute_s,
            )

    def read(
        self,
        key: ChunkKey,
        positions: Tensor | None = None,
        *,
        layers: tuple[int, int] | None = None,
        timeout_s: float | None = None,
    ) -> Hit | None:
        with self._served.use() as store:
            return store.read(self._keys.to_store(key), positions, layers=layers, timeout_s=timeout_s)

    def get(
        self,
        key: ChunkKey,
        positions: Tensor | None = None,
        *,
        layers: tuple[int, int] | None = None,
        timeout_s: float | None = None,
    ) -> KVChunk | None:
        hit = self.read(key, positions, layers=layers, timeout_s=timeout_s)
        return None if hit is None else hit.chunk

    def __contains__(self, key: ChunkKey) -> bool:
        return self.locate(key) is not None

    def match(self, keys: Sequence[ChunkKey]) -> int:
        with self._served.use() as store:
            return store.match(self._all(keys))

    def locate(self, key: ChunkKey) -> str | None:
        with self._served.use() as store:
            return store.locate(self._keys.to_store(key))

    def locate_prefix(self, keys: Sequence[ChunkKey]) -> tuple[str, ...]:
        with self._served.use() as store:
            return store.locate_prefix(self._all(keys))

    def pinned(self, keys: Iterable[ChunkKey], *, deadline_s: float | None = None) -> AbstractContextManager[None]:
        return self._pinned(self._all(keys), deadline_s)

    def delete(self, key: ChunkKey) -> bool:
        with self._served.use() as store:
            return store.delete(self._keys.to_store(key))

    def explain(self, keys: Iterable[ChunkKey]) -> list[Explanation]:
        with self._served.use() as store:
            return store.explain(self._all(keys))

    def check_certificates(self, spec: KVSpec) -> None:
        with self._served.use() as store:
            store.check_certificates(spec)

    def close(self) -> None:
        """Leaves the store that is served open."""

    def _all(self, keys: Iterable[ChunkKey]) -> list[ChunkKey]:
        return [self._keys.to_store(key) for key in keys]

    @contextmanager
    def _pinned(self, keys: list[ChunkKey], deadline_s: float | None) -> Iterator[None]:
        """In the store of this moment: if that is replaced meanwhile, the pins end with it."""
        with self._served.use() as store:
            pins = store.pinned(keys, deadline_s=deadline_s)
            pins.__enter__()
        try:
            yield
        finally:
            pins.__exit__(None, None, None)
