"""A worker of vLLM without a model: blocks hold numbers that stand for KV, each made of its token and of all before it.

vLLM's scheduler and the scheduler's half of `KVLoomConnector` are the real ones. What this worker reads where a token
was computed decides what it answers, so that a wrong block, a block overwritten too early, or fused KV under a plain
name shows in the answer, as it would with a model. Needs vLLM and its own test utilities (`vllm_unit`).
"""

import importlib
import math
import random
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvloom.connectors.serving.controller.decisions import Missing
from kvloom.connectors.serving.messages import Fusion, Load, Loaded, LookUp, StepReport, WorkerInfo
from kvloom.connectors.serving.settings import RequestOptions
from kvloom.connectors.serving.worker.fuser import continued, stage
from kvloom.core import ChunkKey, KVSpec

UNIT = Path(sys.prefix) / "vllm-tests"
"""vLLM's folder tests/v1/kv_connector/unit, where tests/engines/vllm.sh puts it."""

NEEDS_SCHEDULER = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.skipif(
        not (UNIT / "utils.py").exists(),
        reason="vLLM's source distribution could not be had when this environment was made (tests/engines/vllm.sh)",
    ),
]
"""Marks of tests with vLLM's real scheduler and a worker of this file."""

VOCABULARY = 997


def vllm_unit(name: str) -> Any:
    """A module of vLLM's own tests. They are no installed package, so that they are given a name here."""
    if "vllm_unit" not in sys.modules:
        package = types.ModuleType("vllm_unit")
        package.__path__ = [str(UNIT)]
        sys.modules["vllm_unit"] = package
    return importlib.import_module(f"vllm_unit.{name}")


SPEC = KVSpec("model", 2, 2, 8, torch.float32, None)


def after(kv: int, token: int, weights: int = 0) -> int:
    """KV of a token behind KV, by a model of these weights."""
    return hash((kv, token, weights) if weights else (kv, token))


def answer_to(kv: int) -> int:
    return kv % VOCABULARY


def plain_answer(prompt: Sequence[int], count: int, weights: int = 0) -> list[int]:
    kv, answer = 0, []
    for token in prompt:
        kv = after(kv, token, weights)
    for _ in range(count):
        answer.append(answer_to(kv))
        kv = after(kv, answer[-1], weights)
    return answer


@dataclass
class Faults:
    """What goes wrong from now on, by request id; `tokens` that still arrive of a load."""

    lost_from: dict[str, int] = field(default_factory=dict)
    held: set[str] = field(default_factory=set)  # loads and fusions that do not go on
    token_s: Callable[[], float] | None = None  # seconds that a load says it took for each token


class SimulatedStore(dict[ChunkKey, list[int]]):
    """At most `capacity` chunks, of which the one stored or read longest ago goes that no offer pins."""

    def __init__(self, capacity: int = 10**9) -> None:
        super().__init__()
        self.capacity = capacity
        self.pins: dict[int, Sequence[ChunkKey]] = {}  # by the number of a look-up

    def save(self, key: ChunkKey, kv: list[int]) -> None:
        if key in self:
            return
        pinned = {each for keys in self.pins.values() for each in keys}
        while len(self) >= self.capacity:
            victim = next((each for each in self if each not in pinned), None)
            if victim is None:
                return
            del self[victim]
        self[key] = kv

    def read(self, key: ChunkKey) -> list[int] | None:
        kv = self.pop(key, None)
        if kv is not None:
            self[key] = kv  # the last one to go
        return kv


