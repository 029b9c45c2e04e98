"""Common parts of retrieval's compiled kernels: rows read by address, and threads; needs numba.

(`pip install "kvloom[retrieval]"`.) The caller of a function that takes an address keeps the memory there alive, and
has checked its dtype and shape.
"""

from __future__ import annotations

import platform
import threading
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import llvmlite.binding as llvm
import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from ...compress.kernels import machine_code

_R = TypeVar("_R")

VECTOR_LENGTH = 16
# registers hold this many numbers, and as many sums of four rows with each of some queries
_DOT_LANES = 16 if llvm.get_host_cpu_features().get("avx512f", False) else 8
DOT_QUERIES = _DOT_LANES // 4
KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_I8, _I16, _I32 = (ir.IntType(bits) for bits in (8, 16, 32))
_HALF, _FLOAT = ir.HalfType(), ir.FloatType()
_u = np.uint64  # unsigned indices, since numba would ask of a signed one whether it counts from the end
# Sums may be reordered and products fused; infinities keep their meaning
_FAST = {"reassoc", "contract", "nsz", "arcp"}
# One of numba's threading layers ends the process if two threads enter it, and which one is in use is not known here
_ENTRY = threading.Lock()

# LLVM widens half precision by one instruction on these; on others it calls a function that may be missing
if platform.machine() not in ("aarch64", "arm64") and not llvm.get_host_cpu_features().get("f16c", False):
    raise ImportError("no conversion from half precision on this processor")


def run(kernel: Callable[..., None], *arguments: Any) -> None:
    """Calls a parallel kernel with as many threads as torch uses, of those that numba was allowed."""
    config: Any = numba.config
    with _ENTRY:
        _start_threads()
        before, wanted = numba.get_num_threads(), max(1, min(torch.get_num_threads(), config.NUMBA_NUM_THREADS))
        if before == wanted:
            kernel(*arguments)
            return
        numba.set_num_threads(wanted)
        try:
            kernel(*arguments)
        finally:
            numba.set_num_threads(before)


def place_of(tensor: Tensor) -> tuple[int, int]:
    """Address of a tensor, and bytes from head to head."""
    return tensor.data_ptr(), tensor.stride(0) * tensor.element_size()


@cache
def _start_threads() -> None:
    """Starts numba's threads from a thread of its own.

    Numba then sets OpenMP's number of threads for the calling thread. Engines rely on the number that they have set for
    theirs; vLLM's kernels end the process when it changes.
    """
    asks = threading.Thread(target=numba.get_num_threads, name="kvloom-numba")
    asks.start()
    asks.join()


def compiled(*, parallel: bool = False) -> Callable[[Callable[..., _R]], Callable[..., _R]]:
    """Decorator: machine code whose sums may be taken in any order."""
    return machine_code.compiled(parallel=parallel, fastmath=_FAST, error_model="numpy")


def _vector_at(builder: Any, address: Any, element: ir.Type, lanes: int) -> Any:
    kind = element if lanes == 1 else ir.VectorType(element, lanes)
    found = builder.load(builder.inttoptr(address, kind.as_pointer()))
    found.align = element.width // 8 if isinstance(element, ir.IntType) else 2 if element is _HALF else 4
    return found


def _widening(kind: int, lanes: int) -> Any:
    """Intrinsic: `out[o : o + lanes]` becomes the `lanes` numbers at an address, as float32."""

    def of_types(_typing: Any, address: Any, out: Any, o: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            from numba.core import cgutils

            address, out, o = args
            wide = _FLOAT if lanes == 1 else ir.VectorType(_FLOAT, lanes)
            if kind == 0:
                numbers = _vector_at(builder, address, _FLOAT, lanes)
            elif kind == 1:
                numbers = builder.fpext(_vector_at(builder, address, _HALF, lanes), wide)
            else:
                whole = _I32 if lanes == 1 else ir.VectorType(_I32, lanes)
                shift = ir.Constant(whole, 16 if lanes == 1 else [16] * lanes)
                numbers = _vector_at(builder, address, _I16, lanes)
                numbers = builder.bitcast(builder.shl(builder.zext(numbers, whole), shift), wide)
            data = cgutils.create_struct_proxy(signature.args[1])(context, builder, out).data
            builder.store(numbers, builder.bitcast(builder.gep(data, [o]), wide.as_pointer())).align = 4
            return context.get_dummy_value()

        return types.void(types.uint64, out, types.uint64), generate

    return intrinsic(of_types)


def _type_prefetch(_typing: Any, address: Any) -> Any:
    """Asks for the cache line at an address."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [_I8.as_pointer(), _I32, _I32, _I32])
        function = builder.module.globals.get("llvm.prefetch.p0") or ir.Function(
            builder.module, kind, name="llvm.prefetch.p0"
        )
        read, keep, data = (ir.Constant(_I32, n) for n in (0, 3, 1))
        builder.call(function, [builder.inttoptr(args[0], _I8.as_pointer()), read, keep, data])
        return context.get_dummy_value()

    return types.void(types.uint64), generate


def _type_copy(_typing: Any, source: Any, target: Any, count: Any) -> Any:
    """Copies bytes from one address to another."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        from numba.core import cgutils

        source, target, count = args
        byte = _I8.as_pointer()
        cgutils.raw_memcpy(builder, builder.inttoptr(target, byte), builder.inttoptr(source, byte), count, 1)
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64, types.uint64), generate


