"""Names for what shapes the KV of a vLLM engine: its weights, and what a request brings beside its tokens."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from blake3 import blake3

from ...errors import EngineError

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_INCIDENTAL_FIELDS = ("_name_or_path", "transformers_version", "dtype")  # where from, read by what, and into what


def model_id_of(model_config: Any) -> str:
    """Names weights and configuration of a vLLM `ModelConfig`, wherever they lie: BLAKE3 over both.

    Overrides and quantisation count, the precision does not: the spec of a cache has that itself. Some seconds for
    16 GB in the page cache.

    Raises
    ------
    EngineError : the weights are not to be found as files.
    """
    files = _weight_files(model_config)
    config = model_config.hf_config.to_dict()
    fields = {name: value for name, value in config.items() if name not in _INCIDENTAL_FIELDS}
    fields["kvloom quantization"] = model_config.quantization
    digest = blake3(json.dumps(fields, sort_keys=True, default=str).encode())
    for path in files:
        digest.update(file_digest(path))
    return f"{config.get('model_type', 'model')}-{digest.hexdigest(32)}"


def weight_files_id(model: Any) -> str:
    """Names the weights of a folder or of a vLLM `ModelConfig` by their files alone: BLAKE3 over all of them.

    Raises
    ------
    EngineError : there are none.
    """
    files = _files_in(model) if isinstance(model, Path) else _weight_files(model)
    digest = blake3()
    for path in files:
        digest.update(file_digest(path))
    return digest.hexdigest()


def request_identity(request: Any) -> bytes | None:
    """What shapes the KV of a vLLM `Request` beside model and tokens, and whose it is; None if kvloom cannot tell.

    None for pictures and sounds, whose tokens are placeholders, for prompts given as embeddings, for sessions whose
    tokens change, for pooling, and for adapters that are not files here.
    """
    is_plain = request.prompt_token_ids is not None and request.prompt_embeds is None
    if not is_plain or request.mm_features or request.resumable or request.sampling_params is None:
        return None
    parts: dict[str, str] = {}
    if request.cache_salt:
        parts["cache_salt"] = request.cache_salt
    if request.lora_request is not None:
        folder = Path(request.lora_request.lora_path)
        files = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
        if not any(path.suffix in _WEIGHTS for path in files):
            return None
        known = ((path, path.stat()) for path in files if path.suffix in (*_WEIGHTS, ".json"))
        parts["adapter"] = _adapter_digest(tuple((str(path), s.st_size, s.st_mtime_ns) for path, s in known))
    return json.dumps(parts, sort_keys=True).encode()


def file_digest(path: Path) -> bytes:
    """BLAKE3 of a file's bytes."""
    return blake3(max_threads=blake3.AUTO).update_mmap(path).digest()


@lru_cache(maxsize=256)
def _adapter_digest(files: tuple[tuple[str, int, int], ...]) -> str:
    """Of files that are what they were as long as size and time of change are."""
    digest = blake3()
    for path, _, _ in files:
        digest.update(file_digest(Path(path)))
    return digest.hexdigest()


def _weight_files(model_config: Any) -> list[Path]:
    folder = Path(model_config.model)
    return _files_in(folder if folder.exists() else _hub_folder(model_config))


def _files_in(folder: Path) -> list[Path]:
    files = [folder] if folder.is_file() else sorted(path for path in folder.iterdir() if path.suffix in _WEIGHTS)
    if not files:
        raise EngineError(
            f"no weights ({', '.join(_WEIGHTS)}) in {folder}, so that kvloom cannot name the model; give a name of "
            'your own as "model_id" in kv_connector_extra_config, another one whenever the weights change'
        )
    return files


def _hub_folder(model_config: Any) -> Path:
    """Where the hub's client keeps the revision that vLLM has loaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model_config.model, revision=model_config.revision, local_files_only=True))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as exc:
        raise EngineError(
            f"model {model_config.model!r} is neither a folder nor in the hub's cache, so that kvloom cannot name its "
            'weights; give "model_id" in kv_connector_extra_config'
        ) from exc
