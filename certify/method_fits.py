"""What every method learns from a model's keys and values: one table, one line a method."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeAlias

from torch import Tensor

from ..calibration.layer_sample import LayerSample
from ..calibration.model_profile import Profile
from ..core import KVChunk

_ENTROPY_BITS = (4, 3, 2)  # of `nuq`, whose codes get tables


LayerFit: TypeAlias = Callable[[LayerSample], Mapping[str, Tensor]]
"""From a layer's sample to tensors of a profile, without the layer dimension."""

ChunkFit: TypeAlias = Callable[[Profile, Iterable[KVChunk]], Mapping[str, Tensor]]
"""From what the layers' fits have found, and chunks of the same text, to further tensors, layers stacked.

The chunks are computed while they are gone through, and may be gone through again.
"""


def _nuq(sample: LayerSample) -> Mapping[str, Tensor]:
    flat = [t.flatten(1) for t in (sample.keys, sample.key_fisher, sample.values, sample.value_fisher)]
    found: Mapping[str, Tensor] = _function("compress.nuq.nuq_fit", "fit_layer")(*flat, heads=sample.spec.num_kv_heads)
    return found


def _kv4(sample: LayerSample) -> Mapping[str, Tensor]:
    is_interleaved = sample.spec.rope is not None and sample.spec.rope.interleaved
    return {"smooth.keys": _function("compress.kv4", "fit_smoothing")(sample.keys, interleaved=is_interleaved)}


def _lowrank(sample: LayerSample) -> Mapping[str, Tensor]:
    gram = _function("compress.gram", "Gram").of(sample.keys.flatten(1))
    found: Mapping[str, Tensor] = _function("compress.lowrank", "fit_layer")(gram)
    return found


def _vq(sample: LayerSample) -> Mapping[str, Tensor]:
    found: Mapping[str, Tensor] = _function("retrieval.vq.vq_fit", "fit_layer")(sample)
    return found


def _entropy(profile: Profile, chunks: Iterable[KVChunk]) -> Mapping[str, Tensor]:
    fit, nuq = _function("compress.entropy", "fit_entropy"), _function("compress.nuq.nuq", "NuqCodec")
    return {name: t for bits in _ENTROPY_BITS for name, t in fit(nuq(profile, bits=bits), chunks).items()}


def _function(module: str, name: str) -> Any:
    return getattr(import_module(f"..{module}", __package__), name)


def _absent(modules: Iterable[str]) -> list[str]:
    return [module for module in modules if find_spec(module, __package__) is None]


_NEEDS: Mapping[str, tuple[str, ...]] = {
    "nuq": ("..compress.nuq.nuq_fit",),
    "kv4": ("..compress.kv4",),
    "lowrank": ("..compress.gram", "..compress.lowrank"),
    "vq": ("..retrieval.vq.vq_fit", "faiss"),
    "entropy": ("..compress.nuq.nuq", "..compress.entropy", "numba"),
}
LEFT_OUT: Mapping[str, list[str]] = {method: missing for method, needs in _NEEDS.items() if (missing := _absent(needs))}
"""Methods that learn nothing here, and the modules that they lack."""

LAYER_FITS: Mapping[str, LayerFit] = {
    method: fit
    for method, fit in (("nuq", _nuq), ("kv4", _kv4), ("lowrank", _lowrank), ("vq", _vq))
    if method not in LEFT_OUT
}
CHUNK_FITS: Mapping[str, ChunkFit] = {method: fit for method, fit in (("entropy", _entropy),) if method not in LEFT_OUT}
