"""The functions of code_ops.py compiled for this processor; needs numba (`pip install "kvloom[retrieval]"`).

code_ops.py has checked what it dispatches here. KV heads are divided among threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor

from .ranks_numba import ordered, threshold
from .rows_numba import compiled, run, word

_CODES = 8  # of 12 bits in three words of 32: a branch for all of them, since few are chosen
_u = np.uint64
_w = np.uint32


def code_counts(packed: Tensor, bits: int, tokens: int, band_starts: Sequence[int]) -> Tensor:
    """See code_ops.py; all codes of so many bits for each band."""
    counts = torch.zeros(packed.shape[0], len(band_starts) + 1 << bits, dtype=torch.int64)
    run(_count, _numbers(packed), bits, _bounds(band_starts, tokens), counts.numpy())
    return counts


def vq_scores(table: Tensor, packed: Tensor, bits: int, tokens: int, band_starts: Sequence[int]) -> Tensor:
    """See code_ops.py."""
    scores = torch.empty(table.shape[0], tokens)
    run(_look_up, _numbers(table.float()), _numbers(packed), bits, _bounds(band_starts, tokens), scores.numpy())
    return scores


def vq_select(
    importance: Tensor, packed: Tensor, bits: int, tokens: int, counts: Tensor, budget: int, band_starts: Sequence[int]
) -> Tensor:
    """See code_ops.py; `budget` is above 0 and below `tokens`, which is the sum of each row of `counts`."""
    ids = torch.empty(packed.shape[0], budget, dtype=torch.int64)
    # + 0.0: a zero has one sign, so that bits order numbers
    ranks = _numbers(importance + 0.0).view(np.int32)
    run(_select, ranks, _numbers(packed), bits, _bounds(band_starts, tokens), _numbers(counts), ids.numpy())
    return ids


def _bounds(band_starts: Sequence[int], tokens: int) -> np.ndarray[Any, Any]:
    return np.array([0, *band_starts, tokens], np.int64)


def _numbers(tensor: Tensor) -> np.ndarray[Any, Any]:
    found: np.ndarray[Any, Any] = tensor.contiguous().numpy()
    return found


@compiled()
def _code(row: Any, n: Any, bits: Any) -> Any:
    """Code n of a row."""
    if bits == 16:
        return _w(row[_u(2) * n]) | _w(row[_u(2) * n + _u(1)]) << _w(8)
    odd = n % _u(2)
    first = n // _u(2) * _u(3) + odd
    return (_w(row[first]) | _w(row[first + _u(1)]) << _w(8)) >> _w(_u(4) * odd) & _w(4095)


@compiled(parallel=True)
def _count(packed: Any, bits: Any, bounds: Any, counts: Any) -> None:
    for h in prange(len(packed)):
        for band in range(len(bounds) - 1):
            first = _u(band << bits)
            for n in range(_u(bounds[band]), _u(bounds[band + 1])):
                counts[h, first + _code(packed[h], n, bits)] += 1


@compiled(parallel=True)
def _look_up(table: Any, packed: Any, bits: Any, bounds: Any, scores: Any) -> None:
    group, bands = len(table) // len(packed), len(bounds) - 1
    for head in prange(len(table)):
        for band in range(bands):
            first = _u(table.shape[1] // bands * band)
            for n in range(_u(bounds[band]), _u(bounds[band + 1])):
                scores[head, n] = table[head, first + _code(packed[head // group], n, bits)]


@compiled()
def _select_head(ranks: Any, row: Any, bits: Any, bounds: Any, counts: Any, ids: Any) -> None:
    """A flag for each code (1: its tokens are taken, 2: the last of them are), then a pass over the tokens' codes."""
    least, skipped = threshold(ranks, counts, len(ids))
    bands, taken, low = len(bounds) - 1, _u(0), _w(4095)
    flags, own = np.zeros(_u(1 << bits), np.uint8), len(ranks) // bands
    for band in range(bands):
        for c in range(own):
            key = ordered(ranks[own * band + c])
            flags[c] = np.uint8(2) if key == least else np.uint8(1) if key > least else np.uint8(0)
        n, stop = _u(bounds[band]), _u(bounds[band + 1])
        while n < stop:
            some = min(_u(_CODES) - n % _u(_CODES), stop - n)
            if bits == 12 and some == _u(_CODES):
                at = n // _u(2) * _u(3)
                a, b, c = word(row, at), word(row, at + _u(4)), word(row, at + _u(8))
                first = flags[a & low] | flags[a >> _w(12) & low]
                second = flags[a >> _w(24) | (b & _w(15)) << _w(8)] | flags[b >> _w(4) & low]
                third = flags[b >> _w(16) & low] | flags[b >> _w(28) | (c & _w(255)) << _w(4)]
                any_flag = first | second | third | flags[c >> _w(8) & low] | flags[c >> _w(20)]
                if any_flag == 0:
                    n += some
                    continue
                if any_flag == 1 and taken + some <= _u(len(ids)):
                    # which of the 8 are taken cannot be foretold: each is written, and stays if it is
                    for i in range(_u(_CODES)):
                        ids[taken] = n + i
                        taken += _u(flags[_code(row, n + i, bits)])
                    n += some
                    continue
            for i in range(some):
                flag = flags[_code(row, n + i, bits)]
                if flag == 2 and skipped > 0:
                    skipped -= 1
                elif flag != 0:
                    ids[taken] = n + i
                    taken += _u(1)
            n += some


@compiled(parallel=True)
def _select(ranks: Any, packed: Any, bits: Any, bounds: Any, counts: Any, ids: Any) -> None:
    for h in prange(len(packed)):
        _select_head(ranks[h], packed[h], bits, bounds, counts[h], ids[h])
