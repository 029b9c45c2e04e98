"""What is where in a stack of tiers, until when, and what is pinned: all that is known without asking a tier."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple, TypeAlias

from ...core import ChunkInfo, ChunkKey, Tier
from ..eviction.admission import AdmissionPolicy
from ..eviction.policy import EvictionPolicy
from ..history import Explanation, History
from ..stats import TierStats
from .pins import Pins
from .quota import Quota
from .tier_state import Held, Level

Removal: TypeAlias = Literal[
    "evictions", "expirations", "deletions", "corruptions", "undecodable", "departures", "given_up"
]

_ABSENT_S = float("-inf")


class PlacementChange(NamedTuple):
    """A chunk is in a tier from now on, or no longer."""

    key: ChunkKey
    tier: str
    is_there: bool


class Books:
    """The levels of a stack under one lock. Every method may be called from any thread, and does no I/O.

    A key enters and leaves the books of a level in one step. The stack sees to it that they say what the tier does.

    Parameters
    ----------
    policy, admission : make what orders and admits chunks, for each tier anew.
    clock : Unix time in seconds, for expiry and the deadlines of pins.

    Attributes
    ----------
    history : what became of chunks lately.
    """

    def __init__(
        self,
        tiers: Sequence[Tier],
        *,
        policy: Callable[[], EvictionPolicy],
        admission: Callable[[], AdmissionPolicy],
        quotas: Mapping[str, Quota],
        clock: Callable[[], float],
    ) -> None:
        self.levels = [Level(tier, policy, admission(), quotas) for tier in tiers]
        self.history = History()
        self._clock = clock
        self._lock = threading.Lock()
        self._pins = Pins()
        self._changes: list[PlacementChange] | None = None
        self._until: dict[ChunkKey, float] = {}  # of every key in some tier: when the last copy expires, or infinity
        for level in self.levels:
            for entry in level.tier.entries():
                self._enter(level, entry.key, entry.nbytes, entry.info)
                level.counts["arrivals"] += 1

    def match(self, keys: Sequence[ChunkKey]) -> int:
        """How many leading keys are in some tier that answers, unexpired."""
        answering = [level for level in self.levels if level.answers]
        if len(answering) < len(self.levels):
            return self._match_in(answering, keys)
        # Without the lock: each look-up is one step of the interpreter, and the answer may be outdated when it is
        # returned in any case. A key that stays stored is never missing from `_until`, not even while it changes.
        now_s = self._clock()
        for count, until_s in enumerate(map(self._until.get, keys)):
            if until_s is None or until_s <= now_s:
                return count
        return len(keys)

    def locate(self, key: ChunkKey) -> int | None:
        """Index of the fastest tier that answers and holds the chunk, unexpired."""
        with self._lock:
            now_s = self._clock()
            found = [index for index, level in enumerate(self.levels) if level.has(key, now_s)]
        return next((index for index in found if self.levels[index].answers), None)

    def locate_prefix(self, keys: Sequence[ChunkKey]) -> tuple[str, ...]:
        """For each leading key, the fastest tier that answers and holds it, unexpired."""
        found = []
        answering = [level for level in self.levels if level.answers]
        with self._lock:
            now_s = self._clock()
            for key in keys:
                level = next((level for level in answering if level.has(key, now_s)), None)
                if level is None:
                    break
                found.append(level.tier.name)
        return tuple(found)

    def info(self, key: ChunkKey) -> ChunkInfo:
        """What the fastest tier that holds the chunk remembers of it; nothing if none does."""
        with self._lock:
            return next((level.keys[key].info for level in self.levels if key in level.keys), ChunkInfo())

    def held(self, level: Level, key: ChunkKey) -> Held | None:
        with self._lock:
            return level.keys.get(key)

    def read(self, level: Level, key: ChunkKey, *, is_use: bool) -> Held | Literal["expired"] | None:
        """What a tier can be asked for, None if it has no such chunk; notes that it is asked, if `is_use`."""
        with self._lock:
            held = level.keys.get(key)
            if held is None:
                return None
            if held.expires_at_s <= self._clock():
                return "expired"
            if is_use:
                level.touch(key)
            return held

    @contextmanager
    def pinned(self, keys: Iterable[ChunkKey], deadline_s: float | None) -> Iterator[None]:
        """`deadline_s`: from now; None for no deadline."""
        with self._lock:
            hold = self._pins.hold(keys, None if deadline_s is None else self._clock() + deadline_s)
        try:
            yield
        finally:
            with self._lock:
                self._pins.lapse(self._clock())
                self._pins.release(hold)

    def pin_counts(self) -> tuple[int, int]:
        """Different keys that are pinned now, and how many calls of `pinned` have outlived their deadline so far."""
        with self._lock:
            self._pins.lapse(self._clock())
            return len(self._pins), self._pins.overdue

    def admits(self, level: Level, key: ChunkKey, nbytes: int) -> bool:
        """Whether a chunk may evict others; one that is there already may."""
        with self._lock:
            return key in level.keys or level.admission.admit(key, nbytes)

    def excess_bytes(self, level: Level, key: ChunkKey, nbytes: int, namespace: str) -> float:
        """By how much the namespace would exceed its limit with `key`; 0 or less if not at all."""
        with self._lock:
            return level.excess_bytes(key, nbytes, namespace)

    @contextmanager
    def inserting(self, level: Level) -> Iterator[None]:
        """Within, the level knows that a chunk is on its way into it."""
        with self._lock:
            level.inserts += 1
        try:
            yield
        finally:
            with self._lock:
                level.inserts -= 1

    def fits(self, level: Level, nbytes: int) -> bool:
        """Whether the tier should have room for so much more, by the books."""
        with self._lock:
            capacity_bytes = level.tier.capacity_bytes
            return capacity_bytes is None or level.held_bytes + nbytes <= capacity_bytes

    def expired(self, level: Level) -> ChunkKey | None:
        """A chunk of the level whose time is over; it is named once."""
        with self._lock:
            return level.expired(self._clock())

    def choose_victim(self, level: Level, key: ChunkKey, info: ChunkInfo, *, own_room: bool) -> ChunkKey | None:
        """The chunk to evict for `key`, `leaving` until `let_go`; None if none may go."""
        with self._lock:
            self._pins.lapse(self._clock())
            victim = level.victim(key, info, self._pins, own_room=own_room)
            if victim is not None:
                level.leaving.add(victim)
            return victim

    def let_go(self, level: Level, victim: ChunkKey) -> None:
        """The thread that was to evict `victim` has done so, or has given up."""
        with self._lock:
            level.leaving.discard(victim)

    def enter(self, level: Level, key: ChunkKey, nbytes: int, info: ChunkInfo, **counts: int) -> None:
        """A chunk is in the tier from now on; with what else is to be counted for it."""
        with self._lock:
            self._enter(level, key, nbytes, info)
            level.counts.update(counts)

    def strike(self, level: Level, key: ChunkKey, why: Removal) -> Held | None:
        """A chunk is in the tier no longer; what it was. None if it was not there.

        None also if it may not go: what is pinned is not evicted, what is not due does not expire.
        """
        with self._lock:
            now_s = self._clock()
            self._pins.lapse(now_s)
            held = level.keys.get(key)
            if held is None or (why == "evictions" and key in self._pins):
                return None
            if why == "expirations" and held.expires_at_s > now_s:
                return None
            level.drop(key, evicted=why == "evictions")
            if self._changes is not None:
                self._changes.append(PlacementChange(key, level.tier.name, is_there=False))
            level.counts.update({why: 1, "removed_bytes": held.nbytes})
            self._note(key)
            self.history.departed(key, level.tier.name, why)
            return held

    def restore(self, level: Level, key: ChunkKey, held: Held, why: Removal) -> None:
        """A chunk that was struck out is still there: as if it had not happened."""
        with self._lock:
            level.counts.update({why: -1, "removed_bytes": -held.nbytes, "added_bytes": -held.nbytes})
            self._enter(level, key, held.nbytes, held.info)
        self.history.returned(key)

    def turn_away(self, level: Level, key: ChunkKey, why: Literal["not_admitted", "rejections"]) -> None:
        """The tier has not taken a chunk that was offered."""
        self.count(level, **{why: 1})
        self.history.departed(key, level.tier.name, why)

    def explain(self, key: ChunkKey) -> Explanation:
        """What is known of a chunk, without asking a tier."""
        with self._lock:
            held = [(level.tier.name, level.keys[key]) for level in self.levels if key in level.keys]
        recompute_s = held[0][1].info.recompute_s if held else None
        return self.history.explain(key, [(name, there.nbytes) for name, there in held], recompute_s)

    def give_up(self, level: Level, key: ChunkKey, why: Removal) -> None:
        """A chunk that was struck out for `why` may be in the tier until that answers: it counts as given up."""
        with self._lock:
            level.counts.update({why: -1, "given_up": 1})
        self.history.departed(key, level.tier.name, "given_up")

    def count(self, level: Level, **counts: int) -> None:
        with self._lock:
            level.counts.update(counts)

    def count_hit(self, level: Level, nbytes: int) -> None:
        """As `count`, of which there is one for each chunk read: hits and bytes_read."""
        with self._lock:
            level.counts["hits"] += 1
            level.counts["bytes_read"] += nbytes

    def take_placement_changes(self) -> list[PlacementChange]:
        """Since the last call, in order. They are noted from the first call on."""
        with self._lock:
            changes, self._changes = self._changes, []
        return changes or []

    def stats(self) -> tuple[TierStats, ...]:
        with self._lock:
            return tuple(level.stats() for level in self.levels)

    def check(self) -> list[str]:
        """What is inconsistent among the books, in words."""
        problems = []
        until: dict[ChunkKey, float] = {}
        for level in self.levels:
            for key, held in level.keys.items():
                until[key] = max(until.get(key, _ABSENT_S), held.expires_at_s)
        if until != self._until:
            problems.append(f"{len(until)} keys are stored, {len(self._until)} are found, or expire at another time")
        return problems + self._pins.check()

    def _match_in(self, levels: Sequence[Level], keys: Sequence[ChunkKey]) -> int:
        with self._lock:
            now_s = self._clock()
            for count, key in enumerate(keys):
                if not any(level.has(key, now_s) for level in levels):
                    return count
        return len(keys)

    def _enter(self, level: Level, key: ChunkKey, nbytes: int, info: ChunkInfo) -> None:
        old = level.add(key, nbytes, info)
        level.counts["added_bytes"] += nbytes
        if self._changes is not None and old is None:
            self._changes.append(PlacementChange(key, level.tier.name, is_there=True))
        if old is not None:
            level.counts.update(replaced=1, removed_bytes=old.nbytes)
        self._note(key)

    def _note(self, key: ChunkKey) -> None:
        until = _ABSENT_S
        for level in self.levels:
            held = level.keys.get(key)
            if held is not None:
                until = max(until, held.expires_at_s)
        if until == _ABSENT_S:
            self._until.pop(key, None)
        else:
            self._until[key] = until
