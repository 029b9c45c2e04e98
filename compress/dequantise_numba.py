"""`dequantise` compiled for the processor at hand; needs numba (`pip install "kvloom[nuq]"`).

For each layer and token, for each head: codes are unpacked and looked up, 16 at a time, in a table that already holds
the token's range, then scaled by channel. Then outliers replace what stands in their channels, and each head's row is
rotated and rounded. All of a token's numbers stay in the first-level cache; an element costs `bits / 8` bytes read and
its own width written.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from torch import Tensor
from torch.nn import functional as F

from .dequantise import Codes, Grid, Rotation

_LANES = 16
_BYTES_PER_THREAD = 1 << 20  # starting a thread takes as long as making half of this
_MAX_LEVELS = 256
_u = np.uint64  # unsigned indices, since numba would ask of a signed one whether it counts from the end

_I8, _I16, _I32, _HALF, _FLOAT = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.HalfType(), ir.FloatType()
# What a row is rounded to, by the dtype of the array that takes it: numba has no 16-bit floats.
_STORED_AS = {torch.float16: np.uint16, torch.bfloat16: np.int16, torch.float32: np.float32}

# LLVM rounds to half precision in one instruction on these, and calls a function that may not be there on others.
if platform.machine() not in ("aarch64", "arm64") and not llvm.get_host_cpu_features().get("f16c", False):
    raise ImportError("no conversion to half precision on this processor")


def dequantise_compiled(grid: Grid, codes: Codes, rotation: Rotation | None, dtype: torch.dtype) -> Tensor:
    """See `dequantise`; any other dtype than 16 and 32 bits is rounded from float32. Uses as many threads as torch."""
    if dtype not in _STORED_AS:
        return dequantise_compiled(grid, codes, rotation, torch.float32).to(dtype)
    (L, H, T, _), D = codes.packed.shape, grid.scale.shape[-1]
    if 0 in (L, H, T, D):
        return torch.empty(L, H, T, D, dtype=dtype)
    # From numpy, which asks for huge pages: faults of small ones take longer than all that is computed here.
    out = torch.from_numpy(np.empty(L * H * T * D * dtype.itemsize, np.uint8)).view(dtype).view(L, H, T, D)
    ranges = torch.tensor([1.0, 0.0]).expand(L, T, 2) if codes.ranges is None else codes.ranges
    half = torch.zeros(0, dtype=torch.float32)
    arrays = (
        _flat(codes.packed),
        grid.bits,
        _flat(F.pad(grid.levels, (0, max(0, _LANES - grid.levels.shape[-1])))),
        # A step of the kernel reads 16 of them, so it may read beyond the last.
        _flat(F.pad(grid.scale.reshape(-1), (0, _LANES))),
        _flat(F.pad(grid.zero.reshape(-1), (0, _LANES))),
        _flat(ranges),
        _flat(codes.channels).view(np.uint32),
        _flat(codes.outliers),
        _flat(half if rotation is None else rotation.cos),
        _flat(half if rotation is None else rotation.sin),
        0 if rotation is None else 2 if rotation.interleaved else 1,
        (out if dtype == torch.float32 else out.view(torch.int16)).numpy().reshape(-1).view(_STORED_AS[dtype]),
        (L, H, T, D, codes.channels.shape[-1]),
    )
    threads = max(1, min(torch.get_num_threads(), L, out.nbytes // _BYTES_PER_THREAD))
    bounds = [(L * i // threads, L * (i + 1) // threads) for i in range(threads)]
    if threads == 1:
        _decode_layers(*bounds[0], *arrays)
        return out
    with ThreadPoolExecutor(threads - 1) as pool:
        others = [pool.submit(_decode_layers, *bound, *arrays) for bound in bounds[1:]]
        _decode_layers(*bounds[0], *arrays)
        for other in others:
            other.result()
    return out


def _flat(tensor: Tensor) -> np.ndarray[Any, Any]:
    return tensor.contiguous().view(-1).numpy()


def _compiled(function: Callable[..., None]) -> Callable[..., None]:
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # numba found no folder that it may write machine code to
        return njit(nogil=True)(function)


def _lanes(context: Any, builder: Any, array_type: Any, array: Any, index: Any, element: ir.Type) -> Any:
    """Pointer to 16 elements from `index` on."""
    from numba.core import cgutils

    data = cgutils.create_struct_proxy(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), ir.VectorType(element, _LANES).as_pointer())


def _load(builder: Any, pointer: Any, align: int) -> Any:
    vector = builder.load(pointer)
    vector.align = align
    return vector


def _vector(element: ir.Type, value: int) -> ir.Constant:
    return ir.Constant(ir.VectorType(element, _LANES), [value] * _LANES)


def _type_look_up(
    _typing: Any, numbers: Any, i: Any, table: Any, scale: Any, zero: Any, c: Any, out: Any, o: Any
) -> Any:
    """`out[o + n] = table[numbers[i + n]] * scale[c + n] + zero[c + n]` for 16 n; numbers are below 16.

    LLVM makes one permutation of the extractions and insertions where the processor has it (`vpermd` of AVX-512).
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        numbers, i, table, scale, zero, c, out, o = args
        kinds = signature.args
        indices = _load(builder, _lanes(context, builder, kinds[0], numbers, i, _I8), 1)
        indices = builder.zext(indices, ir.VectorType(_I32, _LANES))
        entries = _load(builder, _lanes(context, builder, kinds[2], table, ir.Constant(ir.IntType(64), 0), _FLOAT), 4)
        found = ir.Constant(ir.VectorType(_FLOAT, _LANES), ir.Undefined)
        for n in range(_LANES):
            lane = ir.Constant(_I32, n)
            entry = builder.extract_element(entries, builder.extract_element(indices, lane))
            found = builder.insert_element(found, entry, lane)
        found = builder.fmul(found, _load(builder, _lanes(context, builder, kinds[3], scale, c, _FLOAT), 4))
        found = builder.fadd(found, _load(builder, _lanes(context, builder, kinds[4], zero, c, _FLOAT), 4))
        builder.store(found, _lanes(context, builder, kinds[6], out, o, _FLOAT)).align = 4
        return context.get_dummy_value()

    u = types.uint64
    return types.void(numbers, u, table, scale, zero, u, out, u), generate


