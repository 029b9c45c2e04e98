"""A worker of vLLM without a model: blocks hold numbers that stand for KV, each made of its token and of all before it.

vLLM's scheduler and the scheduler's half of `KVLoomConnector` are the real ones. What this worker reads where a token
was computed decides what it answers, so that a wrong block, a block overwritten too early, or fused KV under a plain
name shows in the answer, as it would with a model. Needs vLLM and its own test utilities (`vllm_unit`).
"""

import importlib
import math
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvloom.connectors.serving.messages import Fusion, Load, Loaded, StepReport
from kvloom.connectors.serving.settings import RequestOptions
from kvloom.connectors.vllm.fusion.fuser import continued, stage
from kvloom.core import ChunkKey

UNIT = Path(sys.prefix) / "vllm-tests"
"""vLLM's folder tests/v1/kv_connector/unit, where tests/engines/vllm.sh puts it."""

VOCABULARY = 997


def vllm_unit(name: str) -> Any:
    """A module of vLLM's own tests. They are no installed package, so that they are given a name here."""
    if "vllm_unit" not in sys.modules:
        package = types.ModuleType("vllm_unit")
        package.__path__ = [str(UNIT)]
        sys.modules["vllm_unit"] = package
    return importlib.import_module(f"vllm_unit.{name}")


def after(kv: int, token: int) -> int:
    """KV of a token behind KV."""
    return hash((kv, token))


def answer_to(kv: int) -> int:
    return kv % VOCABULARY


def plain_answer(prompt: Sequence[int], count: int) -> list[int]:
    kv, answer = 0, []
    for token in prompt:
        kv = after(kv, token)
    for _ in range(count):
        answer.append(answer_to(kv))
        kv = after(kv, answer[-1])
    return answer


@dataclass
class Faults:
    """What goes wrong from now on, by request id; `tokens` that still arrive of a load."""

    lost_from: dict[str, int] = field(default_factory=dict)
    held: set[str] = field(default_factory=set)  # loads and fusions that do not go on


