"""Asymmetric numeral coding of symbols whose probabilities depend on symbols decoded before.

Range variant (rANS, Duda, arXiv 1311.2540): states of 32 bits, renormalised by words of 16, probabilities of 12 bits.
Some lanes, each a state of its own, share one run of words, so that a processor works on several symbols at once.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

try:
    import numba
except ImportError as exc:
    raise ImportError("the entropy codec needs numba; install it with `pip install kvloom[compress]`") from exc

PROBABILITY_BITS = 12
LOWEST_STATE = 1 << 16  # where every lane begins to encode, and must end to decode


@numba.njit(nogil=True, error_model="numpy")
def encode(
    symbols: NDArray[np.uint8], contexts: NDArray[np.int32], starts: NDArray[np.int32], lanes: int
) -> tuple[NDArray[np.uint32], NDArray[np.uint16]]:
    """The lanes' states and the words of a stream, in the order in which `decode` takes them.

    Parameters
    ----------
    symbols, contexts : `[C, T]`; token t goes through lane `t % lanes`, channel after channel.
    starts : `[X, n + 1]`, of each context: how much of `1 << PROBABILITY_BITS` lies before each symbol. None is empty.
    """
    channels, tokens = symbols.shape
    words = np.empty(channels * tokens, np.uint16)
    states = np.full(lanes, LOWEST_STATE, np.uint64)
    free = len(words)
    for channel in range(channels - 1, -1, -1):
        lane = tokens % lanes  # counted, as a division takes longer than all the rest
        for token in range(tokens - 1, -1, -1):
            lane = (lane or lanes) - 1
            row = starts[contexts[channel, token]]
            start = np.uint64(row[symbols[channel, token]])
            share = np.uint64(row[symbols[channel, token] + 1]) - start
            state = states[lane]
            if state >= share << np.uint64(20):
                free -= 1
                words[free] = np.uint16(state & np.uint64(0xFFFF))
                state >>= np.uint64(16)
            states[lane] = ((state // share) << np.uint64(PROBABILITY_BITS)) + state % share + start
    return states.astype(np.uint32), words[free:]


@numba.njit(nogil=True, error_model="numpy")
def decode(
    predicted: NDArray[np.float32],
    weights: NDArray[np.float32],
    offsets: NDArray[np.int32],
    starts: NDArray[np.int32],
    bins: int,
    shift: int,
    numbers: NDArray[np.float32],
    states: NDArray[np.uint64],
    words: NDArray[np.uint16],
    taken: int,
) -> int:
    """Decodes a block of C channels into `numbers`; returns how many words are taken then, -1 if they do not suffice.

    The context of a symbol is `offsets[channel] + min(max(prediction >> shift, 0), bins - 1)`; the prediction is what
    `predicted` has of channels before the block, plus that of channels in the block. All numbers are whole and their
    sums below 2 ** 24, so that float32 holds them exactly.

    Parameters
    ----------
    predicted : `[C, T]`; overwritten.
    weights : `[C, C]`; the part below the diagonal counts.
    offsets : `[C]`.
    starts : as for `encode`, n a power of two.
    numbers : `[C, T]`; symbol s becomes `2 s - (n - 1)`.
    states : `[lanes]`; overwritten.
    """
    channels, tokens = numbers.shape
    count = starts.shape[1] - 1
    lanes = len(states)
    for channel in range(channels):
        row = predicted[channel]
        for before in range(channel):
            weight = weights[channel, before]
            if weight != 0:
                known = numbers[before]
                for token in range(tokens):
                    row[token] += weight * known[token]
        lane = 0
        for token in range(tokens):
            place = min(max(np.int32(row[token]) >> shift, 0), bins - 1)
            table = starts[offsets[channel] + place]
            state = states[lane]
            slot = np.int32(state & np.uint64((1 << PROBABILITY_BITS) - 1))
            symbol, half = 0, count >> 1
            while half:
                if table[symbol + half] <= slot:
                    symbol += half
                half >>= 1
            share = np.uint64(table[symbol + 1] - table[symbol])
            state = share * (state >> np.uint64(PROBABILITY_BITS)) + np.uint64(slot - table[symbol])
            if state < np.uint64(LOWEST_STATE):
                if taken >= len(words):
                    return -1
                state = (state << np.uint64(16)) | np.uint64(words[taken])
                taken += 1
            states[lane] = state
            lane += 1
            if lane == lanes:
                lane = 0
            numbers[channel, token] = np.float32(2 * symbol - (count - 1))
    return taken
