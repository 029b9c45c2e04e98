"""The ways of choosing tokens that are measured, by the name to show."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from ..retrieval.flat import ExactSelector, RandomSelector
from ..retrieval.selector import LayerShape, Selector

EXACT, RANDOM = "exact", "random"
TEXT = "text"  # a kind of context beside RULER's: held-out prose, continued

Factory: TypeAlias = Callable[[int, LayerShape, int], Selector]
"""An empty selector of a layer, by its number, its shape and the first token that it covers."""

METHODS: Mapping[str, Factory] = {
    EXACT: lambda _layer, shape, start: ExactSelector(shape, start=start),
    RANDOM: lambda layer, shape, start: RandomSelector(shape, start=start, seed=layer),
}

ONLY: Mapping[str, Sequence[str]] = {}
"""Selectors that are measured on some kinds of context alone."""


def selectors(names: Sequence[str] | None = None) -> dict[str, Factory]:
    """How the selectors of these names are made, all for None; exact search first: what it chooses is what the others
    are held to.

    Raises
    ------
    ValueError : there is no selector of a name.
    """
    names = tuple(METHODS) if names is None else names
    if unknown := [name for name in names if name not in METHODS]:
        raise ValueError(f"selectors are {', '.join(unknown)}; expected some of {', '.join(METHODS)}")
    return {name: METHODS[name] for name in dict.fromkeys((EXACT, *names))}
