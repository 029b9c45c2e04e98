"""Functions by which methods learn from a model's keys and values: one table, one line a method."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeAlias

from torch import Tensor

from ..calibration.layer_sample import LayerSample

LayerFit: TypeAlias = Callable[[LayerSample], Mapping[str, Tensor]]
"""From a layer's sample to tensors of a profile, without the layer dimension."""


def _nuq(sample: LayerSample) -> Mapping[str, Tensor]:
    flat = [t.flatten(1) for t in (sample.keys, sample.key_fisher, sample.values, sample.value_fisher)]
    found: Mapping[str, Tensor] = _function("compress.nuq.nuq_fit", "fit_layer")(*flat, heads=sample.spec.num_kv_heads)
    return found


def _lowrank(sample: LayerSample) -> Mapping[str, Tensor]:
    gram = _function("compress.gram", "GramMatrix").from_keys(sample.keys.flatten(1))
    found: Mapping[str, Tensor] = _function("compress.lowrank", "fit_layer")(gram)
    return found


def _vq(sample: LayerSample) -> Mapping[str, Tensor]:
    found: Mapping[str, Tensor] = _function("retrieval.vq.vq_fit", "fit_layer")(sample)
    return found


def _function(module: str, name: str) -> Any:
    return getattr(import_module(f"..{module}", __package__), name)


def _absent(modules: Iterable[str]) -> list[str]:
    return [module for module in modules if find_spec(module, __package__) is None]


_NEEDS: Mapping[str, tuple[str, ...]] = {
    "nuq": ("..compress.nuq.nuq_fit",),
    "lowrank": ("..compress.gram", "..compress.lowrank"),
    "vq": ("..retrieval.vq.vq_fit", "faiss"),
}
LEFT_OUT: Mapping[str, list[str]] = {method: missing for method, needs in _NEEDS.items() if (missing := _absent(needs))}
"""Methods that learn nothing here, and the modules that they lack."""

LAYER_FITS: Mapping[str, LayerFit] = {
    method: fit for method, fit in (("nuq", _nuq), ("lowrank", _lowrank), ("vq", _vq)) if method not in LEFT_OUT
}
