"""What all ways of choosing tokens share: the protocol, one choice for a group of query heads, the account."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, get_args, runtime_checkable

import torch
from torch import Tensor

from ..core import RopeSpec

Pooling: TypeAlias = Literal["max", "sum"]


@dataclass(frozen=True, slots=True)
class LayerShape:
    """The attention of one layer, as an index needs to know it.

    Attributes
    ----------
    kv_heads : H.
    group : G, query heads a KV head; query heads `[h G, (h + 1) G)` read KV head h.
    head_dim : D.
    scale : factor on the scores, usually `D ** -0.5`.
    rope : how keys and queries were rotated; None if they were not.
    """

    kv_heads: int
    group: int
    head_dim: int
    scale: float
    rope: RopeSpec | None = None

    @property
    def query_heads(self) -> int:
        return self.kv_heads * self.group

    def check_keys(self, keys: Tensor, name: str = "keys") -> None:
        """Raises `ValueError` for what is not `[H, T, D]` floating and finite."""
        if keys.ndim != 3 or keys.shape[0] != self.kv_heads or keys.shape[2] != self.head_dim:
            raise ValueError(f"{name} are {list(keys.shape)}; expected [{self.kv_heads}, T, {self.head_dim}]")
        _check_numbers(keys, name)

    def check_query(self, queries: Tensor, budget: int) -> None:
        """Raises `ValueError` for queries that are not `[Hq, D]` floating and finite, and for a negative budget."""
        if queries.shape != (self.query_heads, self.head_dim):
            raise ValueError(f"queries are {list(queries.shape)}; expected [{self.query_heads}, {self.head_dim}]")
        _check_numbers(queries, "queries")
        if budget < 0:
            raise ValueError(f"budget is {budget}; expected at least 0 tokens")

    def check_observed(self, queries: Tensor, positions: Tensor) -> None:
        """Raises `ValueError` for queries that are not `[Hq, Q, D]` floating and finite, or positions not `[Q]`."""
        if queries.ndim != 3 or queries.shape[0] != self.query_heads or queries.shape[2] != self.head_dim:
            raise ValueError(f"queries are {list(queries.shape)}; expected [{self.query_heads}, Q, {self.head_dim}]")
        if positions.shape != queries.shape[1:2]:
            raise ValueError(f"positions are {list(positions.shape)}; expected [{queries.shape[1]}]")
        if not bool(queries.isfinite().all()):
            raise ValueError("queries are not finite; the context they come from cannot be searched")


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """What a selector chose for one query token of one layer.

    Attributes
    ----------
    ids : `[H, K]` int64, positions in the context, no token twice in a row; -1 pads the end of a row.
    read_bytes : read in order to choose: codes, centroids, landmarks, edges, keys compared. What attention then reads
        of the chosen tokens is not in it.
    compared_keys : whole keys that were compared with a query, summed over KV heads; a key that several queries of a
        group meet counts once.
    rest : estimate of the attention over all that was not chosen, `[Hq, Dv]` and its log-sum-exp `[Hq]`, float32; None
        if there is none.
    """

    ids: Tensor
    read_bytes: int
    compared_keys: int = 0
    rest: tuple[Tensor, Tensor] | None = None


@runtime_checkable
class Selector(Protocol):
    """Which tokens of one layer of one sequence a query needs.

    It covers the tokens `[start, start + len)` of a context; token i stands at position i. What lies before (sinks) and
    behind (the window) is attended to anyway and never enters. Adding tokens in pieces gives what adding them at once
    gives.
    """

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> LayerShape: ...
    @property
    def start(self) -> int: ...
    def __len__(self) -> int: ...
    def add(self, keys: Tensor, values: Tensor) -> None:
        """The next tokens: `[H, T, D]` after rotary embedding, and `[H, T, Dv]`; neither is kept unless copied.

        Raises `ValueError` for other shapes and for numbers that are not finite.
        """
        ...

    def select(self, queries: Tensor, position: int, budget: int) -> Selection:
        """At most `budget` tokens for each KV head, all of them if there are no more.

        `queries` `[Hq, D]` after rotary embedding at `position`. Raises `ValueError` for queries
        that are not finite.
        """
        ...

    @property
    def held_bytes(self) -> int:
        """Bytes of the index, whole keys and values that only stand in for the context's own not counted."""
        ...