class SimulatedWorker:
    """Steps a scheduler; `answers` are the tokens of every request so far."""

    def __init__(self, scheduler: Any, store: dict[ChunkKey, list[int]], *, slice_tokens: int = 10**6) -> None:
        self.scheduler, self.store, self.slice_tokens = scheduler, store, slice_tokens
        self.block_tokens = scheduler.block_size
        self.slots: dict[int, int] = {}
        self.requests: dict[str, Any] = {}
        self.answers: dict[str, list[int]] = {}
        self.usage: dict[str, dict[str, Any]] = {}
        self.faults = Faults()
        self.loads: dict[str, Load] = {}
        self.fusions: dict[str, tuple[Fusion, list[int] | None]] = {}  # with positions still to be computed
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
        self.requests[name], self.answers[name] = made, []
        self.scheduler.add_request(made)
        return name

    def abort(self, name: str) -> None:
        from vllm.v1.request import RequestStatus

        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    def run(self, limit: int = 2000) -> None:
        for _ in range(limit):
            if not self.scheduler.has_requests():
                return
            self.step()
        raise AssertionError(f"requests hang: {list(self.scheduler.requests)}")

    def step(self) -> Any:
        """One step of the engine; what the scheduler had planned."""
        output = self.scheduler.schedule()
        plan = output.kv_connector_metadata.plan
        sampled = self._forward(output)
        for save in plan.saves:
            blocks, size = save.blocks, self.block_tokens
            offset = save.start % size
            kv = [self._read(blocks, p) for p in range(offset, offset + len(save.token_ids))]
            self.store.setdefault(save.keys[0], kv)
        report, bad_blocks, arrived = StepReport(), set(), set()
        for lookup in plan.lookups:
            report.answers[lookup.request_id] = self.look_up(lookup)
        for request_id, load in list(self.loads.items()):
            if request_id not in self.faults.held:
                del self.loads[request_id]
                self._load(load, report, bad_blocks)
                arrived.add(request_id)
        self.loads |= {load.request_id: load for load in plan.loads}
        for fusion in plan.fusions:
            self.fusions[fusion.request_id] = (fusion, None)
            self.told.discard(fusion.request_id)
        for request_id, (fusion, _) in self.fusions.items():
            if request_id not in self.faults.held | self.told:
                self.told.add(request_id)
                report.found[request_id] = (tuple(document.keys[0] in self.store for document in fusion.documents),)
        for advance in plan.advances:
            self._advance(advance.request_id, advance.found, report, arrived)
        for request_id in output.finished_req_ids & self.fusions.keys():
            del self.fusions[request_id]
            arrived.add(request_id)
        self._tell(output, sampled, report, bad_blocks, arrived)
        return output

    def look_up(self, lookup: Any) -> tuple[str, ...]:
        keys = lookup.keys[0]
        missing = next((i for i, key in enumerate(keys) if key not in self.store), len(keys))
        return ("host",) * missing

    # ------------------------------------------------------------------------------------------------ the model

    def _read(self, blocks: Sequence[int], position: int) -> int:
        return self.slots.get(
            blocks[position // self.block_tokens] * self.block_tokens + position % self.block_tokens, 0
        )

    def _write(self, blocks: Sequence[int], position: int, kv: int) -> None:
        self.slots[blocks[position // self.block_tokens] * self.block_tokens + position % self.block_tokens] = kv

    def _compute(self, blocks: Sequence[int], position: int, token: int) -> int:
        kv = after(self._read(blocks, position - 1) if position else 0, token)
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
        chunk_tokens = len(self.store[load.keys[0][0]]) if load.keys[0][0] in self.store else 1
        lost_from = self.faults.lost_from.pop(load.request_id, load.stop)
        for position in range(load.start, min(load.stop, lost_from)):
            chunk, place = divmod(position - load.first, chunk_tokens)
            self._write(load.blocks, position, self.store[load.keys[0][chunk]][place])
        if lost_from < load.stop:
            size = self.block_tokens
            bad_blocks.update(load.blocks[max(lost_from, load.start) // size : -(-load.stop // size)])
        tokens = {"host": max(min(load.stop, lost_from) - load.start, 0)}
        report.loaded[load.request_id] = Loaded(tokens, lost_from < load.stop, 0.0)

    def _advance(self, name: str, found: Sequence[bool], report: StepReport, arrived: set[str]) -> None:
        if name not in self.fusions or name in self.faults.held:
            return
        fusion, left = self.fusions[name]
        if left is None:
            for document, is_found in zip(fusion.documents, found, strict=True):
                for position in range(max(document.start, fusion.start), min(document.stop, fusion.stop)):
                    if is_found:
                        self._write(fusion.blocks, position, self.store[document.keys[0]][position - document.start])
            left = self._choose(fusion, tuple(found))
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

    def _choose(self, fusion: Fusion, found: tuple[bool, ...]) -> list[int]:
        """Which tokens are chosen is a matter of all candidates: a choice among fewer is another one."""
        probed, candidates = stage(fusion, found)
        count = math.ceil(fusion.ratio * len(candidates))
        if fusion.chosen is not None:
            return continued(fusion, found).tolist()
        by_rank = sorted(candidates.tolist(), key=lambda p: hash((p, len(candidates))))
        skipped = torch.tensor(by_rank[count:], dtype=torch.int64)
        return probed[~torch.isin(probed, skipped)].tolist()

    # ------------------------------------------------------------------------------------------- the scheduler

    def _tell(
        self, output: Any, sampled: dict[str, list[int]], report: StepReport, bad_blocks: set[int], arrived: set[str]
    ) -> None:
        from kvloom.connectors.vllm.connector import WorkerMetadata

        runner_output = vllm_unit("utils").create_model_runner_output(
            [self.requests[name] for name in sampled],
            finished_recving=arrived,
            invalid_block_ids=bad_blocks,
            kv_connector_worker_meta=WorkerMetadata(report),
        )
        runner_output.sampled_token_ids = [sampled[name] for name in runner_output.req_ids]
        for outputs in self.scheduler.update_from_output(output, runner_output).values():
            for told in outputs.outputs:
                self.answers[told.request_id] += told.new_token_ids
                if told.kv_transfer_params:
                    self.usage[told.request_id] = told.kv_transfer_params["kvloom"]


def documents(spans: Sequence[tuple[int, int]], ratio: float) -> dict[str, Any]:
    options = {"documents": [list(span) for span in spans], "ratio": ratio}
    assert RequestOptions.of({"kvloom": options}, max(stop for _, stop in spans))
    return options
