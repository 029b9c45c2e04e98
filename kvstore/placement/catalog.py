"""What is where in all tiers, until when, and what is pinned: all that is known without asking a tier."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple, TypeAlias

from ...core import ChunkInfo, ChunkKey, Entry, Tier
from ..eviction.policy import EvictionPolicy
from ..guard.guarded_tier import GuardedTier
from ..guard.locks import release_owned
from ..history import Explanation, History
from ..stats import TierStats
from .pins import Pins
from .quota import Quota
from .tier_state import Residency, TierState

Removal: TypeAlias = Literal[
    "evictions", "expirations", "deletions", "corruptions", "undecodable", "departures", "given_up"
]

_ABSENT_S = float("-inf")


class PlacementChange(NamedTuple):
    """A chunk is in a tier from now on, or no longer. `entry` is what has entered, where that is told too."""

    key: ChunkKey
    tier: str
    is_there: bool
    entry: Entry | None = None


class Catalog:
    """What the store knows of all its tiers, under one lock. Every method from any thread; none does I/O.

    A key enters and leaves the catalog of a tier in one step; `TierIO` sees to it that the tier does the same. A change
    that an exception interrupts leaves `_is_torn` behind, and the next one derives everything from the residencies.

    Parameters
    ----------
    make_policy : makes what orders the chunks of a tier, for each tier anew.
    clock : Unix time in seconds, for expiry and the deadlines of pins.

    Attributes
    ----------
    states : one for each tier, fastest first.
    """

    def __init__(
        self,
        tiers: Sequence[Tier],
        *,
        make_policy: Callable[[], EvictionPolicy],
        quotas: Mapping[str, Quota],
        clock: Callable[[], float],
    ) -> None:
        self.states = [TierState(tier, make_policy, quotas) for tier in tiers]
        self._guarded = [state for state in self.states if isinstance(state.tier, GuardedTier)]
        self._clock = clock
        self._lock = threading.RLock()  # of all that follows, and of what is in it
        self._is_torn = False
        self._history = History(clock)
        self._pins = Pins()
        self._misses: Counter[str] = Counter()
        self._puts: Counter[str] = Counter()
        self._writes = 0
        self._changes: list[PlacementChange] | None = None
        self._until: dict[ChunkKey, float] = {}  # of every key in some tier: when the last copy expires, or infinity
        for state in self.states:
            tier = state.tier
            for entry in (tier.tier if isinstance(tier, GuardedTier) else tier).entries():
                self._enter(state, entry.key, entry.nbytes, entry.info)
                state.counts["arrivals"] += 1

    # ------------------------------------------------------------------------------------------------ where it is

    def match(self, keys: Sequence[ChunkKey]) -> int:
        """How many leading keys are in some tier that answers, unexpired."""
        now_s = self._clock()
        if not all(state.is_available for state in self._guarded):
            available = [state for state in self.states if state.is_available]
            with self._lock:
                for count, key in enumerate(keys):
                    if not any(state.has(key, now_s) for state in available):
                        return count
            return len(keys)
        # Without the lock: each look-up is one step of the interpreter, and the answer may be outdated when it is
        # returned in any case. A key that stays stored is never missing from `_until`, not even while it moves.
        for count, until_s in enumerate(map(self._until.get, keys)):
            if until_s is None or until_s <= now_s:
                return count
        return len(keys)

    def locate(self, keys: Iterable[ChunkKey]) -> list[TierState]:
        """For each leading key, the fastest tier that answers and holds it, unexpired."""
        available = [state for state in self.states if state.is_available]
        found = []
        with self._lock:
            now_s = self._clock()
            for key in keys:
                state = next((state for state in available if state.has(key, now_s)), None)
                if state is None:
                    break
                found.append(state)
        return found

    def residency(self, state: TierState, key: ChunkKey) -> Residency | None:
        """What is known of the chunk in a tier; None if it is not there."""
        return state.residencies.get(key)

    def info(self, key: ChunkKey) -> ChunkInfo:
        """What the fastest tier that holds the chunk remembers of it; nothing if none does."""
        with self._lock:
            found = (state.residencies.get(key) for state in self.states)
            return next((residency.info for residency in found if residency is not None), ChunkInfo())

    def read(self, state: TierState, key: ChunkKey, *, is_use: bool) -> Residency | Literal["expired"] | None:
        """What a tier can be asked for, None if it has no such chunk; the policy is told that it is, if `is_use`."""
        with self._lock:
            residency = state.residencies.get(key)
            if residency is None:
                return None
            if residency.info.expires_at_s is not None and residency.info.expires_at_s <= self._clock():
                return "expired"
            if is_use:
                self._begin()
                state.touch(key, residency)
                self._is_torn = False
            return residency

    # ------------------------------------------------------------------------------------------------------- pins

    def pinned(self, keys: Iterable[ChunkKey], deadline_s: float | None) -> Pinned:
        """`deadline_s`: from the beginning of the `with`; None for no deadline."""
        return Pinned(self, self._pins, tuple(keys), deadline_s)

    def pin(self, number: int, keys: tuple[ChunkKey, ...], deadline_s: float | None) -> None:
        with self._lock:
            self._begin()
            self._pins.hold(number, keys, None if deadline_s is None else self._clock() + deadline_s)
            self._is_torn = False

    def unpin(self, number: int) -> None:
        with self._lock:
            self._begin()
            self._pins.end_overdue(self._clock())
            self._pins.release(number)
            self._is_torn = False

    def pin_counts(self) -> tuple[int, int]:
        """Different keys that are pinned now, and how many calls of `pinned` have outlived their deadline so far."""
        with self._lock:
            self._begin()
            self._pins.end_overdue(self._clock())
            self._is_torn = False
            return len(self._pins), self._pins.overdue

    # ------------------------------------------------------------------------------------------------------ space

    def excess_bytes(self, state: TierState, key: ChunkKey, nbytes: int, namespace: str) -> float:
        """By how much the namespace would exceed its limit with `key`; 0 or less if not at all."""
        with self._lock:
            return state.excess_bytes(key, nbytes, namespace)

    def fits(self, state: TierState, nbytes: int) -> bool:
        """Whether the tier should have space for so much more, by the catalog."""
        with self._lock:
            capacity_bytes = state.tier.capacity_bytes
            return capacity_bytes is None or state.held_bytes + nbytes <= capacity_bytes

    def begin_insertion(self, state: TierState) -> None:
        """The calling thread is bringing a chunk into the tier, until `end_insertion`."""
        with self._lock:
            state.inserting.add(threading.get_ident())

    def end_insertion(self, state: TierState) -> None:
        with self._lock:
            state.inserting.discard(threading.get_ident())

    def expired(self, state: TierState) -> ChunkKey | None:
        """A chunk of the tier whose time is over; it is named once."""
        with self._lock:
            self._begin()
            key = state.expired(self._clock())
            self._is_torn = False
            return key

    def choose_victim(self, state: TierState, key: ChunkKey, info: ChunkInfo, *, own_group: bool) -> ChunkKey | None:
        """The chunk to evict for `key`, `leaving` until `release_victim`; None if none may go."""
        with self._lock:
            self._begin()
            self._pins.end_overdue(self._clock())
            victim = state.victim(key, info, self._pins, own_group=own_group)
            if victim is not None:
                state.leaving[victim] = threading.get_ident()
            self._is_torn = False
            return victim

    def release_victim(self, state: TierState, victim: ChunkKey) -> None:
        """The thread that was to evict `victim` has done so, or has given up."""
        with self._lock:
            state.leaving.pop(victim, None)

    # ---------------------------------------------------------------------------------------------------- changes

    def enter(self, state: TierState, key: ChunkKey, nbytes: int, info: ChunkInfo, **counts: int) -> None:
        """A chunk is in the tier from now on; with what else is to be counted for it."""
        with self._lock:
            self._begin()
            self._enter(state, key, nbytes, info)
            state.count(**counts)
            self._is_torn = False

    def discover(self, state: TierState, entry: Entry) -> None:
        """A chunk of which this store did not know is in the tier; nothing if it has been written here meanwhile."""
        with self._lock:
            if entry.key not in state.residencies:
                self._begin()
                self._enter(state, entry.key, entry.nbytes, entry.info)
                state.count(arrivals=1)
                self._is_torn = False

    def remove(self, state: TierState, key: ChunkKey, why: Removal) -> Residency | None:
        """A chunk is in the tier no longer; what it was. None if it was not there.

        None also if it may not go: what is pinned is not evicted, what is not due does not expire.
        """
        with self._lock:
            now_s = self._clock()
            self._begin()
            self._pins.end_overdue(now_s)
            residency = state.residencies.get(key)
            may_go = residency is not None and not (
                (why == "evictions" and key in self._pins) or (why == "expirations" and residency.expires_at_s > now_s)
            )
            if residency is not None and may_go:
                state.remove(key, evicted=why == "evictions")
                if self._changes is not None:
                    self._changes.append(PlacementChange(key, state.tier.name, is_there=False))
                state.count(**{why: 1, "removed_bytes": residency.nbytes})
                self._note_expiry(key)
                self._history.departed(key, state.tier.name, why)
            self._is_torn = False
            return residency if may_go else None

    def restore(self, state: TierState, key: ChunkKey, residency: Residency, why: Removal) -> None:
        """A chunk that was removed is still in the tier: as if it had not been removed."""
        with self._lock:
            self._begin()
            state.count(**{why: -1, "removed_bytes": -residency.nbytes, "added_bytes": -residency.nbytes})
            self._enter(state, key, residency.nbytes, residency.info)
            self._history.returned(key)
            self._is_torn = False

    def give_up(self, state: TierState, key: ChunkKey, why: Removal) -> None:
        """A chunk that was removed for `why` may be in the tier until that answers: it counts as given up."""
        with self._lock:
            state.count(**{why: -1, "given_up": 1})
            self._history.departed(key, state.tier.name, "given_up")

    def reject(self, state: TierState, key: ChunkKey) -> None:
        """The tier had no space for a chunk that was offered."""
        with self._lock:
            state.count(rejections=1)
            self._history.departed(key, state.tier.name, "rejections")

    def count(self, state: TierState, **counts: int) -> None:
        with self._lock:
            state.count(**counts)

    # ---------------------------------------------------------------------------------------------------- reports

    def record_hit(self, state: TierState, key: ChunkKey, nbytes: int, load_s: float) -> None:
        with self._lock:
            state.counts["hits"] += 1
            state.counts["bytes_read"] += nbytes
            self._history.hit(key, state.tier.name, load_s, nbytes)

    def record_miss(self, key: ChunkKey, reason: str, load_s: float) -> None:
        with self._lock:
            self._misses[reason] += 1
            self._history.missed(key, reason, load_s)

    def record_put(self, outcome: Literal["stored", "refused"], writes: int) -> None:
        with self._lock:
            self._puts[outcome] += 1
            self._writes += writes

    def explain(self, key: ChunkKey) -> Explanation:
        """What is known of a chunk, without asking a tier."""
        with self._lock:
            held = [(state.tier.name, state.residencies[key]) for state in self.states if key in state.residencies]
            recompute_s = held[0][1].info.recompute_s if held else None
            now_s = self._clock()
            is_expired = bool(held) and not any(state.has(key, now_s) for state in self.states)
            tiers = [(name, there.nbytes) for name, there in held]
            return self._history.explain(key, tiers, recompute_s, is_expired=is_expired)

    def take_changes(self) -> list[PlacementChange]:
        """Since the last call, in order. They are noted from the first call on."""
        with self._lock:
            changes, self._changes = self._changes, []
        return changes or []

    def stats(self) -> tuple[tuple[TierStats, ...], dict[str, int], dict[str, int], int]:
        """Counts of the tiers, misses by reason, puts by outcome, and how many chunks those puts wrote."""
        with self._lock:
            tiers = tuple(state.stats() for state in self.states)
            return tiers, dict(self._misses), dict(self._puts), self._writes

    def check(self) -> list[str]:
        """What is inconsistent within the catalog, in words."""
        problems = self._pins.check()
        until = self._latest_expiries()
        if until != self._until:
            problems.append(f"{len(until)} keys are stored, {len(self._until)} are found, or expire at another time")
        return problems

    def recover(self) -> None:
        """For a thread that an exception has taken out of a call: what it held or had begun is set right."""
        release_owned(self._lock)
        this = threading.get_ident()
        with self._lock:
            self._begin()
            for state in self.states:
                state.inserting.discard(this)
                for key in [key for key, thread in state.leaving.items() if thread == this]:
                    del state.leaving[key]
            self._is_torn = False

    def _begin(self) -> None:
        """Before every change that takes more than one step; `_is_torn = False` ends it."""
        if self._is_torn:
            for state in self.states:
                state.rebuild()
            self._pins.rebuild()
            self._until = self._latest_expiries()
        self._is_torn = True

    def _latest_expiries(self) -> dict[ChunkKey, float]:
        until: dict[ChunkKey, float] = {}
        for state in self.states:
            for key, residency in state.residencies.items():
                until[key] = max(until.get(key, _ABSENT_S), residency.expires_at_s)
        return until

    def _enter(self, state: TierState, key: ChunkKey, nbytes: int, info: ChunkInfo) -> None:
        old = state.enter(key, Residency(nbytes, info))
        state.counts["added_bytes"] += nbytes
        if old is not None:
            state.count(replaced=1, removed_bytes=old.nbytes)
        elif self._changes is not None:
            change = PlacementChange(key, state.tier.name, is_there=True, entry=Entry(key, nbytes, info))
            self._changes.append(change)
        self._note_expiry(key)

    def _note_expiry(self, key: ChunkKey) -> None:
        until_s = _ABSENT_S
        for state in self.states:
            residency = state.residencies.get(key)
            if residency is not None:
                until_s = max(until_s, residency.expires_at_s)
        if until_s == _ABSENT_S:
            self._until.pop(key, None)
        else:
            self._until[key] = until_s


class Pinned:
    """Within `with`, the chunks are pinned. The pins end with this object if an exception passes `__exit__` by."""

    _number: int | None = None  # of the hold

    def __init__(self, catalog: Catalog, pins: Pins, keys: tuple[ChunkKey, ...], deadline_s: float | None) -> None:
        self._catalog = catalog
        self._pins = pins
        self._keys = keys
        self._deadline_s = deadline_s

    def __enter__(self) -> None:
        try:
            self._number = number = next(self._pins.numbers)
            self._catalog.pin(number, self._keys, self._deadline_s)
        except BaseException:
            self._release_again()
            raise

    def __exit__(self, *_: object) -> None:
        try:
            if self._number is not None:
                self._catalog.unpin(self._number)
            self._number = None
        except BaseException:
            self._release_again()
            raise

    def __del__(self) -> None:
        if self._number is not None:
            self._pins.dropped.append(self._number)  # no lock: this may run within any other call

    def _release_again(self) -> None:
        self._catalog.recover()
        if self._number is not None:
            self._catalog.unpin(self._number)
        self._number = None
