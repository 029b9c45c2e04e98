"""Compiled loops of `RoarGraphIndex`: searching a graph of keys, and building one.

Keys are rows of float32, float16 (seen as uint16) or bfloat16 (seen as int16), read as they are and multiplied in
float32. An edge is 3 bytes, the number of a key, low byte first; a key has `DEGREE` of them in a row, and `NO_EDGE`
where it has fewer. None of the loops holds the interpreter's lock; the callers check what they are given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir

try:
    from numba import njit, types
    from numba.extending import intrinsic
except ImportError as exc:
    raise ImportError("graph search needs numba; install it with `pip install kvloom[retrieval]`") from exc

DEGREE = 32
EDGE_BYTES = 3
NO_EDGE = (1 << 24) - 1


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    try:
        return njit(nogil=True, cache=True, fastmath=True, error_model="numpy")(function)
    except RuntimeError:  # numba found no folder that it may write machine code to
        return njit(nogil=True, fastmath=True, error_model="numpy")(function)


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


_number = intrinsic(_type_number)


@_compiled
def _dot(rows, row, queries, g, dim):  # type: ignore[no-untyped-def]
    total = np.float32(0.0)
    for d in range(dim):
        total += _number(rows, row * dim + d) * queries[g, d]
    return total


@_compiled
def _distance(table, a, b):  # type: ignore[no-untyped-def]
    total = np.float32(0.0)
    for d in range(table.shape[1]):
        gap = table[a, d] - table[b, d]
        total += gap * gap
    return total


@_compiled
def _edge(edges, node, slot):  # type: ignore[no-untyped-def]
    return np.int64(edges[node, slot, 0]) | np.int64(edges[node, slot, 1]) << 8 | np.int64(edges[node, slot, 2]) << 16


@_compiled
def _set_edge(edges, node, slot, to):  # type: ignore[no-untyped-def]
    edges[node, slot, 0] = to & 0xFF
    edges[node, slot, 1] = (to >> 8) & 0xFF
    edges[node, slot, 2] = to >> 16


@_compiled
def _first_visit(visited, node):  # type: ignore[no-untyped-def]
    bit = np.uint64(1) << np.uint64(node & 63)
    if visited[node >> 6] & bit:
        return False
    visited[node >> 6] |= bit
    return True


@_compiled
def _into_beam(scores, ids, size, beam, score, node):  # type: ignore[no-untyped-def]
    """Place at which a node entered a beam sorted by falling score, `beam` if it did not."""
    if size == beam and score <= scores[beam - 1]:
        return beam
    low, high = 0, size
    while low < high:
        middle = (low + high) >> 1
        if scores[middle] >= score:
            low = middle + 1
        else:
            high = middle
    for place in range(min(size, beam - 1), low, -1):
        scores[place] = scores[place - 1]
        ids[place] = ids[place - 1]
    scores[low] = score
    ids[low] = node
    return low


@_compiled
def search_graph(rows, dim, edges, entries, queries, beam, scores, ids):  # type: ignore[no-untyped-def]
    """Best-first search for several queries at once, which share what has been visited.

    Each query has a beam. They take turns: the query whose turn it is takes the best node of its beam that no query has
    expanded; each neighbour not met before is compared with all queries, for its row is read once. It ends when every
    node of every beam is expanded.

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
    count = queries.shape[0]
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
    while True:
        for n in range(found):
            node = fresh[n]
            for g in range(count):
                score = _dot(rows, node, queries, g, dim)
                place = _into_beam(scores[g], ids[g], sizes[g], beam, score, node)
                if place < beam:
                    sizes[g] = min(sizes[g] + 1, beam)
                    cursors[g] = min(cursors[g], place)
        compared += found
        found = 0
        # the next node that nobody has expanded, of the query whose turn it is
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
            to = _edge(edges, node, slot)
            if to != NO_EDGE and _first_visit(visited, to):
                fresh[found] = to
                found += 1


