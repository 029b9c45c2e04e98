"""Selectors by name: what a caller chooses from, and what each needs to be made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib import import_module
from typing import Any, TypeAlias

from ..calibration.model_profile import Profile
from .exact import ExactSelector, RandomSelector
from .selector import LayerShape, Pooling, Selector

MakeSelector: TypeAlias = Callable[..., Selector]
"""`make(shape, layer, start=, pooling=, profile=, **parameters)`: an empty selector of one layer."""


def _exact(shape: LayerShape, _layer: int, *, start: int, pooling: Pooling, profile: Profile | None) -> Selector:
    return ExactSelector(shape, start=start, pooling=pooling)


def _random(
    shape: LayerShape, layer: int, *, start: int, pooling: Pooling, profile: Profile | None, seed: int = 0
) -> Selector:
    return RandomSelector(shape, start=start, seed=seed + layer)


def _of_class(module: str, name: str) -> MakeSelector:
    """Of a class whose constructor takes a method's parameters as they are; loaded when it is first asked for."""

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
    # Its fingerprint is over megabytes, and every sequence asks.
    return import_module(".vq.codebook", __package__).Codebook.of_layer(profile, layer)


METHODS: dict[str, MakeSelector] = {
    "exact": _exact,
    "random": _random,
    "landmarks": _of_class(".landmarks", "LandmarkIndex"),
    "factor": _of_class(".factor.factor", "FactorIndex"),
    "clusters": _of_class(".clusters", "ClusterIndex"),
    "graph": _graph,
    "sketch": _of_class(".sketch.sketch", "SketchIndex"),
    "vq": _vq,
}
"""Every way of choosing tokens, by the name that `Retrieval` and the command line take."""


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
    layer : which one, where a method learned something of each.
    start : first token of the context that it covers.
    pooling : see `pooled`.
    profile : what `kvloom calibrate` learned of the model, for methods that need it.
    parameters : the method's own, by the names of its constructor.

    Raises
    ------
    ValueError : no method of that name, a parameter that it does not know, or it needs a profile.
    """
    if name not in METHODS:
        raise ValueError(f"no retrieval method {name!r}; known: {', '.join(sorted(METHODS))}")
    try:
        return METHODS[name](shape, layer, start=start, pooling=pooling, profile=profile, **(parameters or {}))
    except TypeError as exc:
        raise ValueError(f"{name} does not take {dict(parameters or {})}: {exc}") from exc
