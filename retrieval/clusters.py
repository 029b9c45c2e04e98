"""Clusters of keys: the best are attended to exactly, the next ones as one token each (RetroInfer's wave index)."""

from __future__ import annotations

import math
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

try:
    import faiss
except ImportError as error:
    raise ImportError('kvloom.retrieval.clusters needs faiss: pip install "kvloom[retrieval]"') from error

from .attention import PartialAttention
from .selector import LayerShape, Pooling, Rest, Selection

SEGMENT_TOKENS, UPDATE_TOKENS = 8192, 1024  # RetroInfer: keys clustered together, in a prompt and while generating
TOKENS_A_CLUSTER = 16  # RetroInfer: on average
ESTIMATED_RATIO = 0.232  # RetroInfer: of all clusters

_ITERATIONS = 9  # RetroInfer: 10, of which the last only assigns


class Clusters(NamedTuple):
    """Clusters of some consecutive tokens.

    Attributes
    ----------
    keys, values : means, `[H, E, D]` and `[H, E, Dv]`.
    sizes : `[H, E]` int64.
    members : `[H, T]` int32, tokens counted from the first, cluster by cluster and ascending within a cluster.
    starts : `[H, E]` int64, where each cluster begins in `members`.
    """

    keys: Tensor
    values: Tensor
    sizes: Tensor
    members: Tensor
    starts: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes that an index must hold; sizes follow from `starts`, for which 4 bytes suffice."""
        return self.keys.nbytes + self.values.nbytes + 4 * self.starts.numel() + self.members.nbytes


class ClusterIndex:
    """`Selector` of whole clusters within the budget, with an estimate of the attention over the next best ones.

    The keys of a segment, less their mean, are clustered by direction (spherical k-means, about one cluster for 16
    tokens). Clusters are ranked by the query's score of their mean key. The best, as far as the budget reaches, are
    chosen; the next `estimated_ratio` of all clusters are attended to by mean key, mean value and size; the others are
    dropped. (RetroInfer, arXiv 2505.02922, section 4, and its released code.) For a cluster that
    is estimated as a whole, the weight is a lower bound of the true one (Jensen).

    A segment is clustered when it is complete. Behind the last segment, every complete `update_tokens` are clustered
    alone, and each of the remaining tokens is a cluster of its own. So the clusters depend on the number of tokens, not
    on the pieces in which they were added.

    Deviations: the budget counts tokens, not clusters, so that one cluster may be chosen in part: its latest tokens,
    the others are estimated by its means. Ranking takes the softmax over tokens (clusters weighted by size), not over
    clusters. Clusters that end up empty are left out. A prompt shorter than a segment is clustered in updates.

    Parameters
    ----------
    start : first token of the context that it covers.
    segment_tokens : multiple of `update_tokens`.
    estimated_ratio : share of clusters that are estimated; 0 for no estimate.
    pooling : see `pooled`.
    """

    name = "clusters"

    def __init__(
        self,
        shape: LayerShape,
        *,
        start: int = 0,
        segment_tokens: int = SEGMENT_TOKENS,
        update_tokens: int = UPDATE_TOKENS,
        tokens_a_cluster: int = TOKENS_A_CLUSTER,
        estimated_ratio: float = ESTIMATED_RATIO,
        pooling: Pooling = "sum",
    ) -> None:
        if not 1 <= tokens_a_cluster <= update_tokens <= segment_tokens or segment_tokens % update_tokens:
            raise ValueError(
                f"segments of {segment_tokens}, updates of {update_tokens} and clusters of {tokens_a_cluster} tokens; "
                "expected each to be no longer than the one before, and segments of whole updates"
            )
        if not 0 <= estimated_ratio <= 1:
            raise ValueError(f"estimated_ratio is {estimated_ratio}; expected 0 to 1")
        self.shape, self.start, self._pooling = shape, start, pooling
        self._segment_tokens, self._update_tokens, self._per_cluster = segment_tokens, update_tokens, tokens_a_cluster
        self._ratio = estimated_ratio
        self._tokens = 0
        self._segments: list[Clusters] = []
        self._updates: list[Clusters] = []  # of the segment that is not complete
        self._pending: tuple[Tensor, Tensor] | None = None  # its keys and values, float32; None before the first token
        self._all: Clusters | None = None  # of everything, put together when it is asked for

    def __len__(self) -> int:
        return self._tokens

    @property
    def held_bytes(self) -> int:
        """Bytes of all clusters; keys and values of the incomplete segment stand for the context's own."""
        return sum(clusters.nbytes for clusters in (*self._segments, *self._updates))

    @property
    def clusters(self) -> Clusters | None:
        """Clusters of all tokens; None before the first token."""
        if self._all is None and self._pending is not None:
            self._all = self._joined(*self._pending)
        return self._all

    def add(self, keys: Tensor, values: Tensor) -> None:
        self.shape.check_keys(keys)
        if values.ndim != 3 or values.shape[:2] != keys.shape[:2] or not bool(values.isfinite().all()):
            raise ValueError(
                f"values are {list(values.shape)}; expected [{keys.shape[0]}, {keys.shape[1]}, Dv], finite"
            )
        if not keys.shape[1]:
            return
        new = (keys.float(), values.float())
        kept = self._pending
        keys, values = new if kept is None else (torch.cat(both, dim=1) for both in zip(kept, new, strict=True))
        self._tokens += new[0].shape[1]
        size, done = self._segment_tokens, 0
        while keys.shape[1] - done >= size:
            self._segments.append(self._clustered(keys[:, done : done + size], values[:, done : done + size]))
            self._updates, done = [], done + size
        keys, values, size = keys[:, done:].clone(), values[:, done:].clone(), self._update_tokens
        while (len(self._updates) + 1) * size <= keys.shape[1]:
            here = slice(len(self._updates) * size, (len(self._updates) + 1) * size)
            self._updates.append(self._clustered(keys[:, here], values[:, here]))
        self._pending, self._all = (keys, values), None

    def select(self, queries: Tensor, position: int, budget: int) -> Selection:
        self.shape.check_query(queries, budget)
        known = self.clusters
        if self._pending is None or known is None:
            return Selection(torch.empty(self.shape.kv_heads, 0, dtype=torch.int64), 0)
        heads, entries, dim = known.keys.shape
        budget = min(budget, self._tokens)
        grouped = queries.float().view(heads, -1, dim)
        scores = (grouped @ known.keys.mT) * self.shape.scale  # [H, G, E]
        order = self._importance(scores, known.sizes).argsort(dim=1, descending=True, stable=True)
        sizes = known.sizes.gather(1, order)
        before = sizes.cumsum(1) - sizes
        taken = torch.minimum((budget - before).clamp(min=0), sizes)
        ids = _latest(known.members, known.starts.gather(1, order) + sizes, taken) + self.start
        singles = self._pending[0].shape[1] - len(self._updates) * self._update_tokens
        read = known.keys.nbytes + 4 * known.sizes.numel()
        rest: Rest | None = None
        estimated = round(self._ratio * entries)
        if estimated and budget < self._tokens:
            left = sizes - taken
            first = ((left == 0) & (sizes > 0)).sum(1, keepdim=True)  # chosen whole; empty clusters stand at the end
            places = first + torch.arange(estimated)
            counts = left.gather(1, places.clamp(max=entries - 1)) * (places < entries)
            found = _estimate(scores, known.values, counts, order.gather(1, places.clamp(max=entries - 1)))
            rest = partial(_same, found)
            read += heads * estimated * known.values.shape[-1] * known.values.itemsize
        return Selection(ids, read, heads * singles, rest)

    def _joined(self, keys: Tensor, values: Tensor) -> Clusters:
        """Clusters of all tokens, from keys and values of the incomplete segment."""
        done = len(self._updates) * self._update_tokens
        parts = [*self._segments, *self._updates, _singles(keys[:, done:], values[:, done:])]
        firsts = [0, *accumulate(part.members.shape[1] for part in parts[:-1])]
        both = list(zip(parts, firsts, strict=True))
        return Clusters(
            torch.cat([part.keys for part in parts], dim=1),
            torch.cat([part.values for part in parts], dim=1),
            torch.cat([part.sizes for part in parts], dim=1),
            torch.cat([part.members + first for part, first in both], dim=1),
            torch.cat([part.starts + first for part, first in both], dim=1),
        )

    def _importance(self, scores: Tensor, sizes: Tensor) -> Tensor:
        """Logarithm of the pooled softmax weight of one token of each cluster, `[H, E]`."""
        total = (scores + sizes[:, None].log()).logsumexp(-1, keepdim=True)
        weights = (scores - total).amax(1) if self._pooling == "max" else (scores - total).logsumexp(1)
        return weights.masked_fill(sizes == 0, -math.inf)

    def _clustered(self, keys: Tensor, values: Tensor) -> Clusters:
        heads, tokens, _ = keys.shape
        count = tokens // self._per_cluster
        codes = torch.stack([_directions(of_head, count) for of_head in keys])
        sizes = torch.zeros(heads, count, dtype=torch.int64).scatter_add_(1, codes, torch.ones_like(codes))
        return Clusters(
            _means(keys, codes, sizes),
            _means(values, codes, sizes),
            sizes,
            codes.argsort(dim=1, stable=True).int(),
            sizes.cumsum(1) - sizes,
        )