@_compiled
def nearest_rows(scores, limits, first, ids, best, margin, closest):  # type: ignore[no-untyped-def]
    """The highest of each row of scores, and for each column the row that it came closest to.

    A column's margin in a row is its score less the lowest of those that the row keeps.

    Parameters
    ----------
    scores : `[Q, S]` float32; of row i only the first `limits[i]` count.
    first : number of row 0 among all training queries.
    ids, best : `[Q, N]` int32 and float32, written best first; -1 and -inf where there are fewer.
    margin, closest : `[S]` float32 and int32, kept over calls.
    """
    kept = ids.shape[1]
    for q in range(scores.shape[0]):
        size = 0
        bar = np.float32(-np.inf)
        row = scores[q]
        of_ids, of_best = ids[q], best[q]
        stop = limits[q]
        for begin in range(0, stop, 16):
            end = min(begin + 16, stop)
            top = np.float32(-np.inf)
            for j in range(begin, end):
                top = max(top, row[j])
            if size == kept and top <= bar:
                continue
            for j in range(begin, end):
                if size < kept or row[j] > bar:
                    place = _into_beam(of_best, of_ids, size, kept, row[j], j)
                    if place < kept:
                        size = min(size + 1, kept)
                    if size == kept:
                        bar = of_best[kept - 1]
        for n in range(size, kept):
            of_ids[n] = -1
            of_best[n] = -np.inf
        if size == 0:
            continue
        bar = of_best[size - 1]
        number = np.int32(first + q)
        for j in range(stop):
            gap = row[j] - bar
            better = gap > margin[j]
            margin[j] = gap if better else margin[j]
            closest[j] = number if better else closest[j]


@_compiled
def invert(lists, best, keys, kept):  # type: ignore[no-untyped-def]
    """For each key the `kept` queries that rank it best: `[S, kept]` int32, -1 pads.

    `lists` `[Q, N]`, `best` their scores. A query ranks a key by how far its score is above the list's last.
    """
    found = np.full((keys, kept), -1, np.int32)
    margins = np.full((keys, kept), -np.inf, np.float32)
    for q in range(lists.shape[0]):
        size = lists.shape[1]
        while size and lists[q, size - 1] < 0:
            size -= 1
        for n in range(size):
            key = lists[q, n]
            _into_beam(margins[key], found[key], kept, kept, best[q, n] - best[q, size - 1], q)
    return found


@_compiled
def project_edges(table, lists, found, closest, starts, attached, forward, occlusion, edges, gaps):  # type: ignore[no-untyped-def]
    """Each key's edges to what the queries that it is the pivot of find beside it.

    Candidates of a key are the lists of all its queries, merged; a key that is in no list takes the list of the query
    that it came closest to, and its like. They are walked from the nearest on; one that lies nearer to an accepted one
    than to the key is put back, and taken only if there is room.

    Parameters
    ----------
    table : `[S, R]` float32, keys in the metric of the queries.
    found : `[S, m]` from `invert`. closest : `[S]` from `nearest_rows`.
    starts, attached : keys of no list by the query they are closest to: `[Q + 1]` int64, int32.
    forward : edges a key, at most `DEGREE`.
    edges, gaps : `[S, 32, 3]` and `[S, forward]` float32, written.
    """
    keys, most = found.shape
    seen = np.full(keys, -1, np.int32)
    room = lists.shape[1] * most + 64
    candidates = np.empty(room, np.int64)
    lengths = np.empty(room, np.float32)
    taken = np.empty(forward, np.int64)
    spare = np.empty(room, np.int64)
    for key in range(keys):
        count = 0
        seen[key] = key
        alone = found[key, 0] < 0
        for m in range(1 if alone else most):
            q = closest[key] if alone else found[key, m]
            if q < 0:
                break
            for n in range(lists.shape[1]):
                other = lists[q, n]
                if other < 0:
                    break
                if seen[other] != key:
                    seen[other] = key
                    candidates[count] = other
                    count += 1
            if alone:
                for at in range(starts[q], min(starts[q + 1], starts[q] + 64)):
                    other = attached[at]
                    if seen[other] != key:
                        seen[other] = key
                        candidates[count] = other
                        count += 1
        for n in range(count):
            lengths[n] = _distance(table, key, candidates[n])
        order = np.argsort(lengths[:count])
        size, spares = 0, 0
        for place in order:
            other, length = candidates[place], lengths[place]
            hidden = False
            for t in range(size):
                if _distance(table, other, candidates[taken[t]]) * occlusion < length:
                    hidden = True
                    break
            if hidden:
                spare[spares] = place
                spares += 1
            else:
                taken[size] = place
                size += 1
                if size == forward:
                    break
        for n in range(min(spares, forward - size)):
            taken[size] = spare[n]
            size += 1
        for slot in range(DEGREE):
            _set_edge(edges, key, slot, candidates[taken[slot]] if slot < size else NO_EDGE)
        for slot in range(forward):
            gaps[key, slot] = lengths[taken[slot]] if slot < size else np.inf


