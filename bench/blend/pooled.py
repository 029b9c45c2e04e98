"""Questions over fused documents in several processes, each with a share of the cores or of a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

from ...blend.blender import Blender
from ...evaluation.answers import Answer
from ...evaluation.placed import FusionBed, MeasuredMethod
from ...evaluation.questions import Question
from ..harness.pool import LoadedModel, ModelPool

_NAME = "measured"  # of the weights, which nobody looks for in a store


class PooledBed(FusionBed):
    """Measures in the processes of a pool; see `FusionBed`."""

    def __init__(self, pool: ModelPool) -> None:
        super().__init__(pool.here.model, model_id=_NAME)
        self._pool = pool

    def measure(
        self,
        contexts: Sequence[Sequence[Question]],
        methods: dict[str, Blender],
        *,
        stop_s: float = math.inf,
        advance: Callable[[], object] = lambda: None,
    ) -> tuple[tuple[Answer, ...], list[MeasuredMethod]]:
        """As that of one process."""
        measured = partial(_measured, methods=methods)
        found = self._pool.map(measured, contexts, stop_s=stop_s, advance=advance)
        if not found:
            found = self._pool.map(measured, contexts[:1], advance=advance)
        total = sum(len(full) for full, _ in found)
        merged = [
            MeasuredMethod(
                name,
                tuple(answer for _, methods_found in found for answer in methods_found[place].answers),
                sum(of[place].computed_ratio * len(full) for full, of in found) / total,
            )
            for place, name in enumerate(methods)
        ]
        return tuple(answer for full, _ in found for answer in full), merged


def _measured(
    loaded: LoadedModel, questions: Sequence[Question], *, methods: dict[str, Blender]
) -> tuple[tuple[Answer, ...], list[MeasuredMethod]]:
    bed = loaded.once("bed", lambda: FusionBed(loaded.model, model_id=_NAME))
    return bed.measure([questions], methods)
