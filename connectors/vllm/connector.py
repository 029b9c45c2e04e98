"""vLLM's KV connector: prefixes that are computed once, by any engine, and documents that are fused into one context.

    LLM(model, kv_transfer_config=KVTransferConfig(
        kv_connector="KVLoomConnector", kv_role="kv_both", kv_load_failure_policy="recompute",
        kv_connector_extra_config={"host_bytes": "64GiB", "disk_path": "kv-cache"}))

Stock vLLM from 0.32 on. Without kvloom's entry point (not installed, only on the path) add
`kv_connector_module_path="kvloom.connectors.vllm_v1"`. The settings are `ServingSettings`, what a request may ask for
in its `kv_transfer_params` is `RequestOptions`; its output has `{"kvloom": {...}}` there.

vLLM makes two of this class: one beside its scheduler (`scheduler_half.py`), one in each worker (`serving.worker.steps`
with what `worker.py` opens). They exchange the messages of `serving.messages` with each step of the engine; where both
are in one process, the scheduler's half asks the worker's store directly.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

try:
    from vllm.distributed.kv_transfer.kv_connector.v1.base import (
        KVConnectorBase_V1,
        KVConnectorMetadata,
        KVConnectorRole,
        KVConnectorTransferResults,
        KVConnectorWorkerMetadata,
        SupportsHMA,
    )
    from vllm.v1.metrics.cache_hit_source import CacheHitSource
except ImportError as error:
    raise ImportError("kvloom.connectors.vllm.connector needs vLLM 0.32 or newer: pip install vllm") from error

from ..serving.messages import StepPlan, StepReport
from ..serving.settings import ServingSettings
from ..serving.worker.steps import Steps, Worker
from .plugin import forward_logs
from .scheduler_half import SchedulerHalf
from .servable import expect_servable, settings_for
from .stats import FAULTS, KVLoomPromMetrics, KVLoomStats
from .worker import open_worker

_SOURCES = {"host": CacheHitSource.HOST, "disk": CacheHitSource.DISK}


@dataclass
class StepMetadata(KVConnectorMetadata):
    """From the scheduler's half to the workers."""

    plan: StepPlan


@dataclass
class WorkerMetadata(KVConnectorWorkerMetadata):
    """From a worker to the scheduler's half."""

    report: StepReport

    def aggregate(self, other: KVConnectorWorkerMetadata) -> WorkerMetadata:
        return WorkerMetadata(self.report.merged(other.report))


