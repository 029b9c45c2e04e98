"""What names the KV of an SGLang engine: weights, what it decides at run time, and the rank that has these heads."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blake3 import blake3

from ...core import KVSpec, RopeSpec
from ...errors import EngineError
from ..identity.loaded_weights import ANY_LENGTH, may_have_changed, private_name
from ..identity.rope import derived_rope, settled_rope
from ..identity.rotary import spec_of_rotary
from ..identity.weights import file_digest, folder_name, model_folder, weight_files, with_state
from .host_pages import HostPages

_LOG = logging.getLogger("kvloom.identity")
_WHERE = "hicache_storage_backend_extra_config"

# That read the model's own weight files and nothing else.
_LOAD_FORMATS = frozenset({"auto", "safetensors", "fastsafetensors", "mistral", "runai_streamer"})


def engine_spec(storage_config: Any, pool: Any, pages: HostPages, model_id: str | None) -> KVSpec:
    """The spec of the KV in a rank's host pool.

    Parameters
    ----------
    storage_config : SGLang's `HiCacheStorageConfig`.
    pool, pages : the host pool.
    model_id : the user's name for the weights; None reads the files.

    Raises
    ------
    EngineError : the weights are not to be found as files; or the engine divides tokens among ranks, or drafts with a
        model whose KV lies in the same pool.
    """
    from sglang.srt.runtime_context import get_lora, get_model

    if storage_config.attn_cp_size > 1 or storage_config.dcp_size > 1:
        raise EngineError("kvloom cannot serve an engine that divides the context among ranks; use tensor parallelism")
    if getattr(pool, "target_layer_num", pages.num_layers) != pages.num_layers:
        raise EngineError("the host pool holds the KV of a draft model, too; leave the draft or kvloom out")
    model, lora = get_model(), get_lora()
    folder = model_folder(model.model_path, model.revision)
    config = _text_config(folder)
    rope = engine_rope(config, pages)
    shard = (0, 1) if storage_config.is_mla_model else (storage_config.tp_rank, storage_config.tp_size)
    stage = None if storage_config.pp_size == 1 else [pool.start_layer, pool.end_layer]
    is_any_length = rope is not None and config.get("model_type") in ANY_LENGTH
    name = with_state(
        model_id if model_id is not None else _weights_name(folder, model),
        # Two formats of 8 bits lie in the same integers.
        computes=None
        if model.kv_cache_dtype in ("auto", str(pages.dtype).removeprefix("torch."))
        else f"{model.dtype} as {model.kv_cache_dtype}",
        max_model_len=None if is_any_length else (model.context_length or "the model's"),
        overrides=_given(model.json_model_override_args),
        quantization=_quantization(model, config),
        # SGLang's layers do not say here which of them have a window: nothing is shared with engines that tell.
        windows="SGLang" if _has_windows(config) else None,
        implementation=None if model.model_impl in ("auto", "sglang") else str(model.model_impl),
        format=getattr(pool, "storage_format_tag", None),
        adapters=_adapters(lora) if lora.enable_lora else None,
        stage=stage,
    )
    value_dim = None if pages.v_head_dim == pages.head_dim else pages.v_head_dim
    return KVSpec(name, pages.num_layers, pages.num_kv_heads, pages.head_dim, pages.dtype, rope, value_dim, shard)


def engine_heads() -> int:
    """KV heads of the whole model; 0 if its config does not say."""
    from sglang.srt.runtime_context import get_model

    model = get_model()
    config = _text_config(model_folder(model.model_path, model.revision))
    return int(config.get("num_key_value_heads") or config.get("num_attention_heads") or 0)


def engine_rope(config: Mapping[str, Any], pages: HostPages) -> RopeSpec | None:
    """How the engine rotates keys, by the table that all engines share if it is that one; None if that is not known."""
    if pages.is_latent:
        return None
    parameters = config.get("rope_parameters") or {}
    try:
        from sglang.srt.layers.rotary_embedding.factory import _ROPE_DICT

        modules = list(_ROPE_DICT.values())  # of this process, which has loaded its model
    except ImportError as exc:
        _LOG.info("SGLang does not show its tables of rotation (%s)", exc)
        return None
    try:
        actual = {spec_of_rotary(module, pages.head_dim) for module in modules}
    except EngineError as exc:
        _LOG.info("this engine's rotation is not understood (%s): KV is shared with SGLang alone", exc)
        return None
    if not actual:
        return derived_rope(parameters, pages.head_dim)
    return settled_rope(actual.pop(), parameters) if len(actual) == 1 else None


def live_weights() -> tuple[object, ...]:
    """What SGLang says of the weights in use; it changes when they are replaced under a new version or path."""
    from sglang.srt.runtime_context import get_model, get_serving

    return get_model().model_path, get_serving().weight_version


def _weights_name(folder: Path | None, model: Any) -> str:
    load_format = str(getattr(model.load_format, "value", model.load_format))
    if load_format not in _LOAD_FORMATS:
        return private_name(_WHERE, f"load_format {load_format!r} may bring weights from elsewhere than the folder")
    if folder is None:
        raise EngineError(
            f"model {model.model_path!r} is neither a folder nor in the hub's cache, so that kvloom cannot name its "
            f'weights; give "model_id" in {_WHERE}'
        )
    has_both = load_format == "auto" and folder.is_dir() and any(folder.glob("consolidated*.safetensors"))
    if has_both:
        return private_name(_WHERE, f"{folder} holds weights in two formats")
    consolidated = load_format == "mistral"
    files = weight_files(folder, consolidated=consolidated)
    name = folder_name(folder, consolidated=consolidated)
    if may_have_changed(folder, files):
        return private_name(_WHERE, f"files in {folder} have changed since this process began")
    return with_state(name, load_format="mistral" if consolidated else None)


def _text_config(folder: Path | None) -> dict[str, Any]:
    """The config of the language model as transformers reads it; empty if it cannot."""
    if folder is None or not folder.is_dir():
        return {}
    from transformers import AutoConfig

    try:
        config: dict[str, Any] = AutoConfig.from_pretrained(folder).get_text_config().to_dict()
    except (OSError, ValueError, KeyError) as exc:
        _LOG.info("transformers cannot read the config in %s (%s)", folder, exc)
        return {}
    return config


def _has_windows(config: Mapping[str, Any]) -> bool:
    kinds = set(config.get("layer_types") or ())
    return bool(kinds - {"full_attention"}) or (
        not kinds and config.get("sliding_window") is not None and config.get("use_sliding_window") is not False
    )


def _quantization(model: Any, config: Mapping[str, Any]) -> dict[str, str] | None:
    """Quantisation that the engine was asked for, beside what the checkpoint itself says."""
    asked = {
        "method": None if "quantization_config" in config else model.quantization,
        "scales": None
        if model.quantization_param_path is None
        else file_digest(Path(model.quantization_param_path)).hex(),
        "modelopt": model.modelopt_quant,
    }
    given = {name: str(value) for name, value in asked.items() if value}
    return given or None


def _given(text: str | None) -> str | None:
    return None if not text or json.loads(text) == {} else text


def _adapters(lora: Any) -> str:
    """Digest of the adapters named at start: SGLang names their KV by their paths, and contents change.

    An adapter that is loaded later has a number of its own each time, so that its KV is never found again.
    """
    digest = blake3()
    for each in sorted(lora.lora_paths or (), key=str):
        path = getattr(each, "lora_path", each)
        folder = model_folder(str(path))
        if folder is None:
            raise EngineError(
                f"adapter {path!r} is neither a folder nor in the hub's cache, so that it cannot be named"
            )
        files = sorted(file for file in folder.iterdir() if file.is_file()) if folder.is_dir() else [folder]
        for file in files:
            if file.suffix in (".safetensors", ".bin", ".json"):
                digest.update(file.name.encode() + b"\0" + file_digest(file))
    return str(digest.hexdigest(16))
