"""What becomes of the errors of tiers that are not raised: they are counted, and logged at most once a minute."""

from __future__ import annotations

import logging
import threading
import time

from ...core import ChunkKey
from ...errors import TierError, TierFullError, TierTimeoutError
from .catalog import Books
from .tier_state import Level

logger = logging.getLogger(__name__)

_INTERVAL_S = 60.0


class Faults:
    """Counts in the books and warns, once a minute for each tier. Every method may be called from any thread."""

    def __init__(self, books: Books) -> None:
        self._books = books
        self._lock = threading.Lock()
        self._logged_at_s: dict[tuple[Level, str], float] = {}

    def refused(self, level: Level, key: ChunkKey, exc: TierError) -> None:
        """The tier has not taken the chunk."""
        if isinstance(exc, TierFullError):
            self._books.turn_away(level, key, "rejections")
        else:
            self.failed(level, exc)

    def failed(self, level: Level, exc: TierError) -> None:
        """The tier has not done something else, or has failed."""
        self._books.count(level, **{"timeouts" if isinstance(exc, TierTimeoutError) else "errors": 1})
        self.warn(level, exc)

    def warn(self, level: Level, exc: Exception) -> None:
        if self._is_due(level, "warning"):
            logger.warning("tier %r: %s (its further warnings are held back for a minute)", level.tier.name, exc)

    def welcome(self, level: Level, down_s: float) -> None:
        """The tier was down, and answers again."""
        self._books.count(level, recoveries=1)
        if self._is_due(level, "welcome"):
            logger.warning("tier %r answers again, after %.1f s", level.tier.name, down_s)

    def _is_due(self, level: Level, what: str) -> bool:
        now_s = time.monotonic()
        with self._lock:
            if now_s - self._logged_at_s.get((level, what), float("-inf")) < _INTERVAL_S:
                return False
            self._logged_at_s[level, what] = now_s
        return True