def _type_round(_typing: Any, row: Any, i: Any, out: Any, o: Any) -> Any:
    """`out[o + n] = row[i + n]` for 16 n, rounded to nearest even as `_STORED_AS` says."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        row, i, out, o = args
        numbers = _load(builder, _lanes(context, builder, signature.args[0], row, i, _FLOAT), 4)
        if out_type.dtype == types.float32:
            builder.store(numbers, _lanes(context, builder, signature.args[2], out, o, _FLOAT)).align = 4
            return context.get_dummy_value()
        if out_type.dtype == types.uint16:
            numbers = builder.fptrunc(numbers, ir.VectorType(_HALF, _LANES))
            rounded = builder.bitcast(numbers, ir.VectorType(_I16, _LANES))
        else:
            wide = builder.bitcast(numbers, ir.VectorType(_I32, _LANES))
            odd = builder.and_(builder.lshr(wide, _vector(_I32, 16)), _vector(_I32, 1))
            wide = builder.add(builder.add(wide, _vector(_I32, 0x7FFF)), odd)
            rounded = builder.trunc(builder.lshr(wide, _vector(_I32, 16)), ir.VectorType(_I16, _LANES))
        builder.store(rounded, _lanes(context, builder, signature.args[2], out, o, _I16)).align = 2
        return context.get_dummy_value()

    out_type = out
    return types.void(row, types.uint64, out, types.uint64), generate


_look_up: Any = intrinsic(_type_look_up)
_round: Any = intrinsic(_type_round)


@_compiled
def _decode_layers(
    start: Any,
    stop: Any,
    packed: Any,
    bits: Any,
    levels: Any,
    scale: Any,
    zero: Any,
    ranges: Any,
    channels: Any,
    outliers: Any,
    cos: Any,
    sin: Any,
    turning: Any,
    out: Any,
    shape: Any,
) -> None:
    """Fills layers `[start, stop)` of `out`. All arrays are flat; `turning` is 0 (none), 1 (halves) or 2 (pairs)."""
    H, T, D, slots = _u(shape[1]), _u(shape[2]), _u(shape[3]), _u(shape[4])
    lanes, padded, half, entries = _u(16), (D + _u(7)) // _u(8) * _u(8), D // _u(2), _u(max(16, 1 << bits))
    row_bytes = padded // _u(8) * _u(bits)
    numbers = np.zeros(padded + lanes, np.uint8)
    table = np.empty(_u(_MAX_LEVELS), np.float32)
    token = np.zeros(H * D + lanes, np.float32)  # a step of 16 may end in the next head, which is filled later
    last = np.zeros(lanes, out.dtype)
    for layer in range(_u(start), _u(stop)):
        for t in range(T):
            at = layer * T + t
            for h in range(H):
                head = layer * H + h
                for i in range(entries):
                    table[i] = levels[head * entries + i] * ranges[_u(2) * at] + ranges[_u(2) * at + _u(1)]
                plane = (head * T + t) * row_bytes
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
                row, channel = h * D, head * D
                if bits <= 4:
                    for i in range(_u(0), D, lanes):
                        _look_up(numbers, i, table, scale, zero, channel + i, token, row + i)
                else:
                    for i in range(D):
                        token[row + i] = table[numbers[i]] * scale[channel + i] + zero[channel + i]
            for i in range(slots):
                token[channels[at * slots + i]] = outliers[at * slots + i]
            for h in range(H):
                row, angle, target = h * D, t * half, ((layer * H + h) * T + t) * D
                if turning == 1:
                    for i in range(half):
                        a, b, c, s = token[row + i], token[row + half + i], cos[angle + i], sin[angle + i]
                        token[row + i] = a * c - b * s
                        token[row + half + i] = b * c + a * s
                elif turning == 2:
                    for i in range(half):
                        a, b = token[row + _u(2) * i], token[row + _u(2) * i + _u(1)]
                        c, s = cos[angle + i], sin[angle + i]
                        token[row + _u(2) * i] = a * c - b * s
                        token[row + _u(2) * i + _u(1)] = b * c + a * s
                whole = D // lanes * lanes
                for i in range(_u(0), whole, lanes):
                    _round(token, row + i, out, target + i)
                if whole < D:
                    _round(token, row + whole, last, _u(0))
                    for i in range(D - whole):
                        out[target + whole + i] = last[i]