class KVLoomConnector(KVConnectorBase_V1, SupportsHMA):
    """See the module. `vllm_config`, `role` and `kv_cache_config` are vLLM's.

    Attributes
    ----------
    token : names this object among all connectors of the machine.
    worker : what it has opened; None beside the scheduler.
    scheduler_half : None in a worker.

    Raises
    ------
    ValueError : a setting is unknown, out of its range, or contradicts another one.
    EngineError : this engine's cache cannot be served exactly: KV cache groups of other kinds than full, latent,
        windowed and chunked local attention, and states behind blocks; caches quantised otherwise than as fp8, context
        parallelism, a draft model.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        forward_logs()
        self.settings = ServingSettings.of(self._kv_transfer_config.kv_connector_extra_config or {})
        self.token = secrets.token_hex(16)
        self.worker: Worker | None = None
        self._steps: Steps | None = None
        self.scheduler_half: SchedulerHalf | None = None
        groups = expect_servable(self.settings, vllm_config, kv_cache_config)
        self.settings = settings_for(groups, self.settings)
        if role == KVConnectorRole.SCHEDULER:
            self.scheduler_half = SchedulerHalf(self.settings, vllm_config, groups, worker_here)
        self._quiet = StepMetadata(StepPlan())  # never changed

    @property
    def requires_kv_delivery(self) -> bool:
        """False: kvloom is a cache. What is not stored is computed again."""
        return False

    @property
    def _half(self) -> SchedulerHalf:
        if self.scheduler_half is None:
            raise RuntimeError("vLLM calls a worker's connector for what belongs to the scheduler")
        return self.scheduler_half

    # =================================================================================== beside the scheduler

    def on_new_request(self, request: Any) -> None:
        self._half.open(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self._half.matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self._half.allocated(request, blocks, num_external_tokens)

    def get_external_cache_hit_sources(self, request: Any, num_external_tokens: int) -> dict[CacheHitSource, int]:
        by_source: dict[CacheHitSource, int] = {}
        for tier, tokens in self._half.hit_tokens(request.request_id).items():
            source = _SOURCES.get(tier, CacheHitSource.EXTERNAL_UNSPECIFIED)
            by_source[source] = by_source.get(source, 0) + tokens
        if sum(by_source.values()) != num_external_tokens:  # a fusion: partly computed, known when it is over
            return {CacheHitSource.EXTERNAL_UNSPECIFIED: num_external_tokens} if num_external_tokens else {}
        return by_source

    def build_connector_meta(self, scheduler_output: Any) -> StepMetadata:
        plan = self._half.plan(scheduler_output)
        return self._quiet if plan is None else StepMetadata(plan)

    def update_connector_output(self, connector_output: Any) -> None:
        metadata = connector_output.kv_connector_worker_meta
        report = metadata.report if isinstance(metadata, WorkerMetadata) else None
        arrived, unwritten = self._half.apply(report, set(connector_output.finished_recving or ()))
        connector_output.finished_recving = arrived or None
        if unwritten and self._kv_cache_manager is not None:
            self._kv_cache_manager.evict_blocks(unwritten)

    def take_events(self) -> Iterable[Any]:
        return self._half.take_events()

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return False, self._half.close(request)

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, block_ids[0])

    def reset_cache(self) -> bool:
        """Find nothing from now on that was stored before, in this engine; other engines keep what they have."""
        self._half.reset()
        return True

    # ============================================================================================= in a worker

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        self.worker = open_worker(self.settings, self.token, self._vllm_config, self._kv_cache_config)
        self._steps = Steps(self.worker)

    def unregister_kv_caches(self) -> None:
        """VLLM (0.33) is about to sleep: the memory of its caches goes away, at addresses that stay the same."""
        if self._steps is not None:
            self._steps.drain()

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        if self._steps is not None:
            self._steps.begin(self._get_connector_metadata().plan)

    def wait_for_layer_load(self, layer_name: str) -> None:
        if self._steps is not None:
            self._steps.wait_for_layer(layer_name)

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Layers wait in between, which a graph of the whole model would leave out.

        vLLM asks this long before it loads weights: wrong settings are refused here.
        """
        return ServingSettings.of(extra_config).load_mode == "layerwise"

    @classmethod
    def supports_sleep_mode(cls, kv_transfer_config: Any) -> bool:
        """True. vLLM (0.33) asks this before it loads weights, as above."""
        ServingSettings.of(kv_transfer_config.kv_connector_extra_config or {})
        return True

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing: whole chunks are saved when a step is done, see `wait_for_save`."""

    def wait_for_save(self) -> None:
        if self._steps is not None:
            self._steps.save(self._get_connector_metadata().plan)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        if self._steps is None:
            return None, None
        return None, self._steps.end(self._get_connector_metadata().plan, finished_req_ids) or None

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        results = super().get_transfer_results(finished_req_ids)
        if self._steps is not None:
            results.failed_recving.update(self._steps.take_failed())
        return results

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
        if self.worker is not None and (counts := self.worker.transfers.take_counts()):
            if self.worker.transfers.rank:  # tokens are the same on every rank, faults are not
                counts = {name: count for name, count in counts.items() if name in FAULTS}
        elif self.scheduler_half is not None:
            counts = self.scheduler_half.take_counts()
        return KVLoomStats(counts) if counts else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVLoomStats:
        return KVLoomStats(data or {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any
    ) -> KVLoomPromMetrics:
        return KVLoomPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)


def worker_here(token: str) -> Worker | None:
    """What the worker whose connector has this token has opened, if it lives in this process."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

    if not has_kv_transfer_group():
        return None
    group = get_kv_transfer_group()
    for each in (group, *getattr(group, "sub_connectors", ())):  # of a `MultiConnector`
        if isinstance(each, KVLoomConnector) and each.token == token:
            return each.worker
    return None
