"""The connector's half beside vLLM's scheduler: its calls, translated for `serving.scheduler.planner`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from blake3 import blake3

from ..identity.adapters import AdapterNames
from ..serving.messages import Scheduled, StepPlan, StepReport, WorkerInfo
from ..serving.scheduler.planner import Planner
from ..serving.settings import RequestOptions, ServingSettings
from ..serving.worker.steps import Worker
from .adapters import OpenAdapters, adapter_variant
from .events import KVEvents
from .groups import EngineGroups
from .identity import engine_lead, request_identity
from .retrieval.settings import decoding_identity

_LOG = logging.getLogger("kvloom")
_MOST_SILENT_STEPS = 64  # without a word of the workers; then the engine is served without kvloom


@dataclass(slots=True)
class _Mark:
    """What the kvloom connectors of one `MultiConnector` tell each other of a request; an attribute of it.

    The first connector that opens a request may fuse it. `exact_tokens`: before the first one that may be fused; None
    if all are. `name`: what its blocks are named by, see `Planner.fusion_name`.
    """

    connectors: list[object]
    exact_tokens: int | None = None
    name: tuple[int | None, bytes] = (None, b"")


class SchedulerHalf:
    """Serves the requests of one engine, once its workers have introduced themselves.

    vLLM has a handshake for that, but a `MultiConnector` gives all its connectors the handshake of one. So the first
    steps of the engine ask the workers; requests that come before they have answered wait for a step.

    Parameters
    ----------
    settings : the user's.
    vllm_config : vLLM's, with the `kv_transfer_config` of this connector.
    groups : of the engine's layers.
    worker_here : the worker whose connector has this token, if it lives in this process; None if not.

    Attributes
    ----------
    events : None if the engine publishes none.
    """

    def __init__(
        self,
        settings: ServingSettings,
        vllm_config: Any,
        groups: EngineGroups,
        worker_here: Callable[[str], Worker | None],
    ) -> None:
        transfer = vllm_config.kv_transfer_config
        if settings.lead_ids is None:
            settings = replace(settings, lead_ids=engine_lead(vllm_config.model_config))
        self._settings = settings
        self._groups = groups
        self._block_tokens = block_tokens = groups.shapes[0].block_tokens
        self._ranks = ranks_of(vllm_config)
        self._worker_here = worker_here
        self._may_load, self._may_save = bool(transfer.is_kv_consumer), bool(transfer.is_kv_producer)
        self._may_give_back = transfer.kv_load_failure_policy == "recompute"
        self._adapter_variant = adapter_variant(vllm_config)
        self._adapters = OpenAdapters(AdapterNames(), self._adapter_variant)
        self._decoding = decoding_identity(vllm_config.additional_config)
        self._planner: Planner | None = None
        self._workers: dict[int, WorkerInfo] = {}
        self._silent_steps = 0
        self._may_fuse = False
        self._early: dict[str, Any] = {}  # requests that came before the workers had introduced themselves
        self._requests: dict[str, Any] = {}  # vLLM's, of those that are served
        self._refused = 0
        self.events: KVEvents | None = None
        if publishes_events(vllm_config):
            if not groups.is_plain:
                _LOG.warning("kvloom publishes no KV events: the layers of this engine are in groups, or have windows")
            elif settings.chunk_tokens % block_tokens == 0:
                self.events = KVEvents(block_tokens, settings.chunk_tokens, self._requests)
            else:
                _LOG.warning(
                    "kvloom publishes no KV events: chunk_tokens is %d, no multiple of the engine's block of %d tokens",
                    settings.chunk_tokens,
                    block_tokens,
                )
        if transfer.kv_load_failure_policy != "recompute" and self._may_load:
            _LOG.warning(
                "kv_load_failure_policy is %r: a chunk that is lost while it is loaded fails its request; set it to "
                "'recompute'",
                transfer.kv_load_failure_policy,
            )

    # ------------------------------------------------------------------------------------------------ requests

    def open(self, request: Any) -> None:
        """A new vLLM `Request`."""
        if self._planner is not None:
            self._open(self._planner, request)
        elif self._silent_steps <= _MOST_SILENT_STEPS:
            self._early[request.request_id] = request

    def _open(self, planner: Planner, request: Any) -> None:
        """Open a request, or open it anew after a reset."""
        identity = request_identity(request, self._adapters, self._decoding)
        if identity is None:
            return
        try:
            options = RequestOptions.of(request.kv_transfer_params, request.num_prompt_tokens)
        except ValueError as exc:
            _LOG.warning("request %s is served without kvloom: %s", request.request_id, exc)
            self._refused += 1
            return
        mark = _mark_of(request)
        if self not in mark.connectors:
            mark.connectors.append(self)
        is_first = mark.connectors[0] is self
        inexact = planner.open(
            request.request_id,
            request.all_token_ids,
            identity,
            options,
            # The runner prepares adapters for its own batch, not for passes of ours.
            may_fuse=self._may_fuse and is_first and request.lora_request is None,
            exact_tokens=None if is_first else mark.exact_tokens,
        )
        self._requests[request.request_id] = request
        if is_first:
            mark.exact_tokens = inexact
            self._name_blocks(planner, request, mark)

    def _name_blocks(self, planner: Planner, request: Any, mark: _Mark) -> None:
        """File a request's blocks, which it does not have yet, under names of what they will hold."""
        name = planner.fusion_name(request.request_id)
        if name == mark.name:
            return
        if mark.name[0] is not None:
            _restore_hashes(request)
        mark.name = name
        inexact, digest = name
        if inexact is not None:
            _fork_hashes(request, inexact // self._block_tokens, digest)

    def _leave_if_changed(self, planner: Planner, request_id: str, local_tokens: int = 0) -> None:
        """A request goes on without kvloom once it is uncertain which version of its adapter computes it."""
        if self._adapters.has_changed(request_id, local_tokens):
            self._adapters.close(request_id)
            self._requests.pop(request_id, None)
            planner.close(request_id)

    def close(self, request: Any) -> dict[str, Any] | None:
        """A request is over; what its output says of kvloom."""
        self._early.pop(request.request_id, None)
        self._requests.pop(request.request_id, None)
        self._adapters.close(request.request_id)
        usage = None if self._planner is None else self._planner.close(request.request_id)
        if usage is None:
            return None
        number = _mark_of(request).connectors.index(self)
        return {f"kvloom.{number + 1}" if number else "kvloom": usage}

    def reset(self) -> None:
        """Find nothing from now on that was stored before; other engines still find it. See `Planner.reset`."""
        if self._planner is None:
            return
        self._planner.reset()
        if self.events is not None:
            self.events.residences.clear()
        for request in list(self._requests.values()):
            if request.num_computed_tokens == 0:  # it holds no blocks: nothing of the old KV is left
                self._open(self._planner, request)

    # ------------------------------------------------------------------------------------------------- loading

    def matched_tokens(self, request: Any, computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens that can be provided, and whether their load takes longer than a step; None: ask again later."""
        if self._planner is None:
            return (None if request.request_id in self._early else 0), False
        self._leave_if_changed(self._planner, request.request_id, computed_tokens)
        if self._planner.is_stale(request.request_id):
            # It held blocks when the cache was reset. What vLLM found in its own cache, it found under hashes that may
            # have changed just now: it has to look again.
            self._open(self._planner, request)
            return None, False
        if self._planner.has_to_wait(request.all_token_ids, computed_tokens):
            return None, False
        tokens = self._planner.matched_tokens(request.request_id, computed_tokens)
        if tokens is None and (mark := _mark_of(request)).connectors[0] is self:
            self._name_blocks(self._planner, request, mark)
        return tokens, bool(tokens) and not self._planner.is_layerwise(request.request_id)

    def allocated(self, request: Any, blocks: Any, external_tokens: int) -> None:
        """The request is admitted, and `external_tokens` of it are to be provided."""
        self._early.pop(request.request_id, None)  # admitted without an answer: it is served without kvloom
        if self._planner is not None:
            rows = self._groups.in_order(blocks.get_block_ids())
            self._planner.allocated(request.request_id, external_tokens, *rows)

    def hit_tokens(self, request_id: str) -> dict[str, int]:
        """Tokens of the last offer taken, by tier; empty for a fusion."""
        return {} if self._planner is None else dict(self._planner.hit_tokens(request_id))

    # --------------------------------------------------------------------------------------------------- steps

    def plan(self, scheduler_output: Any) -> StepPlan | None:
        """What the workers have to do in the step; None for nothing."""
        if self._planner is None:
            return StepPlan(introduce=True) if self._silent_steps <= _MOST_SILENT_STEPS else None
        is_idle = scheduler_output.total_num_scheduled_tokens == 0
        if not is_idle and self._planner.is_quiet(scheduler_output.num_scheduled_tokens):
            return None
        for request_id in scheduler_output.num_scheduled_tokens:
            self._leave_if_changed(self._planner, request_id)
        unread = self._adapters.begin_step(scheduler_output.num_scheduled_tokens.keys())
        plan = self._planner.plan_step(_scheduled(scheduler_output, self._groups), is_idle=is_idle, unsaved=unread)
        if self.events is not None:
            self.events.describe(plan)
        return plan

    def apply(self, report: StepReport | None, arrived: set[str]) -> tuple[set[str], set[int]]:
        """Take note of the outcome of a step.

        Parameters
        ----------
        arrived : requests whose loads are over, by the workers of all connectors.

        Returns
        -------
        Requests whose loads are over for the engine, and blocks that its prefix cache has to forget.
        """
        if self._planner is None:
            self._meet(report)
            return arrived, set()
        if report is not None:
            self._planner.apply_report(report)
            if self.events is not None:
                self.events.residences.apply(report.placement_changes)
        return self._planner.arrived(arrived), self._planner.take_unwritten_blocks()

    def _meet(self, report: StepReport | None) -> None:
        """Begin to serve when all workers have introduced themselves."""
        if report is not None:
            self._workers |= report.workers
        if len(self._workers) < self._ranks:
            self._silent_steps += 1
            if self._silent_steps == _MOST_SILENT_STEPS + 1:
                _LOG.error("the workers of this engine do not answer: it is served without kvloom")
                self._early.clear()
            return
        workers = [self._workers[rank] for rank in sorted(self._workers)]
        here = self._worker_here(workers[0].token) if len(workers) == 1 else None
        if here is not None:
            self._adapters = OpenAdapters(AdapterNames(here.adapters), self._adapter_variant)
        self._may_fuse = all(worker.may_fuse for worker in workers)
        self._planner = Planner(
            self._settings,
            [worker.spec for worker in workers],
            self._block_tokens,
            None if here is None else here.transfers.look_up,
            splits=[worker.splits for worker in workers],
            fusion=max((worker.fusion for worker in workers), key=lambda fusion: fusion.ratio),
            may_load=self._may_load,
            may_save=self._may_save,
            shapes=() if self._groups.is_plain else self._groups.shapes,
            further=tuple(zip(*(worker.further for worker in workers), strict=True)),
            why_missing=(lambda _: None) if here is None else here.transfers.why_missing,
            tiers=workers[0].tiers,
            may_give_back=self._may_give_back,
        )
        early, self._early = self._early, {}
        for request in early.values():
            self._open(self._planner, request)

    @property
    def is_idle(self) -> bool:
        """Whether no request is open and no load or fusion is under way."""
        return not self._early and not self._requests and (self._planner is None or self._planner.is_idle)

    def take_events(self) -> Iterable[Any]:
        """KV events since the last call."""
        return () if self.events is None else self.events.take()

    def take_counts(self) -> dict[str, float]:
        """What was counted since the last call."""
        counts = {} if self._planner is None else self._planner.take_counts()
        if self._refused:
            counts["refused_requests"], self._refused = self._refused, 0
        return counts


def ranks_of(vllm_config: Any) -> int:
    """Workers of an engine: as many as hold the heads, in each stage of its layers."""
    parallel = vllm_config.parallel_config
    return int(parallel.tensor_parallel_size) * int(parallel.pipeline_parallel_size)


def publishes_events(vllm_config: Any) -> bool:
    """Whether this engine publishes KV events."""
    config = vllm_config.kv_events_config
    return config is not None and bool(config.enable_kv_cache_events)


def _scheduled(scheduler_output: Any, groups: EngineGroups) -> Iterator[Scheduled]:
    """Every request of the step. Drafted tokens do not count as computed: they may be rejected."""
    state = scheduler_output.kv_connector_block_state
    before = {new.req_id: new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs}
    cached = scheduler_output.scheduled_cached_reqs
    before |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    states = state.boundary_state_offloads if groups.keeps_states else {}
    for request_id, count in scheduler_output.num_scheduled_tokens.items():
        rows = state.get_block_ids(request_id)
        if rows is not None and request_id in before:
            drafted = len(scheduler_output.scheduled_spec_decode_tokens.get(request_id, ()))
            blocks, *further = groups.rows_to_save(rows, states.get(request_id, ()))
            yield Scheduled(request_id, before[request_id] + count - drafted, blocks, count, tuple(further))


def _mark_of(request: Any) -> _Mark:
    mark = getattr(request, "kvloom_mark", None)
    if not isinstance(mark, _Mark):
        mark = request.kvloom_mark = _Mark([])
    return mark


def _fork_hashes(request: Any, first: int, digest: bytes) -> None:
    """Give a request's blocks from `first` on, and all that follow them, other hashes.

    vLLM files blocks under a chain of hashes of tokens. Fused KV is not the KV of its tokens: a plain request must not
    find it, and a request for the very same fusion may.
    """
    hashes = request.block_hashes
    forked = type(hashes[first])(blake3(hashes[first], key=digest).digest())
    del hashes[first:]
    hashes.append(forked)
    request.update_block_hashes()


def _restore_hashes(request: Any) -> None:
    """Give all blocks of a request the hashes of its tokens again."""
    request.block_hashes.clear()
    request.update_block_hashes()
