"""Compiled functions that search the graph of `RoarGraphIndex`; `build_numba.py` builds it.

Keys are rows of float32, float16 (seen as uint16) or bfloat16 (seen as int16), read as they are and multiplied in
float32. An edge is 3 bytes, the number of a key, low byte first; a key has `DEGREE` of them in a row, and `NO_EDGE`
where it has fewer. The functions release the interpreter's lock; callers check arguments.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir

try:
    from numba import types
    from numba.extending import intrinsic

    from ..kernels.rows_numba import compiled
except ImportError as exc:
    raise ImportError("graph search needs numba; install it with `pip install kvloom[retrieval]`") from exc

DEGREE = 32
EDGE_BYTES = 3
NO_EDGE = (1 << 24) - 1


def _type_number(_typing: Any, rows: Any, i: Any) -> Any:
    """`rows[i]` as float32, whatever 16 or 32 bits it has."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        from numba.core import cgutils

        data = cgutils.create_struct_proxy(signature.args[0])(context, builder, args[0]).data
        bits = builder.load(builder.gep(data, [args[1]]))
        if signature.args[0].dtype == types.float32:
            return bits
        if signature.args[0].dtype == types.uint16:
            return builder.fpext(builder.bitcast(bits, ir.HalfType()), ir.FloatType())
        wide = builder.shl(builder.zext(bits, ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(wide, ir.FloatType())

    return types.float32(rows, types.int64), generate


def _type_fetch_ahead(_typing: Any, rows: Any, i: Any) -> Any:
    """Prefetches the cache line of `rows[i]`: a search mostly waits for rows."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        from numba.core import cgutils

        data = cgutils.create_struct_proxy(signature.args[0])(context, builder, args[0]).data
        word, pointer = ir.IntType(32), ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, word, word, word])
        prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        place = builder.bitcast(builder.gep(data, [args[1]]), pointer)
        builder.call(prefetch, [place, ir.Constant(word, 0), ir.Constant(word, 3), ir.Constant(word, 1)])
        return context.get_dummy_value()

    return types.void(rows, types.int64), generate


_number: Any = intrinsic(_type_number)
_fetch_ahead: Any = intrinsic(_type_fetch_ahead)


@compiled()
def _dot(rows, row, queries, g, dim):  # type: ignore[no-untyped-def]
    total = np.float32(0.0)
    for d in range(dim):
        total += _number(rows, row * dim + d) * queries[g, d]
    return total


@compiled()
def edge(edges, node, slot):  # type: ignore[no-untyped-def]
    return np.int64(edges[node, slot, 0]) | np.int64(edges[node, slot, 1]) << 8 | np.int64(edges[node, slot, 2]) << 16


@compiled()
def set_edge(edges, node, slot, to):  # type: ignore[no-untyped-def]
    edges[node, slot, 0] = to & 0xFF
    edges[node, slot, 1] = (to >> 8) & 0xFF
    edges[node, slot, 2] = to >> 16


@compiled()
def _first_visit(visited, node):  # type: ignore[no-untyped-def]
    bit = np.uint64(1) << np.uint64(node & 63)
    if visited[node >> 6] & bit:
        return False
    visited[node >> 6] |= bit
    return True


@compiled()
def into_beam(scores, ids, g, size, score, node):  # type: ignore[no-untyped-def]
    """Inserts a node into row g of `size` nodes in descending order; its position, or the row's length if refused."""
    beam = scores.shape[1]
    if size == beam and score <= scores[g, beam - 1]:
        return beam
    low, high = 0, size
    while low < high:
        middle = (low + high) >> 1
        if scores[g, middle] >= score:
            low = middle + 1
        else:
            high = middle
    for place in range(min(size, beam - 1), low, -1):
        scores[g, place] = scores[g, place - 1]
        ids[g, place] = ids[g, place - 1]
    scores[g, low] = score
    ids[g, low] = node
    return low


@compiled()
def search_graph(rows, dim, edges, entries, queries, scores, ids):  # type: ignore[no-untyped-def]
    """Best-first search for several queries at once, which share what has been visited.

    Each query has a beam. In turn, a query expands the best node of its beam that no query has expanded; each neighbour
    that was not visited is compared with all queries, so its row is read once. The search ends when every node of every
    beam is expanded.

    Parameters
    ----------
    rows : `[S * D]` keys.
    edges : `[S, 32, 3]` uint8.
    entries : `[E]` int64, where to begin.
    queries : `[Q, D]` float32.
    scores, ids : `[Q, beam]` float32 and int64, written: the beams, best first; -inf and -1 where not filled.

    Returns
    -------
    (keys compared, nodes expanded)
    """
    count, beam = scores.shape
    words = (edges.shape[0] + 63) >> 6
    visited = np.zeros(words, np.uint64)
    expanded = np.zeros(words, np.uint64)
    sizes = np.zeros(count, np.int64)
    cursors = np.zeros(count, np.int64)
    fresh = np.empty(max(DEGREE, len(entries)), np.int64)
    scores[:] = -np.inf
    ids[:] = -1
    compared, opened = 0, 0
    found = 0
    for entry in entries:
        if _first_visit(visited, entry):
            fresh[found] = entry
            found += 1
    turn, idle = 0, 0
    line = 64 // rows.itemsize
    while True:
        for n in range(found):
            node = fresh[n]
            for g in range(count):
                score = _dot(rows, node, queries, g, dim)
                place = into_beam(scores, ids, g, sizes[g], score, node)
                if place < beam:
                    sizes[g] = min(sizes[g] + 1, beam)
                    cursors[g] = min(cursors[g], place)
        compared += found
        found = 0
        # the best node that is not expanded, of the next query that has one
        node = -1
        idle = 0
        while node < 0 and idle < count:
            g = turn
            turn = turn + 1 if turn + 1 < count else 0
            while cursors[g] < sizes[g]:
                candidate = ids[g, cursors[g]]
                cursors[g] += 1
                if _first_visit(expanded, candidate):
                    node = candidate
                    break
            idle += 1
        if node < 0:
            return compared, opened
        opened += 1
        for slot in range(DEGREE):
            to = edge(edges, node, slot)
            if to != NO_EDGE and _first_visit(visited, to):
                fresh[found] = to
                found += 1
                for d in range(0, dim, line):
                    _fetch_ahead(rows, to * dim + d)
