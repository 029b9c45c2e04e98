"""What a transformers model computes KV with at this moment, and the name of that."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any, TypeAlias

import numpy as np
import torch
import xxhash
from blake3 import blake3
from torch import Tensor, nn

try:
    from transformers import PreTrainedModel
except ImportError as error:
    raise ImportError('kvloom.connectors.hf.identity needs transformers: pip install "kvloom[transformers]"') from error

from ...errors import EngineError
from ..identity.weights import (
    bits_of,
    canonical_config,
    folder_name,
    holds,
    memory_name,
    model_folder,
    plain_tensors,
    update,
    with_state,
)

_Modules: TypeAlias = "Sequence[tuple[str, nn.Module]]"

_LOG = logging.getLogger("kvloom.identity")
_WHOLE_BYTES = 32 << 20  # of a model of which every check reads everything
_SAMPLES = 256  # values of every tensor that a check of a larger one reads
_WRAPPERS = frozenset({"base_layer", "original_module", "token_adapter"})  # PEFT's, around a model's own modules


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside `torch.compile` and PEFT, with the adapters that are injected into it.

    Raises
    ------
    EngineError : it is none, has no language-model head, or PEFT puts virtual tokens in front of its prompts.
    """
    inner: Any = getattr(model, "_orig_mod", model)  # torch.compile's
    if hasattr(inner, "get_base_model"):  # PEFT's
        configs = getattr(inner, "peft_config", {})
        if any(getattr(each, "is_prompt_learning", False) for each in configs.values()):
            raise EngineError(
                f"{type(inner).__name__} puts virtual tokens in front of every prompt, whose KV kvloom cannot name; "
                "give the model without them"
            )
        inner = inner.get_base_model()
        inner = getattr(inner, "_orig_mod", inner)
    if not isinstance(inner, PreTrainedModel):
        raise EngineError(
            f"the model is a {type(inner).__name__}; expected a transformers model, as "
            "AutoModelForCausalLM.from_pretrained gives it"
        )
    if not inner.can_generate():
        raise EngineError(
            f"the model is a {type(inner).__name__}, which has no language-model head; load it with "
            "AutoModelForCausalLM"
        )
    return inner


