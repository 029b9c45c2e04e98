"""Loops compiled for the processor at hand; needs numba (`pip install "kvloom[nuq]"`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from numba import njit

_R = TypeVar("_R")


def compiled(**how: Any) -> Callable[[Callable[..., _R]], Callable[..., _R]]:
    """Decorator: machine code that does not hold the interpreter's lock, kept between processes where there is a folder
    for it; `how` as for `numba.njit`.

    What is kept knows its own file alone: when something it calls changes in another file, its own must be touched.
    """

    def compile_one(function: Callable[..., _R]) -> Callable[..., _R]:
        made: Callable[..., _R]
        try:
            made = njit(nogil=True, cache=True, **how)(function)
        except RuntimeError:  # numba found no folder that it may write to
            made = njit(nogil=True, **how)(function)
        return made

    return compile_one
