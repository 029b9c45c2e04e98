"""Which chunk lies where, in memory, and what can happen to it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from enum import IntEnum
from typing import NamedTuple, TypeAlias

from ....core import NOTHING, ChunkInfo, ChunkKey

ALIGNMENT_BYTES = 4096
"""Containers begin at multiples of it, so that the space of each can be given back alone."""


def taken_bytes(nbytes: int) -> int:
    """What a container takes in its segment."""
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


class PayloadLocation(NamedTuple):
    """Where the container of a chunk lies. No two containers ever have the same segment and offset."""

    segment: int
    offset: int
    nbytes: int

    @property
    def taken_bytes(self) -> int:
        return taken_bytes(self.nbytes)


Row: TypeAlias = tuple[int, int, int, ChunkKey | None, str, float | None, float | None]
"""The fields of `PayloadLocation` and of `ChunkInfo`.

A plain tuple of plain values is what the garbage collector does not look at again, and there may be many.
"""


def row_of(location: PayloadLocation, info: ChunkInfo) -> Row:
    return (*location, info.after, info.namespace, info.expires_at_s, info.recompute_s)


def location_of(row: Row) -> PayloadLocation:
    return PayloadLocation(*row[:3])


def info_of(row: Row) -> ChunkInfo:
    return NOTHING if row[3:] == _NOTHING else ChunkInfo(*row[3:])


_NOTHING = (None, "", None, None)


class Op(IntEnum):
    """What a record of the journal says of its key."""

    PUT = 1
    MOVE = 2  # by compaction: another location, the same turn in the order of writing
    DELETE = 3
    NAMESPACE = 4  # no key: a part of the text that a number stands for


class Change(NamedTuple):
    """What is known of a chunk from now on; no row if it is no more."""

    op: Op
    key: ChunkKey
    row: Row | None


class Index:
    """Rows by key, least recently written first, and the sums over them.

    Attributes
    ----------
    used_bytes : taken by all chunks.
    live_bytes : taken in each segment that holds any.
    last_segment : the highest number ever seen.
    """

    def __init__(self, last_segment: int = 0) -> None:
        self.rows: dict[ChunkKey, Row] = {}
        self.used_bytes = 0
        self.live_bytes: Counter[int] = Counter()
        self.last_segment = last_segment

    def get(self, key: ChunkKey) -> PayloadLocation | None:
        row = self.rows.get(key)
        return None if row is None else location_of(row)

    def apply(self, change: Change) -> None:
        op, key, row = change
        old = self.rows.get(key)
        if op == Op.MOVE and old is None:
            return
        if old is not None:
            self._account(old, -1)
            if op != Op.MOVE:
                del self.rows[key]
        if row is not None:
            self.rows[key] = row
            self._account(row, 1)

    def load(self, records: Iterable[tuple[int, int, ChunkKey, Row | None]]) -> int:
        """Applies what `Records.read` gives to an empty index; where the last record ends, or 0.

        As `apply` for each, but the sums are made at the end.
        """
        rows, last_segment, end = self.rows, self.last_segment, 0
        move, name = Op.MOVE, Op.NAMESPACE
        for end, op, key, row in records:  # noqa: B007  asked for below
            if op == move:
                if key not in rows:
                    continue
            elif key in rows and op != name:
                del rows[key]
            if row is not None:
                rows[key] = row
                if row[0] > last_segment:
                    last_segment = row[0]
        for row in rows.values():
            self.live_bytes[row[0]] += taken_bytes(row[2])
        self.used_bytes, self.last_segment = self.live_bytes.total(), last_segment
        return end

    def differences(self, other: Index) -> Iterator[ChunkKey]:
        """Keys that lie elsewhere, or nowhere, in `other`; what is in `other` in its order."""
        yield from (key for key in self.rows if key not in other.rows)
        yield from (key for key, row in other.rows.items() if self.rows.get(key) != row)

    def _account(self, row: Row, sign: int) -> None:
        segment, taken = row[0], sign * taken_bytes(row[2])
        self.used_bytes += taken
        self.last_segment = max(self.last_segment, segment)
        self.live_bytes[segment] += taken
        if not self.live_bytes[segment]:
            del self.live_bytes[segment]