def _same(estimate: PartialAttention, _: Tensor) -> PartialAttention:
    """`Selection.rest`: tokens that are pruned from the choice are not added to the estimate."""
    return estimate


def _singles(keys: Tensor, values: Tensor) -> Clusters:
    """Clusters of one token each."""
    places = torch.arange(keys.shape[1]).expand(keys.shape[0], -1)
    return Clusters(keys, values, torch.ones_like(places), places.int(), places)


def _directions(keys: Tensor, count: int) -> Tensor:
    """The cluster of each key `[T, D]`, `[T]` int64: spherical k-means less the mean, from evenly spaced keys on."""
    centred = keys - keys.mean(0)
    first = centred[torch.arange(count) * len(keys) // count]
    means = faiss.Kmeans(
        keys.shape[1],
        count,
        niter=_ITERATIONS,
        spherical=True,
        min_points_per_centroid=1,
        max_points_per_centroid=len(keys),
    )
    means.train(centred.numpy(), init_centroids=torch.nn.functional.normalize(first, dim=1).numpy())
    return (centred @ torch.from_numpy(means.centroids).T).argmax(1)


def _means(rows: Tensor, codes: Tensor, sizes: Tensor) -> Tensor:
    """Means `[H, E, D]` float32 of the rows `[H, T, D]` of each cluster; zeros for an empty one."""
    sums = torch.zeros(*sizes.shape, rows.shape[2], dtype=torch.float64)
    sums.scatter_add_(1, codes[..., None].expand_as(rows), rows.double())
    return (sums / sizes.clamp(min=1)[..., None]).float()


def _latest(members: Tensor, stops: Tensor, taken: Tensor) -> Tensor:
    """The last `taken` `[H, E]` of the members `[H, T]` before `stops` `[H, E]`, ascending; as many in every row."""
    heads, tokens = members.shape
    begins = (stops - taken + tokens * torch.arange(heads)[:, None]).flatten()
    counts = taken.flatten()
    within = torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    rows = members.flatten()[begins.repeat_interleave(counts) + within].long()
    return rows.view(heads, -1).sort(dim=1).values


def _estimate(scores: Tensor, values: Tensor, counts: Tensor, clusters: Tensor) -> PartialAttention:
    """Attention over `counts` `[H, N]` tokens at the mean keys and values of `clusters` `[H, N]`.

    Parameters
    ----------
    scores : `[H, G, E]`, scaled, of all mean keys.
    values : `[H, E, Dv]`, mean values.
    """
    group = scores.shape[1]
    found = scores.gather(2, clusters[:, None].expand(-1, group, -1)) + counts[:, None].log()
    lse = found.logsumexp(-1)
    means = values.gather(1, clusters[..., None].expand(-1, -1, values.shape[2]))
    out = torch.exp(found - lse.clamp(min=torch.finfo(torch.float32).min)[..., None]) @ means
    return out.flatten(0, 1), lse.flatten()
