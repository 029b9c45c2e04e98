"""How near attention over chosen tokens comes to attention over all, for the model's own queries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...retrieval.attention import attend
from ...retrieval.selector import Selection, Selector
from .contexts import SINK_TOKENS, WINDOW_TOKENS, Context, ContextModel, attend_pinned, pinned_rows


@dataclass(frozen=True, slots=True)
class AttentionQuality:
    """Means over layers, heads and steps.

    Attributes
    ----------
    mass : share of the softmax over all tokens that falls on those attended to; an estimate of the rest adds none.
    recall : share of the tokens that exact search would choose within the same budget; NaN for a budget of none.
    error : norm of the difference to dense attention's output, over the norm of that; an estimate of the rest counts.
    compared_ratio : whole keys compared with a query, over the keys that the index covers.
    """

    mass: float
    recall: float
    error: float
    compared_ratio: float


@dataclass(frozen=True, slots=True, eq=False)
class _Step:
    """One token in one layer, densely."""

    layer: int
    query: Tensor  # [Hq, D]
    position: int
    pinned: tuple[Tensor, Tensor]
    weights: Tensor  # [H, G, C], the softmax over everything, on the context
    covered_mass: Tensor  # [H, G], of it on what selectors cover
    out: Tensor  # [Hq, Dv]


class AttentionProbe:
    """Queries of a dense pass over a context, and what dense attention makes of them.

    Parameters
    ----------
    behind : what lies between the context and `own`.
    own : the dense pass of the tokens whose queries are looked at.
    exact : an exact selector for each layer, which says what there was to find.
    """

    def __init__(
        self, model: ContextModel, context: Context, behind: Context | None, own: Context, exact: Sequence[Selector]
    ) -> None:
        self._model, self._context, self._exact = model, context, exact
        self._found: dict[int, list[Tensor]] = {}
        self._steps = [self._step(behind, own, layer, t) for layer in range(own.keys.shape[0]) for t in range(len(own))]

    def _step(self, behind: Context | None, own: Context, layer: int, t: int) -> _Step:
        context, shape = self._context, self._model.shape
        before = [part for part in (context, behind) if part is not None]
        keys, values = (
            torch.cat([*(getattr(part, name)[layer] for part in before), getattr(own, name)[layer, :, : t + 1]], dim=1)
            for name in ("keys", "values")
        )
        query = own.queries[layer, :, t]
        out, lse = attend(query, keys, values, scale=shape.scale)
        scores = query.view(shape.kv_heads, shape.group, -1) @ context.keys[layer].mT * shape.scale
        weights = torch.exp(scores - lse.view(shape.kv_heads, shape.group, 1))
        covered = weights[..., SINK_TOKENS : len(context) - WINDOW_TOKENS].sum(-1)
        return _Step(layer, query, own.first + t, pinned_rows(keys, values, len(context)), weights, covered, out)

    def measure(self, selectors: Sequence[Selector], budget: int) -> AttentionQuality:
        """Measure the choices of these selectors, one for each layer."""
        if budget not in self._found:
            self._found[budget] = [self._select(self._exact, step, budget).ids for step in self._steps]
        found = [
            self._of(step, self._select(selectors, step, budget), ids, len(selectors[step.layer]))
            for step, ids in zip(self._steps, self._found[budget], strict=True)
        ]
        return AttentionQuality(*torch.tensor(found).mean(0).tolist())

    def _select(self, selectors: Sequence[Selector], step: _Step, budget: int) -> Selection:
        return selectors[step.layer].select(step.query, step.position, budget)

    def _of(self, step: _Step, selection: Selection, exact: Tensor, covered: int) -> tuple[float, float, float, float]:
        chosen = _marked(selection.ids, len(self._context))
        lost = step.covered_mass - (step.weights * chosen[:, None]).sum(-1)
        wanted = _marked(exact, len(self._context))
        recall = float((chosen & wanted).sum() / wanted.sum()) if bool(wanted.any()) else math.nan
        keys, values = self._context.keys[step.layer], self._context.values[step.layer]
        out = attend_pinned(step.query, step.pinned, keys, values, selection, self._model.shape.scale)
        error = (out - step.out).norm(dim=-1) / step.out.norm(dim=-1)
        compared = selection.compared_keys / max(1, covered * self._model.shape.kv_heads)
        return float(1 - lost.mean()), recall, float(error.mean()), compared


def _marked(ids: Tensor, tokens: int) -> Tensor:
    """`[H, K]` ids, -1 for none -> `[H, tokens]` bool."""
    marks = torch.zeros(ids.shape[0], tokens + 1, dtype=torch.bool)
    return marks.scatter_(1, torch.where(ids >= 0, ids, tokens), True)[:, :tokens]
