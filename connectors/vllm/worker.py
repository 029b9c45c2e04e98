"""Opens what kvloom has in a worker of vLLM: a store of its rank's heads, beside the caches of its layers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from ...core import KVSpec, RopeSpec
from ...errors import EngineError
from ..identity.weights import with_state
from ..serving.groups import GroupShape
from ..serving.head_splits import HeadSplit
from ..serving.messages import WorkerInfo
from ..serving.settings import ServingSettings
from ..serving.worker.fuser import Fuser
from ..serving.worker.layer_loads import LayerLoads
from ..serving.worker.other_sizes import holds_others_only, splits_for, warn_of_other_sizes
from ..serving.worker.pieces import CacheGroup
from ..serving.worker.steps import Worker
from ..serving.worker.store_setup import QualityRecords, is_lossy, open_store
from ..serving.worker.transfers import Transfers
from .adapters import LoadedAdapters
from .fusion.passes import EnginePasses, running_model
from .groups import EngineGroups, groups_of
from .identity import agreed_name, engine_name, engine_rope
from .paged_layers import PagedLayers
from .retrieval.settings import RetrievalSettings
from .scheduler_half import publishes_events, ranks_of
from .state_layers import StateLayers

_LOG = logging.getLogger("kvloom")


def open_worker(settings: ServingSettings, token: str, vllm_config: Any, kv_cache_config: Any) -> Worker:
    """Open the store of this rank, beside the caches that its runner has just allocated.

    Parameters
    ----------
    token : names the connector, see `WorkerInfo`.

    Raises
    ------
    EngineError : the caches cannot be read or written, see `PagedLayers`; the weights cannot be named; or settings of
        retrieval are given that nothing in this engine reads.
    TierError : the folder on disk cannot be used.
    ValueError : no codec has that name, or it needs a profile and there is none.
    SpecMismatchError, CodecError : the profile is of another model, or none.
    UncertifiedError : a codec is lossy, and no certificate covers it for this model; or a file is no certificate.
    """
    groups = groups_of(kv_cache_config)
    members = [_members(vllm_config, kv_cache_config.kv_cache_groups[number]) for number in groups.numbers]
    layers = list(members[0].values())
    stage, stages = _pipeline_stage(), int(vllm_config.parallel_config.pipeline_parallel_size)
    if stages > 1 and not all(members):
        raise EngineError(
            f"stage {stage} of {stages} has no layer of one of this engine's KV cache groups, and kvloom needs some of "
            "each in every stage: choose another --pipeline-parallel-size or VLLM_PP_LAYER_PARTITION, or leave the "
            "connector out"
        )
    _expect_retrieval_is_read(vllm_config, groups, layers)
    computes = vllm_config.model_config.dtype
    caches = [
        _cache_of(list(each.values()), shape, computes) for each, shape in zip(members, groups.shapes, strict=True)
    ]
    cache = caches[0]
    shard = (_tensor_parallel_rank(), int(vllm_config.parallel_config.tensor_parallel_size))
    rank = stage * shard[1] + shard[0]
    # Of a latent cache every rank has the whole. The first stores it where the others find it, or each for itself.
    saves = not cache.is_latent or not shard[0] or (settings.disk_path is None and settings.remote_url is None)
    if groups.is_plain and isinstance(cache, PagedLayers):
        rope, why_not = _rope(vllm_config, layers, cache)
    else:
        rope, why_not = None, "its layers are in groups, or have windows or states, and blocks of those are taken back"
    model = _fusable_model(vllm_config, layers, why_not)
    records = QualityRecords.of(settings)
    if groups.keeps_states and is_lossy(settings, records):
        raise EngineError(
            "this engine has layers with states, which the codec of a tier would round: leave host_codec and "
            "disk_codec out, or give 'lossless'"
        )
    if cache.dtype == torch.uint8 and is_lossy(settings, records):
        raise EngineError(
            f"this engine's cache is quantised already ({layers[0].kv_cache_dtype}), and the codec of a tier would "
            "round it once more: leave host_codec and disk_codec out, or give 'lossless'"
        )
    name = agreed_name(vllm_config, layers, settings.model_id)
    if stages > 1:
        name = with_state(name, stage=list(members[0]))
    pieces: list[CacheGroup] = []
    if groups.is_plain:
        full_name = with_state(engine_name(name, vllm_config, layers, rope, cache.dtype), cache=cache.state())
        spec = _spec(full_name, cache, rope, shard)
    else:
        for paged, shape, each in zip(caches, groups.shapes, members, strict=True):
            attention = () if shape.keeps_state else tuple(each.values())
            group_name = engine_name(name, vllm_config, attention, None, paged.dtype)
            group_name = with_state(group_name, group=_group_state(list(each), shape), cache=paged.state())
            pieces.append(CacheGroup(paged, _spec(group_name, paged, None, shard), shape))
        spec = pieces[0].spec
    method = records.fusion(spec, select=settings.fusion_select, check_layer=settings.check_layer)
    store = open_store(settings, spec, records, ranks=ranks_of(vllm_config))
    for piece in pieces[1:]:
        store.check_certificates(piece.spec)
    splits: tuple[HeadSplit, ...] = ()
    if groups.is_plain:
        splits = splits_for(settings, spec, vllm_config.model_config.get_total_num_kv_heads())
        if rank == 0:
            warn_of_other_sizes(settings, spec, store)
    transfers = Transfers(
        store,
        cache,
        spec,
        rank,
        chunk_tokens=settings.chunk_tokens,
        load_timeout_s=settings.load_timeout_s,
        save_pending_bytes=settings.save_pending_bytes,
        reports_placement=publishes_events(vllm_config) and groups.is_plain,
        splits=splits,
        groups=pieces,
        saves=saves,
        is_foreign=holds_others_only(spec, store),
        correction=records.correction(spec) if method.correction else None,
    )
    adapters = None
    if vllm_config.lora_config is not None:
        with suppress(EngineError):
            adapters = LoadedAdapters(running_model(layers))
    fuser = None
    if model is not None and isinstance(cache, PagedLayers):
        fuser = Fuser(
            transfers,
            EnginePasses(vllm_config, kv_cache_config.kv_cache_groups[0].kv_cache_spec, model, cache),
            cache,
            slice_tokens=settings.fusion_slice_tokens,
            method=method,
            sum_over_ranks=_sum_over_ranks if shard[1] > 1 else None,
            is_lossy=is_lossy(settings, records),
        )
    if fuser is not None and settings.fusion_ratio == "certified":
        _LOG.info("fusions compute %.0f %% of the tokens of documents", 100 * method.ratio)
    layer_loads = LayerLoads(
        transfers.reader,
        transfers.offers,
        cache,
        spec,
        rank,
        chunk_tokens=settings.chunk_tokens,
        load_timeout_s=settings.load_timeout_s,
        count=transfers.count,
    )
    numbers = {layer_name: i for i, layer_name in enumerate(members[0])}
    further = tuple(piece.spec for piece in pieces[1:])
    tiers = tuple(tier.name for tier in store.tiers)
    info = WorkerInfo(spec, fuser is not None, method, token, splits, further, tiers)
    return Worker(info, transfers, layer_loads, numbers, fuser, adapters, fails_whole=bool(pieces))


def _members(vllm_config: Any, group: Any) -> dict[str, Any]:
    """The modules of a KV cache group by name. One that shares another's cache has none of its own to keep."""
    context = vllm_config.compilation_config.static_forward_context
    layers = {name: context[name] for name in group.layer_names}
    return {
        name: layer for name, layer in layers.items() if getattr(layer, "kv_sharing_target_layer_name", None) is None
    }


