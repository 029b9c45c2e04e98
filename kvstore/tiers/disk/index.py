"""Which chunk lies where, in memory, and what can happen to it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from enum import IntEnum
from typing import NamedTuple

from ....core import ChunkInfo, ChunkKey

ALIGNMENT_BYTES = 4096
"""Containers begin at multiples of it, so that the space of each can be given back alone."""


def taken_bytes(nbytes: int) -> int:
    """What a container takes in its segment."""
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


class PayloadLocation(NamedTuple):
    """Where the container of a chunk lies, and what else is remembered of the chunk."""

    segment: int
    offset: int
    nbytes: int
    info: ChunkInfo

    @property
    def address(self) -> tuple[int, int]:
        """Segment and offset. An offset of a segment is used once, so they name the container for ever."""
        return self[:2]

    @property
    def taken_bytes(self) -> int:
        return taken_bytes(self.nbytes)


class Op(IntEnum):
    """What a record says of its key."""

    PUT = 1
    MOVE = 2  # by compaction: another location, the same turn in the order of writing
    DELETE = 3
    NAMESPACE = 4  # no key: a part of the text that a number stands for


class Change(NamedTuple):
    """What a record says: where a chunk lies now; no location if it is no more."""

    op: Op
    key: ChunkKey
    location: PayloadLocation | None


class Index:
    """Locations by key, least recently written first, and the sums over them.

    Attributes
    ----------
    used_bytes : taken by all chunks.
    live_bytes : taken in each segment that holds any.
    last_segment : the highest number ever seen.
    """

    def __init__(self, last_segment: int = 0) -> None:
        self.locations: dict[ChunkKey, PayloadLocation] = {}
        self.used_bytes = 0
        self.live_bytes: Counter[int] = Counter()
        self.last_segment = last_segment

    def apply(self, change: Change) -> None:
        op, key, location = change
        old = self.locations.get(key)
        if op == Op.MOVE and old is None:
            return
        if old is not None:
            self._account(old, -1)
            if op != Op.MOVE:
                del self.locations[key]
        if location is not None:
            self.locations[key] = location
            self._account(location, 1)

    def load(self, changes: Iterable[Change]) -> None:
        """Applies many changes to an empty index; the sums over them are made at the end."""
        locations = self.locations
        for op, key, location in changes:
            if op != Op.MOVE:
                locations.pop(key, None)
            elif key not in locations:
                continue
            if location is not None:
                locations[key] = location
                if location.segment > self.last_segment:
                    self.last_segment = location.segment
        for location in locations.values():
            self.live_bytes[location.segment] += location.taken_bytes
        self.used_bytes = self.live_bytes.total()

    def differences(self, other: Index) -> Iterator[ChunkKey]:
        """Keys that lie elsewhere, or nowhere, in `other`; what is in `other` in its order."""
        yield from (key for key in self.locations if key not in other.locations)
        yield from (key for key, location in other.locations.items() if self.locations.get(key) != location)

    def _account(self, location: PayloadLocation, sign: int) -> None:
        taken = sign * location.taken_bytes
        self.used_bytes += taken
        self.last_segment = max(self.last_segment, location.segment)
        self.live_bytes[location.segment] += taken
        if not self.live_bytes[location.segment]:
            del self.live_bytes[location.segment]
