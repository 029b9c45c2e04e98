"""What a worker does in the steps of its engine, from a `StepPlan` to a `StepReport`. Imports no engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...identity.adapters import EngineMemory
from ..messages import StepPlan, StepReport, WorkerInfo
from .arrivals import Arrival
from .fuser import Fuser
from .layer_loads import LayerLoads
from .transfers import Transfers

_IDLE_WAIT_S = 0.01
_DRAIN_S = 60.0


@dataclass(frozen=True, slots=True)
class Worker:
    """What kvloom has in a worker of an engine: a store of its rank's heads, beside the caches of its layers.

    `layer_numbers`: by the engine's name of a layer. `fuser`: None where the engine cannot fuse. `adapters`: None where
    it has none. `fails_whole`: the engine does not learn which blocks were not loaded, but that a load has failed.
    """

    info: WorkerInfo
    transfers: Transfers
    layer_loads: LayerLoads
    layer_numbers: Mapping[str, int]
    fuser: Fuser | None
    adapters: EngineMemory | None = None
    fails_whole: bool = False

    @property
    def has_work(self) -> bool:
        """Whether something has begun that was not reported yet. A save counts as done: its end is not reported."""
        is_reading = self.transfers.is_loading or self.transfers.prober.is_probing
        return is_reading or (self.fuser is not None and self.fuser.is_fusing)


class Steps:
    """The steps of one worker, which is owned. Each step is `begin`, `save`, `end`; in between the engine computes.

    A step that asks for nothing, while nothing is under way, costs next to nothing.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._report = StepReport()
        self._is_busy = False  # something has begun that was not reported yet
        self._waits_for_layers = False  # within this step
        self._bad_blocks: set[int] = set()
        self._failed: set[str] = set()  # requests whose loads have failed, not reported yet
        self._revoked: set[str] = set()  # whose loads under way are to fail, whatever becomes of them
        self._again: set[str] = set()  # to be reported once more
        self._lost: set[str] = set()

    def begin(self, plan: StepPlan) -> None:
        """Begin loads and fusions, and advance those that the plan names."""
        if not self._is_busy and plan.is_empty:
            return
        self._is_busy = True
        worker, report = self._worker, self._report
        report.number = plan.number
        self._lost = set()
        if plan.introduce:
            report.workers[worker.transfers.rank] = worker.info
        if plan.is_reset:
            worker.transfers.drop_pending_saves()
        for number in plan.released:
            worker.transfers.offers.release(number)
        for lookup in plan.lookups:
            report.found_prefixes[lookup.number] = found = worker.transfers.look_up(lookup)
            if not found and (missing := worker.transfers.why_missing(lookup)) is not None:
                report.missing[lookup.number] = missing
        for load in plan.loads:
            worker.transfers.load(load)
        if worker.fuser is not None:
            for fusion in plan.fusions:
                worker.fuser.begin(fusion)
            for advance in plan.advances:
                worker.fuser.advance(advance)
            report.found_documents |= {name: (mask,) for name, mask in worker.fuser.fetched().items()}
        for revocation in plan.revocations:
            self._cancel(revocation.request_id)
            if not worker.fails_whole:
                self._bad_blocks |= revocation.blocks
            elif worker.transfers.is_loading_for(revocation.request_id):
                self._revoked.add(revocation.request_id)
            report.revoked.add(revocation.request_id)

        for request_id in plan.cancelled:
            worker.transfers.give_back(request_id)
        self._again.update(plan.failures)

        # Last, since passes of our own would wait for them, too.
        for load in plan.layer_loads:
            worker.layer_loads.begin(load)
            self._waits_for_layers = True

    def wait_for_layer(self, name: str) -> None:
        """Wait for loads within the step; others are over before the engine schedules what needs them."""
        if self._waits_for_layers and name in self._worker.layer_numbers:
            self._worker.layer_loads.wait(self._worker.layer_numbers[name])

    def save(self, plan: StepPlan) -> None:
        """The step is computed: copy out what the plan wants stored."""
        self._finish_layers()
        for save in plan.saves:
            if save.request_id not in self._lost:  # otherwise it was computed on KV that is not there
                self._worker.transfers.save(save)

    def end(self, plan: StepPlan, gone: set[str]) -> set[str]:
        """Requests whose load or fusion is over. The requests of `gone` are finished or aborted."""
        if not (self._is_busy or plan.is_idle):
            return set()
        for request_id in gone:
            self._cancel(request_id)
        if plan.is_idle and not plan.advances:
            self._worker.transfers.wait(_IDLE_WAIT_S)
        self._finish_layers()
        arrivals = self._worker.transfers.arrivals()
        if self._worker.fuser is not None:
            arrivals += self._worker.fuser.arrivals()
        self._add(arrivals)
        if (probed := self._worker.transfers.prober.take()) is not None:
            self._report.probed = probed
        if plan.probe is not None:  # now, as the step is computed, and not beside it
            self._worker.transfers.prober.begin(plan.probe)
        self._is_busy = self._worker.has_work
        again, self._again = self._again, set()
        self._failed |= again
        return {arrival.request_id for arrival in arrivals} | again

    def take_bad_blocks(self) -> set[int]:
        """Blocks into which nothing was loaded, since the last call."""
        blocks, self._bad_blocks = self._bad_blocks, set()
        return blocks

    def take_failed(self) -> set[str]:
        """Requests of which nothing was loaded, since the last call; of an engine that learns no blocks."""
        failed, self._failed = self._failed, set()
        return failed

    def take_report(self) -> StepReport | None:
        """The report since the last call; None if there is nothing to report."""
        if self._worker.transfers.reports_placement:
            self._report.placement_changes += self._worker.transfers.take_placement_changes()
        if self._report.is_empty:
            return None
        report, self._report = self._report, StepReport()
        return report

    def drain(self) -> None:
        """Wait until no thread touches the engine's cache: its memory is about to be taken away."""
        self._worker.transfers.drain(_DRAIN_S)

    def close(self) -> None:
        """End loads, store what waits to be stored, and close the worker's store."""
        self._worker.layer_loads.close()
        self._worker.transfers.close()

    def _cancel(self, request_id: str) -> None:
        self._worker.transfers.cancel(request_id)
        if self._worker.fuser is not None:
            self._worker.fuser.cancel(request_id)

    def _finish_layers(self) -> None:
        if not self._waits_for_layers:
            return
        self._waits_for_layers = False
        arrivals = self._worker.layer_loads.finish()
        self._add(arrivals)
        self._lost |= {arrival.request_id for arrival in arrivals if arrival.loaded.failed}

    def _add(self, arrivals: list[Arrival]) -> None:
        for arrival in arrivals:
            self._report.loaded[arrival.request_id] = arrival.loaded
            if not self._worker.fails_whole:
                self._bad_blocks |= arrival.bad_blocks
            elif arrival.loaded.failed or arrival.request_id in self._revoked:
                self._failed.add(arrival.request_id)
            self._revoked.discard(arrival.request_id)
