"""Selectors by name: what a caller chooses from, and what each needs to be made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from ..compress.profile import Profile
from .flat import ExactSelector, RandomSelector
from .selector import LayerShape, Pooling, Selector

MakeSelector: TypeAlias = Callable[..., Selector]
"""`make(shape, layer, start=, pooling=, profile=, **parameters)`: an empty selector of one layer."""


def _exact(shape: LayerShape, _layer: int, *, start: int, pooling: Pooling, profile: Profile | None) -> Selector:
    return ExactSelector(shape, start=start, pooling=pooling)


def _random(
    shape: LayerShape, layer: int, *, start: int, pooling: Pooling, profile: Profile | None, seed: int = 0
) -> Selector:
    return RandomSelector(shape, start=start, seed=seed + layer)


METHODS: dict[str, MakeSelector] = {"exact": _exact, "random": _random}
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
