"""Cascades: a cheap selector names candidates, scores by better keys decide among them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from .growable import GrowableTensor
from .selector import KeepsState, LayerShape, LearnsFromQueries, Pooling, Selection, Selector, pooled


@runtime_checkable
class KeySource(Protocol):
    """Keys of single tokens, exact or approximate, by which candidates are compared."""

    def add(self, keys: Tensor, values: Tensor) -> None:
        """As for `Selector`."""
        ...

    def keys_at(self, ids: Tensor) -> Tensor:
        """Keys of positions `[H, K]` after rotation, `[H, K, D]`; those of -1 are undefined."""
        ...

    @property
    def token_bytes(self) -> int:
        """Bytes read for one token of one KV head."""
        ...

    @property
    def held_bytes(self) -> int: ...


class ExactKeys:
    """`KeySource` that copies the keys. They stand for the context's own, so they count no bytes."""

    held_bytes = 0

    def __init__(self, shape: LayerShape, *, start: int = 0) -> None:
        self._shape, self._start, self._keys = shape, start, GrowableTensor(1)

    @property
    def token_bytes(self) -> int:
        return self._shape.head_dim * (self._keys.all.element_size() if len(self._keys) else 4)

    def add(self, keys: Tensor, values: Tensor) -> None:
        self._shape.check_keys(keys)
        self._keys.add(keys)

    def keys_at(self, ids: Tensor) -> Tensor:
        places = (ids - self._start).clamp(min=0)[..., None]
        return self._keys.all.gather(1, places.expand(-1, -1, self._shape.head_dim))


class CascadeSelector:
    """`Selector` that takes more tokens than the budget from `coarse` and keeps those that score best by `fine`.

    A2ATS and ShadowKV choose once; RetroInfer estimates the rest. An estimate of `coarse` is passed on; candidates that
    `fine` refuses are in neither part.

    Parameters
    ----------
    coarse : may be a cascade itself.
    fine : `ExactKeys`, or a `FactorIndex`; may be the same object as `coarse`.
    candidate_ratio : share of the tokens that `coarse` chooses, unless the budget is larger.
    pooling : see `pooled`; the softmax is over the candidates.
    """

    def __init__(
        self,
        shape: LayerShape,
        coarse: Selector,
        fine: KeySource,
        *,
        candidate_ratio: float = 0.06,
        pooling: Pooling = "max",
    ) -> None:
        if not 0 < candidate_ratio <= 1:
            raise ValueError(f"candidate_ratio is {candidate_ratio}; expected above 0 and at most 1")
        self.shape, self.coarse, self.fine = shape, coarse, fine
        self._candidate_ratio, self._pooling = candidate_ratio, pooling

    def __len__(self) -> int:
        return len(self.coarse)

    @property
    def name(self) -> str:
        return f"{self.coarse.name}+{getattr(self.fine, 'name', 'exact')}"

    @property
    def start(self) -> int:
        return self.coarse.start

    @property
    def held_bytes(self) -> int:
        return sum(stage.held_bytes for stage in self._stages())

    def add(self, keys: Tensor, values: Tensor) -> None:
        self.shape.check_keys(keys)
        for stage in self._stages():
            stage.add(keys, values)

    def observe(self, queries: Tensor, positions: Tensor) -> None:
        """See `LearnsFromQueries`."""
        for stage in self._stages():
            if isinstance(stage, LearnsFromQueries):
                stage.observe(queries, positions)

    def build(self) -> None:
        for stage in self._stages():
            if isinstance(stage, LearnsFromQueries):
                stage.build()

    def state(self) -> Mapping[str, Tensor]:
        """See `KeepsState`: what those stages that keep a state give, each under the stage's number."""
        return {
            f"{number}.{name}": tensor
            for number, stage in enumerate(self._stages())
            if isinstance(stage, KeepsState)
            for name, tensor in stage.state().items()
        }

    def restore_state(self, parts: Mapping[str, Tensor]) -> None:
        """See `KeepsState`."""
        for number, stage in enumerate(self._stages()):
            if isinstance(stage, KeepsState):
                prefix = f"{number}."
                stage.restore_state({n.removeprefix(prefix): t for n, t in parts.items() if n.startswith(prefix)})

    def select(self, queries: Tensor, position: int, budget: int) -> Selection:
        self.shape.check_query(queries, budget)
        found = self.coarse.select(queries, position, max(budget, math.ceil(self._candidate_ratio * len(self))))
        if found.ids.shape[1] <= budget:
            return found
        keys = self.fine.keys_at(found.ids).float()
        is_token = found.ids >= 0
        scores = (queries.float().view(self.shape.kv_heads, self.shape.group, -1) @ keys.mT) * self.shape.scale
        scores = scores.masked_fill(~is_token[:, None], -torch.inf).flatten(0, 1)
        importance = pooled(scores, self.shape, self._pooling).masked_fill(~is_token, -1.0)
        ids = found.ids.gather(1, importance.topk(budget, dim=1).indices)
        ids = ids.masked_fill(ids < 0, torch.iinfo(torch.int64).max).sort(1).values
        ids = ids.masked_fill(ids == torch.iinfo(torch.int64).max, -1)
        candidates = int(is_token.sum())
        read = found.read_bytes + candidates * self.fine.token_bytes
        return Selection(ids, read, found.compared_keys + candidates, found.rest)

    def _stages(self) -> list[Selector | KeySource]:
        stages: list[Selector | KeySource] = [self.coarse]
        return stages if self.fine is stages[0] else [*stages, self.fine]
