"""The shape of a model: what its KV takes, and how much it computes. From a folder, a name, or numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from ...core import KVSpec, RopeSpec
from ..schedule.costs import pairs

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FIELDS = ("layers", "kv_heads", "head_dim", "params", "heads", "value_dim", "hidden", "vocab", "dtype", "context")
_NEEDED = FIELDS[:4]
_GROUP = 4  # query heads a KV head, where nothing says how many


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What planning needs to know of a model.

    Attributes
    ----------
    head_dim, value_dim : D and Dv of what is cached; Dv is 0 for a latent (MLA) cache that is all in the keys.
    query_heads : Hq.
    pair_dim : channels that a query head multiplies for a pair of tokens, of scores and of outputs; D + Dv, unless
        attention runs over something else than what is cached.
    params : of all weights, as they lie in memory.
    computed_params : that every token of a prompt is multiplied with: without embeddings, of experts those that a token
        goes through.
    head_params : of the output head, through which only the last token of a prompt goes.
    windows : per layer, how many tokens back attention reaches; None for all. Empty for all layers without a window.
    max_tokens : of a context, where it is known.
    assumed : what was not given, in words.
    """

    name: str
    layers: int
    kv_heads: int
    head_dim: int
    query_heads: int
    params: float
    computed_params: float
    head_params: float = 0.0
    value_dim: int | None = None
    pair_dim: int | None = None
    dtype: torch.dtype = torch.bfloat16
    windows: tuple[int | None, ...] = ()
    max_tokens: int | None = None
    assumed: tuple[str, ...] = ()

    def spec(self) -> KVSpec:
        """Geometry of its cache; the rotation is one of the usual form."""
        rope = None
        if self.value_dim != 0 and self.head_dim % 2 == 0:
            rope = RopeSpec(tuple(10000.0 ** (-2 * i / self.head_dim) for i in range(self.head_dim // 2)))
        return KVSpec(self.name, self.layers, self.kv_heads, self.head_dim, self.dtype, rope, self.value_dim)

    @property
    def weight_bytes(self) -> float:
        return self.params * self.dtype.itemsize

    @property
    def read_bytes(self) -> float:
        """Of the weights that a step reads, however few tokens it computes."""
        return (self.computed_params + self.head_params) * self.dtype.itemsize

    @property
    def pair_flops(self) -> float:
        """Floating-point operations of a layer for a token and one that it attends to."""
        D, Dv = self.head_dim, self.head_dim if self.value_dim is None else self.value_dim
        return 2 * self.query_heads * (D + Dv if self.pair_dim is None else self.pair_dim)

    def prefill_flops(self, new_tokens: float, behind_tokens: float = 0.0) -> float:
        """Floating-point operations, a multiplication and an addition each, of a prompt's piece behind others."""
        windows = self.windows or (None,) * self.layers
        attended = sum(pairs(new_tokens, behind_tokens, window) for window in windows)
        return 2 * self.computed_params * new_tokens + self.pair_flops * attended + 2 * self.head_params


def read_shape(text: str, *, dtype: str | None = None) -> ModelShape:
    """The shape that `text` means: a local Hugging Face folder, one of `KNOWN`, or `layers=32,kv_heads=8,...`.

    Parameters
    ----------
    dtype : of weights and cache, one of `DTYPES`; None for the model's own.

    Raises
    ------
    ValueError : it means none; the message says what is expected.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    folder = Path(text).expanduser()
    if text.lower() in KNOWN:
        shape = KNOWN[text.lower()]()
    elif "=" in text:
        shape = spelled_shape(text)
    elif (folder / "config.json").is_file():
        shape = folder_shape(folder)
    else:
        raise ValueError(
            f"no model {text!r}; expected a folder with config.json, layers=32,kv_heads=8,head_dim=128,params=8e9, or "
            f"one of {', '.join(KNOWN)}"
        )
    return shape if dtype is None else replace(shape, dtype=DTYPES[dtype])


def spelled_shape(text: str) -> ModelShape:
    """`layers=32,kv_heads=8,head_dim=128,params=8e9`, and more of `FIELDS`."""
    found: dict[str, str] = {}
    for item in text.split(","):
        name, separator, value = item.strip().partition("=")
        if name not in FIELDS or not separator or name in found:
            raise ValueError(f"the model's shape has {item.strip()!r}; expected {', '.join(FIELDS)}, each once, with =")
        found[name] = value
    if missing := [name for name in _NEEDED if name not in found]:
        raise ValueError(f"the model's shape lacks {', '.join(missing)}; expected at least {', '.join(_NEEDED)}")
    dtype = found.pop("dtype", "bfloat16")
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    numbers = {name: _count(value, name) for name, value in found.items()}
    assumed = [] if "heads" in numbers else [f"{_GROUP} query heads a KV head (heads=N says how many)"]
    embedding = numbers.get("vocab", 0) * numbers.get("hidden", 0)
    if not embedding:
        assumed.append("all weights compute every token (vocab=N,hidden=N leave out embeddings)")
    if 2 * embedding >= numbers["params"]:
        raise ValueError(f"params is {numbers['params']:,}; expected more than two embeddings of vocab times hidden")
    return ModelShape(
        name=text,
        layers=numbers["layers"],
        kv_heads=numbers["kv_heads"],
        head_dim=numbers["head_dim"],
        query_heads=numbers.get("heads", _GROUP * numbers["kv_heads"]),
        params=numbers["params"],
        computed_params=numbers["params"] - 2 * embedding,
        head_params=embedding,
        value_dim=numbers.get("value_dim"),
        dtype=DTYPES[dtype],
        max_tokens=numbers.get("context"),
        assumed=tuple(assumed),
    )


def _count(text: str, name: str) -> int:
    try:
        number = float(text)
    except ValueError as error:
        raise ValueError(f"{name} is {text!r}; expected a number") from error
    least = 0 if name == "value_dim" else 1
    if not (least <= number < 1e15 and number == int(number)):
        raise ValueError(f"{name} is {text!r}; expected a whole number from {least}")
    return int(number)


def folder_shape(folder: Path) -> ModelShape:
    """The shape of a Hugging Face folder; weights are counted, not read, and need not be there."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'} cannot be read as JSON: {error}") from error
    text = config.get("text_config", config) if isinstance(config, dict) else None
    if not isinstance(text, dict):
        raise ValueError(f"{folder / 'config.json'} is no model's configuration; expected an object")
    linear = {kind for kind in text.get("layer_types") or () if "attention" not in kind or "linear" in kind}
    if linear:
        raise ValueError(f"{folder} has layers of {', '.join(sorted(linear))}; expected attention in every layer")
    layers, heads = _config_count(text, "num_hidden_layers", folder), _config_count(text, "num_attention_heads", folder)
    dtype = text.get("dtype") or text.get("torch_dtype") or config.get("dtype") or config.get("torch_dtype")
    total, embedded, head, idle = _weights(folder, text)
    latent = text.get("kv_lora_rank")
    if latent:
        rotated = _config_count(text, "qk_rope_head_dim", folder)
        kv_heads, head_dim, value_dim = 1, int(latent) + rotated, 0
        plain, out = _config_count(text, "qk_nope_head_dim", folder), _config_count(text, "v_head_dim", folder)
        pair_dim = plain + rotated + out
    else:
        kv_heads, value_dim, pair_dim = int(text.get("num_key_value_heads") or heads), None, None
        head_dim = int(text.get("head_dim") or _config_count(text, "hidden_size", folder) // heads)
    return ModelShape(
        name=folder.name or str(folder.resolve().name),
        layers=layers,
        kv_heads=kv_heads,
        head_dim=head_dim,
        query_heads=heads,
        params=total,
        computed_params=total - embedded - head - idle,
        head_params=head or embedded,
        value_dim=value_dim,
        pair_dim=pair_dim,
        dtype=DTYPES.get(str(dtype), torch.bfloat16),
        windows=_windows(text, layers),
        max_tokens=text.get("max_position_embeddings"),
        assumed=() if str(dtype) in DTYPES else (f"bfloat16 (config.json says {dtype})",),
    )


def _config_count(config: Mapping[str, Any], name: str, folder: Path) -> int:
    value = config.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} in {folder / 'config.json'} is {value!r}; expected a whole number from 1")
    return value


def _windows(config: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    window, kinds = config.get("sliding_window"), config.get("layer_types")
    if not window or config.get("use_sliding_window") is False:
        return ()
    if not kinds:
        return (int(window),) * layers
    return tuple(int(window) if kind == "sliding_attention" else None for kind in kinds)


def _weights(folder: Path, config: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """Numbers of weights: all, of the embedding, of an output head of its own, of experts that a token does not use."""
    sizes = _stored_sizes(folder) or _built_sizes(folder)
    experts = config.get("num_local_experts") or config.get("num_experts") or config.get("n_routed_experts") or 1
    used = config.get("num_experts_per_tok") or config.get("experts_per_token") or experts
    routed = sum(size for name, size in sizes.items() if ".experts." in name)
    embedded = sum(size for name, size in sizes.items() if "embed" in name or name.endswith("wte.weight"))
    head = sum(size for name, size in sizes.items() if "lm_head" in name or "embed_out" in name)
    return sum(sizes.values()), embedded, head, round(routed * (1 - used / experts))


def _stored_sizes(folder: Path) -> dict[str, int]:
    import safetensors

    sizes: dict[str, int] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    shape: Sequence[int] = file.get_slice(name).get_shape()
                    sizes[name] = torch.Size(shape).numel()
        except (OSError, safetensors.SafetensorError) as error:
            raise ValueError(f"{path} cannot be read as safetensors: {error}") from error
    return sizes


def _built_sizes(folder: Path) -> dict[str, int]:
    """From the configuration alone: the model is built without memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder / 'config.json'} describes no model that transformers knows: {error}") from error
    return {name: parameter.numel() for name, parameter in model.named_parameters()}


def _decoder(
    name: str, layers: int, heads: int, kv_heads: int, hidden: int, inner: int, vocab: int, *, extra: int = 0,
    head_dim: int = 128, context: int = 131072,
) -> Callable[[], ModelShape]:  # fmt: skip
    """A decoder of Llama's kind, with an output head of its own; `extra`: weights of a layer beside matrices."""

    def make() -> ModelShape:
        attention, norms = 2 * hidden * head_dim * (heads + kv_heads), 2 * hidden
        block = attention + 3 * hidden * inner + norms + extra
        return ModelShape(
            name=name,
            layers=layers,
            kv_heads=kv_heads,
            head_dim=head_dim,
            query_heads=heads,
            params=layers * block + 2 * vocab * hidden + hidden,
            computed_params=layers * block + hidden,
            head_params=vocab * hidden,
            max_tokens=context,
        )

    return make


KNOWN: Mapping[str, Callable[[], ModelShape]] = MappingProxyType({
    "llama-3.1-8b": _decoder("llama-3.1-8b", 32, 32, 8, 4096, 14336, 128256),
    "llama-3.1-70b": _decoder("llama-3.1-70b", 80, 64, 8, 8192, 28672, 128256),
    "llama-2-7b": _decoder("llama-2-7b", 32, 32, 32, 4096, 11008, 32000, context=4096),
    "mistral-7b": _decoder("mistral-7b", 32, 32, 8, 4096, 14336, 32000, context=32768),
    "qwen2.5-7b": _decoder("qwen2.5-7b", 28, 28, 4, 3584, 18944, 152064, extra=36 * 128, context=32768),
    "qwen3-8b": _decoder("qwen3-8b", 36, 32, 8, 4096, 12288, 151936, extra=2 * 128, context=40960),
    "yi-34b": _decoder("yi-34b", 60, 56, 8, 7168, 20480, 64000, context=4096),
})  # fmt: skip
"""Models by name, from their published configurations."""
