"""Locks that no exception leaves held, wherever it is raised."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType

from ..guard.locks import release_owned


class LockGuard:
    """A context manager: if its block ends with an exception, it releases what this thread still holds of a lock.

    A signal handler, or another thread, may raise an exception between any two instructions. `with lock:` releases the
    lock if that happens within the block, but not if it happens between the end of the block and the release. So the
    locks of tiers are re-entrant, which know the thread that holds them, and are taken within a guard:

        with guard, lock: ...

    No code that takes these locks runs as a generator: a suspended one would release a lock at some later time.

    Parameters
    ----------
    mend : called first.
    """

    def __init__(self, *locks: threading.RLock, mend: Callable[[], None] = lambda: None) -> None:
        self._locks = locks
        self._mend = mend

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._mend()
            release_owned(*self._locks)


def is_held(lock: threading.RLock) -> bool:
    """Whether this thread holds the lock."""
    return bool(lock._is_owned())  # type: ignore[attr-defined]  # noqa: SLF001  as `threading.Condition` asks
