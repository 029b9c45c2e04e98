"""Sums of codes and of exponentials in vector registers, as numba's intrinsics: the parts of quantized_ops_numba.py.

The caller of a function that takes an address keeps the memory there alive. Arrays are flat, and not sliced: counting
the reference of a slice takes as long as a row.
"""

from __future__ import annotations

import platform
from functools import partial
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .quantized_ops import GROUP_TOKENS, PART_TOKENS, WORD_CODES

LANES = 8  # words in a register
RUN_WORDS = 8  # as many products of a code with 8 bits as two halves of a word of 32 bits hold sums of
BYTES, TURNS = 4, WORD_CODES // 4  # of a word; codes of a byte
_I8, _I16, _I32, _FLOAT = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType()
_HAS_PAIRS = platform.machine() in ("x86_64", "AMD64") and llvm.get_host_cpu_features().get("avx2", False)
_LOG2E = 1.4426950408889634
_POWERS = (1.3333558e-3, 9.6181291e-3, 5.5504109e-2, 2.4022651e-1, 6.9314718e-1, 1.0)  # Taylor series of 2 ** f


def _all(kind: ir.VectorType, value: Any) -> ir.Constant:
    return ir.Constant(kind, [value] * kind.count)


def _spread(builder: Any, one: Any, lanes: int) -> Any:
    """A vector of the same number."""
    empty = ir.Constant(ir.VectorType(one.type, lanes), ir.Undefined)
    filled = builder.insert_element(empty, one, ir.Constant(_I32, 0))
    return builder.shuffle_vector(filled, empty, _all(ir.VectorType(_I32, lanes), 0))


def _function(builder: Any, name: str, returned: ir.Type, *given: ir.Type) -> Any:
    """An intrinsic of LLVM."""
    kind = ir.FunctionType(returned, given)
    return builder.module.globals.get(name) or ir.Function(builder.module, kind, name=name)


def _data(context: Any, builder: Any, signature: Any, args: Any, place: int) -> Any:
    from numba.core import cgutils

    return cgutils.create_struct_proxy(signature.args[place])(context, builder, args[place]).data


def _pairs(builder: Any, codes: Any, weights: Any, has_pairs: bool) -> Any:
    """Products of bytes, the first ones unsigned, added in pairs of neighbours to 16 bits."""
    wide = ir.VectorType(_I16, 2 * LANES)
    if has_pairs:
        function = _function(builder, "llvm.x86.avx2.pmadd.ub.sw", wide, codes.type, weights.type)
        return builder.call(function, [codes, weights])
    sums = []
    for first in (0, 1):
        lanes = ir.Constant(ir.VectorType(_I32, 2 * LANES), list(range(first, 4 * LANES, 2)))
        code, weight = (builder.shuffle_vector(each, each, lanes) for each in (codes, weights))
        sums.append(builder.mul(builder.zext(code, wide), builder.sext(weight, wide)))
    return builder.add(*sums)