@runtime_checkable
class LearnsFromQueries(Protocol):
    """Optional capability: the index is built from the prompt's own queries."""

    def observe(self, queries: Tensor, positions: Tensor) -> None:
        """Queries `[Hq, Q, D]` after rotary embedding, at `positions` `[Q]`: a sample of what will be asked."""
        ...

    def build(self) -> None:
        """Takes what was added into the index; until then it is searched exactly. May run in another thread than
        `select`, not than `add`.
        """
        ...


@runtime_checkable
class TravelsWithChunks(Protocol):
    """Optional capability: what the index knows of some tokens depends on nothing behind them, so it can be stored with
    their chunk and read again.
    """

    def export(self, first: int, stop: int) -> Mapping[str, Tensor]:
        """Of the tokens `[first, stop)`, all covered; bounds are multiples of 8, or the end of what is covered."""
        ...

    def restore(self, parts: Mapping[str, Tensor], tokens: int) -> None:
        """Like `add` of the next `tokens` tokens, from what `export` gave of them.

        Raises `CodecError` for tensors that are not this index's.
        """
        ...


@runtime_checkable
class KeepsState(Protocol):
    """Optional capability: what the index knows belongs to the sequence as a whole, and can be stored like that."""

    def state(self) -> Mapping[str, Tensor]:
        """All of it, once it is built."""
        ...

    def restore_state(self, parts: Mapping[str, Tensor]) -> None:
        """Makes of the same tokens, added anew, what gave this `state`. Raises `CodecError` for tensors not its own."""
        ...


def choose(selector: Selector, queries: Tensor, position: int, budget: int) -> Selection:
    """What a selector chooses; one that covers no more tokens than `budget` is not asked.

    Parameters
    ----------
    queries : `[Hq, D]` after rotary embedding at `position`.
    budget : tokens for each KV head.
    """
    covered = len(selector)
    if 0 < budget < covered:
        return selector.select(queries, position, budget)
    ids = torch.arange(selector.start, selector.start + min(budget, covered))
    return Selection(ids.expand(selector.shape.kv_heads, -1), 0)


def pooled(scores: Tensor, shape: LayerShape, pooling: Pooling = "max") -> Tensor:
    """One importance for each KV head: softmax for each query head, then the maximum or the sum over the group.

    The softmax comes first because heads of one group differ in temperature (ShadowKV, arXiv 2410.21465, section 4;
    RetroInfer, arXiv 2505.02922, sums).

    Parameters
    ----------
    scores : `[Hq, N]` scaled scores over the same candidates; -inf for none.

    Returns
    -------
    Tensor : `[H, N]` float32.
    """
    if pooling not in get_args(Pooling):
        raise ValueError(f"pooling is {pooling!r}; expected one of {', '.join(get_args(Pooling))}")
    weights = torch.softmax(scores.float(), dim=-1).nan_to_num_(0.0)
    grouped = weights.view(shape.kv_heads, shape.group, -1)
    return grouped.amax(1) if pooling == "max" else grouped.sum(1)


def top_ids(importance: Tensor, budget: int, start: int = 0) -> Tensor:
    """The `budget` most important of `[H, N]`, as ids from `start` on, ascending: `[H, min(budget, N)]` int64."""
    count = importance.shape[1]
    if budget >= count:
        return torch.arange(start, start + count).expand(importance.shape[0], -1).contiguous()
    return importance.topk(budget, dim=1, sorted=False).indices.sort(dim=1).values + start


def _check_numbers(tensor: Tensor, name: str) -> None:
    if not tensor.is_floating_point():
        raise ValueError(f"{name} are {tensor.dtype}; expected floating numbers")
    # one pass, without a boolean copy: a sum of absolute values is finite only if all of them are, short of overflow
    if tensor.numel() and not bool(tensor.sum(dtype=torch.float32).isfinite()) and not bool(tensor.isfinite().all()):
        raise ValueError(f"{name} are not finite; the context they come from cannot be searched")
