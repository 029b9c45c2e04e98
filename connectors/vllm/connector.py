"""vLLM's KV connector: prefixes that are computed once, by any engine, and documents that are fused into one context.

    LLM(model, kv_transfer_config=KVTransferConfig(
        kv_connector="KVLoomConnector", kv_role="kv_both", kv_load_failure_policy="recompute",
        kv_connector_extra_config={"host_bytes": "64GiB", "disk_path": "kv-cache"}))

Stock vLLM from 0.32 on. Without kvloom's entry point (not installed, only on the path) add
`kv_connector_module_path="kvloom.connectors.vllm_v1"`. The settings are `settings.ServingSettings`. What a request
may ask for in its `kv_transfer_params` is `settings.RequestOptions`; what it gets back is `{"kvloom": {...}}`.

vLLM makes two of this class: one beside its scheduler (`serving/planner.py` does the work there), one in each worker
(`serving/steps.py`, with what `worker.py` opens). They speak through the metadata of a step of the engine; where both
are in one process, the scheduler's half asks the worker's store directly.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

try:
    from vllm.distributed.kv_transfer.kv_connector.v1.base import (
        KVConnectorBase_V1,
        KVConnectorHandshakeMetadata,
        KVConnectorMetadata,
        KVConnectorRole,
        KVConnectorWorkerMetadata,
        SupportsHMA,
    )
    from vllm.v1.metrics.cache_hit_source import CacheHitSource
except ImportError as error:
    raise ImportError("kvloom.connectors.vllm.connector needs vLLM 0.32 or newer: pip install vllm") from error

from blake3 import blake3

from ...core import KVSpec
from ..identity.adapters import AdapterNames
from ..serving.messages import Scheduled, StepPlan, StepReport
from ..serving.scheduler.planner import Planner
from ..serving.settings import RequestOptions, ServingSettings
from ..serving.worker.steps import Steps
from .adapters import OpenAdapters, adapter_variant
from .events import KVEvents
from .identity import engine_lead, request_identity
from .retrieval.settings import decoding_identity
from .stats import FAULTS, KVLoomPromMetrics, KVLoomStats
from .worker import Worker, expect_servable, open_worker, publishes_events

_LOG = logging.getLogger("vllm.kvloom")
_SOURCES = {"host": CacheHitSource.HOST, "disk": CacheHitSource.DISK}


@dataclass
class StepMetadata(KVConnectorMetadata):
    """From the scheduler's half to the workers'."""

    plan: StepPlan


@dataclass
class WorkerMetadata(KVConnectorWorkerMetadata):
    """From a worker's half to the scheduler's."""

    report: StepReport

    def aggregate(self, other: KVConnectorWorkerMetadata) -> WorkerMetadata:
        return WorkerMetadata(self.report.merged(other.report))


@dataclass
class WorkerSpec(KVConnectorHandshakeMetadata):
    """What a worker tells of its cache when the engine starts, as JSON."""

    spec: str
    may_fuse: bool
    fusion_ratio: float


class KVLoomConnector(KVConnectorBase_V1, SupportsHMA):
    """See the module. `vllm_config`, `role` and `kv_cache_config` are vLLM's.

    Raises
    ------
    ValueError : a setting is unknown or out of its range.
    EngineError : this engine's cache cannot be served exactly: several or other than full-attention KV cache groups,
        latent (MLA) or quantised caches, pipeline or context parallelism, a draft model. Or its weights cannot be
        named.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.settings = ServingSettings.of(self._kv_transfer_config.kv_connector_extra_config or {})
        self._block_tokens = expect_servable(self.settings, vllm_config, kv_cache_config)
        self._planner: Planner | None = None
        self._quiet = StepMetadata(StepPlan())  # never changed
        self._events: KVEvents | None = None
        self._kv_cache_manager: Any = None
        self._may_fuse = False
        self.worker: Worker | None = None
        self._steps: Steps | None = None
        self._refused = 0
        self._decoding = decoding_identity(vllm_config.additional_config)
        self._adapters = OpenAdapters(AdapterNames())
        if role == KVConnectorRole.WORKER:
            return
        if publishes_events(vllm_config) and self.settings.chunk_tokens % self._block_tokens == 0:
            self._events = KVEvents(self._block_tokens, self.settings.chunk_tokens)
        elif publishes_events(vllm_config):
            _LOG.warning(
                "kvloom publishes no KV events: chunk_tokens is %d, no multiple of the engine's block of %d tokens",
                self.settings.chunk_tokens,
                self._block_tokens,
            )
        if self._kv_transfer_config.kv_load_failure_policy != "recompute":
            _LOG.warning(
                "kv_load_failure_policy is %r: a chunk lost on its way fails its request; set it to 'recompute'",
                self._kv_transfer_config.kv_load_failure_policy,
            )

    @property
    def requires_kv_delivery(self) -> bool:
        """A cache: what is not stored is computed again."""
        return False

    # =================================================================================== beside the scheduler

    def set_xfer_handshake_metadata(self, metadata: Mapping[int, WorkerSpec]) -> None:
        """All workers are there: the scheduler's half learns of their caches and can begin."""
        specs = [KVSpec.from_json(metadata[rank].spec) for rank in sorted(metadata)]
        worker = _worker_here() if len(specs) == 1 else None
        ask = None if worker is None or worker.worker is None else worker.worker.transfers.look_up
        self._may_fuse = all(told.may_fuse for told in metadata.values())
        ratio = max(told.fusion_ratio for told in metadata.values())
        settings = self.settings
        if settings.lead_ids is None:
            settings = replace(settings, lead_ids=engine_lead(self._vllm_config.model_config))
        memory = None if worker is None or worker.worker is None else worker.worker.adapters
        self._adapters = OpenAdapters(AdapterNames(memory), adapter_variant(self._vllm_config))
        self._planner = Planner(settings, specs, self._block_tokens, ask, fusion_ratio=ratio)

    def on_new_request(self, request: Any) -> None:
        identity = request_identity(request, self._adapters, self._decoding)
        if self._planner is None or identity is None:
            return
        try:
            options = RequestOptions.of(request.kv_transfer_params, request.num_prompt_tokens)
        except ValueError as exc:
            _LOG.warning("request %s is served without kvloom: %s", request.request_id, exc)
            self._refused += 1
            return
        # The runner prepares adapters for its own batch, not for passes of ours.
        may_fuse = self._may_fuse and request.lora_request is None
        inexact = self._planner.open(request.request_id, request.all_token_ids, identity, options, may_fuse=may_fuse)
        if self._events is not None:
            self._events.open(request)
        if inexact is not None:
            _leave_exact_chain(request, inexact // self._block_tokens, self._planner.fusion_digest(request.request_id))

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        if self._planner is None:
            return 0, False
        self._leave_if_changed(request.request_id, num_computed_tokens)
        if self._planner.has_to_wait(request.all_token_ids, num_computed_tokens):
            return None, False
        tokens = self._planner.matched_tokens(request.request_id, num_computed_tokens)
        return tokens, bool(tokens) and not self._planner.is_layerwise(request.request_id)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if self._planner is not None:
            self._planner.allocated(request.request_id, num_external_tokens, blocks.get_block_ids()[0])

    def get_external_cache_hit_sources(self, request: Any, num_external_tokens: int) -> dict[CacheHitSource, int]:
        found = {} if self._planner is None else self._planner.hit_tokens(request.request_id)
        by_source: dict[CacheHitSource, int] = {}
        for tier, tokens in found.items():
            source = _SOURCES.get(tier, CacheHitSource.EXTERNAL_UNSPECIFIED)
            by_source[source] = by_source.get(source, 0) + tokens
        if sum(by_source.values()) != num_external_tokens:  # a fusion: partly computed, known when it is over
            return {CacheHitSource.EXTERNAL_UNSPECIFIED: num_external_tokens} if num_external_tokens else {}
        return by_source

    def build_connector_meta(self, scheduler_output: Any) -> StepMetadata:
        if self._planner is None:
            return StepMetadata(StepPlan())
        is_idle = scheduler_output.total_num_scheduled_tokens == 0
        if not is_idle and self._planner.is_quiet(scheduler_output.num_scheduled_tokens):
            return self._quiet
        for request_id in scheduler_output.num_scheduled_tokens:
            self._leave_if_changed(request_id)
        unread = self._adapters.begin_step(scheduler_output.num_scheduled_tokens.keys())
        plan = self._planner.plan_step(_scheduled(scheduler_output), is_idle=is_idle, unsaved=unread)
        if self._events is not None:
            self._events.describe(plan)
        return StepMetadata(plan)

    def update_connector_output(self, connector_output: Any) -> None:
        news = connector_output.kv_connector_worker_meta
        if self._planner is not None and isinstance(news, WorkerMetadata):
            self._planner.hear(news.report)
            if (blocks := self._planner.take_spoiled()) and self._kv_cache_manager is not None:
                self._kv_cache_manager.evict_blocks(blocks)
            if self._events is not None:
                self._events.residences.hear(news.report.moves)

    def take_events(self) -> Iterable[Any]:
        return () if self._events is None else self._events.take()

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        self._adapters.close(request.request_id)
        usage = None if self._planner is None else self._planner.close(request.request_id)
        if self._events is not None:
            self._events.close(request.request_id)
        return False, None if usage is None else {"kvloom": usage}

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, block_ids[0])

    def reset_cache(self) -> bool:
        """Nothing that was stored before is found any more, by this engine; others keep what they have."""
        if self._planner is not None:
            self._planner.renew()
        if self._events is not None:
            self._events.residences.clear()
        return True

    def _leave_if_changed(self, request_id: str, local_tokens: int = 0) -> None:
        """A request goes on without kvloom once it is uncertain which version of its adapter computes it."""
        if self._planner is not None and self._adapters.has_changed(request_id, local_tokens):
            self._adapters.close(request_id)
            self._planner.close(request_id)
            if self._events is not None:
                self._events.close(request_id)

    # ============================================================================================= in a worker

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        self.worker = open_worker(self.settings, self._vllm_config, self._kv_cache_config)
        self._steps = Steps(self.worker)

    def get_handshake_metadata(self) -> WorkerSpec | None:
        if self.worker is None:
            return None
        return WorkerSpec(self.worker.spec.to_json(), self.worker.fuser is not None, self.worker.fusion_ratio)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        if self._steps is not None:
            self._steps.begin(self._get_connector_metadata().plan)

    def wait_for_layer_load(self, layer_name: str) -> None:
        if self._steps is not None:
            self._steps.wait_for_layer(layer_name)

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Layers wait in between, which a graph of the whole model would leave out."""
        return extra_config.get("load_mode") == "layerwise"

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Whole chunks are saved when a step is done, see `wait_for_save`."""

    def wait_for_save(self) -> None:
        if self._steps is not None:
            self._steps.save(self._get_connector_metadata().plan)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        if self._steps is None:
            return None, None
        return None, self._steps.end(self._get_connector_metadata().plan, finished_req_ids) or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        return set() if self._steps is None else self._steps.take_bad_blocks()

    def build_connector_worker_meta(self) -> WorkerMetadata | None:
        report = None if self._steps is None else self._steps.take_report()
        return None if report is None else WorkerMetadata(report)

    def shutdown(self) -> None:
        if self._steps is not None:
            self._steps.close()
        self._steps = self.worker = None

    # ================================================================================================ counting

    def get_kv_connector_stats(self) -> KVLoomStats | None:
        counts: dict[str, float] = {}
        if self.worker is not None and (counts := self.worker.transfers.take_counts()) and self.worker.spec.shard[0]:
            # Tokens are the same on every rank, faults are not.
            counts = {name: count for name, count in counts.items() if name in FAULTS}
        if self._planner is not None:
            counts |= self._planner.take_counts()
        if self._refused:
            counts["refused_requests"], self._refused = self._refused, 0
        return KVLoomStats(counts) if counts else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVLoomStats:
        return KVLoomStats(data or {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any
    ) -> KVLoomPromMetrics:
        return KVLoomPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)


