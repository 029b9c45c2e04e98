"""Functions that numba compiles for this processor; needs numba (`pip install "kvloom[compress]"`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from numba import njit

_R = TypeVar("_R")


def compiled(**how: Any) -> Callable[[Callable[..., _R]], Callable[..., _R]]:
    """Decorator: compiles a function to machine code that releases the interpreter's lock.

    The code is cached between processes where numba finds a folder for it. The cache only notices changes of the
    function's own file: after a change of a function that it calls, touch the file.

    Parameters
    ----------
    how : options of `numba.njit`.
    """

    def compile_one(function: Callable[..., _R]) -> Callable[..., _R]:
        made: Callable[..., _R]
        try:
            made = njit(nogil=True, cache=True, **how)(function)
        except RuntimeError:  # numba found no folder that it may write to
            made = njit(nogil=True, **how)(function)
        return made

    return compile_one
