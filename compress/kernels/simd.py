"""Vectors of 16 float32 or int32 for code that numba compiles: LLVM maps them to the registers of the processor.

numba reuses compiled code while the file of the compiled function is unchanged: after a change here, touch that file.
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

VECTOR_LENGTH = 16

_I8, _I16, _I32, _HALF, _FLOAT = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.HalfType(), ir.FloatType()

# LLVM rounds to half precision by one instruction on these; on others it calls a function that may be missing.
if platform.machine() not in ("aarch64", "arm64") and not llvm.get_host_cpu_features().get("f16c", False):
    raise ImportError("no conversion to half precision on this processor")


class Vector(types.Type):
    """numba's type of a vector."""


FLOATS, CODES = Vector("16 x float32"), Vector("16 x int32")


@register_model(Vector)
class _Model(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Vector) -> None:
        super().__init__(manager, kind, ir.VectorType(_FLOAT if kind == FLOATS else _I32, VECTOR_LENGTH))  # type: ignore[no-untyped-call]


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, index: Any, element: ir.Type) -> Any:
    data = cgutils.create_struct_proxy(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), ir.VectorType(element, VECTOR_LENGTH).as_pointer())


def _load(context: Any, builder: Any, array_type: Any, array: Any, index: Any, element: ir.Type) -> Any:
    vector = builder.load(_pointer(context, builder, array_type, array, index, element))
    vector.align = element.get_abi_size(context.target_data)
    return vector


def _splat(builder: Any, scalar: Any) -> Any:
    undefined = ir.Constant(ir.VectorType(scalar.type, VECTOR_LENGTH), ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, undefined, _constant(_I32, 0))


def _constant(element: ir.Type, value: int) -> ir.Constant:
    return ir.Constant(ir.VectorType(element, VECTOR_LENGTH), [value] * VECTOR_LENGTH)


def _type_load(_typing: Any, array: Any, i: Any) -> Any:
    """`array[i : i + 16]` of float32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array, i = args
        return _load(context, builder, signature.args[0], array, i, _FLOAT)

    return FLOATS(array, types.uint64), generate


def _rounded(builder: Any, numbers: Any, kind: Any) -> Any:
    """To nearest even, as an array of that dtype takes them: uint16 the bits of float16, int16 those of bfloat16."""
    if kind == types.uint16:
        halves = builder.fptrunc(numbers, ir.VectorType(_HALF, VECTOR_LENGTH))
        return builder.bitcast(halves, ir.VectorType(_I16, VECTOR_LENGTH))
    if kind == types.int16:
        wide = builder.bitcast(numbers, ir.VectorType(_I32, VECTOR_LENGTH))
        odd = builder.and_(builder.lshr(wide, _constant(_I32, 16)), _constant(_I32, 1))
        wide = builder.add(builder.add(wide, _constant(_I32, 0x7FFF)), odd)
        return builder.trunc(builder.lshr(wide, _constant(_I32, 16)), ir.VectorType(_I16, VECTOR_LENGTH))
    return numbers


def _type_store(_typing: Any, array: Any, i: Any, vector: Any) -> Any:
    """`array[i : i + 16] = vector`, rounded if the array is of 16 bits (`_rounded`)."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array, i, numbers = args
        numbers = _rounded(builder, numbers, signature.args[0].dtype)
        pointer = _pointer(context, builder, signature.args[0], array, i, numbers.type.element)
        builder.store(numbers, pointer).align = signature.args[0].dtype.bitwidth // 8
        return context.get_dummy_value()

    return types.void(array, types.uint64, vector), generate


def _type_stream(_typing: Any, array: Any, i: Any, vector: Any) -> Any:
    """`store` past the caches, for what is not read soon; `array[i]` lies at a multiple of 16 elements' bytes.

    Other threads see it after `fence`.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array, i, numbers = args
        numbers = _rounded(builder, numbers, signature.args[0].dtype)
        stored = builder.store(numbers, _pointer(context, builder, signature.args[0], array, i, numbers.type.element))
        stored.align = VECTOR_LENGTH * signature.args[0].dtype.bitwidth // 8
        stored.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(_I32, 1)]))
        return context.get_dummy_value()

    return types.void(array, types.uint64, vector), generate


def _type_fence(_typing: Any) -> Any:
    """Makes what `stream` has written visible to other threads."""

    def generate(context: Any, builder: Any, _signature: Any, _args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


def _type_broadcast(_typing: Any, number: Any) -> Any:
    """Sixteen times one float32."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return _splat(builder, args[0])

    return FLOATS(types.float32), generate


def _type_widen(_typing: Any, array: Any, i: Any) -> Any:
    """`array[i : i + 16]` of uint8, as int32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array, i = args
        narrow = _load(context, builder, signature.args[0], array, i, _I8)
        return builder.zext(narrow, ir.VectorType(_I32, VECTOR_LENGTH))

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
        codes = builder.and_(codes, _constant(_I32, VECTOR_LENGTH - 1))
        found = ir.Constant(table.type, ir.Undefined)
        for n in range(VECTOR_LENGTH):
            position = ir.Constant(_I32, n)
            entry = builder.extract_element(table, builder.extract_element(codes, position))
            found = builder.insert_element(found, entry, position)
        return found

    return FLOATS(FLOATS, CODES), generate


def _operator(instruction: str, of: Vector) -> Callable[..., Any]:
    def typed(_typing: Any, a: Any, b: Any) -> Any:
        def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            return getattr(builder, instruction)(*args)

        return of(of, of), generate

    emitted: Any = intrinsic(typed)

    return lambda a, b: (lambda a, b: emitted(a, b)) if a == b == of else None  # noqa: PLW0108  it wants a function


load: Any = intrinsic(_type_load)
store: Any = intrinsic(_type_store)
stream: Any = intrinsic(_type_stream)
fence: Any = intrinsic(_type_fence)
broadcast: Any = intrinsic(_type_broadcast)
widen: Any = intrinsic(_type_widen)
part: Any = intrinsic(_type_part)
look_up: Any = intrinsic(_type_look_up)
# Products and sums are rounded one by one: LLVM fuses them only if it is told to.
overload(operator.add)(_operator("fadd", FLOATS))
overload(operator.sub)(_operator("fsub", FLOATS))
overload(operator.mul)(_operator("fmul", FLOATS))
overload(operator.or_)(_operator("or_", CODES))
