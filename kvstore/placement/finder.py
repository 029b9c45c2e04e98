"""Chunks that other machines have put into a tier, found when they are wanted."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

from ...core import ChunkKey, Entry, Tier
from ...errors import TierError
from ..capabilities import FindsChunks
from ..guard.guarded_tier import GuardedTier
from .catalog import Catalog
from .tier_state import TierState

_WAIT_S = 1.0  # a look-up waits no longer: what comes later is found by the next one
_MOST_ABSENT = 1 << 16
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0


class Finder:
    """Asks one tier for keys that the catalog does not know, and enters what it has. Every method from any thread.

    A key that the tier did not have is not asked for again for `FindsChunks.recheck_s`, so that a look-up that is
    repeated costs nothing. After a failure nothing is asked for a time that doubles up to 5 s: until then look-ups
    answer from the catalog, at once.

    Parameters
    ----------
    tier : with its guard, if it has one.
    failed : told of errors of the tier.
    clock : seconds, monotonic.
    """

    def __init__(
        self,
        tier: Tier,
        finder: FindsChunks,
        state: TierState,
        catalog: Catalog,
        failed: Callable[[TierError], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._guard = tier if isinstance(tier, GuardedTier) else None
        self._finder = finder
        self._state = state
        self._catalog = catalog
        self._failed = failed
        self._clock = clock
        # Without a lock: each of its operations is one step of the interpreter.
        self._absent_until_s: OrderedDict[ChunkKey, float] = OrderedDict()
        self._pause_s = 0.0
        self._ask_after_s = float("-inf")

    def look_for(self, keys: Sequence[ChunkKey]) -> bool:
        """Whether any of the keys that the catalog did not have in this tier is there."""
        now_s = self._clock()
        if now_s < self._ask_after_s or not self._state.is_available:
            return False
        wanted = [key for key in keys if key not in self._state.residencies and not self._is_absent(key, now_s)]
        if not wanted:
            return False
        try:
            if self._guard is None:
                is_found = self._ask(wanted)
            else:
                is_found = self._guard.call(lambda _: self._ask(wanted), is_brief=True, timeout_s=_WAIT_S)
        except TierError as exc:
            self._pause_s = min(_LONGEST_PAUSE_S, 2 * self._pause_s or _FIRST_PAUSE_S)
            self._ask_after_s = self._clock() + self._pause_s
            self._failed(exc)
            return False
        self._pause_s = 0.0
        return is_found

    def forget(self, key: ChunkKey) -> None:
        """The tier has just failed to give this chunk: it counts as absent for a while."""
        self._note_absent([key], [None])

    def _ask(self, keys: Sequence[ChunkKey]) -> bool:
        """Runs where the tier is called, to its end also if the caller gives up: catalog and tier stay in step."""
        found = self._finder.find(keys)
        entries = [entry for entry in found if entry is not None]
        for entry in entries:
            self._catalog.discover(self._state, entry)
        self._note_absent(keys, found)
        return bool(entries)

    def _is_absent(self, key: ChunkKey, now_s: float) -> bool:
        until_s = self._absent_until_s.get(key)
        return until_s is not None and now_s < until_s

    def _note_absent(self, keys: Sequence[ChunkKey], found: Sequence[Entry | None]) -> None:
        until_s = self._clock() + self._finder.recheck_s
        for key, entry in zip(keys, found, strict=True):
            self._absent_until_s.pop(key, None)
            if entry is None:
                self._absent_until_s[key] = until_s
        while len(self._absent_until_s) > _MOST_ABSENT:
            self._absent_until_s.popitem(last=False)
