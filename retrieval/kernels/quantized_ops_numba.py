"""Scores of keys of two bits a channel, compiled for this processor; needs numba (`pip install "kvloom[retrieval]"`).

quantized_ops.py has checked what it dispatches here. Groups of tokens are divided among threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic
from torch import Tensor

from .quantized_ops import GROUP_TOKENS, MIDDLE, WORD_CODES
from .rows_numba import KINDS, VECTOR_LENGTH, compiled, run, widen

_I32, _FLOAT = ir.IntType(32), ir.FloatType()
_GROUP, _HALF_KIND = GROUP_TOKENS, KINDS[torch.float16]
_TOP = WORD_CODES - 2  # the highest code whose bits, left where they are, make a positive number
_u = np.uint64


def quantized_scores(queries: Tensor, words: Tensor, scales: Tensor, means: Tensor, scale: float) -> Tensor:
    """See quantized_ops.py."""
    (Hq, D), (H, n, W, _) = queries.shape, words.shape
    G, wide = Hq // H, (queries.float() * scale).view(H, Hq // H, D)
    rows = -(-G // 2) * 2
    padded = torch.nn.functional.pad(wide, (0, W * WORD_CODES - D, 0, rows - G))
    # a code is read with the bits below it zero, not shifted down: its weight is smaller by as much
    shifts = torch.arange(WORD_CODES).clamp(max=_TOP).repeat(W)
    weights = (padded * 0.25**shifts).contiguous()
    scores = torch.empty(Hq, n * _GROUP)
    run(
        _score, weights.view(H, -1).numpy(), wide.contiguous().numpy(), W, D, *_place(words), *_place(scales),
        *_place(means), scores.numpy().reshape(H, G, -1),
    )  # fmt: skip
    return scores


def _place(tensor: Tensor) -> tuple[int, int]:
    """Address, and bytes from head to head."""
    return tensor.data_ptr(), tensor.stride(0) * tensor.element_size()


def _sums(heads: int, lanes: int) -> Any:
    """Intrinsic: `out[lanes q + t]` becomes the weighted sum of the codes of token t, for some queries and tokens.

    At the address `words` lie the words of as many tokens as there are lanes, those of the next 16 channels a group's
    row behind them. Weights are flat, those of query q from `first + q * width` on.
    """

    def of_types(_typing: Any, weights: Any, first: Any, width: Any, words: Any, count: Any, out: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            from numba.core import cgutils

            _, first, width, words, count, _ = args
            wide, whole = ir.VectorType(_FLOAT, lanes), ir.VectorType(_I32, lanes)
            of_weights, of_out = (
                cgutils.create_struct_proxy(signature.args[n])(context, builder, args[n]).data for n in (0, 5)
            )
            number = count.type

            def constant(value: int) -> ir.Constant:
                return ir.Constant(number, value)

            starts = [builder.add(first, builder.mul(width, constant(q))) for q in range(heads)]
            before = builder.block
            loop, done = builder.append_basic_block("loop"), builder.append_basic_block("done")
            builder.branch(loop)
            builder.position_at_end(loop)
            at = builder.phi(number)
            sums = [builder.phi(wide) for _ in range(heads)]
            at.add_incoming(constant(0), before)
            for each in sums:
                each.add_incoming(ir.Constant(wide, [0.0] * lanes), before)
            address = builder.add(words, builder.mul(at, constant(4 * _GROUP)))
            row = builder.load(builder.inttoptr(address, whole.as_pointer()))
            row.align = 4
            lower = builder.lshr(row, ir.Constant(whole, [2] * lanes))
            empty, all_first = ir.Constant(wide, ir.Undefined), ir.Constant(whole, [0] * lanes)
            totals = list(sums)
            for code in range(WORD_CODES):
                held, bits = (row, code) if code <= _TOP else (lower, _TOP)
                mask = ir.Constant(whole, [3 << (2 * bits)] * lanes)
                numbers = builder.sitofp(builder.and_(held, mask), wide)
                place = builder.add(builder.mul(at, constant(WORD_CODES)), constant(code))
                for q in range(heads):
                    one = builder.load(builder.gep(of_weights, [builder.add(starts[q], place)]))
                    filled = builder.insert_element(empty, one, ir.Constant(_I32, 0))
                    spread = builder.shuffle_vector(filled, empty, all_first)
                    product = builder.fmul(spread, numbers, flags=("contract",))
                    totals[q] = builder.fadd(totals[q], product, flags=("contract",))
            for each, total in zip(sums, totals, strict=True):
                each.add_incoming(total, loop)
            following = builder.add(at, constant(1))
            at.add_incoming(following, loop)
            builder.cbranch(builder.icmp_unsigned("<", following, count), loop, done)
            builder.position_at_end(done)
            for q, total in enumerate(totals):
                place = builder.gep(of_out, [constant(q * lanes)])
                builder.store(total, builder.bitcast(place, wide.as_pointer())).align = 4
            return context.get_dummy_value()

        u = types.uint64
        return types.void(weights, u, u, u, u, out), generate

    return intrinsic(of_types)


# as many lanes as registers hold sums of: what is unpacked and spread serves more of them
_WIDE = 2 * VECTOR_LENGTH
_sums_of_two, _sums_of_four = _sums(2, _WIDE), _sums(4, VECTOR_LENGTH)


@compiled()
def _score_group(
    weights: Any, queries: Any, W: Any, D: Any, words: Any, scales: Any, means: Any, at: Any, scores: Any
) -> None:
    """Scores of the 256 tokens of a group, from column `at` on."""
    G, width = _u(queries.shape[0]), _u(W) * _u(WORD_CODES)
    of_tokens, of_mean = np.empty(_GROUP, np.float32), np.empty(_u(D), np.float32)
    widen(scales, _HALF_KIND, _u(_GROUP), of_tokens, _u(0))
    widen(means, _HALF_KIND, _u(D), of_mean, _u(0))
    shared, middle = np.zeros(G, np.float32), np.zeros(G, np.float32)
    for g in range(G):
        for d in range(_u(D)):
            shared[g] += of_mean[d] * queries[g, d]
            middle[g] += queries[g, d]
        middle[g] *= np.float32(MIDDLE)
    found = np.empty(_u(4 * VECTOR_LENGTH), np.float32)
    for g in range(_u(0), G, _u(4)):
        some = min(_u(4), G - g)
        lanes = _u(VECTOR_LENGTH) if some > _u(2) else _u(_WIDE)
        for tile in range(_u(0), _u(_GROUP), lanes):
            if some > _u(2):
                _sums_of_four(weights, g * width, width, words + tile * _u(4), _u(W), found)
            else:
                _sums_of_two(weights, g * width, width, words + tile * _u(4), _u(W), found)
            for q in range(some):
                less, more = middle[g + q], shared[g + q]
                for i in range(lanes):
                    value = (found[q * lanes + i] - less) * of_tokens[tile + i] + more
                    scores[g + q, _u(at) + tile + i] = value


@compiled(parallel=True)
def _score(
    weights: Any, queries: Any, W: Any, D: Any, words: Any, words_step: Any, scales: Any, scales_step: Any, means: Any,
    means_step: Any, scores: Any,
) -> None:  # fmt: skip
    H, groups = len(queries), scores.shape[2] // _GROUP
    for part in prange(H * groups):
        h, n = part // groups, part % groups
        _score_group(
            weights[h], queries[h], W, D, _u(words) + _u(h) * _u(words_step) + _u(n) * _u(4 * _GROUP) * _u(W),
            _u(scales) + _u(h) * _u(scales_step) + _u(n) * _u(2 * _GROUP),
            _u(means) + _u(h) * _u(means_step) + _u(n) * _u(2) * _u(D), n * _GROUP, scores[h],
        )  # fmt: skip
