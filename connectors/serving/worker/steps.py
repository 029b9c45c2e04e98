"""What a worker does in the steps of its engine, from a `StepPlan` to a `StepReport`. Imports no engine."""

from __future__ import annotations

from ...vllm.worker import Worker
from ..messages import StepPlan, StepReport

_IDLE_WAIT_S = 0.01


class Steps:
    """Of one worker, which is owned. Every step is `begin`, `save`, `end`; in between the engine computes.

    A step that asks for nothing, while nothing is under way, costs next to nothing.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._report = StepReport()
        self._is_busy = False  # something was begun whose end has not been told of
        self._waits_for_layers = False  # within this step
        self._bad_blocks: set[int] = set()
        self._lost: set[str] = set()

    def begin(self, plan: StepPlan) -> None:
        """Begin loads and fusions, and go on with those that the plan names."""
        if not self._is_busy and plan.is_empty:
            return
        self._is_busy = True
        self._report.number = plan.number
        self._lost = set()
        for lookup in plan.lookups:
            self._report.answers[lookup.request_id] = self._worker.transfers.look_up(lookup)
        for load in plan.loads:
            self._worker.transfers.load(load)
        if self._worker.fuser is not None:
            for fusion in plan.fusions:
                self._worker.fuser.begin(fusion)
            for advance in plan.advances:
                self._worker.fuser.advance(advance)
            self._report.found |= {name: (mask,) for name, mask in self._worker.fuser.fetched().items()}

        # Last, since passes of our own would wait for them, too.
        for load in plan.layerwise:
            self._worker.layer_loads.begin(load)
            self._waits_for_layers = True

    def wait_for_layer(self, name: str) -> None:
        """For loads within the step; others are over before the engine schedules what needs them."""
        if self._waits_for_layers and name in self._worker.layer_numbers:
            self._worker.layer_loads.wait(self._worker.layer_numbers[name])

    def save(self, plan: StepPlan) -> None:
        """All is computed: copy out what the plan wants stored."""
        self._finish_layers()
        for save in plan.saves:
            if save.request_id not in self._lost:  # otherwise computed on what has not come
                self._worker.transfers.save(save)

    def end(self, plan: StepPlan, gone: set[str]) -> set[str]:
        """Requests for which all has come, or will not come. The requests of `gone` need nothing any more."""
        if not (self._is_busy or plan.is_idle):
            return set()
        for request_id in gone:
            self._worker.transfers.cancel(request_id)
        if plan.is_idle:
            self._worker.transfers.wait(_IDLE_WAIT_S)
        self._finish_layers()
        arrivals = self._worker.transfers.arrivals()
        if self._worker.fuser is not None:
            for request_id in gone:
                self._worker.fuser.cancel(request_id)
            arrivals += self._worker.fuser.arrivals()
        for arrival in arrivals:
            self._report.loaded[arrival.request_id] = arrival.loaded
            self._bad_blocks |= arrival.bad_blocks
        self._is_busy = self._worker.has_work
        return {arrival.request_id for arrival in arrivals}

    def take_bad_blocks(self) -> set[int]:
        """Blocks in which nothing came, since the last call."""
        blocks, self._bad_blocks = self._bad_blocks, set()
        return blocks

    def take_report(self) -> StepReport | None:
        """Since the last call; None if there is nothing to tell."""
        if self._worker.transfers.tells_moves:
            self._report.moves += self._worker.transfers.take_moves()
        if self._report.is_empty:
            return None
        report, self._report = self._report, StepReport()
        return report

    def close(self) -> None:
        """Ends loads and stores what was to be stored; closes the worker's store."""
        self._worker.layer_loads.close()
        self._worker.transfers.close()

    def _finish_layers(self) -> None:
        if not self._waits_for_layers:
            return
        self._waits_for_layers = False
        arrivals = self._worker.layer_loads.finish()
        for arrival in arrivals:
            self._report.loaded[arrival.request_id] = arrival.loaded
            self._bad_blocks |= arrival.bad_blocks
        self._lost |= {arrival.request_id for arrival in arrivals if arrival.loaded.failed}
