"""Selectors by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib import import_module
from typing import Any, TypeAlias

from ..calibration.model_profile import Profile
from .cascade import CascadeSelector
from .exact import ExactSelector, RandomSelector
from .factor.factor import FactorIndex
from .landmarks import LandmarkIndex
from .quantized.quantized import VALUE_BITS
from .selector import LayerShape, Pooling, Selector

MakeSelector: TypeAlias = Callable[..., Selector]
"""`make(shape, layer, start=, pooling=, profile=, **parameters)`: an empty selector of one layer."""


def _exact(shape: LayerShape, _layer: int, *, start: int, pooling: Pooling, profile: Profile | None) -> Selector:
    return ExactSelector(shape, start=start, pooling=pooling)


def _random(
    shape: LayerShape, layer: int, *, start: int, pooling: Pooling, profile: Profile | None, seed: int = 0
) -> Selector:
    return RandomSelector(shape, start=start, seed=seed + layer)


def _from_class(module: str, name: str) -> MakeSelector:
    """Makes selectors of a class whose constructor takes the method's parameters; the class is loaded on first use."""

    def make(
        shape: LayerShape, _layer: int, *, start: int, pooling: Pooling, profile: Profile | None, **parameters: Any
    ) -> Selector:
        made: Selector = getattr(import_module(module, __package__), name)(
            shape, start=start, pooling=pooling, **parameters
        )
        return made

    return make


def _graph(
    shape: LayerShape,
    _layer: int,
    *,
    start: int,
    pooling: Pooling,
    profile: Profile | None,
    query_ratio: float = 0.5,
    threads: int = 1,
    **settings: Any,
) -> Selector:
    graphs = import_module(".roargraph.roargraph", __package__)
    made: Selector = graphs.RoarGraphIndex(
        shape,
        start=start,
        pooling=pooling,
        settings=graphs.GraphSettings(**settings),
        query_ratio=query_ratio,
        threads=threads,
    )
    return made


def _vq(shape: LayerShape, layer: int, *, start: int, pooling: Pooling, profile: Profile | None) -> Selector:
    if profile is None:
        raise ValueError("vq needs a profile, which holds its codebooks; make one with `kvloom calibrate`")
    made: Selector = import_module(".vq.vq", __package__).VqIndex(
        shape, _codebook(profile, layer), start=start, pooling=pooling
    )
    return made


@lru_cache(maxsize=256)
def _codebook(profile: Profile, layer: int) -> Any:
    # A fingerprint takes a pass over megabytes, and every sequence needs it
    return import_module(".vq.codebook", __package__).Codebook.from_profile(profile, layer)


def _landmarks_factor(
    shape: LayerShape,
    _layer: int,
    *,
    start: int,
    pooling: Pooling,
    profile: Profile | None,
    candidate_ratio: float = 0.25,
    rank: int | None = None,
    row_bits: int = 4,
    max_residual: float = 0.5,
    **landmarks: Any,
) -> Selector:
    """Landmarks name candidates, keys from a low-rank factor decide among them."""
    coarse = LandmarkIndex(shape, start=start, pooling=pooling, **landmarks)
    fine = FactorIndex(shape, start=start, rank=rank, row_bits=row_bits, max_residual=max_residual)
    return CascadeSelector(shape, coarse, fine, candidate_ratio=candidate_ratio, pooling=pooling)


METHODS: dict[str, MakeSelector] = {
    "exact": _exact,
    "random": _random,
    "landmarks": _from_class(".landmarks", "LandmarkIndex"),
    "factor": _from_class(".factor.factor", "FactorIndex"),
    "landmarks+factor": _landmarks_factor,
    "clusters": _from_class(".clusters", "ClusterIndex"),
    "graph": _graph,
    "quantized": _from_class(".quantized.quantized", "QuantizedKeyIndex"),
    "sketch": _from_class(".sketch.sketch", "SketchIndex"),
    "vq": _vq,
}
"""What makes a selector, by the name of the method that `Retrieval` and the command line take."""

NAMED_DEFAULTS: Mapping[str, Mapping[str, Any]] = {"quantized": {"value_bits": VALUE_BITS}}
"""Parameters by method that a certificate names even where nobody sets them: there were certificates before there was
the parameter, and they are about another method."""


def selector_by_name(
    name: str,
    shape: LayerShape,
    layer: int,
    *,
    start: int = 0,
    pooling: Pooling = "max",
    profile: Profile | None = None,
    parameters: Mapping[str, Any] | None = None,
) -> Selector:
    """An empty selector of one layer of one sequence.

    Parameters
    ----------
    layer : number of the layer, for methods that calibrate each layer.
    start : first token of the context that it covers.
    pooling : see `pooled`.
    profile : from `kvloom calibrate`, for methods that need one.
    parameters : of the method, by the names of its constructor.

    Raises
    ------
    ValueError : no method has that name, a parameter is unknown, or the method needs a profile.
    """
    if name not in METHODS:
        raise ValueError(f"no retrieval method {name!r}; known: {', '.join(sorted(METHODS))}")
    try:
        return METHODS[name](shape, layer, start=start, pooling=pooling, profile=profile, **(parameters or {}))
    except TypeError as exc:
        raise ValueError(f"{name} does not take {dict(parameters or {})}: {exc}") from exc
