"""Indexes of faiss, as others use them over keys: what the projection graph is measured against."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...retrieval.per_head import SearchResult
from .flat_index import FlatIndex

try:
    import faiss
except ImportError as exc:
    raise ImportError("IVF and HNSW need faiss; install it with `pip install kvloom[retrieval]`") from exc

_LINK_BYTES = 4


class IvfIndex:
    """`GrowableIndex` by inverted lists: keys in lists by k-means, of which a query reads the best few.

    Lists are made of what is there at the first search; keys added later join them.

    Parameters
    ----------
    nprobe : lists read; the knob for recall.
    nlist : lists; None for `4 sqrt(S)`, as faiss advises, of 16 keys at least.
    """

    def __init__(self, dim: int, *, nprobe: int = 16, nlist: int | None = None) -> None:
        if nprobe < 1 or (nlist is not None and nlist < 1):
            raise ValueError(f"nprobe {nprobe}, nlist {nlist}; expected at least 1")
        self.dim, self.nprobe, self._nlist = dim, nprobe, nlist
        self._waiting = FlatIndex(dim)
        self._index: Any = None

    def __len__(self) -> int:
        return len(self._waiting) + (0 if self._index is None else int(self._index.ntotal))

    @property
    def held_bytes(self) -> int:
        """Centroids and ids."""
        return 0 if self._index is None else int(self._index.nlist * self.dim * 4 + self._index.ntotal * 8)

    def add(self, keys: Tensor) -> None:
        """`[T, D]`, copied."""
        self._waiting.add(keys)

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """See `KeyIndex`."""
        found = self.search_with_cost(queries, k)
        return found.scores, found.ids

    def search_with_cost(self, queries: Tensor, k: int) -> SearchResult:
        """A list that several queries read counts once; centroids are read bytes, but no keys."""
        _check(queries, self.dim)
        index = self._taken_in()
        if index is None:
            return _of_nothing(queries, k)
        nprobe = int(index.nlist) if k >= len(self) else min(self.nprobe, int(index.nlist))
        asked = queries.float().contiguous().numpy()
        scores, ids = index.search(asked, k, params=faiss.SearchParametersIVF(nprobe=nprobe))
        probed = torch.from_numpy(index.quantizer.search(asked, nprobe)[1]).unique()
        compared = sum(int(index.invlists.list_size(int(number))) for number in probed if number >= 0)
        read_bytes = (int(index.nlist) + compared) * self.dim * 4
        return _found(scores, ids, compared, read_bytes)

    def _taken_in(self) -> Any:
        if len(self._waiting):
            keys = self._waiting.keys.numpy()
            if self._index is None:
                nlist = self._nlist or max(1, min(int(4 * len(keys) ** 0.5), len(keys) // 16))
                index = faiss.IndexIVFFlat(faiss.IndexFlatIP(self.dim), self.dim, nlist, faiss.METRIC_INNER_PRODUCT)
                index.cp.min_points_per_centroid, index.cp.max_points_per_centroid = 1, 64
                index.train(keys)
                self._index = index
            self._index.add(keys)
            self._waiting = FlatIndex(self.dim)
        return self._index


class HnswIndex:
    """`GrowableIndex` by a hierarchical graph of neighbouring keys, which are inserted when it is searched.

    Parameters
    ----------
    efSearch : width of the beam, at least k; the knob for recall.
    M : edges a key, twice as many in the lowest layer.
    efConstruction : width of the beam while keys are inserted.
    """

    def __init__(self, dim: int, *, efSearch: int = 128, M: int = 16, efConstruction: int = 100) -> None:
        if min(efSearch, M, efConstruction) < 1:
            raise ValueError(f"efSearch {efSearch}, M {M}, efConstruction {efConstruction}; expected at least 1")
        self.dim, self.efSearch = dim, efSearch
        self._M = M
        self._waiting = FlatIndex(dim)
        self._index: Any = faiss.IndexHNSWFlat(dim, M, faiss.METRIC_INNER_PRODUCT)
        self._index.hnsw.efConstruction = efConstruction

    def __len__(self) -> int:
        return len(self._waiting) + int(self._index.ntotal)

    @property
    def held_bytes(self) -> int:
        """Links, upper layers left out."""
        return int(self._index.ntotal) * 2 * self._M * _LINK_BYTES

    def add(self, keys: Tensor) -> None:
        """`[T, D]`, copied."""
        self._waiting.add(keys)

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """See `KeyIndex`."""
        found = self.search_with_cost(queries, k)
        return found.scores, found.ids

    def search_with_cost(self, queries: Tensor, k: int) -> SearchResult:
        """By the distances that faiss counted, for the whole process: nothing else may search such an index meanwhile.
        It does not say which keys two queries share, so these count twice.
        """
        _check(queries, self.dim)
        if not len(self):
            return _of_nothing(queries, k)
        if len(self._waiting):
            self._index.add(self._waiting.keys.numpy())
            self._waiting = FlatIndex(self.dim)
        if k >= len(self):  # a beam may not reach every key
            flat = FlatIndex(self.dim)
            flat.add(torch.from_numpy(self._index.reconstruct_n(0, len(self))))
            return SearchResult(*flat.search(queries, k), len(self), len(self) * self.dim * 4)
        faiss.cvar.hnsw_stats.reset()
        params = faiss.SearchParametersHNSW(efSearch=max(self.efSearch, k))
        scores, ids = self._index.search(queries.float().contiguous().numpy(), k, params=params)
        stats = faiss.cvar.hnsw_stats
        compared = min(int(stats.ndis), len(self))
        read_bytes = compared * self.dim * 4 + int(stats.nhops) * 2 * self._M * _LINK_BYTES
        return _found(scores, ids, compared, read_bytes)


def _check(queries: Tensor, dim: int) -> None:
    if queries.ndim != 2 or queries.shape[1] != dim or bool(queries.isnan().any()):
        raise ValueError(f"queries are {list(queries.shape)}; expected [Q, {dim}] without NaN")


def _found(scores: object, ids: object, compared: int, read_bytes: int) -> SearchResult:
    found, where = torch.as_tensor(scores), torch.as_tensor(ids)
    return SearchResult(found.masked_fill(where < 0, -torch.inf), where, compared, read_bytes)


def _of_nothing(queries: Tensor, k: int) -> SearchResult:
    shape = (len(queries), k)
    return SearchResult(torch.full(shape, -torch.inf), torch.full(shape, -1), 0, 0)
