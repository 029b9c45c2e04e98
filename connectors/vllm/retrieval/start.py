"""Before the first request: what of an engine may retrieve, whether it is certified, from which length on it pays."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ....calibration.certificate_gate import CertificateGate
from ....core import KVSpec, RopeSpec
from ....errors import EngineError
from ....retrieval.selector import LayerShape, LearnsFromQueries
from ....retrieval.settings import Retrieval, require_certificate
from ...break_even import NEVER, crossing, median_s
from ..identity import agreed_name, engine_name, engine_rope
from ..packings import Packing, find_packing
from .paged_index import PagedRetrieval
from .rows import DecodeRow, PromptPart
from .settings import RetrievalSettings

_LOG = logging.getLogger("kvloom")
_SIZES = (2048, 8192, 32768)  # tokens, as `crossing` has them
_QUERIES = 64  # what an index learns from when it is timed

BuildMetadata = Callable[..., Any]


@dataclass(frozen=True, slots=True, eq=False)
class Retrieving:
    """`layers` that retrieve, and tokens of the shortest context for which they do."""

    layers: Sequence[PagedRetrieval]
    break_even_tokens: int


def open_layers(build: BuildMetadata, spec: Any, names: Sequence[str], config: Any, device: Any) -> Retrieving:
    """Gives every layer that can retrieve its `PagedRetrieval`, unless it has one of this shape already.

    Parameters
    ----------
    build : of the backend's own builder.
    spec, names, config, device : what vLLM makes a builder of.

    Raises
    ------
    ValueError : a setting is wrong.
    UncertifiedError : the engine would approximate without leave.
    EngineError : this engine cannot retrieve: see `why_refused`; or none of its layers can.
    """
    settings = RetrievalSettings.of_engine(config.additional_config)
    if settings is None:
        return Retrieving((), NEVER)
    if (why := why_refused(config)) is not None:
        raise EngineError(f"kvloom cannot decode through retrieval in this engine: {why}; leave its settings out")
    context = config.compilation_config.static_forward_context
    layers = [context[name] for name in names]
    able = {id(layer): layer for layer in layers if why_dense(layer, spec) is None}
    if not able:
        reasons = sorted({str(why_dense(layer, spec)) for layer in layers})
        raise EngineError(f"no layer of this model can retrieve ({'; '.join(reasons)}); leave the settings out")
    retrieval, chosen = settings.retrieval, list(able.values())
    _expect_usable(retrieval)
    rope = engine_rope(config, chosen, int(chosen[0].head_size))
    if any(layer.impl.retrieving is None for layer in chosen):  # not asked before
        _expect_permitted(settings, config, layers, rope)
    opened, timed = [], None
    for layer in chosen:
        number = _number_of(layer.layer_name)
        if number < retrieval.dense_layers:
            continue
        known = layer.impl.retrieving
        if known is None or known.block_tokens != spec.block_size:
            layer.impl.retrieving = None  # what is written in order to look is no write to the cache
            shape = LayerShape(
                layer.num_kv_heads, layer.num_heads // layer.num_kv_heads, layer.head_size, layer.impl.scale, rope
            )
            packing = _packing_of(layer, spec, device)
            known = PagedRetrieval(retrieval, shape, number, _value_dim(layer), packing, int(spec.block_size))
            layer.impl.retrieving = known
        opened.append(known)
        timed = timed or layer
    if not opened:
        raise EngineError(f"dense_layers is {retrieval.dense_layers}; no layer is left that could retrieve")
    break_even = retrieval.break_even_tokens
    if break_even is None:
        break_even = opened[0].break_even_tokens
    if break_even is None:
        break_even = _agreed(lambda: _measured(build, opened[0], timed, spec, config, device))
        opened[0].break_even_tokens = break_even
    _LOG.info(
        "%s",
        f"kvloom decodes through {retrieval.method} (budget {retrieval.budget_ratio:.1%}, at least "
        f"{retrieval.budget_tokens} tokens) in {len(opened)} of {len(layers)} layers, "
        + ("never: dense attention is faster here" if break_even >= NEVER else f"from {break_even:,} tokens on"),
    )
    return Retrieving(tuple(opened), break_even)


def why_refused(config: Any) -> str | None:
    """Why nothing in this engine may retrieve; None if it may."""
    parallel, transfer = config.parallel_config, config.kv_transfer_config
    if parallel.pipeline_parallel_size > 1:
        return "it runs in stages (pipeline parallelism)"
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        return "it divides the context among ranks (context parallelism)"
    if config.speculative_config is not None:
        return "it drafts tokens, and steps of several tokens are dense"
    if transfer is not None and transfer.kv_connector not in (None, "KVLoomConnector"):
        return f"connector {transfer.kv_connector} may write into blocks unseen, under indexes of what was there before"
    mode = getattr(config.compilation_config, "cudagraph_mode", None)
    if config.device_config.device_type != "cpu" and getattr(mode, "name", "NONE") != "NONE":
        return "it replays recorded graphs, in which indexes cannot be kept; set enforce_eager"
    return None


def why_dense(layer: Any, spec: Any) -> str | None:
    """Why a layer attends to everything; None if it can retrieve."""
    impl = layer.impl
    if not hasattr(impl, "retrieving"):
        return f"its backend {type(impl).__name__} is not kvloom's"
    if layer.sliding_window is not None:
        return "a sliding window"
    if getattr(impl, "alibi_slopes", None) is not None:
        return "ALiBi"
    if getattr(impl, "logits_soft_cap", None):
        return "a soft cap on its scores"
    if getattr(impl, "sinks", None) is not None:
        return "learned sinks"
    if getattr(layer, "kv_sharing_target_layer_name", None) is not None:
        return "another layer's cache"
    if str(layer.attn_type).rpartition(".")[2].lower() != "decoder":
        return f"attention of kind {layer.attn_type}"
    if spec.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"a cache of {spec.dtype}"
    return None


def _expect_usable(retrieval: Retrieval) -> None:
    """Tries the method on a few random keys, so that what it lacks is missed now and not by the first request.

    Raises
    ------
    ValueError : a parameter is not known or out of its range.
    EngineError : a package is not installed.
    """
    random, shape = torch.Generator().manual_seed(0), LayerShape(1, 2, 64, 0.125)
    keys = torch.randn(1, 512, 64, generator=random)
    selector = retrieval.selector(shape, 0, start=0)
    try:
        selector.add(keys, keys)
        if isinstance(selector, LearnsFromQueries):
            selector.observe(torch.randn(2, 64, 64, generator=random), torch.arange(448, 512))
            selector.build()
        selector.select(torch.randn(2, 64, generator=random), 512, 8)
    except ImportError as exc:
        raise EngineError(
            f"retrieval {retrieval.method!r} needs a package that vLLM's environment lacks: {exc}"
        ) from exc


def _expect_permitted(settings: RetrievalSettings, config: Any, layers: Sequence[Any], rope: RopeSpec) -> None:
    """Raises `UncertifiedError` unless a certificate covers model and settings, or the user insists."""
    model = config.model_config
    certificates = settings.load_certificates()
    name = settings.model_id or _connector_model_id(config)
    if certificates:
        name = engine_name(agreed_name(config, layers, name), config, layers, rope, model.dtype)
    spec = KVSpec(
        model_id=name or model.model,
        num_layers=int(model.hf_text_config.num_hidden_layers),
        num_kv_heads=int(model.get_total_num_kv_heads()),
        head_dim=int(layers[0].head_size),
        dtype=model.dtype,
        rope=rope,
    )
    gate = CertificateGate(certificates, allow_uncertified=settings.allow_uncertified)
    require_certificate(gate, settings.retrieval, spec)


def _connector_model_id(config: Any) -> str | None:
    """The user's name for the weights, if kvloom's connector is told one: an engine has one name."""
    transfer = config.kv_transfer_config
    return None if transfer is None else (transfer.kv_connector_extra_config or {}).get("model_id")


# ------------------------------------------------------------------------------------------------------- the cache


def _packing_of(layer: Any, spec: Any, device: Any) -> Packing:
    heads, dims = int(layer.num_kv_heads), (int(layer.head_size), _value_dim(layer))
    cache = torch.zeros(2, heads, int(spec.block_size), sum(dims), dtype=spec.dtype, device=device)
    return find_packing(layer, cache, *dims)[0]


def _value_dim(layer: Any) -> int:
    return int(getattr(layer, "head_size_v", None) or layer.head_size)


def _number_of(layer_name: str) -> int:
    from vllm.model_executor.models.utils import extract_layer_index

    return int(extract_layer_index(layer_name))


# ------------------------------------------------------------------------------------------------------ break-even


def _agreed(measure: Callable[[], int]) -> int:
    """What the first rank of a tensor-parallel group measures, for all of them."""
    from vllm.distributed import get_tp_group

    group = get_tp_group()
    return int(group.broadcast_object(measure() if group.rank_in_group == 0 else None, src=0))


@torch.inference_mode()
def _measured(build: BuildMetadata, paged: PagedRetrieval, layer: Any, spec: Any, config: Any, device: Any) -> int:
    """Tokens from which on one row of one layer is faster with retrieval, on random keys; `NEVER`."""
    dense: list[float] = []
    sparse: list[float] = []
    for tokens in _SIZES:
        if tokens > config.model_config.max_model_len and dense:
            break
        of_dense, of_sparse = _steps(build, paged, layer, spec, device, tokens)
        dense.append(median_s(of_dense))
        sparse.append(median_s(of_sparse))
        if sparse[-1] <= dense[-1]:
            break
    if len(dense) == 1 and sparse[0] > dense[0]:
        return NEVER
    return crossing(dense, sparse)


def _steps(
    build: BuildMetadata, paged: PagedRetrieval, layer: Any, spec: Any, device: Any, tokens: int
) -> tuple[Callable[[], object], Callable[[], object]]:
    from vllm.v1.attention.backend import CommonAttentionMetadata

    shape, N = paged.shape, paged.block_tokens
    random = torch.Generator().manual_seed(0)
    count = -(-tokens // N) + 1  # block 0 is nobody's
    cache = torch.zeros(count, shape.kv_heads, N, shape.head_dim + paged.value_dim, dtype=spec.dtype, device=device)
    keys, values = (
        torch.randn(tokens, shape.kv_heads, dim, generator=random).to(device, spec.dtype)
        for dim in (shape.head_dim, paged.value_dim)
    )
    slots = torch.arange(N, N + tokens, device=device)
    # its own indexes, so that nothing of this is left behind
    trial = PagedRetrieval(paged.retrieval, shape, paged.layer, paged.value_dim, paged.packing, N)
    layer.impl.retrieving = None
    layer.impl.do_kv_cache_update(layer, keys, values, cache, slots)
    layer.impl.retrieving = paged
    trial.wrote(slots, count)
    query = torch.randn(1, shape.query_heads, shape.head_dim, generator=random).to(device, spec.dtype)
    starts, lengths = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([tokens], dtype=torch.int32)
    blocks = torch.arange(1, count)
    metadata = build(
        0,
        CommonAttentionMetadata(
            query_start_loc=starts.to(device),
            query_start_loc_cpu=starts,
            seq_lens=lengths.to(device),
            num_reqs=1,
            num_actual_tokens=1,
            max_query_len=1,
            max_seq_len=tokens,
            block_table_tensor=blocks.to(device, torch.int32)[None],
            slot_mapping=slots[-1:],
            causal=True,
            seq_lens_cpu_upper_bound=lengths,
        ),
    )
    output = torch.empty_like(query)
    row = DecodeRow(0, 0, tokens - 1, blocks)
    if trial.learns:
        asked = torch.randn(_QUERIES, shape.query_heads, shape.head_dim, generator=random)
        at = torch.arange(tokens - _QUERIES, tokens)
        trial.heard(PromptPart(torch.arange(_QUERIES), at, (at // N + 1).tolist()), asked)
    steps = iter(range(1 << 30))

    def dense() -> object:
        return layer.impl.forward(layer, query, keys[-1:], values[-1:], cache, metadata, output=output)

    def sparse() -> object:
        return layer.impl.retrieve(trial, layer, next(steps), [row], query, cache)

    return dense, sparse
