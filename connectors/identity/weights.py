"""Names of weights: of a model folder's contents, and of tensors in memory that no folder holds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...errors import EngineError

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_INDEX = "model.safetensors.index.json"
_CONSOLIDATED = "consolidated"
_WIDENED = (torch.float16, torch.bfloat16)  # into float32, which holds all their numbers

# Fields of a config that do not shape KV: where it came from, how it was read, what is done with the logits.
_INCIDENTAL_FIELDS = frozenset(
    {
        "_attn_implementation",
        "_attn_implementation_internal",
        "_commit_hash",
        "_name_or_path",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "id2label",
        "label2id",
        "num_labels",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "tie_word_embeddings",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)


def canonical_config(config: Mapping[str, Any]) -> str:
    """JSON of a model's config without fields that do not shape KV, nested configs included; sorted."""
    return json.dumps(_essential(config), sort_keys=True, separators=(",", ":"), default=str)


def _essential(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _essential(v) for k, v in value.items() if k not in _INCIDENTAL_FIELDS}
    return [_essential(each) for each in value] if isinstance(value, list | tuple) else value


def folder_name(folder: Path, *, consolidated: bool = False) -> str:
    """The name of a model folder's contents: BLAKE3 over its config and its weight files, wherever it lies.

    Counts are the fields of `config.json` that shape KV, the bytes of `weight_files`, and Python files if the config
    names them (`auto_map`). The precision of loaded weights does not count: a spec has its dtype. About 4 s for 16 GB
    in the page cache on two cores.

    Parameters
    ----------
    folder : a model folder, or one file of weights, whose config is then up to the caller.
    consolidated : as for `weight_files`.

    Raises
    ------
    EngineError : there are no weights, or a file cannot be read.
    """
    files = weight_files(folder, consolidated=consolidated)
    config: Mapping[str, Any] = {}
    try:
        if (path := folder / "config.json").is_file():
            config = json.loads(path.read_text(encoding="utf-8"))
        if "auto_map" in config:
            files += sorted(folder.glob("*.py"))
        digest = blake3(b"kvloom folder 2\0" + canonical_config(config).encode())
        for path in files:
            digest.update(file_digest(path))
    except (OSError, ValueError) as exc:
        raise EngineError(f"{folder} cannot be read, so that kvloom cannot name the model: {exc}") from exc
    return f"{config.get('model_type', 'model')}-{digest.hexdigest(32)}"


def weight_files(folder: Path, *, consolidated: bool = False) -> list[Path]:
    """The weight files that transformers and vLLM read of a folder: those of the first suffix in `WEIGHTS` that occurs.

    Of safetensors files, those that the index names, if there is one; without an index, all.

    Parameters
    ----------
    consolidated : the files in Mistral's own format, which stand beside the others in some folders.

    Raises
    ------
    EngineError : there are none.
    """
    if folder.is_file():
        return [folder]
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    found = [path for path in found if path.name.startswith(_CONSOLIDATED) == consolidated]
    for suffix in WEIGHTS:
        files = [path for path in found if path.suffix == suffix]
        if suffix == ".safetensors" and (folder / _INDEX).is_file() and not consolidated:
            indexed = set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values())
            files = [path for path in files if path.name in indexed]
        if files:
            return files
    raise EngineError(
        f"no weights ({', '.join(WEIGHTS)}) in {folder}, so that kvloom cannot name the model; give a name of your own "
        "as model_id, and another one whenever the weights change"
    )


def model_folder(name: str, revision: str | None = None) -> Path | None:
    """The folder or file of that path, or what the hub's client has of a repository of that name; None if neither."""
    path = Path(name)
    if not name or path.exists():
        return path if name else None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError):
        return None


def file_digest(path: Path) -> bytes:
    """BLAKE3 of a file's bytes."""
    return blake3(max_threads=blake3.AUTO).update_mmap(path).digest()


