"""LoRA in vLLM: what an engine in this process has in memory, and requests whose adapter may have changed meanwhile."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..identity.adapters import AdapterNames
from ..identity.weights import WEIGHTS

_STEPS_AHEAD = 2  # of the scheduler before a worker's step: what was scheduled so many steps ago is computed


class LoadedAdapters:
    """`EngineMemory` of a vLLM model.

    Parameters
    ----------
    model : the engine's; without adapters it has no manager of them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._manager: Any = getattr(model, "lora_manager", None)

    def adapter(self, number: int) -> object | None:
        return None if self._manager is None else self._manager.list_adapters().get(number)

    def holds(self, adapter: object, folder: Path) -> bool | None:
        """Casts the files' tensors and multiplies the second factors by their scaling, as vLLM does.

        Tensors that are views of the file itself (on a processor, where nothing is cast) prove nothing: they change
        with it, while what computes does not.
        """
        try:
            config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
            rank = config["r"]
            scaling = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
            mine = list(_tensors(adapter))
            if _lie_in_files(mine):
                return None
            with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
                theirs = [file.get_tensor(name).to(mine[0].dtype) for name in file.keys()]  # noqa: SIM118
            if len(mine) != len(theirs) or config.get("rank_pattern") or config.get("alpha_pattern"):
                return None
            known = {_digest(tensor) for tensor in theirs} | {_digest(tensor * scaling) for tensor in theirs}
            return all(_digest(tensor) in known for tensor in mine)
        except (OSError, ValueError, LookupError, AttributeError, TypeError, RuntimeError, SafetensorError):
            return None


def _tensors(adapter: Any) -> Iterator[Tensor]:
    for lora in adapter.loras.values():
        for held in (lora.lora_a, lora.lora_b):
            yield from (tensor for tensor in (held if isinstance(held, list) else [held]) if tensor is not None)


def _lie_in_files(tensors: Sequence[Tensor]) -> bool:
    """Whether some are mapped weight files."""
    bounds = []
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5].removesuffix(" (deleted)").endswith(WEIGHTS):
            first, last = fields[0].split("-")
            bounds.append((int(first, 16), int(last, 16)))
    return any(first <= tensor.data_ptr() < last for tensor in tensors for first, last in bounds)


def _digest(tensor: Tensor) -> bytes:
    values = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return blake3(f"{list(tensor.shape)}".encode() + values.numpy().tobytes()).digest()


@dataclass(slots=True)
class _Open:
    lora: Any
    digest: bytes
    first_step: int | None = None  # in which it was computed


def adapter_variant(vllm_config: Any) -> bytes:
    """The precision of adapters where it is not the model's; empty otherwise."""
    lora, dtype = vllm_config.lora_config, vllm_config.model_config.dtype
    return b"" if lora is None or lora.lora_dtype in (None, "auto", dtype) else str(lora.lora_dtype).encode()


class OpenAdapters:
    """Open requests that have an adapter. Files may change between the moment when a request comes and its steps.

    Parameters
    ----------
    names : of the engine's adapters.
    variant : what of the engine's settings shapes what adapters compute.
    """

    def __init__(self, names: AdapterNames, variant: bytes = b"") -> None:
        self._names = names
        self._variant = variant
        self._first: dict[tuple[str, str], bytes | None] = {}  # digest under each name and path
        self._replaced: set[tuple[str, str]] = set()
        self._open: dict[str, _Open] = {}
        self._step = 0

    def open(self, request_id: str, lora: Any) -> bytes | None:
        """The digest of a request's adapter, empty for none; None if it is uncertain, or no folder here."""
        if lora is None:
            return b""
        digest = self._digest(lora, reloads=bool(getattr(lora, "load_inplace", False)))
        place = lora.lora_name, lora.lora_path
        if self._first.setdefault(place, digest) != digest:
            self._replaced.add(place)
        if digest is None:
            return None
        self._open[request_id] = _Open(lora, digest)
        return digest + self._variant

    def close(self, request_id: str) -> None:
        self._open.pop(request_id, None)

    def has_changed(self, request_id: str, local_tokens: int = 0) -> bool:
        """Whether it is no longer certain that a request is computed by the adapter that it had when it came.

        Parameters
        ----------
        local_tokens : whose KV the engine's own cache provides, which tells adapters apart by name and path only.
        """
        each = self._open.get(request_id)
        if each is None:
            return False
        is_mixed = local_tokens > 0 and (each.lora.lora_name, each.lora.lora_path) in self._replaced
        return is_mixed or self._digest(each.lora) != each.digest

    def begin_step(self, request_ids: Collection[str]) -> set[str]:
        """Those of a step's requests whose adapter the engine may have yet to read: what they compute has no name."""
        self._step += 1
        unread = set()
        for request_id in self._open.keys() & request_ids if self._open else ():
            each = self._open[request_id]
            each.first_step = self._step if each.first_step is None else each.first_step
            is_read = self._names.is_read(each.lora.lora_int_id)
            if is_read is None:
                is_read = self._step - each.first_step >= _STEPS_AHEAD
            if not is_read:
                unread.add(request_id)
        return unread

    def _digest(self, lora: Any, *, reloads: bool = False) -> bytes | None:
        return self._names.digest(lora.lora_int_id, lora.lora_path, reloads=reloads)