class ModelIdentity:
    """Names a model in memory, at every call anew.

    Weights that equal the safetensors files of the model's folder have the folder's name, which other engines know.
    Otherwise they have a name of their own, made of their values. Active adapters add to it.

    Noticed are: other tensors and tensors elsewhere; values that torch's version counters know to have changed; edits
    through `.data`, which they do not know, of anything in a model of at most 32 MiB and of one of 256 values spread
    over a tensor in others; the config; adapters that become active, inactive, scaled, merged or trained. Not noticed
    are smaller edits through `.data`, hooks, replaced `forward` methods, and weights that were offloaded to a disk.

    Parameters
    ----------
    model : see `unwrapped`.
    model_id : names the weights as they are now; None reads them. What changes later and adapters are added to it.

    Attributes
    ----------
    config_text : the config at the last call, without fields that do not shape KV.

    Raises
    ------
    EngineError : the weights cannot be read.
    """

    config_text: str

    def __init__(self, model: PreTrainedModel, model_id: str | None = None) -> None:
        self._model = model
        self._names: dict[bytes, str] = {}  # by the state of the weights
        self._digests: dict[bytes, str] = {}  # by the state of active adapters
        self._model_id = model_id
        weights, _ = self._state(_modules_of(model))
        self._names[weights] = model_id or self._folder_name() or self._memory_name()

    def name(self) -> str:
        """The name of what would compute KV now. Some milliseconds for a large model, unless something has changed.

        Raises
        ------
        EngineError : the model is in training mode, or has changed and its weights cannot be read.
        """
        if self._model.training:
            raise EngineError("the model is in training mode, in which dropout shapes KV; call its eval() first")
        modules = _modules_of(self._model)
        if any(module.training for _, module in modules):
            self._model.eval()  # adapters come in training mode
        weights, adapters = self._state(modules)
        if weights not in self._names:
            if self._model_id is None:
                new = self._folder_name() or self._memory_name()
            else:
                new = with_state(self._model_id, changed=self._memory_name())
            self._names[weights] = new
            _LOG.warning("the model's weights have changed: KV is stored and found under the name %s from now on", new)
        name = self._names[weights]
        if not adapters:
            return name
        state = _digest(adapters)
        if state not in self._digests:
            self._digests[state] = self._adapters_digest(adapters)
        return with_state(name, adapter=self._digests[state])

    def _folder_name(self) -> str | None:
        """The name of the model's folder if it holds these weights, and None otherwise."""
        config = self._model.config
        folder = model_folder(config._name_or_path, getattr(config, "_commit_hash", None))  # noqa: SLF001  public nowhere
        if folder is None or not (folder / "config.json").is_file():
            return None
        try:
            theirs = type(config).from_pretrained(folder)
            is_same = canonical_config(theirs.to_dict()) == canonical_config(config.to_dict())
            name = folder_name(folder) if is_same and holds(folder, self._weights()) else None
        except (EngineError, OSError, ValueError):
            name = None
        if name is None:
            _LOG.info("the model in memory is not what %s holds; its KV has a name of its own", folder)
        return name

    def _memory_name(self) -> str:
        config = self._model.config
        return memory_name(config.model_type, config.to_dict(), self._weights().items())

    def _weights(self) -> dict[str, Tensor]:
        """Everything that is stored of the model but adapters, by the names in the model without them."""
        modules = _modules_of(self._model)
        offloaded = _Offloaded(modules)
        left_out = {
            f"{path}.{attribute}.{adapter}"
            for path, layer in _adapter_layers(modules)
            for attribute in (*layer.adapter_layer_names, *layer.other_param_names)
            for adapter in _names_in(_attribute(layer, attribute))
        }
        found = {}
        for name, tensor in _stored(modules):
            parts = name.split(".")
            if left_out.isdisjoint(_beginnings(parts)):
                whole = offloaded.read(name) if tensor.device.type == "meta" else tensor
                found[".".join(part for part in parts if part not in _WRAPPERS)] = tensor if whole is None else whole
        return found

    def _state(self, modules: _Modules) -> tuple[bytes, list[tuple[str, object]]]:
        """A digest of the weights' state, and the parts of active adapters by name: texts, numbers and tensors."""
        adapters: list[tuple[str, object]] = []
        others: set[int] = set()  # ids of adapters' tensors
        for path, layer in _adapter_layers(modules):
            if layer.disable_adapters and getattr(layer, "merged", False):
                layer.unmerge()  # its forward would do that first
            is_merged = bool(getattr(layer, "merged", False))
            active = [] if layer.disable_adapters or is_merged else list(layer.active_adapters)
            for attribute in (*layer.adapter_layer_names, *layer.other_param_names):
                held = _attribute(layer, attribute)
                for adapter in _names_in(held):
                    parts = list(_parts(held[adapter]))
                    others.update(id(part) for _, part in parts if isinstance(part, Tensor))
                    if adapter in active:
                        place = f"{path}.{attribute}.{active.index(adapter)}"
                        adapters += [(f"{place}.{name}", part) for name, part in parts]
        self.config_text = canonical_config(self._model.config.to_dict())
        weights: list[tuple[str, object]] = [("config", self.config_text)]
        offloaded = _Offloaded(modules)
        for path, module in modules:
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):  # noqa: SLF001  fast
                if tensor is not None and id(tensor) not in others and not _is_rope_table(module, name):
                    whole = offloaded.held(f"{path}.{name}") if tensor.device.type == "meta" else tensor
                    weights.append((f"{path}.{name}", tensor if whole is None else whole))
        return _digest(weights), adapters

    def _adapters_digest(self, parts: Iterable[tuple[str, object]]) -> str:
        digest = blake3()
        for name, part in parts:
            if isinstance(part, Tensor):
                update(digest, name, part)
            else:
                digest.update(json.dumps([name, part]).encode())
        return digest.hexdigest(32)


class _Offloaded:
    """Weights that accelerate keeps elsewhere, while the model itself has tensors without data."""

    def __init__(self, modules: _Modules) -> None:
        self._maps: dict[str, Any] = {}
        for path, module in modules:
            hook = getattr(module, "_hf_hook", None)
            for each in getattr(hook, "hooks", (hook,)):
                weights = getattr(each, "weights_map", None)
                if weights is not None:
                    self._maps[path] = weights

    def read(self, name: str) -> Tensor | None:
        """The tensor of that name, from a disk if need be; None if it is not known."""
        for key, weights in self._places(name):
            try:
                return torch.as_tensor(weights[key])
            except LookupError:
                continue
        return None

    def held(self, name: str) -> Tensor | None:
        """The same, if it lies in memory."""
        for key, weights in self._places(name):
            whole, prefix = getattr(weights, "dataset", weights), getattr(weights, "prefix", "")
            known = getattr(whole, "state_dict", whole)
            tensor = known.get(f"{prefix}{key}") if isinstance(known, Mapping) else None
            if isinstance(tensor, Tensor):
                return tensor
        return None

    def _places(self, name: str) -> Iterator[tuple[str, Any]]:
        if self._maps:
            for path in ("", *_beginnings(name.split("."))):
                if path in self._maps:
                    yield name[len(path) :].lstrip("."), self._maps[path]


def _modules_of(model: nn.Module) -> _Modules:
    """Every module once, with its path; as `named_modules`, which takes several times as long."""
    found, seen, todo = [], {id(model)}, [("", model)]
    while todo:
        path, module = todo.pop()
        found.append((path, module))
        for name, child in module._modules.items():  # noqa: SLF001  fast
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                todo.append((f"{path}.{name}" if path else name, child))
    return found


def _is_rope_table(module: nn.Module, name: str) -> bool:
    """Whether a buffer is a table of frequencies, which the spec holds; some are written anew in every pass."""
    return name.endswith("inv_freq") and name in module._non_persistent_buffers_set  # noqa: SLF001  torch has no other