class SimulatedWorker:
    """Steps a scheduler; `answers` are the tokens of every request so far. `weights` may change at any time."""

    def __init__(self, scheduler: Any, store: SimulatedStore | None = None, *, slice_tokens: int = 10**6) -> None:
        self.scheduler, self.slice_tokens = scheduler, slice_tokens
        self.store = SimulatedStore() if store is None else store
        self.weights = 0
        self.token = str(id(self))
        self.transfers, self.adapters = self, None  # as of a `Worker`
        self.info: WorkerInfo | None = WorkerInfo(SPEC, may_fuse=True, token=self.token)
        self.failed: set[str] = set()  # requests that ended with an error
        self.failed_loads: set[str] = set()  # of the step, where vLLM is not told which blocks
        self.weights_of: dict[str, list[int]] = {}  # that each token of an answer was sampled by
        self.block_tokens = scheduler.block_size
        self.slots: dict[int, int] = {}
        self.requests: dict[str, Any] = {}
        self.answers: dict[str, list[int]] = {}
        self.usage: dict[str, dict[str, Any]] = {}
        self.faults = Faults()
        self.loads: dict[str, Load] = {}
        self.probes: list[Load] = []
        self.fusions: dict[str, tuple[Fusion, list[int] | None]] = {}  # with positions still to be computed
        self.led: dict[str, int] = {}  # token up to which a fusion has what precedes its documents
        self.computed: list[int] = []  # by fusions, in this order
        self.chosen: dict[str, np.ndarray | None] = {}
        self.told: set[str] = set()  # fusions whose documents were found, or not, as the scheduler knows
        self._serial = 0

    def add(
        self, prompt: Sequence[int], options: dict[str, Any] | None = None, *, tokens: int = 4, name: str | None = None
    ) -> str:
        self._serial += 1
        utils = vllm_unit("utils")
        request = utils.create_request(self._serial, 1, block_size=self.block_tokens, max_tokens=tokens)
        kinds = type(request)
        name = name or f"r{self._serial}"
        sampling = request.sampling_params.clone()
        sampling.ignore_eos = True
        made = kinds(
            request_id=name,
            prompt_token_ids=list(prompt),
            sampling_params=sampling,
            pooling_params=None,
            mm_features=None,
            block_hasher=utils.get_request_block_hasher(self.block_tokens, utils.sha256),
        )
        made.kv_transfer_params = None if options is None else {"kvloom": options}
        self.requests[name], self.answers[name], self.weights_of[name] = made, [], []
        self.scheduler.add_request(made)
        return name

    def is_right(self, name: str, prompt: Sequence[int]) -> bool:
        """Whether each token of an answer is what its weights make of all tokens before it."""
        answer, weights = self.answers[name], self.weights_of[name]
        rows = ([*prompt, *answer[:count]] for count in range(len(answer)))
        return answer == [plain_answer(row, 1, by)[0] for row, by in zip(rows, weights, strict=True)]

    def abort(self, name: str) -> None:
        from vllm.v1.request import RequestStatus

        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    def run(self, limit: int = 2000) -> None:
        for _ in range(limit):
            if not self.scheduler.has_requests():
                return
            self.step()
        raise AssertionError(f"requests hang: {list(self.scheduler.requests)}")

    def step(self, meanwhile: Callable[[], object] | None = None) -> Any:
        """One step of the engine; what the scheduler had planned. `meanwhile`: before it hears of the outcome."""
        output = self.scheduler.schedule()
        plan = output.kv_connector_metadata.plan
        sampled = self._forward(output)
        for save in plan.saves:
            blocks, size = save.blocks, self.block_tokens
            offset = save.start % size
            kv = [self._read(blocks, p) for p in range(offset, offset + len(save.token_ids))]
            self.store.save(save.keys[0], kv)
        report, bad_blocks, arrived = StepReport(number=plan.number), set[int](), set[str]()
        if plan.introduce:
            report.workers |= {} if self.info is None else {0: self.info}
        for number in plan.released:
            self.store.pins.pop(number, None)
        for lookup in plan.lookups:
            report.found_prefixes[lookup.number] = found = self.look_up(lookup)
            if not found:
                report.missing[lookup.number] = self.why_missing(lookup)
        for request_id, load in list(self.loads.items()):
            if request_id not in self.faults.held:
                del self.loads[request_id]
                self._load(load, report, bad_blocks)
                arrived.add(request_id)
        if plan.probe is not None:
            self.probes.append(plan.probe)
            report.probed = self._probe(plan.probe)
        self.loads |= {load.request_id: load for load in plan.loads}
        for request_id in set(plan.cancelled) & self.loads.keys():
            self._give_back(self.loads.pop(request_id), report, bad_blocks)
            arrived.add(request_id)
        for fusion in plan.fusions:
            self.fusions[fusion.request_id] = (fusion, None)
            self.led.pop(fusion.request_id, None)
            self.told.discard(fusion.request_id)
        for request_id, (fusion, _) in self.fusions.items():
            if request_id not in self.faults.held | self.told:
                self.told.add(request_id)
                report.found_documents[request_id] = (
                    tuple(document.keys[0] in self.store for document in fusion.documents),
                )
        for revocation in plan.revocations:
            bad_blocks |= revocation.blocks
            report.revoked.add(revocation.request_id)
            if self.fusions.pop(revocation.request_id, None) is not None:
                report.loaded[revocation.request_id] = Loaded({}, True, 0.0)
                arrived.add(revocation.request_id)
        for advance in plan.advances:
            self._advance(advance.request_id, advance.found, report, arrived)
        for request_id in output.finished_req_ids & self.fusions.keys():
            del self.fusions[request_id]
            report.loaded[request_id] = Loaded({}, False, 0.0)
            arrived.add(request_id)
        if meanwhile is not None:
            weights, _ = self.weights, meanwhile()
            self._tell(output, sampled, report, bad_blocks, arrived, weights)
        else:
            self._tell(output, sampled, report, bad_blocks, arrived, self.weights)
        return output

    def look_up(self, lookup: LookUp) -> tuple[str, ...]:
        keys = lookup.keys[0]
        if lookup.is_each:
            return tuple("host" if key in self.store else "" for key in keys)
        found = next((i for i, key in enumerate(keys) if key not in self.store), len(keys))
        self.store.pins.pop(lookup.replaces, None)
        if lookup.number and found:
            self.store.pins[lookup.number] = keys[:found]
        return ("host",) * found

    def why_missing(self, _: LookUp) -> Missing:
        return "never stored"

    # ------------------------------------------------------------------------------------------------ the model

    def _read(self, blocks: Sequence[int], position: int) -> int:
        return self.slots.get(
            blocks[position // self.block_tokens] * self.block_tokens + position % self.block_tokens, 0
        )

    def _write(self, blocks: Sequence[int], position: int, kv: int) -> None:
        self.slots[blocks[position // self.block_tokens] * self.block_tokens + position % self.block_tokens] = kv

    def _compute(self, blocks: Sequence[int], position: int, token: int) -> int:
        kv = after(self._read(blocks, position - 1) if position else 0, token, self.weights)
        self._write(blocks, position, kv)
        return kv

    def _forward(self, output: Any) -> dict[str, list[int]]:
        before = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        before |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        sampled: dict[str, list[int]] = {}
        for name, count in output.num_scheduled_tokens.items():
            (blocks,) = self.scheduler.kv_cache_manager.get_block_ids(name)
            request, start = self.requests[name], before[name]
            kv = 0
            for position in range(start, start + count):
                kv = self._compute(blocks, position, request.all_token_ids[position])
            sampled[name] = [answer_to(kv)] if start + count >= request.num_tokens else []
        return sampled

    # ------------------------------------------------------------------------------------------- the connector

    def _load(self, load: Load, report: StepReport, bad_blocks: set[int]) -> None:
        lost_from, first = self.faults.lost_from.pop(load.request_id, load.stop), load.first
        for key in load.keys[0]:
            if (kv := self.store.read(key)) is None:
                break
            for position in range(max(first, load.start), min(first + len(kv), load.stop, lost_from)):
                self._write(load.blocks, position, kv[position - first])
            first += len(kv)
        lost_from = min(lost_from, max(first, load.start))
        self.store.pins.pop(load.lookup, None)
        if lost_from < load.stop:
            size = self.block_tokens
            bad_blocks.update(load.blocks[max(lost_from, load.start) // size : -(-load.stop // size)])
        tokens = {"host": max(min(load.stop, lost_from) - load.start, 0)}
        read_s = {} if self.faults.token_s is None else {"host": tokens["host"] * self.faults.token_s()}
        report.loaded[load.request_id] = Loaded(tokens, lost_from < load.stop, 0.0, read_s=read_s)

    def _probe(self, probe: Load) -> Loaded:
        if self.store.read(probe.keys[0][0]) is None:
            return Loaded({}, True, 0.0)
        tokens = probe.stop - probe.start
        read_s = {} if self.faults.token_s is None else {"host": tokens * self.faults.token_s()}
        return Loaded({"host": tokens}, False, 0.0, read_s=read_s)

    def _give_back(self, load: Load, report: StepReport, bad_blocks: set[int]) -> None:
        self.store.pins.pop(load.lookup, None)
        bad_blocks.update(load.blocks_from(load.start, self.block_tokens))
        report.loaded[load.request_id] = Loaded({}, True, 0.0, given_back=True)

    def _advance(self, name: str, found: Sequence[bool] | None, report: StepReport, arrived: set[str]) -> None:
        if name not in self.fusions:
            return
        fusion, left = self.fusions[name]
        if found is None:
            led = self.led.setdefault(name, fusion.start)
            self.led[name] = min(led + self.slice_tokens, fusion.documents[0].start, fusion.stop)
            for position in range(led, self.led[name]):
                self._compute(fusion.blocks, position, int(fusion.token_ids[position]))
            return
        if name in self.faults.held:
            return
        if left is None:
            for document, is_found in zip(fusion.documents, found, strict=True):
                for position in range(max(document.start, fusion.start), min(document.stop, fusion.stop)):
                    if is_found:
                        self._write(fusion.blocks, position, self.store[document.keys[0]][position - document.start])
            left = self._choose(fusion, tuple(found), self.led.pop(name, 0))
            self.chosen[name] = None if fusion.chosen is not None else np.array(left, dtype=np.int32)
        else:
            for position in left[: self.slice_tokens]:
                self._compute(fusion.blocks, position, int(fusion.token_ids[position]))
                self.computed.append(position)
            left = left[self.slice_tokens :]
        self.fusions[name] = (fusion, left)
        if not left:
            del self.fusions[name]
            report.loaded[name] = Loaded({"host": 1}, False, 0.0, 1, chosen=self.chosen.pop(name))
            arrived.add(name)

    def _choose(self, fusion: Fusion, found: tuple[bool, ...], led: int) -> list[int]:
        """Which tokens are chosen is a matter of all candidates: a choice among fewer is another one."""
        probed, candidates = stage(fusion, found, led)
        count = math.ceil(fusion.ratio * len(candidates))
        if fusion.chosen is not None:
            return continued(fusion, found, led).tolist()
        by_rank = sorted(candidates.tolist(), key=lambda p: hash((p, len(candidates))))
        skipped = torch.tensor(by_rank[count:], dtype=torch.int64)
        return probed[~torch.isin(probed, skipped)].tolist()

    # ------------------------------------------------------------------------------------------- the scheduler

    def _tell(
        self,
        output: Any,
        sampled: dict[str, list[int]],
        report: StepReport,
        bad_blocks: set[int],
        arrived: set[str],
        weights: int,
    ) -> None:
        from kvloom.connectors.vllm.connector import WorkerMetadata

        runner_output = vllm_unit("utils").create_model_runner_output(
            [self.requests[name] for name in sampled],
            finished_recving=arrived,
            invalid_block_ids=bad_blocks,
            kv_connector_worker_meta=WorkerMetadata(report),
        )
        runner_output.kv_connector_output.failed_recving = self.failed_loads
        runner_output.sampled_token_ids = [sampled[name] for name in runner_output.req_ids]
        for outputs in self.scheduler.update_from_output(output, runner_output).values():
            for told in outputs.outputs:
                self.answers[told.request_id] += told.new_token_ids
                self.weights_of[told.request_id] += [weights] * len(told.new_token_ids)
                if str(told.finish_reason) == "error":
                    self.failed.add(told.request_id)
                if told.kv_transfer_params:
                    self.usage[told.request_id] = told.kv_transfer_params["kvloom"]


def documents(spans: Sequence[tuple[int, int]], ratio: float) -> dict[str, Any]:
    options = {"documents": [list(span) for span in spans], "ratio": ratio}
    assert RequestOptions.of({"kvloom": options}, max(stop for _, stop in spans))
    return options


def finish(worker: SimulatedWorker) -> None:
    """All to the end; then nothing is held any more, by vLLM's own account and by kvloom's."""
    worker.faults.held.clear()
    worker.run()
    worker.step()
    vllm_unit("utils").assert_scheduler_empty(worker.scheduler)
    assert worker.scheduler.connector.scheduler_half.is_idle
    assert not worker.store.pins, "every offer is over"


def prompt(seed: int, tokens: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 900) for _ in range(tokens)]


def ask(worker: SimulatedWorker, tokens: list[int], options: dict[str, Any] | None = None, count: int = 4) -> list[int]:
    name = worker.add(tokens, options, tokens=count)
    worker.run()
    return worker.answers[name]


def forget(worker: SimulatedWorker) -> None:
    """vLLM's own prefix cache; the store keeps what it has."""
    assert worker.scheduler.kv_cache_manager.reset_prefix_cache()


DOCUMENTS = [prompt(20, 50), prompt(21, 41), prompt(22, 33)]


def store_documents(worker: SimulatedWorker) -> None:
    for document in DOCUMENTS:
        ask(worker, document, documents([(0, len(document))], 0.0), count=1)
    forget(worker)


def in_context(
    seed: int, order: tuple[int, ...] = (2, 0, 1), lead: int = 37
) -> tuple[list[int], list[tuple[int, int]]]:
    tokens, spans = prompt(seed, lead), []
    for index in order:
        spans.append((len(tokens), len(tokens) + len(DOCUMENTS[index])))
        tokens += DOCUMENTS[index]
    return tokens + prompt(seed + 1000, 20), spans


def step_and_reset(worker: SimulatedWorker, name: str, steps: int, *, is_in_flight: bool) -> bool:
    """Reset without preempting anything, as vLLM lets users do, and reports as failed where blocks are held.

    Whether the request had its KV by then: it goes on with that, like every running request.
    """
    has_kv = []

    def reset() -> None:
        scheduler = worker.scheduler
        running = [request.request_id for request in scheduler.running]
        has_kv.append(name in (*scheduler.finished_recving_kv_req_ids, *running))
        scheduler.reset_prefix_cache(False, True)
        worker.weights += 1

    for _ in range(steps - 1):
        worker.step()
    worker.step(reset) if is_in_flight else (worker.step(), reset())
    worker.run()
    return has_kv[0]