def _scheduled(scheduler_output: Any) -> Iterator[Scheduled]:
    """Every request of the step. Of drafted tokens nothing counts as computed: they may be rejected."""
    state = scheduler_output.kv_connector_block_state
    before = {new.req_id: new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs}
    cached = scheduler_output.scheduled_cached_reqs
    before |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    for request_id, count in scheduler_output.num_scheduled_tokens.items():
        blocks = state.get_block_ids(request_id)
        if blocks is not None and request_id in before:
            drafted = len(scheduler_output.scheduled_spec_decode_tokens.get(request_id, ()))
            yield Scheduled(request_id, before[request_id] + count - drafted, blocks[0], count)


def _leave_exact_chain(request: Any, first: int, digest: bytes) -> None:
    """Give a request's blocks from `first` on other hashes, and so all that follow them.

    vLLM files blocks under a chain of hashes of tokens. Fused KV is not the KV of its tokens: it must not be found by
    who asks for them plainly, and may be found by who asks for the very same fusion.
    """
    request.block_hashes[first:] = [
        type(block_hash)(blake3(block_hash, key=digest).digest()) for block_hash in request.block_hashes[first:]
    ]


def _worker_here() -> KVLoomConnector | None:
    """The worker's half, if it lives in this process."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

    worker = get_kv_transfer_group() if has_kv_transfer_group() else None
    return worker if isinstance(worker, KVLoomConnector) else None
