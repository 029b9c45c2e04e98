"""What kvloom has in a worker of vLLM: a store of its rank's heads, beside the caches of its layers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ...core import KVSpec
from ...errors import EngineError
from ..serving.settings import ServingSettings
from ..serving.worker.layer_loads import LayerLoads
from ..serving.worker.store_setup import QualityRecords, is_lossy, open_store
from ..serving.worker.transfers import Transfers
from .adapters import LoadedAdapters
from .fusion.fuser import Fuser
from .fusion.passes import EnginePasses, running_model
from .identity import agreed_name, engine_name, engine_rope
from .paged_layers import PagedLayers

_LOG = logging.getLogger("vllm.kvloom")


@dataclass(frozen=True, slots=True)
class Worker:
    """`fuser` is None where the engine cannot fuse, `adapters` where it has none. `fusion_ratio`: what certificates
    permit; 1 without any.
    """

    spec: KVSpec
    fusion_ratio: float
    transfers: Transfers
    layer_loads: LayerLoads
    layer_numbers: Mapping[str, int]
    fuser: Fuser | None
    adapters: LoadedAdapters | None

    @property
    def has_work(self) -> bool:
        """Something was begun whose end has not been told of. Saves count as done: nobody asks for their end."""
        return self.transfers.is_loading or (self.fuser is not None and self.fuser.is_fusing)


def open_worker(settings: ServingSettings, vllm_config: Any, kv_cache_config: Any) -> Worker:
    """The store of this rank, beside the caches that its runner has just allocated.

    Raises
    ------
    EngineError : the caches cannot be read or written, see `PagedLayers`.
    TierError : the folder on disk cannot be used.
    ValueError : no codec has that name, or it needs a profile and there is none.
    SpecMismatchError, CodecError : the profile is of another model, or none.
    UncertifiedError : a codec is lossy, and no certificate covers it for this model; or a file is no certificate.
    """
    context = vllm_config.compilation_config.static_forward_context
    (group,) = kv_cache_config.kv_cache_groups
    layers = [context[name] for name in group.layer_names]
    # A layer that shares another's cache has none of its own to keep.
    layers = [layer for layer in layers if getattr(layer, "kv_sharing_target_layer_name", None) is None]
    cache = PagedLayers(layers, int(group.kv_cache_spec.block_size))
    rank, size = _tensor_parallel_rank(), vllm_config.parallel_config.tensor_parallel_size
    rope, why_not = None, None
    try:
        rope = engine_rope(vllm_config, layers, cache.head_dim)
    except EngineError as exc:
        why_not = str(exc)
    model = _fusable_model(vllm_config, layers, why_not)
    papers = QualityRecords.of(settings)
    spec = KVSpec(
        model_id=engine_name(
            agreed_name(vllm_config, layers, settings.model_id), vllm_config, layers, rope, cache.dtype
        ),
        num_layers=len(layers),
        num_kv_heads=cache.num_kv_heads,
        head_dim=cache.head_dim,
        dtype=cache.dtype,
        rope=rope,
        v_head_dim=None if cache.v_head_dim == cache.head_dim else cache.v_head_dim,
        shard=(rank, size),
    )
    ratio = papers.fusion_ratio(spec, check_layer=settings.check_layer)
    transfers = Transfers(
        open_store(settings, spec, papers),
        cache,
        spec,
        rank,
        chunk_tokens=settings.chunk_tokens,
        load_timeout_s=settings.load_timeout_s,
        save_pending_bytes=settings.save_pending_bytes,
        tells_moves=publishes_events(vllm_config),
    )
    adapters = None
    if vllm_config.lora_config is not None:
        with suppress(EngineError):
            adapters = LoadedAdapters(running_model(layers))
    fuser = None
    if model is not None:
        fuser = Fuser(
            transfers,
            EnginePasses(vllm_config, group.kv_cache_spec, model, cache),
            cache,
            slice_tokens=settings.fusion_slice_tokens,
            check_layer=settings.check_layer,
            size=size,
            is_lossy=is_lossy(settings, papers),
        )
    if fuser is not None and settings.fusion_ratio == "certified":
        _LOG.info("fusions compute %.0f %% of the tokens of documents", 100 * ratio)
    layer_loads = LayerLoads(
        transfers.store,
        cache,
        spec,
        rank,
        chunk_tokens=settings.chunk_tokens,
        load_timeout_s=settings.load_timeout_s,
        count=transfers.count,
    )
    return Worker(
        spec, ratio, transfers, layer_loads, {layer.layer_name: i for i, layer in enumerate(layers)}, fuser, adapters
    )


def publishes_events(vllm_config: Any) -> bool:
    """Whether somebody wants KV events of this engine."""
    config = vllm_config.kv_events_config
    return config is not None and bool(config.enable_kv_cache_events)


def _fusable_model(config: Any, layers: list[Any], why: str | None) -> Any:
    """The model, or None if this engine cannot fuse; says why, once."""
    if config.lora_config is not None:
        why = "it may have adapters, which its runner prepares for its own batches only"
    elif config.parallel_config.data_parallel_size > 1:
        why = "its ranks compute in step (data parallelism)"
    elif config.speculative_config is not None:
        why = "it drafts tokens"
    elif config.model_config.is_multimodal_model or len(layers) < 2:
        why = "its model is not a plain language model of several layers"
    try:
        if why is None:
            return running_model(layers)
    except EngineError as exc:
        why = str(exc)
    _LOG.warning("kvloom does not fuse documents in this engine, and serves prefixes as ever: %s", why)
    return None


def expect_servable(settings: ServingSettings, vllm_config: Any, kv_cache_config: Any) -> int:
    """Tokens of a block, of an engine whose whole KV is one row of blocks for each request."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    parallel, speculative = vllm_config.parallel_config, vllm_config.speculative_config
    why = None
    groups = kv_cache_config.kv_cache_groups
    kinds = [type(group.kv_cache_spec).__name__ for group in groups]
    if kinds != [FullAttentionSpec.__name__]:
        hint = "--disable-hybrid-kv-cache-manager may help"
        why = f"its KV cache groups are {', '.join(sorted(set(kinds)))}, not one of full attention ({hint})"
    elif parallel.pipeline_parallel_size > 1:
        why = "it runs in stages (pipeline parallelism)"
    elif parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        why = "it divides the context among ranks (context parallelism)"
    elif speculative is not None and speculative.method not in ("ngram", "suffix"):
        why = f"it drafts with a model ({speculative.method}), whose KV is another one's"
    if settings.load_mode == "layerwise" and why is None:
        # vLLM 0.32 (issue 49250) goes on from tokens sampled of KV that did not come, where it plans ahead.
        if vllm_config.scheduler_config.async_scheduling:
            raise EngineError(
                "load_mode 'layerwise' needs --no-async-scheduling: vLLM cannot take back a step otherwise"
            )
        if vllm_config.use_v2_model_runner:
            raise EngineError("load_mode 'layerwise' needs VLLM_USE_V2_MODEL_RUNNER=0: V2 cannot take back a step")
    if why is not None:
        raise EngineError(f"kvloom cannot serve this engine exactly: {why}; leave the connector out")
    return int(groups[0].kv_cache_spec.block_size)


def _tensor_parallel_rank() -> int:
    from vllm.distributed import get_tensor_model_parallel_rank

    return int(get_tensor_model_parallel_rank())
