"""Weighted sums of values of one bit a channel, compiled for this processor; needs numba.

(`pip install "kvloom[retrieval]"`.) quantized_ops.py has checked what it dispatches here. Groups of tokens are divided
among threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor

from .quantized_ops import GROUP_TOKENS, WORD_SIGNS
from .rows_numba import KINDS, compiled, run, widen

_GROUP, _HALF_KIND = GROUP_TOKENS, KINDS[torch.float16]
_TASK_GROUPS = 16  # that a thread takes at a time
_RUN = 8  # tokens whose signs are unpacked at once: sums are read and written once for all of them
_u = np.uint64


def quantized_sums(weights: Tensor, words: Tensor, scales: Tensor, means: Tensor) -> Tensor:
    """See quantized_ops.py."""
    (H, n, _, D), Hq = words.shape, len(weights)
    sums = torch.zeros(H, -(-n // _TASK_GROUPS), Hq // H * D)
    run(
        _sum, weights.contiguous().view(H, -1).numpy(), words.view(H, -1).numpy(), *_place(scales), *_place(means),
        n, D, sums.numpy(),
    )  # fmt: skip
    return sums.sum(1).view(Hq, D)


def _place(tensor: Tensor) -> tuple[int, int]:
    """Address, and bytes from head to head."""
    return tensor.data_ptr(), tensor.stride(0) * tensor.element_size()


@compiled()
def _sum_groups(
    weights: Any, words: Any, scales: Any, means: Any, first: Any, stop: Any, groups: Any, D: Any, sums: Any
) -> None:
    """Adds the sums over some groups of tokens; arrays are flat, one query head behind the other."""
    dim = _u(D)
    G = _u(len(sums)) // dim
    products, mean = np.empty(G * _u(_GROUP), np.float32), np.empty(dim, np.float32)
    signs, own = np.empty(_u(_RUN) * dim, np.float32), np.empty(_GROUP, np.float32)
    for n in range(_u(first), _u(stop)):
        widen(means + n * _u(2) * dim, _HALF_KIND, dim, mean, _u(0))
        widen(scales + n * _u(2 * _GROUP), _HALF_KIND, _u(_GROUP), own, _u(0))
        for g in range(G):
            start, row = (g * _u(groups) + n) * _u(_GROUP), g * dim
            total = np.float32(0)
            for t in range(_u(_GROUP)):
                total += weights[start + t]
                products[g * _u(_GROUP) + t] = weights[start + t] * own[t]
            for d in range(dim):
                sums[row + d] += total * mean[d]
        for token in range(_u(0), _u(_GROUP), _u(_RUN)):
            place = (n * _u(_GROUP // WORD_SIGNS) + token // _u(WORD_SIGNS)) * dim
            for i in range(_u(_RUN)):
                shift, line = np.int32(token % _u(WORD_SIGNS) + i), i * dim
                for d in range(dim):
                    signs[line + d] = np.float32(
                        ((words[place + d] >> shift) & np.int32(1)) * np.int32(2) - np.int32(1)
                    )
            for g in range(G):
                row, at = g * dim, g * _u(_GROUP) + token
                a, b, c, e = products[at], products[at + _u(1)], products[at + _u(2)], products[at + _u(3)]
                at += _u(4)
                f, h, k, m = products[at], products[at + _u(1)], products[at + _u(2)], products[at + _u(3)]
                for d in range(dim):
                    found = a * signs[d] + b * signs[dim + d] + c * signs[_u(2) * dim + d] + e * signs[_u(3) * dim + d]
                    more = f * signs[_u(4) * dim + d] + h * signs[_u(5) * dim + d]
                    more += k * signs[_u(6) * dim + d] + m * signs[_u(7) * dim + d]
                    sums[row + d] += found + more


@compiled(parallel=True)
def _sum(
    weights: Any, words: Any, scales: Any, scales_step: Any, means: Any, means_step: Any, groups: Any, D: Any,
    sums: Any,
) -> None:  # fmt: skip
    H, tasks = len(weights), sums.shape[1]
    for part in prange(H * tasks):
        h, first = part // tasks, part % tasks * _TASK_GROUPS
        _sum_groups(
            weights[h], words[h], _u(scales) + _u(h) * _u(scales_step), _u(means) + _u(h) * _u(means_step),
            first, min(groups, first + _TASK_GROUPS), groups, D, sums[h, part % tasks],
        )  # fmt: skip
