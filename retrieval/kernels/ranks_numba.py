"""Selection of the largest numbers without sorting, compiled; needs numba (`pip install "kvloom[retrieval]"`)."""

from __future__ import annotations

from typing import Any

import numpy as np

from .rows_numba import compiled

_w = np.uint32
_SAMPLED, _MANY = 16, 8192


@compiled()
def ordered(rank: Any) -> Any:
    """Unsigned numbers that are ordered like the floats with these bits."""
    return _w(rank) ^ _w(0xFFFFFFFF) if rank < 0 else _w(rank) ^ _w(0x80000000)


@compiled()
def threshold(ranks: Any, counts: Any, budget: Any) -> Any:
    """The key (see `ordered`) of the least important token that is taken, and how many tokens of it are not taken.

    Radix selection: 11, 11 and 10 bits are found in turn, each by counting tokens of codes with equal bits before.
    """
    held, left = np.empty(2048, np.int64), budget
    found, known, b = _w(0), _w(0), 0
    for shift, width in ((21, 11), (10, 11), (0, 10)):
        held[:] = 0
        for c in range(len(ranks)):
            key = ordered(ranks[c])
            if key & known == found:
                held[key >> _w(shift) & _w((1 << width) - 1)] += counts[c]
        b = (1 << width) - 1
        while held[b] < left:
            left -= held[b]
            b -= 1
        found |= _w(b) << _w(shift)
        known |= _w((1 << width) - 1) << _w(shift)
    return found, held[b] - left


@compiled()
def largest(ranks: Any, ids: Any) -> None:
    """Writes the positions of the `len(ids)` largest, ascending, the last among equals; `ranks` are bits of floats.

    Of many, those that are not above what one in sixteen says about the rest are left out first: one pass instead of
    four. If that leaves too few, all are looked at.
    """
    count, wanted = len(ranks), len(ids)
    of_sample = wanted // _SAMPLED + 4 * np.int64(np.sqrt(wanted // _SAMPLED)) + 8
    if count >= _MANY and of_sample < count // _SAMPLED // 2:
        sample = ranks[::_SAMPLED].copy()
        least, _ = threshold(sample, np.ones(len(sample), np.int8), of_sample)
        kept, places, found = np.empty(count, np.int32), np.empty(count, np.int32), 0
        for n in range(count):
            kept[found], places[found] = ranks[n], n
            found += ordered(ranks[n]) >= least
        if found >= wanted:
            _largest(kept[:found], ids)
            for n in range(wanted):
                ids[n] = places[ids[n]]
            return
    _largest(ranks, ids)


@compiled()
def _largest(ranks: Any, ids: Any) -> None:
    least, skipped = threshold(ranks, np.ones(len(ranks), np.int8), len(ids))
    taken = 0
    for n in range(len(ranks)):
        key = ordered(ranks[n])
        if key == least and skipped > 0:
            skipped -= 1
        elif key >= least:
            ids[taken] = n
            taken += 1
