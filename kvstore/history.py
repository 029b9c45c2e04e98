"""What became of chunks, for a while: the answers to "why was this a miss?"."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple, TypeAlias, TypeVar

from ..core import ChunkKey

_T = TypeVar("_T")

Word: TypeAlias = Literal["stored", "never stored", "evicted", "expired", "removed"]
"""What is known of a chunk, in a word. `removed`: deleted, damaged, undecodable, or it did not fit."""

_DEPARTED: Mapping[str, Word] = MappingProxyType({"evictions": "evicted", "expirations": "expired"})

_WORDS = {
    "evictions": "was evicted from {tier}",
    "expirations": "expired in {tier}",
    "deletions": "was deleted from {tier}",
    "corruptions": "was found corrupt in {tier}",
    "undecodable": "could not be decoded from {tier}",
    "departures": "was removed from {tier} by another process, or lost there",
    "given_up": "may or may not be in {tier}, which did not answer in time",
    "rejections": "did not fit into {tier}",
}
_MEMORY = 0.9  # of a tier's speed: the last ten reads or so count


class Lookup(NamedTuple):
    """One `read`: of a chunk, or of some of its layers.

    Attributes
    ----------
    tier : that answered; None for a miss.
    reason : of the miss, see `StoreStats.misses`; None for a hit.
    load_s : seconds from the call to the decoded chunk, or to the miss.
    nbytes : read.
    at_s : Unix time.
    """

    tier: str | None
    reason: str | None
    load_s: float
    nbytes: int
    at_s: float


@dataclass(frozen=True, slots=True)
class Departure:
    """Why a tier does not hold a chunk that it held, or was offered.

    Attributes
    ----------
    why : the counter of `TierStats` that went up for it: `evictions`, `deletions`, `rejections`, ...
    at_s : Unix time.
    """

    tier: str
    why: str
    at_s: float

    def __str__(self) -> str:
        return _WORDS[self.why].format(tier=self.tier)


@dataclass(frozen=True, slots=True)
class Explanation:
    """Where a chunk is, what came of looking it up, and what that cost.

    Attributes
    ----------
    tiers : that hold it now, fastest first.
    lookup : the last one; None if there was none lately.
    departure : the last time that it left a tier, or that a tier refused it; None if there was none lately.
    load_s : seconds that reading it would take now, by what the tier has measured; None if it is nowhere, or nothing
        was read from that tier yet.
    recompute_s : what computing it took, if `put` was told.
    is_expired : what is there is too old to be found, and goes when it is met.
    """

    key: ChunkKey
    tiers: tuple[str, ...]
    lookup: Lookup | None
    departure: Departure | None
    load_s: float | None
    recompute_s: float | None
    is_expired: bool = False

    @property
    def word(self) -> Word:
        """Where it is, or why it is nowhere: `never stored` also if that is so long ago that it is forgotten."""
        if self.is_expired:
            return "expired"
        if self.tiers:
            return "stored"
        if self.departure is None:
            return "never stored"
        return _DEPARTED.get(self.departure.why, "removed")

    def __str__(self) -> str:
        """In one line, for people."""
        where = f"in {', '.join(self.tiers)}" if self.tiers else "not stored"
        parts = [f"chunk {self.key.hex()[:12]}: {where}{', but expired' if self.is_expired else ''}"]
        if self.departure is not None:
            parts.append(str(self.departure))
        elif not self.tiers:
            parts.append("never put, or too long ago to be remembered")
        if self.lookup is not None:
            outcome = f"hit in {self.lookup.tier}" if self.lookup.tier else f"miss ({self.lookup.reason})"
            parts.append(f"last lookup: {outcome}, {self.lookup.load_s * 1e3:.2f} ms")
        if self.load_s is not None:
            parts.append(f"loading takes about {self.load_s * 1e3:.2f} ms")
        if self.recompute_s is not None:
            parts.append(f"computing it took {self.recompute_s * 1e3:.2f} ms")
            if self.load_s is not None and self.load_s > self.recompute_s:
                parts.append("so that loading it does not pay by itself")
        return "; ".join(parts)


class History:
    """The last lookup and the last departure of the chunks that had one most recently. Guarded by the catalog's lock.

    Parameters
    ----------
    clock : Unix time in seconds.
    chunks : how many chunks are remembered, of each.
    """

    def __init__(self, clock: Callable[[], float], chunks: int = 65_536) -> None:
        self._clock = clock
        self._chunks = chunks
        self._lookups: OrderedDict[ChunkKey, Lookup] = OrderedDict()
        self._departures: OrderedDict[ChunkKey, Departure] = OrderedDict()
        self._speeds: dict[str, tuple[float, float]] = {}  # of each tier: seconds and bytes of late reads, decayed

    def hit(self, key: ChunkKey, tier: str, load_s: float, nbytes: int) -> None:
        """A chunk was found."""
        _remember(self._lookups, key, Lookup(tier, None, load_s, nbytes, self._clock()), self._chunks)
        seconds, read_bytes = self._speeds.get(tier, (0.0, 0.0))
        self._speeds[tier] = _MEMORY * seconds + load_s, _MEMORY * read_bytes + nbytes

    def missed(self, key: ChunkKey, reason: str, load_s: float) -> None:
        """A chunk was looked for in vain."""
        _remember(self._lookups, key, Lookup(None, reason, load_s, 0, self._clock()), self._chunks)

    def departed(self, key: ChunkKey, tier: str, why: str) -> None:
        """A chunk has left a tier, or was not taken by it."""
        _remember(self._departures, key, Departure(tier, why, self._clock()), self._chunks)

    def returned(self, key: ChunkKey) -> None:
        """A chunk has not departed after all."""
        self._departures.pop(key, None)

    def explain(
        self, key: ChunkKey, held: Sequence[tuple[str, int]], recompute_s: float | None, *, is_expired: bool = False
    ) -> Explanation:
        """What is known of a chunk.

        Parameters
        ----------
        held : name of each tier that holds it, fastest first, and the bytes that it takes there.
        """
        load_s = None
        if held and self._speeds.get(held[0][0], (0.0, 0.0))[1] > 0:
            seconds, nbytes = self._speeds[held[0][0]]
            load_s = seconds * held[0][1] / nbytes
        lookup, departure = self._lookups.get(key), self._departures.get(key)
        return Explanation(key, tuple(name for name, _ in held), lookup, departure, load_s, recompute_s, is_expired)


def _remember(known: OrderedDict[ChunkKey, _T], key: ChunkKey, event: _T, most: int) -> None:
    known[key] = event
    known.move_to_end(key)
    if len(known) > most:
        known.popitem(last=False)
