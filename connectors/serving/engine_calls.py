"""Calls that an engine's own threads make of us: whatever goes wrong is logged, counted and a miss."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TypeVar

T = TypeVar("T")
F = TypeVar("F")

_LOG = logging.getLogger("kvloom")


class EngineCalls:
    """Counts, and calls that raise nothing. Every method may be called from any thread.

    Parameters
    ----------
    engine : its name, for the log.
    """

    def __init__(self, engine: str) -> None:
        self._engine = engine
        self._counts: Counter[str] = Counter()
        self._counts_lock = threading.Lock()

    def guarded(self, what: str, work: Callable[[], T], failed: F) -> T | F:
        """What `work` gives; `failed` if it raises anything, which is logged and counted."""
        try:
            return work()
        except Exception:  # noqa: BLE001  called in the engine's threads, which must not end with us
            self.count({"errors": 1})
            _LOG.exception("%s of %s failed; it is a miss", what, self._engine)
            return failed

    def counts(self) -> Mapping[str, float]:
        """Since the beginning."""
        with self._counts_lock:
            return dict(self._counts)

    def count(self, counts: Mapping[str, float]) -> None:
        with self._counts_lock:
            self._counts.update(counts)
