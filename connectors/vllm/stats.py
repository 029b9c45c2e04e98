"""What kvloom counts in vLLM, for vLLM's own log line and for its Prometheus endpoint."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

try:
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
except ImportError as error:
    raise ImportError("kvloom.connectors.vllm.stats needs vLLM 0.32 or newer: pip install vllm") from error

_TIER = "loaded_tokens."  # followed by the tier's name
_REASON = "decisions."  # followed by the reason

COUNTERS = MappingProxyType(
    {
        "hit_tokens": "Tokens that kvloom offered and vLLM took: prefix hits and fusions.",
        "lookups": "Questions to the store.",
        "lookup_chunks": "Chunks asked about.",
        "hit_chunks": "Chunks asked about that were stored.",
        "joined_chunks": "Chunks made of those that engines of other tensor-parallel sizes have stored.",
        "loads": "Loads that ended.",
        "loaded_bytes": "Bytes of keys and values loaded into the engine's blocks by loads of prefixes.",
        "load_seconds": "Time from the beginning of a load to its end, summed.",
        "seconds_saved": "Seconds of computing that loads and fusions saved, less those they took.",
        "probes": "Chunks read beside requests, to learn what a tier costs that no request loads from.",
        "given_back_loads": "Loads that ended early, as computing was faster by then.",
        "failed_loads": "Loads or fusions that lost a chunk on the way; it was computed.",
        "saved_chunks": "Chunks stored.",
        "saved_tokens": "Tokens stored.",
        "failed_saves": "Chunks that the store did not take.",
        "dropped_saves": "Chunks not stored because too much was waiting.",
        "fusions": "Fusions that ended.",
        "fused_tokens": "Tokens provided by fusions.",
        "fusion_computed_tokens": "Of them, tokens that were computed.",
        "fusion_seconds": "Time from the beginning of a fusion to its end, summed.",
        "refused_requests": "Requests with unusable options, served without kvloom.",
        "errors": "Faults of kvloom itself; the log has them.",
    }
)


FAULTS = frozenset({"failed_loads", "failed_saves", "dropped_saves", "errors"})
"""What every rank counts for itself; all else is counted by the first."""


class KVLoomStats(KVConnectorStats):
    """Counts of an interval by name; ranks and intervals add up."""

    def reset(self) -> None:
        self.data = dict[str, float]()

    def aggregate(self, other: KVConnectorStats) -> KVLoomStats:
        names = {**self.data, **other.data}
        return KVLoomStats({name: self.data.get(name, 0) + other.data.get(name, 0) for name in names})

    def reduce(self) -> dict[str, int | float]:
        return {name: round(value, 3) for name, value in sorted(self.data.items())}

    def is_empty(self) -> bool:
        return not any(self.data.values())


class KVLoomPromMetrics(KVConnectorPromMetrics):
    """`vllm:kvloom_<name>_total` with vLLM's own labels, `vllm:kvloom_loaded_tokens_total{tier}` and
    `vllm:kvloom_decisions_total{reason}`.
    """

    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = {
            name: self._counter_cls(name=f"vllm:kvloom_{name}", documentation=text, labelnames=labelnames)
            for name, text in COUNTERS.items()
        }
        self._loaded_tokens = self._counter_cls(
            name="vllm:kvloom_loaded_tokens",
            documentation="Tokens loaded, by the tier that they came from.",
            labelnames=[*labelnames, "tier"],
        )
        self._decisions = self._counter_cls(
            name="vllm:kvloom_decisions",
            documentation="Decisions on how much of a stored prefix a request loads, by their reason.",
            labelnames=[*labelnames, "reason"],
        )

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        labels = self.per_engine_labelvalues[engine_idx]
        for name, value in transfer_stats_data.items():
            if name.startswith(_TIER):
                self._loaded_tokens.labels(*labels, name.removeprefix(_TIER)).inc(value)
            elif name.startswith(_REASON):
                self._decisions.labels(*labels, name.removeprefix(_REASON)).inc(value)
            elif name in self._counters:
                self._counters[name].labels(*labels).inc(value)