def memory_name(model_type: str, config: Mapping[str, Any], tensors: Iterable[tuple[str, Tensor]]) -> str:
    """The name of weights in memory: BLAKE3 over config, names, shapes and values.

    Equal numbers have equal names in whatever precision they are held, so that what was measured in float32 serves
    the same weights in bfloat16. Rounded weights are other weights. Some seconds for 10 GB.

    Raises
    ------
    EngineError : a tensor's values cannot be read.
    """
    digest = blake3(b"kvloom memory 2\0" + canonical_config(config).encode(), max_threads=blake3.AUTO)
    for name, tensor in sorted(tensors):
        update(digest, name, tensor)
    return f"{model_type}-{digest.hexdigest(32)}"


def update(digest: blake3, name: str, tensor: Tensor) -> None:
    """Add a tensor's name, shape and values, widened to float32 where that is exact.

    Raises
    ------
    EngineError : its values cannot be read.
    """
    try:
        for part, plain in plain_tensors(name, tensor):
            values = plain.detach().cpu().contiguous()
            if values.dtype in _WIDENED:
                values = values.float()
            digest.update(f"{part} {values.dtype} {list(values.shape)}\0".encode())
            digest.update(values.view(-1).view(torch.uint8).numpy().data)
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError) as exc:
        raise EngineError(
            f"the values of {name} ({type(tensor).__name__} on {tensor.device}) cannot be read, so that kvloom cannot "
            "name the model; give a name of your own as model_id, and another one whenever the weights change"
        ) from exc


def plain_tensors(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors that a tensor subclass (torchao's kinds) consists of; a plain tensor alone."""
    if hasattr(tensor, "__tensor_flatten__"):
        inner, context = tensor.__tensor_flatten__()
        for attribute in inner:
            yield from plain_tensors(f"{name}.{attribute} {context}", getattr(tensor, attribute))
    else:
        yield name, tensor


def holds(folder: Path, tensors: Mapping[str, Tensor]) -> bool:
    """Whether every tensor is that of its name in a folder's safetensors files, cast to its dtype.

    A tensor without such a name passes if it shares its memory with one that passed (tied embeddings). Reads each
    tensor of the files once. False for folders without safetensors, and where a name stands in two files.
    """
    try:
        files = weight_files(folder)
        if files[0].suffix != ".safetensors":
            return False
        matched, seen = set[tuple[object, ...]](), set[str]()
        for path in files:
            with safe_open(path, framework="pt") as file:
                names = set(file.keys())
                if names & seen:
                    return False
                seen |= names
                for name in sorted(names & tensors.keys()):
                    mine, theirs = tensors[name], file.get_tensor(name)
                    if mine.shape != theirs.shape or not _equal(mine, theirs.to(mine.dtype)):
                        return False
                    matched.add(_memory(mine))
        return all(_memory(tensors[name]) in matched for name in tensors.keys() - seen)
    except (EngineError, OSError, ValueError, LookupError, RuntimeError, TypeError, SafetensorError):
        return False


def _equal(one: Tensor, other: Tensor) -> bool:
    """Bit for bit, which is faster than to compare numbers of 16 bits."""
    bits = bits_of(one.dtype)
    return torch.equal(one.detach().cpu().contiguous().view(bits), other.contiguous().view(bits))


def bits_of(dtype: torch.dtype) -> torch.dtype:
    """The integers of that size, as which values can be compared and read whatever they are."""
    return {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(dtype.itemsize, torch.uint8)


def _memory(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def with_state(name: str, **state: object) -> str:
    """A model's name together with what else shapes its KV when it runs; `name` itself if there is nothing.

    Parameters
    ----------
    state : by kind, as JSON; what is None, empty or False is nothing.
    """
    given = {kind: value for kind, value in state.items() if value}
    if not given:
        return name
    text = json.dumps(given, sort_keys=True, separators=(",", ":"), default=str)
    return f"{name}+{'.'.join(sorted(given))}-{blake3(text.encode()).hexdigest(16)}"


def windows_of(window_tokens: Sequence[int | None]) -> Sequence[int | None] | None:
    """State for `with_state`: the sliding window of every layer; nothing if none has one.

    A config is no proof: programs differ about where a window that it names applies.
    """
    return window_tokens if any(window is not None for window in window_tokens) else None
