"""A graph of keys projected from the prompt's own queries.

RetrievalAttention, arXiv 2409.10516, with the graph of RoarGraph, arXiv 2408.08933, sections 4 and 5.

Queries are distributed unlike keys. In a graph that links the keys which a query finds together, a search gets from one
needed key to the others; in a graph of neighbouring keys it does not. Deviations from the papers:

- One graph for each KV head, trained with the queries of the whole group, of 32 edges of 3 bytes: 768 bytes a token and
  layer at 8 KV heads, where one graph a query head with 35 to 105 edges of 4 bytes takes 4.5 to 13.4 kB.
- RoarGraph makes a query's best key its pivot, and lets the last query of a pivot overwrite the others. Here every key
  is the pivot of the few queries that rank it best, whose neighbours are merged before they are pruned. So no key has
  many queries, and heavy hitters do not take all edges.
- A key that no query finds is linked to the keys of the query that nearly found it, which the exact search knows. This
  replaces a search of width 500 for each key, most of the papers' build time.
- Neighbours are pruned by angle in the metric of the queries' second moment: two keys are alike if queries score them
  alike. By the angle of the keys themselves, a search of a planted context of 128K tokens compares 2.3 times as many
  keys for the same recall; with the small reference model it makes no difference.
- A query at position p is trained with the keys up to p alone, and later queries are taken more often: few see late
  keys.
- Of very many training queries only some are compared with all keys; the graph that they make finds for the others.
- Keys that remain unreachable are linked to reachable ones, so that every key can be reached from the entries.
- Generated tokens are searched exactly, and inserted in blocks by the results of the latest queries.
- A group of queries is searched together: each key that one of them meets is compared with all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...errors import CodecError
from ..per_head import PerHeadSelector
from ..selector import LayerShape, Pooling, Selection
from .key_graph import GraphSettings, KeyGraph

_RECENT = 32  # steps whose queries insert generated tokens


class RoarGraphIndex:
    """`Selector` by one graph for each KV head; it `LearnsFromQueries`, and is exact until it has.

    Queries are observed during prefill, then `build` is called. Afterwards every `merge_tokens` added tokens are
    inserted.

    Parameters
    ----------
    start : first token of the context that it covers.
    pooling : see `pooled`.
    settings : of building and searching.
    query_ratio : share of the budget that each query head of a group searches for.
    threads : that build and search KV heads side by side.
    """

    name = "roargraph"

    def __init__(
        self,
        shape: LayerShape,
        *,
        start: int = 0,
        pooling: Pooling = "max",
        settings: GraphSettings | None = None,
        query_ratio: float = 0.5,
        threads: int = 1,
    ) -> None:
        self.shape, self.start, self.settings = shape, start, settings or GraphSettings()
        self._graphs: list[KeyGraph] = []
        self._selector = PerHeadSelector(
            shape,
            self._make,
            name=self.name,
            start=start,
            pooling=pooling,
            query_ratio=query_ratio,
            threads=threads,
        )
        self._observed: list[tuple[Tensor, Tensor]] = []
        self._seen = 0
        self._recent: list[Tensor] = []

    def _make(self, dim: int) -> KeyGraph:
        self._graphs.append(KeyGraph(dim, self.settings))
        return self._graphs[-1]

    def __len__(self) -> int:
        return len(self._selector)

    @property
    def graphs(self) -> Sequence[KeyGraph]:
        """The graph of each KV head."""
        return self._graphs

    @property
    def held_bytes(self) -> int:
        return self._selector.held_bytes + sum(queries.nbytes for queries, _ in self._observed)

    def add(self, keys: Tensor, values: Tensor) -> None:
        """See `Selector`; keys are copied, and kept in the 16 or 32 bits that the first ones had."""
        if self._recent:
            asked = torch.stack(self._recent).view(len(self._recent), self.shape.kv_heads, -1, self.shape.head_dim)
            for head, graph in enumerate(self._graphs):
                graph.remember(asked[:, head].flatten(0, 1))
        self._selector.add(keys, values)

    def observe(self, queries: Tensor, positions: Tensor) -> None:
        """See `LearnsFromQueries`. One in `keep_every` is copied and kept until `build`."""
        self.shape.check_observed(queries, positions)
        every = self.settings.keep_every
        first = -self._seen % every
        self._seen += len(positions)
        self._observed.append((queries[:, first::every].clone(), positions[first::every].clone()))
        self._recent = [*self._recent, *queries[:, -_RECENT:].float().unbind(1)][-_RECENT:]

    def build(self) -> None:
        """See `LearnsFromQueries`.

        Does nothing without queries, for a context that is searched faster exactly, and if there is a graph already.
        """
        kept, self._observed = self._observed, []
        if not kept or self._graphs[0].built or len(self) < self.settings.exact_beams * self.settings.Ls:
            return
        queries, positions = torch.cat([q for q, _ in kept], 1), torch.cat([p for _, p in kept])
        order = positions.argsort(stable=True)
        order = order[positions[order] >= self.start]
        taken = order[self._sample(len(order))]
        visible = (positions[taken] + 1 - self.start).clamp(max=len(self)).repeat_interleave(self.shape.group)
        if not len(visible):
            return

        def train(graph: KeyGraph, of_group: Tensor) -> None:
            graph.build(of_group[:, taken].transpose(0, 1).reshape(-1, self.shape.head_dim), visible)

        grouped = queries.view(self.shape.kv_heads, self.shape.group, -1, self.shape.head_dim)
        list(self._selector.run(train, self._graphs, grouped))

    def _sample(self, count: int) -> Tensor:
        """Indices of training queries among `count` queries in order; later ones are denser."""
        settings = self.settings
        wanted = min(int(settings.train_ratio * len(self)), settings.train_queries // self.shape.group)
        wanted = max(1, wanted, min(count, 256))
        places = ((torch.arange(wanted) + 0.5) / wanted).sqrt().mul(count).long().clamp(max=max(0, count - 1))
        unique: Tensor = places.unique()
        return unique

    def select(self, queries: Tensor, position: int, budget: int) -> Selection:
        selection = self._selector.select(queries, position, budget)
        self._recent = [*self._recent[1 - _RECENT :], queries.float().clone()]
        return selection

    def state(self) -> dict[str, Tensor]:
        """See `KeepsState`: the graphs as tensors `head.name`, without the keys."""
        return {f"{h}.{name}": t for h, graph in enumerate(self._graphs) for name, t in graph.state().items()}

    @classmethod
    def from_state(
        cls,
        shape: LayerShape,
        state: Mapping[str, Tensor],
        keys: Tensor,
        *,
        start: int = 0,
        pooling: Pooling = "max",
        settings: GraphSettings | None = None,
        query_ratio: float = 0.5,
        threads: int = 1,
    ) -> RoarGraphIndex:
        """The index of the keys `[H, T, D]` that `state` was taken with.

        Raises
        ------
        CodecError : the tensors are not of graphs of these keys.
        """
        index = cls(shape, start=start, pooling=pooling, settings=settings, query_ratio=query_ratio, threads=threads)
        index.add(keys, keys)
        index.restore_state(state)
        return index

    def restore_state(self, parts: Mapping[str, Tensor]) -> None:
        """See `KeepsState`: the same keys were added, and `parts` are what `state` gave."""
        for h, graph in enumerate(self._graphs):
            graph.restore({name.partition(".")[2]: t for name, t in parts.items() if name.partition(".")[0] == str(h)})
        if len({graph.built for graph in self._graphs}) > 1:
            raise CodecError(f"graphs have {[graph.built for graph in self._graphs]} keys; expected equal numbers")