@_compiled
def reverse_edges(edges, gaps):  # type: ignore[no-untyped-def]
    """Adds the reverse of edges where there is room, shortest first."""
    keys, forward = gaps.shape
    room = DEGREE - forward
    wanted = np.full((keys, DEGREE), -1, np.int64)
    lengths = np.full((keys, DEGREE), -np.inf, np.float32)
    sizes = np.zeros(keys, np.int64)
    for key in range(keys):
        for slot in range(forward):
            to = _edge(edges, key, slot)
            if to == NO_EDGE:
                break
            if _has_edge(edges, to, key):
                continue
            place = _into_beam(lengths[to], wanted[to], sizes[to], DEGREE, -gaps[key, slot], key)
            if place < DEGREE:
                sizes[to] = min(sizes[to] + 1, DEGREE)
    for key in range(keys):
        n = 0
        for slot in range(DEGREE):
            if n == sizes[key]:
                break
            if _edge(edges, key, slot) == NO_EDGE:
                _set_edge(edges, key, slot, wanted[key, n])
                n += 1
    return room


@_compiled
def _has_edge(edges, node, to):  # type: ignore[no-untyped-def]
    for slot in range(DEGREE):
        if _edge(edges, node, slot) == to:
            return True
    return False


@_compiled
def connect(edges, entries):  # type: ignore[no-untyped-def]
    """Makes every node reachable from the entries, and returns how many were not.

    A node that is not reached gets an edge from a neighbour of its own that is, or from the next node that is. An edge
    by which another node was first reached is never given up for it, so what was reached remains so.
    """
    count = edges.shape[0]
    parent = np.full(count, -1, np.int64)
    queue = np.empty(count, np.int64)
    head, tail = 0, 0
    for entry in entries:
        if parent[entry] < 0:
            parent[entry] = count  # of an entry
            queue[tail] = entry
            tail += 1
    repaired, giver, unreached = 0, 0, 0
    while True:
        while head < tail:
            node = queue[head]
            head += 1
            for slot in range(DEGREE):
                to = _edge(edges, node, slot)
                if to != NO_EDGE and parent[to] < 0:
                    parent[to] = node
                    queue[tail] = to
                    tail += 1
        while unreached < count and parent[unreached] >= 0:
            unreached += 1
        if unreached == count:
            return repaired
        repaired += 1
        placed = False
        for slot in range(DEGREE):
            near = _edge(edges, unreached, slot)
            if near != NO_EDGE and parent[near] >= 0 and _give_slot(edges, near, unreached, parent):
                parent[unreached] = near
                placed = True
                break
        while not placed:  # ends: nodes that were reached have more slots than nodes were reached by them
            if parent[giver] >= 0 and _give_slot(edges, giver, unreached, parent):
                parent[unreached] = giver
                placed = True
            else:
                giver = giver + 1 if giver + 1 < count else 0
        queue[tail] = unreached
        tail += 1


@_compiled
def _give_slot(edges, node, to, parent):  # type: ignore[no-untyped-def]
    """Writes the edge into the last slot that may be had: a free one, or of an edge that nothing hangs on."""
    for slot in range(DEGREE - 1, -1, -1):
        old = _edge(edges, node, slot)
        if old == NO_EDGE or parent[old] != node:
            _set_edge(edges, node, slot, to)
            return True
    return False
