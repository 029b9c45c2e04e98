"""What names the KV of a vLLM engine: weights as it has loaded them, its choices at run time, and its requests."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ...core import RopeSpec
from ...errors import EngineError
from ..identity.loaded_weights import ANY_LENGTH, may_have_changed, private_name
from ..identity.requests import chunk_salt, natural_lead
from ..identity.rope import settled_rope
from ..identity.weights import canonical_config, folder_name, model_folder, weight_files, windows_of, with_state
from .adapters import OpenAdapters
from .fusion.passes import running_model
from .fusion.rope import rope_of

_LOG = logging.getLogger("kvloom.identity")
_WHERE = "kv_connector_extra_config"

# That read the model's own weight files and nothing else; any other may bring weights from elsewhere.
_LOAD_FORMATS = frozenset(
    {"auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "runai_streamer", "mistral"}
)


def agreed_name(vllm_config: Any, layers: Sequence[Any], model_id: str | None) -> str:
    """The name of an engine's weights, the same on every rank of its tensor-parallel group.

    Parameters
    ----------
    layers : the attention modules of the model.
    model_id : the user's name for the weights; None reads them.

    Raises
    ------
    EngineError : they are not to be found as files.
    """
    from vllm.distributed import get_tp_group

    if model_id is not None:
        return model_id
    group = get_tp_group()
    found: tuple[str, str | None] | None = None
    if group.rank_in_group == 0:
        try:
            found = (_weights_name(vllm_config, layers), None)
        except EngineError as exc:
            found = ("", str(exc))
    name, refusal = group.broadcast_object(found, src=0)
    if refusal is not None:
        raise EngineError(refusal)
    return str(name)


def engine_name(name: str, vllm_config: Any, layers: Sequence[Any], rope: RopeSpec | None, dtype: torch.dtype) -> str:
    """The name of weights together with what the engine has decided beside their config, as far as it shapes KV.

    Parameters
    ----------
    name : see `agreed_name`.
    rope : see `engine_rope`; None if that raises.
    dtype : of the cache.
    """
    model = vllm_config.model_config
    length = None if rope is not None and model.hf_text_config.model_type in ANY_LENGTH else model.max_model_len
    return with_state(
        name,
        computes=None if model.dtype == dtype else str(model.dtype),
        max_model_len=length,
        overrides=_overrides(model),
        quantization=_quantization(model),
        windows=windows_of([layer.sliding_window for layer in layers]),
    )


def engine_rope(vllm_config: Any, layers: Sequence[Any], head_dim: int) -> RopeSpec:
    """How the engine rotates keys, by the table that all engines share if it is that one.

    Raises
    ------
    EngineError : see `rope_of`.
    """
    actual = rope_of(running_model(layers), layers, head_dim)
    return settled_rope(actual, getattr(vllm_config.model_config.hf_text_config, "rope_parameters", None))


def engine_lead(model_config: Any) -> tuple[int, ...]:
    """The lead tokens of an engine whose user names none: as the transformers connector has them.

    Empty, and a line in the log, where there is no tokenizer.
    """
    from vllm.tokenizers import get_tokenizer

    try:
        tokenizer = get_tokenizer(
            model_config.tokenizer,
            tokenizer_mode=model_config.tokenizer_mode,
            revision=model_config.tokenizer_revision,
            trust_remote_code=model_config.trust_remote_code,
        )
        return natural_lead(tokenizer)
    except Exception as exc:  # noqa: BLE001  whatever a foreign tokenizer raises: there is none, then
        _LOG.info(
            "the tokenizer of %s cannot be asked for a BOS (%s): documents are taken to stand at the very start of a "
            "prompt; name the tokens in front of them in lead_ids",
            model_config.tokenizer,
            str(exc).splitlines()[0] if str(exc) else type(exc).__name__,
        )
        return ()


def request_identity(request: Any, adapters: OpenAdapters, decoding: bytes = b"") -> bytes | None:
    """The part of a `chunk_salt` that a vLLM `Request` brings; None if kvloom cannot tell what shapes its KV.

    None for pictures and sounds, whose tokens are placeholders, for prompts given as embeddings, for sessions whose
    tokens change, for pooling, and for adapters that are uncertain or no files here.

    Parameters
    ----------
    adapters : those of the engine's open requests, which the request joins.
    decoding : see `chunk_salt`.
    """
    is_plain = request.prompt_token_ids is not None and request.prompt_embeds is None
    if not is_plain or request.mm_features or request.resumable or request.sampling_params is None:
        return None
    adapter = adapters.open(request.request_id, request.lora_request)
    if adapter is None:
        return None
    return chunk_salt(cache_salt=(request.cache_salt or "").encode(), adapter=adapter, decoding=decoding)


# --------------------------------------------------------------------------------------------------------- weights


def _weights_name(vllm_config: Any, layers: Sequence[Any]) -> str:
    model, load_format = vllm_config.model_config, str(vllm_config.load_config.load_format)
    if load_format not in _LOAD_FORMATS:
        return private_name(
            _WHERE, f"load_format {load_format!r} may bring weights from elsewhere than the model's folder"
        )
    folder = model_folder(model.model, model.revision)
    if folder is None:
        raise EngineError(
            f"model {model.model!r} is neither a folder nor in the hub's cache, so that kvloom cannot name its "
            'weights; give "model_id" in kv_connector_extra_config'
        )
    # vLLM prefers Mistral's own files where both are; transformers reads the others.
    has_both = load_format == "auto" and folder.is_dir() and any(folder.glob("consolidated*.safetensors"))
    consolidated = load_format == "mistral" or has_both
    name = folder_name(folder, consolidated=consolidated)
    files = weight_files(folder, consolidated=consolidated)
    if may_have_changed(folder, files) and not _holds(layers, files):
        return private_name(
            _WHERE, f"files in {folder} have changed since this process began, and may not be what it has loaded"
        )
    return with_state(name, load_format="mistral" if consolidated else None)


def _holds(layers: Sequence[Any], files: Sequence[Path]) -> bool:
    """Whether what the engine's first rank has in memory is what the files hold, as far as both have it in one form.

    These are embeddings and norms: other weights are divided, joined, or rearranged for a processor.
    """
    try:
        named = running_model(layers).named_parameters()
        weights = {name.replace(".base_layer", ""): weight for name, weight in named}  # as with adapters
        matrices = 0
        for path in files:
            if path.suffix != ".safetensors":
                return False
            with safe_open(path, framework="pt") as file:
                for name in sorted(set(file.keys()) & weights.keys()):
                    mine, theirs = weights[name], file.get_tensor(name)
                    # Of embeddings a rank has the first rows, and further ones that fill up the last rank's.
                    rows = min(len(mine), len(theirs)) if mine.ndim and mine.shape[1:] == theirs.shape[1:] else 0
                    if mine.dtype.itemsize < 2 or not rows:
                        continue
                    if not torch.equal(mine[:rows].detach().cpu(), theirs[:rows].to(mine.dtype)):
                        return False
                    matrices += theirs.ndim == 2
        return matrices > 0
    except (EngineError, OSError, ValueError, RuntimeError, TypeError):
        return False


def _overrides(model: Any) -> str | None:
    """The config in use, where it is not the one that lies beside the weights."""
    is_own = (
        not model.hf_overrides and model.hf_config_path is None and model.config_format in ("auto", "hf", "mistral")
    )
    return None if is_own else canonical_config(model.hf_config.to_dict())


def _quantization(model: Any) -> dict[str, str] | None:
    """Quantisation that the engine was asked for, beside what the checkpoint itself says."""
    folder = model_folder(model.model, model.revision)
    path = None if folder is None else folder / "config.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path is not None and path.is_file() else {}
    asked = getattr(model, "quantization_config", None)
    is_own = "quantization_config" in known or "compression_config" in known
    if model.quantization is None or (is_own and not asked):
        return None
    return {"method": str(model.quantization), "config": str(asked)}