def code_sums(heads: int, vectors: int, *, has_pairs: bool = _HAS_PAIRS) -> Any:
    """Intrinsic: to `out[at + 256 q + t]` is added the weighted sum of the codes of token t, for some queries, tokens.

    At the address `words` lie the words of as many tokens as `vectors` registers hold, those of the next 16 channels a
    group's row behind them; `count` such rows are read, at most `RUN_WORDS`. Weights of 8 bits, four in an int32, lie
    in `weights` from `first + q * width` on: those of the lowest codes of a word's 4 bytes, then those of the next.
    """

    def of_types(_typing: Any, weights: Any, first: Any, width: Any, words: Any, count: Any, out: Any, at: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _, first, width, words, count, _, at = args
            whole, halves = ir.VectorType(_I32, LANES), ir.VectorType(_I16, 2 * LANES)
            octets, floats = ir.VectorType(_I8, 4 * LANES), ir.VectorType(_FLOAT, LANES)
            of_weights, of_out = (_data(context, builder, signature, args, n) for n in (0, 5))
            number = count.type

            def constant(value: int) -> ir.Constant:
                return ir.Constant(number, value)

            starts = [builder.add(first, builder.mul(width, constant(q))) for q in range(heads)]
            before = builder.block
            loop, done = builder.append_basic_block("loop"), builder.append_basic_block("done")
            builder.branch(loop)
            builder.position_at_end(loop)
            word = builder.phi(number)
            sums = [builder.phi(halves) for _ in range(heads * vectors)]
            word.add_incoming(constant(0), before)
            for each in sums:
                each.add_incoming(_all(halves, 0), before)
            address, rows = builder.add(words, builder.mul(word, constant(4 * GROUP_TOKENS))), []
            for v in range(vectors):
                place = builder.add(address, constant(4 * LANES * v))
                rows.append(builder.load(builder.inttoptr(place, whole.as_pointer())))
                rows[-1].align = 4
            totals = list(sums)
            for turn in range(TURNS):
                place = builder.add(builder.mul(word, constant(TURNS)), constant(turn))
                spread = [
                    builder.bitcast(
                        _spread(builder, builder.load(builder.gep(of_weights, [builder.add(start, place)])), LANES),
                        octets,
                    )
                    for start in starts
                ]
                for v, row in enumerate(rows):
                    moved = builder.lshr(row, _all(whole, 2 * turn)) if turn else row
                    codes = builder.bitcast(builder.and_(moved, _all(whole, 0x03030303)), octets)
                    for q in range(heads):
                        of_pairs = _pairs(builder, codes, spread[q], has_pairs)
                        totals[q * vectors + v] = builder.add(totals[q * vectors + v], of_pairs)
            for each, total in zip(sums, totals, strict=True):
                each.add_incoming(total, loop)
            following = builder.add(word, constant(1))
            word.add_incoming(following, loop)
            builder.cbranch(builder.icmp_unsigned("<", following, count), loop, done)
            builder.position_at_end(done)
            for q in range(heads):
                for v in range(vectors):
                    both = builder.bitcast(totals[q * vectors + v], whole)
                    lower = builder.ashr(builder.shl(both, _all(whole, 16)), _all(whole, 16))
                    total = builder.sitofp(builder.add(lower, builder.ashr(both, _all(whole, 16))), floats)
                    place = builder.gep(of_out, [builder.add(at, constant(GROUP_TOKENS * q + LANES * v))])
                    place = builder.bitcast(place, floats.as_pointer())
                    held = builder.load(place)
                    held.align = 4
                    builder.store(builder.fadd(held, total), place).align = 4
            return context.get_dummy_value()

        u = types.uint64
        return types.void(weights, u, u, u, u, out, u), generate

    return intrinsic(of_types)


def _part(context: Any, builder: Any, signature: Any, args: Any, first: int = 0) -> list[Any]:
    """The numbers `row[at : at + 16]` in two registers; `row` and `at` are arguments from `first` on."""
    wide, found, at = ir.VectorType(_FLOAT, LANES), [], args[first + 1]
    data = _data(context, builder, signature, args, first)
    for v in range(PART_TOKENS // LANES):
        place = builder.gep(data, [builder.add(at, ir.Constant(at.type, LANES * v))])
        found.append(builder.load(builder.bitcast(place, wide.as_pointer())))
        found[-1].align = 4
    return found


def _larger(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _reduced(builder: Any, parts: list[Any], join: Any) -> Any:
    """All numbers of two registers in one."""
    found = join(*parts)
    for span in (4, 2, 1):
        moved = ir.Constant(ir.VectorType(_I32, LANES), [(lane + span) % LANES for lane in range(LANES)])
        found = join(found, builder.shuffle_vector(found, found, moved))
    return builder.extract_element(found, ir.Constant(_I32, 0))


def _type_scaled(
    _typing: Any, sums: Any, at: Any, scales: Any, t: Any, step: Any, less: Any, more: Any, out: Any, o: Any
) -> Any:
    """`out[o : o + 16]` becomes `(sums[at ...] * step - less) * scales[t ...] + more`; the largest is returned."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide = ir.VectorType(_FLOAT, LANES)
        step, less, more = (_spread(builder, each, LANES) for each in args[4:7])
        sums = _part(context, builder, signature, args, 0)
        scales = _part(context, builder, signature, args, 2)
        data, found = _data(context, builder, signature, args, 7), []
        for v, (each, own) in enumerate(zip(sums, scales, strict=True)):
            centred = builder.fsub(builder.fmul(each, step, flags=("contract",)), less, flags=("contract",))
            found.append(builder.fadd(builder.fmul(centred, own, flags=("contract",)), more, flags=("contract",)))
            place = builder.gep(data, [builder.add(args[8], ir.Constant(args[8].type, LANES * v))])
            builder.store(found[-1], builder.bitcast(place, wide.as_pointer())).align = 4
        return _reduced(builder, found, partial(_larger, builder))

    u, f = types.uint64, types.float32
    return types.float32(sums, u, scales, u, f, f, f, out, u), generate


def _type_top(_typing: Any, row: Any, at: Any) -> Any:
    """The largest of `row[at : at + 16]`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _reduced(builder, _part(context, builder, signature, args), partial(_larger, builder))

    return types.float32(row, types.uint64), generate


def _type_exp_sum(_typing: Any, row: Any, at: Any, shift: Any) -> Any:
    """The sum of `exp(x - shift)` for x in `row[at : at + 16]`, none above 1, to 3e-6 of itself.

    What is below `exp(-87)` becomes that.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide, whole = ir.VectorType(_FLOAT, LANES), ir.VectorType(_I32, LANES)
        shift, found = _spread(builder, args[2], LANES), []
        rounding = _function(builder, f"llvm.rint.v{LANES}f32", wide, wide)
        for x in _part(context, builder, signature, args):
            t = builder.fmul(builder.fsub(x, shift), _all(wide, _LOG2E))
            t = _larger(builder, t, _all(wide, -126.0))
            nearest = builder.call(rounding, [t])
            f = builder.fsub(t, nearest)
            p = _all(wide, _POWERS[0])
            for power in _POWERS[1:]:
                product = builder.fmul(p, f, flags=("contract",))
                p = builder.fadd(product, _all(wide, power), flags=("contract",))
            exponent = builder.shl(builder.fptosi(nearest, whole), _all(whole, 23))
            found.append(builder.bitcast(builder.add(builder.bitcast(p, whole), exponent), wide))
        return _reduced(builder, found, builder.fadd)

    return types.float32(row, types.uint64, types.float32), generate


def _type_above(_typing: Any, row: Any, at: Any, least: Any) -> Any:
    """Which of `row[at : at + 16]` are at least that: the lowest bit for the first."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        least, bits = _spread(builder, args[2], LANES), []
        for x in _part(context, builder, signature, args):
            of_part = builder.bitcast(builder.fcmp_ordered(">=", x, least), ir.IntType(LANES))
            bits.append(builder.zext(of_part, _I32))
        return builder.or_(bits[0], builder.shl(bits[1], ir.Constant(_I32, LANES)))

    return types.uint32(row, types.uint64, types.float32), generate


def _type_first_bit(_typing: Any, bits: Any) -> Any:
    """The number of the lowest bit that is set; some is."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        found = builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))
        return builder.zext(found, ir.IntType(64))

    return types.uint64(types.uint32), generate


scaled: Any = intrinsic(_type_scaled)
top_of_part: Any = intrinsic(_type_top)
exp_sum: Any = intrinsic(_type_exp_sum)
at_least: Any = intrinsic(_type_above)
first_bit: Any = intrinsic(_type_first_bit)
