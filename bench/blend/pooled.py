"""Questions over fused documents in several processes: `FusionBed` for a GPU that one process leaves waiting."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

from ...blend.blender import Blender
from ...evaluation.answers import Answer
from ...evaluation.placed import FusionBed, MeasuredMethod
from ...evaluation.questions import Question
from ..harness.pool import LoadedModel, ModelPool


class PooledBed(FusionBed):
    """Measures in the processes of a pool; see `FusionBed`.

    Parameters
    ----------
    stop_s : by `time.monotonic`; after it no question begins but the first one of a call.
    """

    def __init__(self, pool: ModelPool, *, stop_s: float = math.inf) -> None:
        super().__init__(pool.here.model)
        self._pool, self._stop_s = pool, stop_s

    def measure(
        self,
        questions: Sequence[Question],
        methods: dict[str, Blender],
        *,
        advance: Callable[[], object] = lambda: None,
    ) -> tuple[tuple[Answer, ...], list[MeasuredMethod]]:
        """As that of one process; over fewer questions, from the first on, if time is up."""
        measured = partial(_measured, methods=methods)
        found = self._pool.map(measured, questions, stop_s=self._stop_s, advance=advance)
        if not found:
            found = self._pool.map(measured, questions[:1])
        merged = [
            MeasuredMethod(
                name,
                tuple(one[place].answers[0] for _, one in found),
                sum(one[place].computed_ratio for _, one in found) / len(found),
            )
            for place, name in enumerate(methods)
        ]
        return tuple(full[0] for full, _ in found), merged


def _measured(
    loaded: LoadedModel, question: Question, *, methods: dict[str, Blender]
) -> tuple[tuple[Answer, ...], list[MeasuredMethod]]:
    bed = loaded.once("bed", lambda: FusionBed(loaded.model))
    return bed.measure([question], methods)
