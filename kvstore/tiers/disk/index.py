"""Which chunk lies where, in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ....core import ChunkInfo, ChunkKey

ALIGNMENT_BYTES = 4096
"""Containers begin at multiples of it, so that the space of each can be given back alone."""


def taken_bytes(nbytes: int) -> int:
    """What a container takes in its segment."""
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


class Place(NamedTuple):
    """Where a container lies. An offset of a segment is used once, so the first two fields name it for ever."""

    segment: int
    offset: int
    nbytes: int
    info: ChunkInfo

    @property
    def at(self) -> tuple[int, int]:
        return self.segment, self.offset

    @property
    def taken_bytes(self) -> int:
        return taken_bytes(self.nbytes)


class Index:
    """Places by key, least recently written first, and the sums over them.

    Attributes
    ----------
    used_bytes : taken by all places.
    live : bytes taken in each segment that holds any.
    last_segment : the highest number ever seen.
    """

    def __init__(self) -> None:
        self.places: dict[ChunkKey, Place] = {}
        self.used_bytes = 0
        self.live: dict[int, int] = {}
        self.last_segment = 0

    def put(self, key: ChunkKey, place: Place) -> Place | None:
        """Returns where the key lay before."""
        old = self.remove(key)
        self.places[key] = place
        self._account(place, 1)
        return old

    def move(self, key: ChunkKey, place: Place) -> Place | None:
        """As `put`, but the key keeps its turn in the order of writing."""
        old = self.places.get(key)
        if old is not None:
            self._account(old, -1)
            self.places[key] = place
            self._account(place, 1)
        return old

    def remove(self, key: ChunkKey) -> Place | None:
        old = self.places.pop(key, None)
        if old is not None:
            self._account(old, -1)
        return old

    def differences(self, other: Index) -> Iterator[ChunkKey]:
        """Keys that lie elsewhere, or nowhere, in `other`; what is in `other` in its order."""
        yield from (key for key in self.places if key not in other.places)
        yield from (key for key, place in other.places.items() if self.places.get(key) != place)

    def _account(self, place: Place, sign: int) -> None:
        taken = sign * place.taken_bytes
        self.used_bytes += taken
        self.last_segment = max(self.last_segment, place.segment)
        left = self.live.get(place.segment, 0) + taken
        if left:
            self.live[place.segment] = left
        else:
            del self.live[place.segment]
