"""Selectors: the protocol, its optional capabilities, and one choice of tokens for each group of query heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, get_args, runtime_checkable

import torch
from torch import Tensor

from ..core import RopeSpec

Pooling: TypeAlias = Literal["max", "sum"]
Rest: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]
"""`rest(ids)`: of ids `[H, K]` (-1 for none) an output `[Hq, Dv]` and its log-sum-exp `[Hq]`, float32."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """The shape of one layer's attention.

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
    """The tokens chosen for one query token of one layer, and the cost of choosing.

    Attributes
    ----------
    ids : `[H, K]` int64, positions in the context, no token twice in a row; -1 pads the end of a row.
    read_bytes : bytes read to choose: codes, centroids, landmarks, edges, keys compared. Attention over the chosen
        tokens is not included.
    compared_keys : whole keys compared with a query, summed over KV heads; a key that several queries of a group meet
        counts once.
    rest : estimates the attention over the tokens that are not among the ids given, which are those above or some of
        them; None if nothing is estimated.
    """

    ids: Tensor
    read_bytes: int
    compared_keys: int = 0
    rest: Rest | None = None


@runtime_checkable
class Selector(Protocol):
    """Chooses the tokens of one layer of one sequence that a query attends to.

    It covers the tokens `[start, start + len)` of a context; token i has position i. Tokens before these (sinks) and
    after them (the window) are always attended to and are not added. Adding tokens in pieces and at once are the same.
    """

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> LayerShape: ...
    @property
    def start(self) -> int: ...
    def __len__(self) -> int: ...
    def add(self, keys: Tensor, values: Tensor) -> None:
        """Adds the next tokens, `[H, T, D]` after rotary embedding and `[H, T, Dv]`; the tensors are not referred to.

        Raises `ValueError` for other shapes and for numbers that are not finite.
        """
        ...

    def select(self, queries: Tensor, position: int, budget: int) -> Selection:
        """Chooses at most `budget` tokens for each KV head, all of them if there are no more.

        `queries` are `[Hq, D]` after rotary embedding at `position`. Raises `ValueError` for queries that are not
        finite.
        """
        ...

    @property
    def held_bytes(self) -> int:
        """Bytes of the index, without copies of keys and values that the context holds as well."""
        ...


@runtime_checkable
class LearnsFromQueries(Protocol):
    """Optional capability: the index is built from queries of the prompt."""

    def observe(self, queries: Tensor, positions: Tensor) -> None:
        """Takes queries `[Hq, Q, D]` after rotary embedding, at `positions` `[Q]`, as a sample of later ones."""
        ...

    def build(self) -> None:
        """Builds the index of all added tokens, which are searched exactly until then.

        May run in another thread than `select`, but not at the same time as `add`.
        """
        ...


@runtime_checkable
class TravelsWithChunks(Protocol):
    """Optional capability: the index of a chunk's tokens depends on no later token, so it is stored with the chunk."""

    def export(self, first: int, stop: int) -> Mapping[str, Tensor]:
        """The index of covered tokens `[first, stop)`; bounds are multiples of 8, or the end of the covered tokens."""
        ...

    def restore(self, parts: Mapping[str, Tensor], tokens: int) -> None:
        """Adds the next `tokens` tokens from what `export` gave for them.

        Raises `CodecError` for tensors of another index.
        """
        ...


@runtime_checkable
class KeepsState(Protocol):
    """Optional capability: the index depends on the whole sequence, and is stored as a whole."""

    def state(self) -> Mapping[str, Tensor]:
        """All tensors of the built index."""
        ...

    def restore_state(self, parts: Mapping[str, Tensor]) -> None:
        """Restores the index that gave `state`; the same tokens were added before.

        Raises `CodecError` for tensors of another index.
        """
        ...


@runtime_checkable
class SeesNear(Protocol):
    """Optional capability: tokens are weighed beside what is attended to anyway."""

    def select_beside(self, queries: Tensor, position: int, budget: int, near: Tensor | None) -> Selection:
        """As `select`; `near` `[Hq]` float32, see `pooled`."""
        ...


def choose(selector: Selector, queries: Tensor, position: int, budget: int, near: Tensor | None = None) -> Selection:
    """What a selector chooses; one that covers no more tokens than `budget` is not asked.

    Parameters
    ----------
    queries : `[Hq, D]` after rotary embedding at `position`.
    budget : tokens for each KV head.
    near : see `SeesNear`; None if it is not known.
    """
    covered = len(selector)
    if 0 < budget < covered:
        if isinstance(selector, SeesNear):
            return selector.select_beside(queries, position, budget, near)
        return selector.select(queries, position, budget)
    ids = torch.arange(selector.start, selector.start + min(budget, covered))
    return Selection(ids.expand(selector.shape.kv_heads, -1), 0)


def pooled(scores: Tensor, shape: LayerShape, pooling: Pooling = "max", near: Tensor | None = None) -> Tensor:
    """The importance of candidates for each KV head: softmax of each query head, then its maximum or sum in the group.

    The softmax comes first because heads of one group differ in temperature (ShadowKV, arXiv 2410.21465, section 4;
    RetroInfer, arXiv 2505.02922, sums). With `near`, it is that of the whole attention: a head that looks at sinks and
    window alone has no say in which candidates are chosen.

    Parameters
    ----------
    scores : `[Hq, N]` scaled scores of the candidates; -inf for none.
    near : `[Hq]` float32, log-sum-exp of the scaled scores of what is attended to anyway; None for nothing.

    Returns
    -------
    Tensor : `[H, N]` float32.
    """
    if pooling not in get_args(Pooling):
        raise ValueError(f"pooling is {pooling!r}; expected one of {', '.join(get_args(Pooling))}")
    if near is None:
        weights = torch.softmax(scores.float(), dim=-1).nan_to_num_(0.0)
    else:
        total = torch.logaddexp(scores.float().logsumexp(-1), near)
        weights = (scores.float() - total[:, None]).exp().nan_to_num_(0.0)
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
