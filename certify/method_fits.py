"""Functions by which methods learn from a model's keys and values: one table, one line a method."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeAlias

from torch import Tensor

from ..calibration.layer_sample import LayerSample
from ..core import KVSpec

LayerFit: TypeAlias = Callable[[LayerSample], Mapping[str, Tensor]]
"""From a layer's sample to tensors of a profile, without the layer dimension."""


@dataclass(frozen=True, slots=True)
class GroupFit:
    """Learns from consecutive layers together.

    Attributes
    ----------
    layers : how many of a model's layers make a group.
    fit : from the samples of a group, and the number of its first layer, to tensors whose first dimension is the layer.
    """

    layers: Callable[[KVSpec], int]
    fit: Callable[[Sequence[LayerSample], int], Mapping[str, Tensor]]


Fit: TypeAlias = LayerFit | GroupFit


def _nuq(sample: LayerSample) -> Mapping[str, Tensor]:
    known = len(sample.key_fisher)
    flat = [t.flatten(1) for t in (sample.keys[:known], sample.key_fisher, sample.values[:known], sample.value_fisher)]
    found: Mapping[str, Tensor] = _function("compress.nuq.nuq_fit", "fit_layer")(*flat, heads=sample.spec.num_kv_heads)
    return found


def _lowrank(sample: LayerSample) -> Mapping[str, Tensor]:
    gram = _function("compress.gram", "GramMatrix").from_keys(sample.keys.flatten(1))
    found: Mapping[str, Tensor] = _function("compress.lowrank", "fit_layer")(gram)
    return found


def _transform_layers(spec: KVSpec) -> int:
    channels = spec.num_kv_heads * (spec.head_dim + spec.value_dim)
    layers: int = _function("compress.transform.transform_fit", "group_layers")(spec.num_layers, channels)
    return layers


def _transform(samples: Sequence[LayerSample], first_layer: int) -> Mapping[str, Tensor]:
    found: Mapping[str, Tensor] = _function("compress.transform.transform_fit", "fit_group")(samples, first_layer)
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
    "transform": ("..compress.transform.transform_fit",),
    "vq": ("..retrieval.vq.vq_fit", "faiss"),
}
LEFT_OUT: Mapping[str, list[str]] = {method: missing for method, needs in _NEEDS.items() if (missing := _absent(needs))}
"""Methods that learn nothing here, and the modules that they lack."""

_FITS: Mapping[str, Fit] = {
    "nuq": _nuq,
    "lowrank": _lowrank,
    "transform": GroupFit(_transform_layers, _transform),
    "vq": _vq,
}

LAYER_FITS: Mapping[str, Fit] = {method: fit for method, fit in _FITS.items() if method not in LEFT_OUT}
