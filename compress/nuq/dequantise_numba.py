"""`dequantise` compiled for this processor; needs numba (`pip install "kvloom[compress]"`).

For each layer, token and head, codes are unpacked and looked up, 16 at a time (`simd.py`), in a table that is stretched
to the token's range, then scaled by channel. Then outliers replace the numbers of their channels, and each head's row
is rotated and rounded. All numbers of a token stay in the first-level cache. A number reads `bits / 8` bytes and writes
its own width past the caches, which could not hold a chunk.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..capabilities import Allocator
from ..kernels.machine_code import compiled
from ..kernels.simd import VECTOR_LENGTH, broadcast, fence, load, look_up, part, store, stream, widen
from .codes import Codes, Grid, RotaryAngles, channel_error, fresh_memory
from .outliers import high_bits

_BYTES_PER_THREAD = 1 << 22  # starting a thread takes as long as making a quarter of this
_MAX_LEVELS = 256
_LINE_BYTES = 64
_u = np.uint64  # unsigned indices, since numba would ask of a signed one whether it counts from the end

# What a row is rounded to, by the dtype of the array that takes it: numba has no 16-bit floats.
_STORED_AS = {torch.float16: np.uint16, torch.bfloat16: np.int16, torch.float32: np.float32}


def dequantise_compiled(
    grid: Grid, codes: Codes, angles: RotaryAngles | None, dtype: torch.dtype, allocate: Allocator = fresh_memory
) -> Tensor:
    """See `dequantise`. Other dtypes than those of 16 and 32 bits are rounded from float32. Uses torch's threads."""
    if dtype not in _STORED_AS:
        return dequantise_compiled(grid, codes, angles, torch.float32).to(dtype)
    (L, H, T, _), D = codes.packed.shape, grid.scale.shape[-1]
    if 0 in (L, H, T, D):
        return torch.empty(L, H, T, D, dtype=dtype)
    out = _aligned((L, H, T, D), dtype, allocate)
    ranges = torch.tensor([1.0, 0.0]).expand(L, T, 2) if codes.ranges is None else codes.ranges
    half = torch.zeros(0, dtype=torch.float32)
    arrays = (
        _flat(codes.packed),
        grid.bits,
        _flat(F.pad(grid.levels, (0, max(0, VECTOR_LENGTH - grid.levels.shape[-1])))),
        # A step of the kernel reads 16 of them, so it may read beyond the last.
        _flat(F.pad(grid.scale.reshape(-1), (0, VECTOR_LENGTH))),
        _flat(F.pad(grid.zero.reshape(-1), (0, VECTOR_LENGTH))),
        _flat(ranges),
        _flat(codes.channels),
        high_bits(H * D),
        _flat(codes.outliers),
        _flat(half if angles is None else angles.cos),
        _flat(half if angles is None else angles.sin),
        0 if angles is None else 2 if angles.interleaved else 1,
        (out if dtype == torch.float32 else out.view(torch.int16)).numpy().reshape(-1).view(_STORED_AS[dtype]),
        (L, H, T, D, codes.outliers.shape[-1]),
    )
    threads = max(1, min(torch.get_num_threads(), L, out.nbytes // _BYTES_PER_THREAD))
    # A step of 16 may end in the next head, which is filled later.
    parts = [
        (
            L * i // threads,
            L * (i + 1) // threads,
            _aligned((H * D + VECTOR_LENGTH,), torch.float32, fresh_memory).numpy(),
        )
        for i in range(threads)
    ]
    if threads == 1:
        wrong = _decode_layers(*parts[0], *arrays)
    else:
        with ThreadPoolExecutor(threads - 1) as pool:
            others = [pool.submit(_decode_layers, *own, *arrays) for own in parts[1:]]
            wrong = _decode_layers(*parts[0], *arrays) + sum(other.result() for other in others)
    if wrong:
        raise channel_error(H * D)
    return out


def _aligned(shape: tuple[int, ...], dtype: torch.dtype, allocate: Allocator) -> Tensor:
    """Memory that begins with a cache line: `stream` needs that, and a store across two lines takes twice as long."""
    found = allocate(math.prod(shape) * dtype.itemsize)
    if found.data_ptr() % _LINE_BYTES:
        raise ValueError(f"memory at {found.data_ptr():#x}; expected it at a multiple of {_LINE_BYTES} bytes")
    return found.view(dtype).view(shape)


def _flat(tensor: Tensor) -> np.ndarray[Any, Any]:
    return tensor.contiguous().view(-1).numpy()


@compiled()
def _decode_layers(
    start: Any,
    stop: Any,
    token: Any,
    packed: Any,
    bits: Any,
    levels: Any,
    scale: Any,
    zero: Any,
    ranges: Any,
    channels: Any,
    high: Any,
    outliers: Any,
    cos: Any,
    sin: Any,
    pairing: Any,
    out: Any,
    shape: Any,
) -> int:
    """Fills layers `[start, stop)` of `out`; returns the number of outliers whose channel number is too large.

    All arrays are flat. `token` is scratch memory for one token; `high`: bits of a channel number above its low 8;
    `pairing` is 0 (no rotation), 1 (channels i and i + D / 2) or 2 (channels 2i and 2i + 1).
    """
    H, T, D, k = _u(shape[1]), _u(shape[2]), _u(shape[3]), _u(shape[4])
    step, padded, half, entries = _u(VECTOR_LENGTH), (D + _u(7)) // _u(8) * _u(8), D // _u(2), _u(max(16, 1 << bits))
    row_bytes = padded // _u(8) * _u(bits)
    run, mask = padded // _u(8) * _u(1 if bits == 3 else bits), (1 << bits) - 1
    padded_k = (k + _u(7)) // _u(8) * _u(8)
    channel_bytes = k + padded_k // _u(8) * _u(high)
    numbers = np.zeros(max(padded, padded_k) + step, np.uint8)
    wrong = 0
    table = np.empty(_u(_MAX_LEVELS), np.float32)
    last = np.zeros(step, out.dtype)
    for layer in range(_u(start), _u(stop)):
        for t in range(T):
            at = layer * T + t
            stretch, offset = ranges[_u(2) * at], ranges[_u(2) * at + _u(1)]
            for h in range(H):
                head, row = layer * H + h, h * D
                channel, plane = head * D, (head * T + t) * row_bytes
                entry = load(levels, head * entries) * broadcast(stretch) + broadcast(offset)
                if bits in (1, 2, 4) and run % step == _u(0):  # 16 codes lie in 16 bytes, in the same place of each
                    for i in range(_u(0), run, step):
                        codes = widen(packed, plane + i)
                        for r in range(8 // bits):
                            here = i + _u(r) * run
                            _put(token, row + here, entry, part(codes, r * bits, mask, 0), scale, zero, channel + here)
                elif bits == 3 and run % step == _u(0):  # a plane of two bits, twice as long as that of the third
                    for i in range(_u(0), run, step):
                        even, odd = widen(packed, plane + i), widen(packed, plane + run + i)
                        third = widen(packed, plane + _u(2) * run + i)
                        for r in range(4):
                            here, next_run = i + _u(2 * r) * run, i + _u(2 * r + 1) * run
                            codes = part(even, 2 * r, 3, 0) | part(third, 2 * r, 1, 2)
                            _put(token, row + here, entry, codes, scale, zero, channel + here)
                            codes = part(odd, 2 * r, 3, 0) | part(third, 2 * r + 1, 1, 2)
                            _put(token, row + next_run, entry, codes, scale, zero, channel + next_run)
                else:
                    _unpack(packed, plane, bits, padded, numbers)
                    if bits <= 4:
                        for i in range(_u(0), D, step):
                            _put(token, row + i, entry, widen(numbers, i), scale, zero, channel + i)
                    else:
                        for i in range(entries):
                            table[i] = levels[head * entries + i] * stretch + offset
                        for i in range(D):
                            token[row + i] = table[numbers[i]] * scale[channel + i] + zero[channel + i]
            if high:
                _unpack(channels, at * channel_bytes + k, high, padded_k, numbers)
            for i in range(k):
                place = _u(channels[at * channel_bytes + i])
                if high:
                    place |= _u(numbers[i]) << _u(8)
                if place < H * D:
                    token[place] = outliers[at * k + i]
                else:
                    wrong += 1
            for h in range(H):
                row, angle, target = h * D, t * half, ((layer * H + h) * T + t) * D
                if pairing == 1 and half % step == _u(0):
                    for i in range(_u(0), half, step):
                        a, b = load(token, row + i), load(token, row + half + i)
                        c, s = load(cos, angle + i), load(sin, angle + i)
                        stream(out, target + i, a * c - b * s)
                        stream(out, target + half + i, b * c + a * s)
                    continue
                if pairing:
                    _rotate(token, row, half, cos, sin, angle, pairing)
                if D % step == _u(0):
                    for i in range(_u(0), D, step):
                        stream(out, target + i, load(token, row + i))
                else:
                    for i in range(_u(0), D, step):
                        store(last, _u(0), load(token, row + i))
                        for n in range(min(step, D - i)):
                            out[target + i + n] = last[n]
    fence()
    return wrong


@compiled()
def _put(token: Any, at: Any, table: Any, codes: Any, scale: Any, zero: Any, channel: Any) -> None:
    store(token, at, look_up(table, codes) * load(scale, channel) + load(zero, channel))


@compiled()
def _unpack(packed: Any, plane: Any, bits: Any, padded: Any, numbers: Any) -> None:
    """The codes of a row whose bytes begin at `plane`, whatever their number and width."""
    shift = _u(0)
    for exponent in range(3, -1, -1):
        width = _u(1 << exponent)
        if not _u(bits) & width:
            continue
        mask, run = np.uint8((1 << width) - 1), padded * width // _u(8)
        for r in range(_u(8) // width):
            down, up, first = np.uint8(width * r), np.uint8(shift), r * run
            if shift == _u(0):
                for i in range(run):
                    numbers[first + i] = (packed[plane + i] >> down) & mask
            else:
                for i in range(run):
                    numbers[first + i] |= ((packed[plane + i] >> down) & mask) << up
        plane += run
        shift += width


@compiled()
def _rotate(token: Any, row: Any, half: Any, cos: Any, sin: Any, angle: Any, pairing: Any) -> None:
    """Rotates the pairs of a row in place."""
    if pairing == 1:
        for i in range(half):
            a, b, c, s = token[row + i], token[row + half + i], cos[angle + i], sin[angle + i]
            token[row + i] = a * c - b * s
            token[row + half + i] = b * c + a * s
    elif pairing == 2:
        for i in range(half):
            a, b = token[row + _u(2) * i], token[row + _u(2) * i + _u(1)]
            c, s = cos[angle + i], sin[angle + i]
            token[row + _u(2) * i] = a * c - b * s
            token[row + _u(2) * i + _u(1)] = b * c + a * s
