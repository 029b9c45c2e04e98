"""What is chosen by scores of keys of two bits, and attention over the rest; compiled for this processor; needs numba.

quantized_ops.py and ops.py have checked what they dispatch here. KV heads are divided among threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor

from .quantized_ops import GROUP_TOKENS, PART_TOKENS, WORD_SIGNS
from .quantized_sums_numba import at_least, exp_sum, first_bit, top_of_part
from .ranks_numba import _largest, threshold
from .rows_numba import KINDS, compiled, exp_less, place_of, run, widen

_HALF_KIND, _GROUP_PARTS = KINDS[torch.float16], GROUP_TOKENS // PART_TOKENS
_LEAST = np.float32(-3e38)
_LOST = np.float32(1 / 256)  # of a part's sum; where less is left it is summed anew, since differences are not exact
_u = np.uint64


def top_of_parts(scores: Tensor, parts: Tensor, kv_heads: int, k: int, near: Tensor | None) -> Tensor:
    """`top_pooled` with `max`, of at most as many candidates as there are parts of 16.

    The k-th largest of the parts' largest is a bound: at least k candidates are not below it, and most parts are not
    looked at.
    """
    ids = torch.empty(kv_heads, k, dtype=torch.int64)
    _, Hq, P = parts.shape
    grouped = parts.numpy().reshape(2, kv_heads, Hq // kv_heads, P)
    beside = torch.full((Hq,), -torch.inf) if near is None else near.contiguous()
    run(
        _top, scores.numpy().reshape(kv_heads, -1), grouped[0], grouped[1], beside.numpy().reshape(kv_heads, -1),
        ids.numpy(),
    )  # fmt: skip
    return ids


def attend_to_rest(
    scores: Tensor, parts: Tensor, ids: Tensor, words: Tensor, scales: Tensor, means: Tensor, behind: Tensor,
    begin: int, light: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See quantized_ops.py."""
    H, (_, Hq, P), v_dim = ids.shape[0], parts.shape, means.shape[2]
    out, lse = torch.empty(Hq, v_dim), torch.empty(Hq)
    grouped = parts.numpy().reshape(2, H, Hq // H, P)
    run(
        _rest, scores.numpy().reshape(H, -1), grouped[0], grouped[1], ids.contiguous().numpy(),
        words.view(H, -1).numpy(), *place_of(scales), *place_of(means), means.shape[1], behind.contiguous().numpy(),
        begin, np.float32(max(np.log(light), _LEAST) if light > 0 else _LEAST),
        out.numpy().reshape(H, -1, v_dim), lse.numpy().reshape(H, -1),
    )  # fmt: skip
    return out, lse


@compiled()
def _log_sum(tops: Any, masses: Any, g: Any, weights: Any, bits: Any) -> Any:
    """Log-sum-exp of a row, from those of its parts; `weights` and `bits` are room for as many numbers."""
    P, top, total = tops.shape[1], _LEAST, np.float32(0)
    for p in range(P):
        weights[p] = tops[g, p]
    whole = P // PART_TOKENS * PART_TOKENS
    for p in range(_u(0), _u(whole), _u(PART_TOKENS)):
        top = max(top, top_of_part(weights, p))
    for p in range(whole, P):
        top = max(top, weights[p])
    exp_less(weights, top, P, bits)
    for p in range(P):
        total += weights[p] * masses[g, p]
    return top + np.log(total)


@compiled()
def _top_of_head(scores: Any, tops: Any, masses: Any, near: Any, ids: Any) -> None:
    """`scores` are flat, one query head behind the other."""
    G, P, wanted = tops.shape[0], tops.shape[1], len(ids)
    width = _u(P) * _u(PART_TOKENS)
    pooled, room, bits = np.empty(P, np.float32), np.empty(P, np.float32), np.empty(P, np.int32)
    shifts = np.empty(G, np.float32)
    for g in range(G):
        shift = _log_sum(tops, masses, g, room, bits)
        larger, smaller = max(shift, near[g]), min(shift, near[g])
        shifts[g] = shift = larger + np.log(np.float32(1) + np.exp(smaller - larger))
        for p in range(P):
            own = tops[g, p] - shift
            pooled[p] = own if g == 0 else max(pooled[p], own)
    key, _ = threshold(pooled.view(np.int32), np.ones(P, np.int8), wanted)
    # the number that has this key, see `ordered`
    rank = np.empty(1, np.uint32)
    rank[0] = key ^ np.uint32(0x80000000) if key & np.uint32(0x80000000) else ~key
    least = rank.view(np.float32)[0]
    kept, places = np.empty(P * PART_TOKENS, np.float32), np.empty(P * PART_TOKENS, np.int32)
    best, found = np.empty(PART_TOKENS, np.float32), _u(0)
    for p in range(_u(P)):
        if pooled[p] < least:
            continue
        at = p * _u(PART_TOKENS)
        for i in range(_u(PART_TOKENS)):
            best[i] = scores[at + i] - shifts[0]
        for g in range(_u(1), _u(G)):
            for i in range(_u(PART_TOKENS)):
                best[i] = max(best[i], scores[g * width + at + i] - shifts[g])
        left = at_least(best, _u(0), least)
        while left:
            i = first_bit(left)
            kept[found], places[found] = best[i], at + i
            left &= left - np.uint32(1)
            found += _u(1)
    _largest(kept.view(np.int32)[: np.int64(found)], ids)
    for n in range(wanted):
        ids[n] = places[ids[n]]


@compiled(parallel=True)
def _top(scores: Any, tops: Any, masses: Any, near: Any, ids: Any) -> None:
    for h in prange(len(ids)):
        _top_of_head(scores[h], tops[h], masses[h], near[h], ids[h])


@compiled()
def _take(scores: Any, first: Any, ids: Any, count: Any, peaks: Any, sums: Any, weights: Any, bits: Any) -> None:
    """Takes the exponentials of `ids` off the sums of their parts; those of a part follow one another.

    `first` is where the query's scores begin. The peak of a part of which little is left is that of what is left.
    """
    for n in range(count):
        weights[n] = scores[first + ids[n]] - max(peaks[ids[n] // PART_TOKENS], _LEAST)
    exp_less(weights, np.float32(0), count, bits)
    room, n = np.empty(PART_TOKENS, np.float32), 0
    while n < count:
        part, total, stop = ids[n] // PART_TOKENS, np.float32(0), n
        while stop < count and ids[stop] // PART_TOKENS == part:
            total += weights[stop]
            stop += 1
        left = sums[part] - total
        if left < _LOST * sums[part]:
            for i in range(PART_TOKENS):
                room[i] = scores[first + part * PART_TOKENS + i]
            for m in range(n, stop):
                room[ids[m] % PART_TOKENS] = -np.inf
            peaks[part] = top_of_part(room, _u(0))
            left = exp_sum(room, _u(0), max(peaks[part], _LEAST))
        sums[part] = left
        n = stop


@compiled()
def _add_signed(
    scores: Any, first: Any, tops: Any, lse: Any, least: Any, chosen: Any, taken: Any, words: Any, scales: Any,
    groups: Any, dim: Any, sums: Any, row: Any,
) -> None:  # fmt: skip
    """Adds to `sums[row : row + dim]` the signs of tokens whose score is at least that, each by weight and scale.

    `first` is where the query's scores begin, `scales` an address. With `b` 0 or 1, `w (2 b - 1)` is summed in two.
    """
    columns, weights = np.empty(GROUP_TOKENS, np.int64), np.empty(GROUP_TOKENS, np.float32)
    bits, own = np.empty(GROUP_TOKENS, np.int32), np.empty(GROUP_TOKENS, np.float32)
    at, total = 0, np.float32(0)
    for n in range(_u(groups)):
        count = 0
        for part in range(n * _u(_GROUP_PARTS), (n + _u(1)) * _u(_GROUP_PARTS)):
            if tops[part] < least:
                continue
            begin = part * _u(PART_TOKENS)
            left = at_least(scores, first + begin, least)
            while left:
                column = np.int64(begin + first_bit(left))
                left &= left - np.uint32(1)
                while at < taken and chosen[at] < column:
                    at += 1
                if at == taken or chosen[at] != column:
                    columns[count], weights[count] = column, min(scores[first + _u(column)] - lse, np.float32(0))
                    count += 1
        if not count:
            continue
        exp_less(weights, np.float32(0), count, bits)
        widen(scales + n * _u(2 * GROUP_TOKENS), _HALF_KIND, _u(GROUP_TOKENS), own, _u(0))
        for i in range(count):
            token = _u(columns[i]) % _u(GROUP_TOKENS)
            weight = weights[i] * own[token]
            twice, shift = np.float32(2) * weight, np.int32(token % _u(WORD_SIGNS))
            place = (n * _u(GROUP_TOKENS // WORD_SIGNS) + token // _u(WORD_SIGNS)) * dim
            total += weight
            for d in range(dim):
                sums[row + d] += twice * np.float32((words[place + d] >> shift) & np.int32(1))
    for d in range(dim):
        sums[row + d] -= total


@compiled()
def _rest_of_head(
    scores: Any, tops: Any, masses: Any, ids: Any, words: Any, scales: Any, means: Any, count: Any, behind: Any,
    begin: Any, log_light: Any, out: Any, lses: Any,
) -> None:  # fmt: skip
    (G, P), v_dim, taken = tops.shape, out.shape[1], 0
    chosen = np.empty(len(ids), np.int64)
    for n in range(len(ids)):
        chosen[taken] = ids[n]
        taken += ids[n] >= 0
    weights, bits = np.empty(max(P, len(ids)), np.float32), np.empty(max(P, len(ids)), np.int32)
    coded = count * _GROUP_PARTS
    of_groups = np.zeros((G, count), np.float32)
    sums, peaks, has_left = np.empty(P, np.float32), np.empty(P, np.float32), np.empty(G, np.bool_)
    for g in range(G):
        for p in range(P):
            sums[p], peaks[p] = masses[g, p], tops[g, p]
        _take(scores, g * P * PART_TOKENS, chosen, taken, peaks, sums, weights, bits)
        top, total = _LEAST, np.float32(0)
        for p in range(P):
            top = max(top, peaks[p])
        for p in range(P):
            weights[p] = peaks[p]
        exp_less(weights, top, P, bits)
        for p in range(P):
            if peaks[p] <= _LEAST:
                weights[p] = np.float32(0)
            total += weights[p] * sums[p]
        has_left[g] = total > np.float32(0)
        lses[g] = top + np.log(total) if has_left[g] else -np.inf
        share = np.float32(1) / max(total, np.float32(1e-38))
        for p in range(coded):
            of_groups[g, p // _GROUP_PARTS] += weights[p] * sums[p] * share
    flat = np.zeros(G * v_dim, np.float32)
    row = np.empty(v_dim, np.float32)
    for n in range(count):
        widen(means + _u(n) * _u(2 * v_dim), _HALF_KIND, _u(v_dim), row, _u(0))
        for g in range(G):
            weight = of_groups[g, n]
            for d in range(v_dim):
                flat[g * v_dim + d] += weight * row[d]
    for g in range(_u(G)):
        if has_left[g]:
            _add_signed(
                scores, g * _u(P * PART_TOKENS), tops[g], lses[g], max(lses[g] + log_light, _LEAST), chosen, taken,
                words, scales, count, _u(v_dim), flat, g * _u(v_dim),
            )  # fmt: skip
    for g in range(G):
        for d in range(v_dim):
            out[g, d] = flat[g * v_dim + d]
    at = 0
    for t in range(len(behind)):
        while at < taken and chosen[at] < begin + t:
            at += 1
        if at < taken and chosen[at] == begin + t:
            continue
        for g in range(G):
            if has_left[g]:
                weight = np.exp(min(scores[g * P * PART_TOKENS + begin + t] - lses[g], np.float32(0)))
                for d in range(v_dim):
                    out[g, d] += weight * behind[t, d]


@compiled(parallel=True)
def _rest(
    scores: Any, tops: Any, masses: Any, ids: Any, words: Any, scales: Any, scales_step: Any,
    means: Any, means_step: Any, count: Any, behind: Any, begin: Any, log_light: Any, out: Any, lses: Any,
) -> None:  # fmt: skip
    for h in prange(len(ids)):
        _rest_of_head(
            scores[h], tops[h], masses[h], ids[h], words[h], _u(scales) + _u(h) * _u(scales_step),
            _u(means) + _u(h) * _u(means_step), count, behind[h], begin, log_light, out[h], lses[h],
        )  # fmt: skip
