"""What every method learns from a model's keys and values: one table, one line a method."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeAlias

from torch import Tensor

from ..core import KVChunk, KVSpec
from .profile import Profile

_ENTROPY_BITS = (4, 3, 2)  # of `nuq`, whose codes get tables


@dataclass(frozen=True, slots=True, eq=False)
class LayerSample:
    """Keys and values of one layer over a calibration text, and what an error in each number costs.

    Attributes
    ----------
    keys : `[N, H, D]` float32, before rotation, as codecs take them back: `rope.shift(keys, -positions)`.
    values : `[N, H, Dv]` float32.
    key_fisher, value_fisher : of the same shapes, the squared gradients of the language-model loss (nats, summed over a
        sequence): the diagonal of the Fisher information.
    query_moments : `[H, D, D]` float64, mean of the outer products of all queries of a group with themselves, before
        rotation; text and strings alike.
    further_keys : `[N', H, D]` float32, keys over random strings: like no text, but like what is looked up in one.
    """

    spec: KVSpec
    keys: Tensor
    values: Tensor
    key_fisher: Tensor
    value_fisher: Tensor
    query_moments: Tensor
    further_keys: Tensor


LayerFit: TypeAlias = Callable[[LayerSample], Mapping[str, Tensor]]
"""From a layer's sample to tensors of a profile, without the layer dimension."""

ChunkFit: TypeAlias = Callable[[Profile, Iterable[KVChunk]], Mapping[str, Tensor]]
"""From what the layers' fits have found, and chunks of the same text, to further tensors, layers stacked.

The chunks are computed while they are gone through, and may be gone through again.
"""


def _nuq(sample: LayerSample) -> Mapping[str, Tensor]:
    flat = [t.flatten(1) for t in (sample.keys, sample.key_fisher, sample.values, sample.value_fisher)]
    found: Mapping[str, Tensor] = _function("nuq_fit", "fit_layer")(*flat, heads=sample.spec.num_kv_heads)
    return found


def _kv4(sample: LayerSample) -> Mapping[str, Tensor]:
    is_interleaved = sample.spec.rope is not None and sample.spec.rope.interleaved
    return {"smooth.keys": _function("kv4", "fit_smoothing")(sample.keys, interleaved=is_interleaved)}


def _lowrank(sample: LayerSample) -> Mapping[str, Tensor]:
    gram = _function("gram", "Gram").of(sample.keys.flatten(1))
    found: Mapping[str, Tensor] = _function("lowrank", "fit_layer")(gram)
    return found


def _vq(sample: LayerSample) -> Mapping[str, Tensor]:
    found: Mapping[str, Tensor] = _function("vq_fit", "fit_layer")(sample)
    return found


def _entropy(profile: Profile, chunks: Iterable[KVChunk]) -> Mapping[str, Tensor]:
    fit, nuq = _function("entropy", "fit_entropy"), _function("nuq", "NuqCodec")
    return {name: t for bits in _ENTROPY_BITS for name, t in fit(nuq(profile, bits=bits), chunks).items()}


def _function(module: str, name: str) -> Any:
    return getattr(import_module(f".{module}", __package__), name)


def _absent(modules: Iterable[str]) -> list[str]:
    return [module for module in modules if find_spec(module, __package__) is None]


_NEEDS: Mapping[str, tuple[str, ...]] = {
    "nuq": (".nuq_fit",),
    "kv4": (".kv4",),
    "lowrank": (".gram", ".lowrank"),
    "vq": (".vq_fit", "faiss"),
    "entropy": (".nuq", ".entropy", "numba"),
}
LEFT_OUT: Mapping[str, list[str]] = {method: missing for method, needs in _NEEDS.items() if (missing := _absent(needs))}
"""Methods that learn nothing here, and the modules that they lack."""

LAYER_FITS: Mapping[str, LayerFit] = {
    method: fit
    for method, fit in (("nuq", _nuq), ("kv4", _kv4), ("lowrank", _lowrank), ("vq", _vq))
    if method not in LEFT_OUT
}
CHUNK_FITS: Mapping[str, ChunkFit] = {method: fit for method, fit in (("entropy", _entropy),) if method not in LEFT_OUT}
