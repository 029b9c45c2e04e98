"""Scores of keys of two bits a channel, what is chosen by them, and the rest; compiled for this processor.

Needs numba (`pip install "kvloom[retrieval]"`). quantized_ops.py has checked what it dispatches here. Groups of tokens
and KV heads are divided among threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor

from .quantized_ops import GROUP_TOKENS, MIDDLE, PART_TOKENS, WORD_CODES
from .quantized_sums_numba import (
    BYTES,
    LANES,
    RUN_WORDS,
    TURNS,
    code_sums,
    exp_sum,
    scaled,
    top_of_part,
)
from .rows_numba import KINDS, compiled, place_of, prefetch, run, widen

_GROUP, _HALF_KIND = GROUP_TOKENS, KINDS[torch.float16]
_LARGEST = 127  # of a query's numbers, in 8 bits
_LINE_BYTES = 64
_TILES = _GROUP // (4 * LANES)  # of a group; with each, as much of the next group is asked for
_TASK_GROUPS = 16  # that a thread takes at a time
_PARTS = _GROUP // PART_TOKENS  # of a group
_LEAST = np.float32(-3e38)  # stands for the largest score where there is no token
_u = np.uint64


def scores_and_parts(
    queries: Tensor, words: Tensor, scales: Tensor, means: Tensor, scale: float, skip: int, padding: int
) -> tuple[Tensor, Tensor]:
    """See quantized_ops.py. Numbers of a query are rounded to 8 bits where they meet codes."""
    (Hq, D), (H, n, W, _) = queries.shape, words.shape
    G, wide = Hq // H, (queries.float() * scale).view(H, Hq // H, D)
    steps = (wide.abs().amax(2) / _LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    rounded = (wide / steps[..., None]).round_()
    shared = torch.stack((steps, rounded.sum(2) * steps * MIDDLE), 2)
    # rows for all that a register may hold; a word has the codes 4 b, 4 b + 1, ... in byte b
    room = torch.nn.functional.pad(rounded, (0, W * WORD_CODES - D, 0, -G % 4))
    weights = room.view(H, -1, W, BYTES, TURNS).transpose(3, 4).to(torch.int8, memory_format=torch.contiguous_format)
    scores = torch.empty(Hq, n * _GROUP + padding)
    parts = torch.empty(2, Hq, scores.shape[1] // PART_TOKENS)
    if not n:
        return scores, parts
    run(
        _score, weights.contiguous().view(H, -1).view(torch.int32).numpy(), wide.contiguous().numpy(), shared.numpy(),
        W, n, skip, *place_of(words), *place_of(scales), *place_of(means), scores.numpy().reshape(H, -1),
        parts.numpy().reshape(2, H, -1),
    )  # fmt: skip
    return scores, parts


_sums_of_one, _sums_of_two, _sums_of_four = code_sums(1, 4), code_sums(2, 4), code_sums(4, 2)


@compiled()
def _prefetch(address: Any, count: Any) -> None:
    for line in range(_u(0), count, _u(_LINE_BYTES)):
        prefetch(address + line)


@compiled()
def _code_sums(weights: Any, G: Any, W: Any, words: Any, sums: Any) -> None:
    """`sums[256 g + t]`: of codes of the group's token t, weighted by the numbers of query g.

    The words of the next group are asked for: a processor does not see that its rows follow, and waits for each line.
    """
    width, bytes_here = _u(W) * _u(TURNS), _u(4 * _GROUP) * _u(W)
    for t in range(_u(G) * _u(_GROUP)):
        sums[t] = np.float32(0)
    tile_bytes = bytes_here // _u(_TILES)
    for first in range(_u(0), _u(W), _u(RUN_WORDS)):
        count, here = min(_u(RUN_WORDS), _u(W) - first), words + first * _u(4 * _GROUP)
        for g in range(_u(0), _u(G), _u(4)):
            start, some = g * width + first * _u(TURNS), _u(G) - g
            if some > _u(2):
                for t in range(_u(0), _u(_GROUP), _u(2 * LANES)):
                    if first + g == _u(0) and t % _u(4 * LANES) == _u(0):
                        _prefetch(words + bytes_here + t // _u(4 * LANES) * tile_bytes, tile_bytes)
                    _sums_of_four(weights, start, width, here + t * _u(4), count, sums, g * _u(_GROUP) + t)
            elif some == _u(2):
                for t in range(_u(0), _u(_GROUP), _u(4 * LANES)):
                    if first + g == _u(0):
                        _prefetch(words + bytes_here + t // _u(4 * LANES) * tile_bytes, tile_bytes)
                    _sums_of_two(weights, start, width, here + t * _u(4), count, sums, g * _u(_GROUP) + t)
            else:
                for t in range(_u(0), _u(_GROUP), _u(4 * LANES)):
                    if first + g == _u(0):
                        _prefetch(words + bytes_here + t // _u(4 * LANES) * tile_bytes, tile_bytes)
                    _sums_of_one(weights, start, width, here + t * _u(4), count, sums, g * _u(_GROUP) + t)


@compiled()
def _score_group(
    weights: Any, queries: Any, shared: Any, W: Any, n: Any, skip: Any, words: Any, scales: Any, means: Any,
    of_tokens: Any, of_mean: Any, sums: Any, scores: Any, tops: Any, masses: Any,
) -> None:  # fmt: skip
    """Scores of the 256 tokens of group n; `scores`, `tops` and `masses` are flat, one query behind the other."""
    G, D = _u(queries.shape[0]), _u(queries.shape[1])
    width, places = _u(len(scores)) // G, _u(len(tops)) // G
    widen(scales, _HALF_KIND, _u(_GROUP), of_tokens, _u(0))
    widen(means, _HALF_KIND, D, of_mean, _u(0))
    _code_sums(weights, G, W, words, sums)
    for g in range(G):
        step, less, more = shared[g, 0], shared[g, 1], np.float32(0)
        for d in range(D):
            more += of_mean[d] * queries[g, d]
        row, at, place = g * _u(_GROUP), g * width + _u(n) * _u(_GROUP), g * places + _u(n) * _u(_PARTS)
        for part in range(_u(_PARTS)):
            start, here = row + part * _u(PART_TOKENS), at + part * _u(PART_TOKENS)
            top = scaled(sums, start, of_tokens, part * _u(PART_TOKENS), step, less, more, scores, here)
            if n == 0 and part * _u(PART_TOKENS) < _u(skip):
                for t in range(min(_u(PART_TOKENS), _u(skip) - part * _u(PART_TOKENS))):
                    scores[here + t] = -np.inf
                top = top_of_part(scores, here)
            tops[place + part] = top
            masses[place + part] = exp_sum(scores, here, max(top, _LEAST))


@compiled()
def _score_groups(
    weights: Any, queries: Any, shared: Any, W: Any, first: Any, stop: Any, skip: Any, words: Any, scales: Any,
    means: Any, scores: Any, tops: Any, masses: Any,
) -> None:  # fmt: skip
    G, D = _u(queries.shape[0]), _u(queries.shape[1])
    of_tokens, of_mean = np.empty(_GROUP, np.float32), np.empty(D, np.float32)
    sums = np.empty((G + _u(3)) * _u(_GROUP), np.float32)
    for n in range(first, stop):
        _score_group(
            weights, queries, shared, W, n, skip, words + _u(n) * _u(4 * _GROUP) * _u(W),
            scales + _u(n) * _u(2 * _GROUP), means + _u(n) * _u(2) * D, of_tokens, of_mean, sums, scores, tops, masses,
        )  # fmt: skip


@compiled(parallel=True)
def _score(
    weights: Any, queries: Any, shared: Any, W: Any, groups: Any, skip: Any, words: Any, words_step: Any, scales: Any,
    scales_step: Any, means: Any, means_step: Any, scores: Any, parts: Any,
) -> None:  # fmt: skip
    H, tasks = len(queries), (groups + _TASK_GROUPS - 1) // _TASK_GROUPS
    for part in prange(H * tasks):
        h, first = part // tasks, part % tasks * _TASK_GROUPS
        _score_groups(
            weights[h], queries[h], shared[h], W, first, min(groups, first + _TASK_GROUPS), skip,
            _u(words) + _u(h) * _u(words_step), _u(scales) + _u(h) * _u(scales_step),
            _u(means) + _u(h) * _u(means_step), scores[h], parts[0, h], parts[1, h],
        )  # fmt: skip
