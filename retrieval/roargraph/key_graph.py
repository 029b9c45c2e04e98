"""The graph of one KV head: projected from training queries, searched, and extended by new keys."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ...errors import CodecError
from ..per_head import SearchResult
from .build_numba import connect, invert, nearest_rows, project_edges, reverse_edges, reverse_into
from .search_numba import DEGREE, EDGE_BYTES, NO_EDGE, search_graph

Array: TypeAlias = np.ndarray[Any, Any]

_SEEN_AS = {torch.float32: torch.float32, torch.float16: torch.uint16, torch.bfloat16: torch.int16}
_QUERIES_AT_ONCE = 128
_EVERY = 8  # one in so many inserted keys is made a query of its own


@dataclass(frozen=True, slots=True)
class GraphSettings:
    """How a graph is built and searched.

    Attributes
    ----------
    Nq : neighbours of a training query (RoarGraph's word).
    pivot_queries : queries for which a key is the pivot: those that rank it best.
    forward : projected edges of a key; reverse edges fill them up to 32.
    metric_dims : dimensions of the queries' second moment, in which keys are compared for pruning.
    train_ratio, train_queries : training queries a query head and token, and at most so many a KV head.
    exact_queries : training queries that are compared with all keys; the others search the graph made of these.
    keep_every : one in so many observed queries is kept until the graph is built.
    entries : keys at which a search begins.
    Ls : least width of the beam, which is 1.25 k if that is more; raises recall.
    exact_beams : fewer keys than so many times the beam are searched exactly.
    merge_tokens : keys added after `build` are searched exactly until there are so many, then inserted.
    """

    Nq: int = 100
    pivot_queries: int = 4
    forward: int = 20
    metric_dims: int = 32
    train_ratio: float = 0.1
    train_queries: int = 131072
    exact_queries: int = 8192
    keep_every: int = 5
    entries: int = 64
    Ls: int = 160
    exact_beams: int = 16
    merge_tokens: int = 1024

    def __post_init__(self) -> None:
        if not 0 < self.forward < DEGREE:
            raise ValueError(f"forward is {self.forward}; expected 1 to {DEGREE - 1} of {DEGREE} edges")
        counts = ("Nq", "pivot_queries", "metric_dims", "train_queries", "exact_queries")
        for name in (*counts, "keep_every", "entries", "Ls", "merge_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")


@dataclass(frozen=True, slots=True, eq=False)
class _Graph:
    """Edges `[S, 32, 3]` of the first S keys, entries `[E]`, and the metric of the queries `[D, R]`."""

    edges: Array
    entries: Array
    metric: Tensor


class KeyGraph:
    """`GrowableIndex` of the keys of one KV head, exact until it is built.

    Parameters
    ----------
    dim : D.
    """

    def __init__(self, dim: int, settings: GraphSettings | None = None) -> None:
        self.dim, self.settings = dim, settings or GraphSettings()
        self._rows = torch.empty(0, dim)
        self._count = 0
        self._graph: _Graph | None = None
        self._recent = torch.empty(0, dim)

    def __len__(self) -> int:
        return self._count

    @property
    def built(self) -> int:
        """Keys in the graph; later ones are searched exactly."""
        return 0 if self._graph is None else len(self._graph.edges)

    @property
    def held_bytes(self) -> int:
        if self._graph is None:
            return 0
        return self._graph.edges.nbytes + self._graph.entries.nbytes + self._graph.metric.nbytes

    @property
    def keys(self) -> Tensor:
        """All of them, `[S, D]`; a view."""
        return self._rows[: self._count]

    def add(self, keys: Tensor) -> None:
        """Copies keys `[T, D]`. Whole blocks of `merge_tokens` are inserted into an existing graph."""
        if keys.ndim != 2 or keys.shape[1] != self.dim:
            raise ValueError(f"keys are {list(keys.shape)}; expected [T, {self.dim}]")
        if self._count + len(keys) >= NO_EDGE:
            raise ValueError(f"{self._count + len(keys)} keys; a graph numbers fewer than {NO_EDGE}")
        if not self._count:
            self._rows = torch.empty(0, self.dim, dtype=keys.dtype if keys.dtype in _SEEN_AS else torch.float32)
        if self._count + len(keys) > len(self._rows):
            room = max(self._count + len(keys), self._count * 5 // 4)
            self._rows = torch.cat((self.keys, self._rows.new_empty(room - self._count, self.dim)))
        self._rows[self._count : self._count + len(keys)] = keys
        self._count += len(keys)
        while self._graph is not None and self._count - self.built >= self.settings.merge_tokens:
            self._insert(self._graph, self.built + self.settings.merge_tokens)

    def remember(self, queries: Tensor) -> None:
        """Takes the latest queries `[Q, D]`, by which keys are inserted."""
        self._recent = queries.float()

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """See `KeyIndex`; each query is searched alone."""
        if queries.ndim != 2 or queries.shape[1] != self.dim or bool(queries.isnan().any()):
            raise ValueError(f"queries are {list(queries.shape)}; expected [Q, {self.dim}] without NaN")
        found = [self.search_with_cost(query, k) for query in queries.split(1)]
        empty = (torch.empty(0, k), torch.empty(0, k, dtype=torch.int64))
        if not found:
            return empty
        return torch.cat([f.scores for f in found]), torch.cat([f.ids for f in found])

    def search_with_cost(self, queries: Tensor, k: int) -> SearchResult:
        """One search for all queries of a group, which share the visited keys."""
        queries, graph = queries.float().contiguous(), self._graph
        beam = max(self.settings.Ls, math.ceil(1.25 * k))
        if graph is None or k >= self._count or len(graph.edges) < self.settings.exact_beams * beam:
            scores, ids = _top(queries @ self.keys.float().T, k)
            return SearchResult(scores, ids, self._count, self._count * self.dim * self._rows.element_size())
        built = len(graph.edges)
        scores, ids = torch.empty(len(queries), beam), torch.empty(len(queries), beam, dtype=torch.int64)
        compared, opened = search_graph(
            self._flat(), self.dim, graph.edges, graph.entries, queries.numpy(), scores.numpy(), ids.numpy()
        )
        if self._count > built:
            behind = queries @ self._rows[built : self._count].float().T
            scores = torch.cat((scores, behind), 1)
            ids = torch.cat((ids, torch.arange(built, self._count).expand(len(queries), -1)), 1)
            compared += self._count - built
        scores, places = _top(scores, k)
        ids = torch.where(places < 0, -1, ids.gather(1, places.clamp(min=0)))
        read_bytes = compared * self.dim * self._rows.element_size() + opened * DEGREE * EDGE_BYTES
        return SearchResult(scores, ids, compared, read_bytes)

    def build(self, queries: Tensor, visible: Tensor) -> None:
        """Builds the graph of all keys from training queries `[Q, D]`.

        Parameters
        ----------
        visible : `[Q]` int64, at least 1 and ascending: query i sees the first `visible[i]` keys.
        """
        settings, keys = self.settings, self.keys.float()
        queries, metric = queries.float(), _metric(queries.float(), settings.metric_dims)
        table = _compared_in(keys, metric)
        mixed = torch.randperm(len(queries), generator=torch.Generator().manual_seed(0))
        exact, others = (
            rows.sort().values
            for rows in mixed.split(
                [min(settings.exact_queries, len(queries)), max(0, len(queries) - settings.exact_queries)]
            )
        )
        lists, best, closest = _neighbours(queries[exact], keys, visible[exact], settings.Nq)
        graph = self._projected(table, lists, best, closest, metric)
        if len(others):
            ids, scores = self._found(graph, queries[others], 2 * settings.Nq)
            scores[ids >= visible[others, None]] = -torch.inf
            scores, places = scores.topk(settings.Nq, dim=1)
            ids = torch.where(scores > -torch.inf, ids.gather(1, places), -1)
            lists, best = np.concatenate((lists, ids.int().numpy())), np.concatenate((best, scores.numpy()))
            graph = self._projected(table, lists, best, closest, metric)
        self._graph = graph

    def _projected(self, table: Array, lists: Array, best: Array, closest: Array, metric: Tensor) -> _Graph:
        """The graph of all keys from the results of training queries."""
        found = invert(lists, best, len(table), self.settings.pivot_queries)
        edges, gaps = _edges(table, lists, found, closest, self.settings.forward)
        reverse_edges(edges, gaps)
        tops = np.unique(lists[:, 0])
        entries = _far_apart(table, tops[tops >= 0].astype(np.int64), self.settings.entries)
        connect(edges, entries)
        return _Graph(edges, entries, metric)

    def _found(self, graph: _Graph, queries: Tensor, beam: int) -> tuple[Tensor, Tensor]:
        """Ids and scores `[Q, beam]` that each query finds in a graph, searched one by one."""
        queries, rows = queries.contiguous(), self._flat()
        ids, scores = (torch.empty(len(queries), beam, dtype=d) for d in (torch.int64, torch.float32))
        asked, ids_out, scores_out = queries.numpy(), ids.numpy(), scores.numpy()
        for n in range(len(queries)):
            one = slice(n, n + 1)
            search_graph(rows, self.dim, graph.edges, graph.entries, asked[one], scores_out[one], ids_out[one])
        return ids, scores

    def _insert(self, graph: _Graph, stop: int) -> None:
        """Links the keys `[built, stop)` by the results of the latest queries, and of queries made of the keys.

        A key's own query is the second moment of the queries times the key: the mean of all queries, weighed by their
        scores with the key.
        """
        settings, first = self.settings, len(graph.edges)
        fresh = self._rows[first:stop].float()
        queries = torch.cat((self._recent, fresh[::_EVERY] @ graph.metric @ graph.metric.T))
        ids, scores = self._found(graph, queries, settings.Nq)
        ids = torch.cat((ids, torch.arange(first, stop).expand(len(queries), -1)), 1)
        asked = queries @ fresh.T
        best, places = torch.cat((scores, asked), 1).topk(settings.Nq, dim=1)
        ids = torch.where(best > -torch.inf, ids.gather(1, places), -1)
        closest = (asked - best[:, -1:]).argmax(0).int().numpy()
        # numbers in a small table: the new keys, then what was found beside them
        beside = ids[(ids >= 0) & (ids < first)].unique()
        nodes = torch.cat((torch.arange(first, stop), beside))
        local = torch.where(ids >= first, ids - first, stop - first + torch.searchsorted(beside, ids))
        lists = torch.where(ids < 0, -1, local).int().numpy()
        found = invert(lists, best.numpy(), stop - first, settings.pivot_queries)
        edges, _ = _edges(
            _compared_in(self._rows[nodes].float(), graph.metric), lists, found, closest, settings.forward
        )
        linked = np.concatenate(
            (graph.edges, _packed(np.append(nodes.numpy(), NO_EDGE)[np.minimum(_numbers(edges), len(nodes))]))
        )
        reverse_into(linked, first, settings.forward)
        connect(linked, graph.entries)
        self._graph = _Graph(linked, graph.entries, graph.metric)

    def state(self) -> dict[str, Tensor]:
        """The graph as tensors: `edges` `[S, 32, 3]` uint8, `entries` `[E]` int64, `metric` `[D, R]` float32.

        Without a graph S and E are 0. The keys are not in it.
        """
        if self._graph is None:
            return {
                "edges": torch.empty(0, DEGREE, EDGE_BYTES, dtype=torch.uint8),
                "entries": torch.empty(0, dtype=torch.int64),
                "metric": torch.empty(self.dim, 0),
            }
        graph = self._graph
        return {
            "edges": torch.from_numpy(graph.edges.copy()),
            "entries": torch.from_numpy(graph.entries.copy()),
            "metric": graph.metric.clone(),
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """The graph of the first keys that were added, from `state`.

        Raises
        ------
        CodecError : the tensors are not of a graph of these keys.
        """
        edges, entries, metric = (_named(state, name) for name in ("edges", "entries", "metric"))
        nodes = len(edges) if edges.ndim else 0
        whole = (
            edges.dtype == torch.uint8
            and edges.shape == (nodes, DEGREE, EDGE_BYTES)
            and entries.dtype == torch.int64
            and entries.ndim == 1
            and metric.dtype == torch.float32
            and metric.ndim == 2
            and metric.shape[0] == self.dim
            and bool(metric.isfinite().all())
        )
        if not whole:
            raise CodecError(
                f"the graph's tensors are edges {list(edges.shape)} {edges.dtype}, entries {list(entries.shape)} "
                f"{entries.dtype}, metric {list(metric.shape)} {metric.dtype}; expected [S, {DEGREE}, {EDGE_BYTES}] "
                f"uint8, [E] int64 and [{self.dim}, R] float32, finite; build it anew"
            )
        if nodes > self._count or bool(nodes) != bool(len(entries)):
            raise CodecError(
                f"a graph of {nodes} keys with {len(entries)} entries; there are {self._count} keys; build it anew"
            )
        numbers = _numbers(edges.numpy())
        if ((numbers >= nodes) & (numbers != NO_EDGE)).any() or bool(((entries < 0) | (entries >= nodes)).any()):
            raise CodecError(f"the graph leads to keys outside its {nodes}; build it anew")
        self._graph = _Graph(edges.numpy().copy(), entries.numpy().copy(), metric.clone()) if nodes else None

    def _flat(self) -> Array:
        """The rows as the compiled functions take them."""
        return self._rows.view(_SEEN_AS[self._rows.dtype]).numpy().reshape(-1)


def _named(state: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise CodecError(f"the graph has no tensor {name!r}, only {', '.join(sorted(state))}; build it anew")
    return state[name].contiguous()


def _top(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest scores and their ids, padded with -inf and -1; the id is -1 also if the score is -inf."""
    found = min(k, scores.shape[1])
    best, places = scores.topk(found, dim=1)
    places = torch.where(best == -torch.inf, -1, places)
    pad = (0, k - found)
    return torch.nn.functional.pad(best, pad, value=-torch.inf), torch.nn.functional.pad(places, pad, value=-1)


def _neighbours(queries: Tensor, keys: Tensor, visible: Tensor, most: int) -> tuple[Array, Array, Array]:
    """Exact results of queries: ids `[Q, most]` int32, scores, and for each key the query that nearly found it, `[S]`.

    Torch computes blocks of scores that are read once from the cache. (faiss takes more than twice as long, has no
    causal mask, and does not return the query that nearly found a key.)
    """
    count = len(keys)
    lists, best = np.empty((len(queries), most), np.int32), np.empty((len(queries), most), np.float32)
    margin, closest = np.full(count, -np.inf, np.float32), np.full(count, len(queries) - 1, np.int32)
    buffer = torch.empty(min(_QUERIES_AT_ONCE, len(queries)) * count)
    for first in range(0, len(queries), _QUERIES_AT_ONCE):
        rows = slice(first, min(first + _QUERIES_AT_ONCE, len(queries)))
        seen = visible[rows]
        width = int(seen.max())
        scores = buffer[: len(seen) * width].view(len(seen), width)
        torch.mm(queries[rows], keys[:width].T, out=scores)
        nearest_rows(scores.numpy(), seen.numpy(), first, lists[rows], best[rows], margin, closest)
    return lists, best, closest


def _metric(queries: Tensor, dims: int) -> Tensor:
    """`P` `[D, R]` such that `|P^T (a - b)|^2` is about the mean squared difference of the scores of keys a and b."""
    moment = (queries.T @ queries).double() / len(queries)
    values, vectors = torch.linalg.eigh(moment)
    made: Tensor = (vectors * values.clamp(min=0).sqrt())[:, -dims:].float()
    return made


def _edges(table: Array, lists: Array, found: Array, closest: Array, forward: int) -> tuple[Array, Array]:
    """Edges `[S, 32, 3]` and the lengths of the projected ones, see `project_edges`."""
    keys, count = len(found), len(lists)
    alone = np.where(found[:, 0] < 0, closest, count)
    order = np.argsort(alone, kind="stable").astype(np.int32)
    starts = np.searchsorted(alone[order], np.arange(count + 1)).astype(np.int64)
    edges, gaps = np.empty((keys, DEGREE, EDGE_BYTES), np.uint8), np.empty((keys, forward), np.float32)
    project_edges(table, lists, found, closest, starts, order, forward, np.float32(1.0), edges, gaps)
    return edges, gaps


def _compared_in(keys: Tensor, metric: Tensor) -> Array:
    """Directions of keys in the metric of the queries, `[S, R]`: keys with similar scores have a small angle.

    By the keys' own angle or distance, neighbours agree in dimensions that hardly any query reads.
    """
    return torch.nn.functional.normalize(keys @ metric, dim=1).numpy()


def _far_apart(table: Array, keys: Array, most: int) -> Array:
    """Chooses `most` entries among keys that queries rank first, far from one another, so that each query is near one.

    Each is the farthest from those before it, among 32 times as many candidates.
    """
    keys = keys[np.linspace(0, len(keys) - 1, min(len(keys), 32 * most)).astype(np.int64)]
    directions = table[keys]
    likeness = np.full(len(keys), -np.inf, np.float32)
    chosen = [0]
    while len(chosen) < min(most, len(keys)):
        likeness = np.maximum(likeness, directions @ directions[chosen[-1]])
        likeness[chosen[-1]] = np.inf
        chosen.append(int(likeness.argmin()))
    return np.sort(keys[chosen])


def _numbers(edges: Array) -> Array:
    """Edges `[..., 3]` uint8 as numbers, int32."""
    wide: Array = edges.astype(np.int32)
    numbers: Array = wide[..., 0] | wide[..., 1] << 8 | wide[..., 2] << 16
    return numbers


def _packed(numbers: Array) -> Array:
    """The inverse of `_numbers`."""
    return np.stack([numbers >> shift & 0xFF for shift in (0, 8, 16)], -1).astype(np.uint8)