def _stored(modules: _Modules) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model's `state_dict`, whose own making is no mere reading in bitsandbytes.

    Raises
    ------
    EngineError : something in it is no tensor.
    """
    for path, module in modules:
        held: dict[str, object] = {}
        prefix = f"{path}." if path else ""
        if _save_of(module) is _save_of(nn.Module) or type(module).__module__.startswith("bitsandbytes"):
            transient = module._non_persistent_buffers_set  # noqa: SLF001  torch has no other name for it
            held |= {prefix + name: tensor for name, tensor in module.named_parameters(recurse=False)}
            held |= {prefix + n: t for n, t in module.named_buffers(recurse=False) if n not in transient}
            for name, tensor in module.named_parameters(recurse=False):
                state = getattr(tensor, "quant_state", None)  # of 4 bits; those of 8 have scales here or there
                held |= (
                    {} if state is None else {f"{prefix}{name}.{n}": t for n, t in state.as_dict(packed=True).items()}
                )
                scales = getattr(tensor, "SCB", None)
                scales = getattr(getattr(module, "state", None), "SCB", None) if scales is None else scales
                held |= {} if scales is None else {f"{prefix}SCB": scales}
        else:
            _save_of(module)(module, held, prefix, keep_vars=True)
        for name, value in held.items():
            if not isinstance(value, Tensor):
                raise EngineError(
                    f"{name} is a {type(value).__name__} and no tensor, and cannot be read, so that kvloom cannot name "
                    "the model; give a name of your own as model_id, and another one when the weights change"
                )
            yield name, value


def _save_of(module: Any) -> Callable[..., None]:
    kind: Any = module if isinstance(module, type) else type(module)
    save: Callable[..., None] = kind._save_to_state_dict  # noqa: SLF001  what modules override
    return save


def _adapter_layers(modules: _Modules) -> Iterator[tuple[str, Any]]:
    """PEFT's modules around the model's own; they share these attributes, but no class."""
    for path, module in modules:
        if hasattr(module, "adapter_layer_names") and hasattr(module, "active_adapters"):
            yield path, module


def _attribute(layer: Any, name: str) -> Any:
    try:
        return attrgetter(name)(layer)
    except AttributeError:
        return None


def _names_in(held: Any) -> Iterable[str]:
    return list(held.keys()) if hasattr(held, "keys") else ()


def _parts(held: Any) -> Iterator[tuple[str, object]]:
    """What an adapter has in one attribute of a layer: tensors, or a number or text that JSON takes."""
    if isinstance(held, nn.Module):
        yield from held.state_dict(keep_vars=True).items()
    elif isinstance(held, Tensor | int | float | str):
        yield "", held


def _beginnings(parts: list[str]) -> Iterator[str]:
    """`a`, `a.b`, `a.b.c`."""
    return (".".join(parts[: stop + 1]) for stop in range(len(parts)))


def _digest(state: Sequence[tuple[str, object]]) -> bytes:
    """Stands for texts, numbers, and tensors by where they lie, how often torch saw them change, and their values.

    Of models that take more than `_WHOLE_BYTES`, some values of every tensor stand for all.
    """
    tensors = [part for name, held in state if isinstance(held, Tensor) for _, part in plain_tensors(name, held)]
    is_small = sum(tensor.nbytes for tensor in tensors) <= _WHOLE_BYTES
    facts: list[object] = [held if not isinstance(held, Tensor) else name for name, held in state]
    digest, elsewhere = xxhash.xxh3_128(), dict[tuple[torch.device, torch.dtype], list[Tensor]]()
    for tensor in tensors:
        version = 0 if tensor.is_inference() else tensor._version  # noqa: SLF001  torch has no other name for it
        facts += (tensor.data_ptr(), version, tuple(tensor.shape), tensor.dtype, tensor.device)
        if tensor.device.type != "meta":
            values = (tensor.detach().reshape(-1) if is_small else _sample(tensor.detach())).view(bits_of(tensor.dtype))
            if tensor.device.type == "cpu":
                digest.update(
                    np.ascontiguousarray(values.numpy()).data
                )  # torch's own copies would wait for its threads
            else:
                elsewhere.setdefault((tensor.device, values.dtype), []).append(values)
    for same_kind in elsewhere.values():
        digest.update(torch.cat(same_kind).cpu().numpy().data)
    digest.update(repr(facts).encode())
    return digest.digest()


def _sample(tensor: Tensor) -> Tensor:
    """About `_SAMPLES` values, spread over the tensor."""
    if tensor.is_contiguous():
        return tensor.view(-1)[:: tensor.numel() // _SAMPLES | 1]  # odd, so that it does not stay in one column
    each = max(1, round(_SAMPLES ** (1 / tensor.ndim)))
    return tensor[tuple(slice(None, None, max(1, size // each)) for size in tensor.shape)].reshape(-1)
