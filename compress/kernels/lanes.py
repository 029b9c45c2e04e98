"""Sixteen float32 or int32 at once for code that numba compiles: vectors of LLVM, which any processor can hold.

numba keeps compiled code as long as the file of the compiled function stays the same: touch that, too, after a change
here.
"""

from __future__ import annotations

import operator
import platform
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

LANES = 16

_I8, _I16, _I32, _HALF, _FLOAT = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.HalfType(), ir.FloatType()

# LLVM rounds to half precision in one instruction on these, and calls a function that may not be there on others.
if platform.machine() not in ("aarch64", "arm64") and not llvm.get_host_cpu_features().get("f16c", False):
    raise ImportError("no conversion to half precision on this processor")


class Lanes(types.Type):
    """Type of a vector, as numba knows it."""


FLOATS, CODES = Lanes("16 x float32"), Lanes("16 x int32")


@register_model(Lanes)
class _Model(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Lanes) -> None:
        super().__init__(manager, kind, ir.VectorType(_FLOAT if kind == FLOATS else _I32, LANES))  # type: ignore[no-untyped-call]


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, index: Any, element: ir.Type) -> Any:
    data = cgutils.create_struct_proxy(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), ir.VectorType(element, LANES).as_pointer())


def _load(context: Any, builder: Any, array_type: Any, array: Any, index: Any, element: ir.Type) -> Any:
    vector = builder.load(_pointer(context, builder, array_type, array, index, element))
    vector.align = element.get_abi_size(context.target_data)
    return vector


def _splat(builder: Any, scalar: Any) -> Any:
    undefined = ir.Constant(ir.VectorType(scalar.type, LANES), ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, undefined, _constant(_I32, 0))


def _constant(element: ir.Type, value: int) -> ir.Constant:
    return ir.Constant(ir.VectorType(element, LANES), [value] * LANES)


def _type_load(_typing: Any, array: Any, i: Any) -> Any:
    """`array[i : i + 16]` of float32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array, i = args
        return _load(context, builder, signature.args[0], array, i, _FLOAT)

    return FLOATS(array, types.uint64), generate


def _rounded(builder: Any, numbers: Any, kind: Any) -> Any:
    """To nearest even, as an array of that dtype takes them: uint16 the bits of float16, int16 those of bfloat16."""
    if kind == types.uint16:
        halves = builder.fptrunc(numbers, ir.VectorType(_HALF, LANES))
        return builder.bitcast(halves, ir.VectorType(_I16, LANES))
    if kind == types.int16:
        wide = builder.bitcast(numbers, ir.VectorType(_I32, LANES))
        odd = builder.and_(builder.lshr(wide, _constant(_I32, 16)), _constant(_I32, 1))
        wide = builder.add(builder.add(wide, _constant(_I32, 0x7FFF)), odd)
        return builder.trunc(builder.lshr(wide, _constant(_I32, 16)), ir.VectorType(_I16, LANES))
    return numbers


def _type_store(_typing: Any, array: Any, i: Any, lanes: Any) -> Any:
    """`array[i : i + 16] = lanes`, rounded if the array is of 16 bits (`_rounded`)."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array, i, numbers = args
        numbers = _rounded(builder, numbers, signature.args[0].dtype)
        pointer = _pointer(context, builder, signature.args[0], array, i, numbers.type.element)
        builder.store(numbers, pointer).align = signature.args[0].dtype.bitwidth // 8
        return context.get_dummy_value()

    return types.void(array, types.uint64, lanes), generate


def _type_stream(_typing: Any, array: Any, i: Any, lanes: Any) -> Any:
    """The same past the caches, for what is not read soon: `array[i]` lies at a multiple of 16 elements' bytes.

    Other threads see it after `settle`.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array, i, numbers = args
        numbers = _rounded(builder, numbers, signature.args[0].dtype)
        stored = builder.store(numbers, _pointer(context, builder, signature.args[0], array, i, numbers.type.element))
        stored.align = LANES * signature.args[0].dtype.bitwidth // 8
        stored.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(_I32, 1)]))
        return context.get_dummy_value()

    return types.void(array, types.uint64, lanes), generate


def _type_settle(_typing: Any) -> Any:
    """Whatever `stream` has written is written."""

    def generate(context: Any, builder: Any, _signature: Any, _args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


def _type_spread(_typing: Any, number: Any) -> Any:
    """Sixteen times one float32."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return _splat(builder, args[0])

    return FLOATS(types.float32), generate


def _type_widen(_typing: Any, array: Any, i: Any) -> Any:
    """`array[i : i + 16]` of uint8, as int32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array, i = args
        narrow = _load(context, builder, signature.args[0], array, i, _I8)
        return builder.zext(narrow, ir.VectorType(_I32, LANES))

    return CODES(array, types.uint64), generate


def _type_part(_typing: Any, codes: Any, down: Any, mask: Any, up: Any) -> Any:
    """`((codes[n] >> down) & mask) << up` for 16 n."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        codes, down, mask, up = args[0], *(_splat(builder, number) for number in args[1:])
        return builder.shl(builder.and_(builder.lshr(codes, down), mask), up)

    return CODES(CODES, types.uint32, types.uint32, types.uint32), generate


def _type_look_up(_typing: Any, table: Any, codes: Any) -> Any:
    """`table[codes[n]]` for 16 n, by the lowest four bits of a code.

    LLVM makes one permutation of the extractions and insertions where the processor has it (`vpermd` of AVX-512).
    """

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        table, codes = args
        codes = builder.and_(codes, _constant(_I32, LANES - 1))
        found = ir.Constant(table.type, ir.Undefined)
        for n in range(LANES):
            lane = ir.Constant(_I32, n)
            entry = builder.extract_element(table, builder.extract_element(codes, lane))
            found = builder.insert_element(found, entry, lane)
        return found

    return FLOATS(FLOATS, CODES), generate


def _operator(instruction: str, of: Lanes) -> Callable[..., Any]:
    def typed(_typing: Any, a: Any, b: Any) -> Any:
        def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            return getattr(builder, instruction)(*args)

        return of(of, of), generate

    emitted: Any = intrinsic(typed)

    return lambda a, b: (lambda a, b: emitted(a, b)) if a == b == of else None  # noqa: PLW0108  it wants a function


load: Any = intrinsic(_type_load)
store: Any = intrinsic(_type_store)
stream: Any = intrinsic(_type_stream)
settle: Any = intrinsic(_type_settle)
spread: Any = intrinsic(_type_spread)
widen: Any = intrinsic(_type_widen)
part: Any = intrinsic(_type_part)
look_up: Any = intrinsic(_type_look_up)
# Each rounds for itself: LLVM joins a product and a sum only if it is told that it may.
overload(operator.add)(_operator("fadd", FLOATS))
overload(operator.sub)(_operator("fsub", FLOATS))
overload(operator.mul)(_operator("fmul", FLOATS))
overload(operator.or_)(_operator("or_", CODES))