def _type_word(_typing: Any, row: Any, i: Any) -> Any:
    """The 32 bits that begin at byte i of an array of bytes."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        from numba.core import cgutils

        data = cgutils.create_struct_proxy(signature.args[0])(context, builder, args[0]).data
        found = builder.load(builder.bitcast(builder.gep(data, [args[1]]), _I32.as_pointer()))
        found.align = 1
        return found

    return types.uint32(row, types.uint64), generate


def _type_dots(_typing: Any, queries: Any, first: Any, rows: Any, width: Any, count: Any, out: Any) -> Any:
    """`out[4 q + n]` becomes the inner product of query q with row n, of `DOT_QUERIES` and 4.

    Queries have `count` numbers, a multiple of 16, one behind the other from `first` on; rows begin every `width`
    numbers. All arrays are flat. As many sums are made side by side as each has lanes, which is what registers hold;
    then halves, quarters, ... of two of them are added at a time, so that all are reduced together.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        from numba.core import cgutils

        _, first, _, width, count, _ = args
        wide = ir.VectorType(_FLOAT, _DOT_LANES)
        data = [cgutils.create_struct_proxy(signature.args[n])(context, builder, args[n]).data for n in (0, 2, 5)]
        number = count.type

        def every(start: Any, first: Any, step: Any, some: int) -> list[Any]:
            places = [builder.add(first, builder.mul(step, ir.Constant(number, n))) for n in range(some)]
            return [builder.ptrtoint(builder.gep(start, [place]), number) for place in places]

        of_queries = every(data[0], first, count, DOT_QUERIES)
        of_rows = every(data[1], ir.Constant(number, 0), width, 4)
        before = builder.block
        loop, done = builder.append_basic_block("loop"), builder.append_basic_block("done")
        builder.branch(loop)
        builder.position_at_end(loop)
        at = builder.phi(number)
        sums = [builder.phi(wide) for _ in range(_DOT_LANES)]
        at.add_incoming(ir.Constant(number, 0), before)
        for each in sums:
            each.add_incoming(ir.Constant(wide, [0.0] * _DOT_LANES), before)
        moved = builder.mul(at, ir.Constant(number, 4))
        right, left = (
            [_vector_at(builder, builder.add(row, moved), _FLOAT, _DOT_LANES) for row in each]
            for each in (of_rows, of_queries)
        )
        for q in range(DOT_QUERIES):
            for n in range(4):
                each = sums[4 * q + n]
                product = builder.fmul(left[q], right[n], flags=("contract",))
                each.add_incoming(builder.fadd(each, product, flags=("contract",)), loop)
        following = builder.add(at, ir.Constant(number, _DOT_LANES))
        at.add_incoming(following, loop)
        builder.cbranch(builder.icmp_unsigned("<", following, count), loop, done)
        builder.position_at_end(done)
        parts = [each.incomings[1][0] for each in sums]
        span = _DOT_LANES // 2
        while span:
            low = [lane if lane // span % 2 == 0 else _DOT_LANES + lane - span for lane in range(_DOT_LANES)]
            masks = [ir.Constant(ir.VectorType(_I32, _DOT_LANES), [m + more for m in low]) for more in (0, span)]
            parts = [
                builder.fadd(*(builder.shuffle_vector(a, b, mask) for mask in masks))
                for a, b in zip(parts[:span], parts[span:], strict=True)
            ]
            span //= 2
        builder.store(parts[0], builder.bitcast(data[2], wide.as_pointer())).align = 4
        return context.get_dummy_value()

    u = types.uint64
    return types.void(queries, u, rows, u, u, out), generate


def _type_tile(
    _typing: Any, queries: Any, first: Any, width: Any, tile: Any, count: Any, out: Any, o: Any, step: Any
) -> Any:
    """`out[o + step q + n]` becomes the inner product of query q with token n, of 4 and 16.

    Queries begin every `width` numbers from `first` on; at the address `tile` lie `count` numbers of 16 tokens each, of
    16 bits, token by token within a number. No sum ever crosses lanes.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        from numba.core import cgutils

        _, first, width, tile, count, _, o, step = args
        wide, number = ir.VectorType(_FLOAT, VECTOR_LENGTH), count.type
        of_queries, of_out = (
            cgutils.create_struct_proxy(signature.args[n])(context, builder, args[n]).data for n in (0, 5)
        )
        starts = [builder.add(first, builder.mul(width, ir.Constant(number, q))) for q in range(4)]
        before = builder.block
        loop, done = builder.append_basic_block("loop"), builder.append_basic_block("done")
        builder.branch(loop)
        builder.position_at_end(loop)
        at = builder.phi(number)
        sums = [builder.phi(wide) for _ in range(4)]
        at.add_incoming(ir.Constant(number, 0), before)
        for each in sums:
            each.add_incoming(ir.Constant(wide, [0.0] * VECTOR_LENGTH), before)
        row_bytes = ir.Constant(number, 2 * VECTOR_LENGTH)
        row = builder.fpext(
            _vector_at(builder, builder.add(tile, builder.mul(at, row_bytes)), _HALF, VECTOR_LENGTH), wide
        )
        empty, all_first = (
            ir.Constant(wide, ir.Undefined),
            ir.Constant(ir.VectorType(_I32, VECTOR_LENGTH), [0] * VECTOR_LENGTH),
        )
        for each, start in zip(sums, starts, strict=True):
            one = builder.load(builder.gep(of_queries, [builder.add(start, at)]))
            spread = builder.shuffle_vector(builder.insert_element(empty, one, ir.Constant(_I32, 0)), empty, all_first)
            product = builder.fmul(spread, row, flags=("contract",))
            each.add_incoming(builder.fadd(each, product, flags=("contract",)), loop)
        following = builder.add(at, ir.Constant(number, 1))
        at.add_incoming(following, loop)
        builder.cbranch(builder.icmp_unsigned("<", following, count), loop, done)
        builder.position_at_end(done)
        for q, each in enumerate(sums):
            place = builder.gep(of_out, [builder.add(o, builder.mul(step, ir.Constant(number, q)))])
            builder.store(each.incomings[1][0], builder.bitcast(place, wide.as_pointer())).align = 4
        return context.get_dummy_value()

    u = types.uint64
    return types.void(queries, u, u, u, u, out, u, u), generate


_widen_float, _widen_half, _widen_bfloat = (_widening(kind, VECTOR_LENGTH) for kind in range(3))
_widen_one_float, _widen_one_half, _widen_one_bfloat = (_widening(kind, 1) for kind in range(3))
prefetch: Any = intrinsic(_type_prefetch)
copy_bytes: Any = intrinsic(_type_copy)
word: Any = intrinsic(_type_word)
dots_with_four: Any = intrinsic(_type_dots)
tile_of_four: Any = intrinsic(_type_tile)


@compiled()
def widen(address: Any, kind: Any, count: Any, out: Any, o: Any) -> None:
    """`out[o : o + count]` becomes a row, as float32. Nothing behind the row is read."""
    whole = count // _u(VECTOR_LENGTH) * _u(VECTOR_LENGTH)
    if kind == 0:
        for i in range(_u(0), whole, _u(VECTOR_LENGTH)):
            _widen_float(address + i * _u(4), out, o + i)
        for i in range(whole, count):
            _widen_one_float(address + i * _u(4), out, o + i)
    elif kind == 1:
        for i in range(_u(0), whole, _u(VECTOR_LENGTH)):
            _widen_half(address + i * _u(2), out, o + i)
        for i in range(whole, count):
            _widen_one_half(address + i * _u(2), out, o + i)
    else:
        for i in range(_u(0), whole, _u(VECTOR_LENGTH)):
            _widen_bfloat(address + i * _u(2), out, o + i)
        for i in range(whole, count):
            _widen_one_bfloat(address + i * _u(2), out, o + i)


@compiled()
def widen_apart(address: Any, kind: Any, count: Any, step: Any, out: Any, o: Any) -> None:
    """The same of numbers that lie `step` bytes from one another."""
    if kind == 0:
        for i in range(count):
            _widen_one_float(address + i * step, out, o + i)
    elif kind == 1:
        for i in range(count):
            _widen_one_half(address + i * step, out, o + i)
    else:
        for i in range(count):
            _widen_one_bfloat(address + i * step, out, o + i)


@compiled()
def exp_less(x: Any, shift: Any, count: Any, bits: Any) -> None:
    """`x[:count] = exp(x - shift)` where that is at most 1, to 2 units in the last place; `bits` is room for as many
    int32. What is below `exp(-87)` becomes that.
    """
    for i in range(count):
        t = max((x[i] - shift) * np.float32(1.4426950408889634), np.float32(-126.0))
        whole = np.floor(t + np.float32(0.5))
        f = t - whole
        # the Taylor series of 2 ** f on [-0.5, 0.5]; what is left out is below 2 ** -26
        p = np.float32(1.5403530e-4) * f + np.float32(1.3333558e-3)
        p = p * f + np.float32(9.6181291e-3)
        p = p * f + np.float32(5.5504109e-2)
        p = p * f + np.float32(2.4022651e-1)
        p = p * f + np.float32(6.9314718e-1)
        x[i] = p * f + np.float32(1.0)
        bits[i] = (np.int32(whole) + np.int32(127)) << np.int32(23)
    powers = bits.view(np.float32)
    for i in range(count):
        x[i] *= powers[i]
