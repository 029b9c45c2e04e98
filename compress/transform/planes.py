"""Integers, most of them near 0, as bytes: each row in as few states as it needs, then zstd.

zstd codes a byte with one bit at least. Rows of small integers, which are most of them, would waste that: here several
share a byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import zstandard

from ...errors import CodecError
from ..zstd import decompress

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.int16]

FRAMES = 7  # the rows' classes; one for each class that shares or fills bytes; low and high bytes of the last class
LARGEST = 32767  # of a magnitude


@dataclass(frozen=True, slots=True)
class _Class:
    """Rows whose largest magnitude is at most `largest`: `count` integers of `2 * largest + 1` states in a byte."""

    largest: int
    count: int

    @property
    def states(self) -> int:
        return 2 * self.largest + 1


_SHARED = (_Class(1, 5), _Class(2, 3), _Class(7, 2), _Class(127, 1))
_WIDE = len(_SHARED) + 1  # class of rows that take two bytes a number; class 0 has zeros alone


def pack(rows: Words, level: int) -> list[bytes]:
    """`[R, T]` integers as `FRAMES` zstd frames; an empty class gives an empty one of no bytes.

    Parameters
    ----------
    rows : magnitudes of at most `LARGEST`.
    level : of zstd.
    """
    largest = np.abs(rows.astype(np.int32)).max(1, initial=0)
    classes = np.searchsorted([0, *(c.largest for c in _SHARED)], largest).astype(np.uint8)
    planes = [classes]
    planes += [_shared(rows[classes == number], c) for number, c in enumerate(_SHARED, start=1)]
    wide = rows[classes == _WIDE].reshape(-1)
    planes += list(np.ascontiguousarray(_zigzag(wide).view(np.uint8).reshape(-1, 2).T))
    zstd = zstandard.ZstdCompressor(level=level)
    return [zstd.compress(plane.tobytes()) if plane.size else b"" for plane in planes]


def unpack(frames: Sequence[memoryview], rows: int, columns: int) -> Words:
    """The inverse of `pack`: `[rows, columns]`.

    Raises
    ------
    CodecError : the frames are not what `pack` makes of so many.
    """
    classes = _read(frames[0], rows)
    if rows and int(classes.max()) > _WIDE:
        raise CodecError(f"transform chunk has a row of class {int(classes.max())}; expected at most {_WIDE}")
    found = np.zeros((rows, columns), np.int16)
    for number, c in enumerate(_SHARED, start=1):
        here = classes == number
        count = int(here.sum())
        numbers = _unshared(_read(frames[number], -(-count * columns // c.count)), c)
        found[here] = numbers[: count * columns].reshape(count, columns)
    here = classes == _WIDE
    count = int(here.sum())
    size = count * columns
    words = np.stack([_read(frame, size) for frame in frames[_WIDE:]], 1).reshape(-1).view("<u2")
    found[here] = _unzigzag(words).reshape(count, columns)
    return found


def _read(frame: memoryview, size: int) -> Bytes:
    if not size:
        if len(frame):
            raise CodecError(f"transform chunk has a stream of {len(frame)} bytes where it has no numbers")
        return np.zeros(0, np.uint8)
    return np.frombuffer(decompress(frame, size), np.uint8)


def _shared(rows: Words, c: _Class) -> Bytes:
    digits = (rows.reshape(-1) + c.largest).astype(np.uint8)
    filled = np.pad(digits, (0, -len(digits) % c.count), constant_values=c.largest).reshape(-1, c.count)
    found: Bytes = (filled * c.states ** np.arange(c.count)).sum(1).astype(np.uint8)
    return found


def _unshared(packed: Bytes, c: _Class) -> Words:
    states = c.states**c.count
    if packed.size and int(packed.max()) >= states:
        raise CodecError(f"transform chunk has a byte of {int(packed.max())}; its class has {states} states")
    table = np.arange(states)[:, None] // c.states ** np.arange(c.count) % c.states - c.largest
    found: Words = table.astype(np.int16)[packed].reshape(-1)
    return found


def _zigzag(numbers: Words) -> npt.NDArray[np.uint16]:
    """0, -1, 1, -2, ... as 0, 1, 2, 3, ...: the high bytes of small numbers are alike."""
    return ((numbers << 1) ^ (numbers >> 15)).astype("<u2")


def _unzigzag(words: npt.NDArray[np.uint16]) -> Words:
    return ((words >> 1).astype(np.int16)) ^ -(words & 1).astype(np.int16)