def _cache_of(layers: Sequence[Any], shape: GroupShape, computes: torch.dtype) -> PagedLayers | StateLayers:
    if shape.keeps_state:
        return StateLayers(layers, shape.block_tokens)
    return PagedLayers(layers, shape.block_tokens, computes)


def _rope(vllm_config: Any, layers: Sequence[Any], cache: PagedLayers) -> tuple[RopeSpec | None, str | None]:
    """The rotation of stored keys; or None, and why they cannot be moved."""
    if cache.is_latent:
        return None, "its cache is latent (MLA)"
    if cache.dtype == torch.uint8:
        return None, f"its cache is quantised ({layers[0].kv_cache_dtype})"
    try:
        return engine_rope(vllm_config, layers, cache.head_dim), None
    except EngineError as exc:
        return None, str(exc)


def _spec(name: str, cache: PagedLayers | StateLayers, rope: RopeSpec | None, shard: tuple[int, int]) -> KVSpec:
    return KVSpec(
        model_id=name,
        num_layers=cache.num_layers,
        num_kv_heads=cache.num_kv_heads,
        head_dim=cache.head_dim,
        dtype=cache.dtype,
        rope=rope,
        v_head_dim=None if cache.v_head_dim == cache.head_dim else cache.v_head_dim,
        shard=(0, 1) if cache.is_latent else shard,
    )


def _group_state(layer_names: Sequence[str], shape: GroupShape) -> dict[str, object]:
    """Which layers a piece is of and, beside the length of a chunk, what decides which tokens."""
    return {
        "layers": layer_names,
        "window": shape.window_tokens,
        "local": shape.local_tokens,
        "block": None if shape.is_full or shape.keeps_state else shape.block_tokens,
    }


def _expect_retrieval_is_read(vllm_config: Any, groups: EngineGroups, layers: Sequence[Any]) -> None:
    """Raises `EngineError` if the engine is to retrieve and cannot, or its attention backend is none of kvloom's."""
    asked = RetrievalSettings.of_engine(vllm_config.additional_config) is not None
    if asked and not groups.is_plain:
        raise EngineError(
            "additional_config asks kvloom for retrieval, but this engine's layers are in several KV cache groups, or "
            "have windows, in which kvloom does not retrieve; leave the settings out"
        )
    if asked and not any(hasattr(layer.impl, "retrieving") for layer in layers):
        raise EngineError(
            "additional_config asks kvloom for retrieval, but this engine's attention backend is "
            f"{type(layers[0].impl).__name__}: install kvloom, so that vLLM finds its entry point, and on a GPU give "
            "--attention-backend CUSTOM; or leave the settings out"
        )


def _fusable_model(config: Any, layers: list[Any], why: str | None) -> Any:
    """The model, or None if this engine cannot fuse; logs why, once."""
    if config.lora_config is not None:
        why = "it may have adapters, which its runner prepares for its own batches only"
    elif config.parallel_config.data_parallel_size > 1:
        why = "its ranks compute in step (data parallelism)"
    elif config.parallel_config.pipeline_parallel_size > 1:
        why = "its layers are in stages (pipeline parallelism), and a fusion computes all of them in one"
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


def _tensor_parallel_rank() -> int:
    from vllm.distributed import get_tensor_model_parallel_rank

    return int(get_tensor_model_parallel_rank())


def _pipeline_stage() -> int:
    from vllm.distributed import get_pp_group

    return int(get_pp_group().rank_in_group)


def _sum_over_ranks(rows: Tensor) -> Tensor:
    """The sum of a tensor over all tensor-parallel ranks, on the cpu."""
    from vllm.distributed import tensor_model_parallel_all_reduce
    from vllm.platforms import current_platform

    summed: Tensor = tensor_model_parallel_all_reduce(rows.to(current_platform.device_type))
    return summed.cpu()
