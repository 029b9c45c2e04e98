"""Compiled functions that build the graph of `RoarGraphIndex`; see `search_numba.py`."""

from __future__ import annotations

import numpy as np

from ..kernels.rows_numba import compiled
from .search_numba import DEGREE, NO_EDGE, edge, into_beam, set_edge


@compiled()
def _distance(table, a, b):  # type: ignore[no-untyped-def]
    total = np.float32(0.0)
    for d in range(table.shape[1]):
        gap = table[a, d] - table[b, d]
        total += gap * gap
    return total


@compiled()
def nearest_rows(scores, limits, first, ids, best, margin, closest):  # type: ignore[no-untyped-def]
    """The highest scores of each row, and for each column the row that nearly found it.

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
                    place = into_beam(best, ids, q, size, row[j], j)
                    if place < kept:
                        size = min(size + 1, kept)
                    if size == kept:
                        bar = best[q, kept - 1]
        for n in range(size, kept):
            ids[q, n] = -1
            best[q, n] = -np.inf
        if size == 0:
            continue
        bar = best[q, size - 1]
        number = np.int32(first + q)
        for j in range(stop):
            gap = row[j] - bar
            better = gap > margin[j]
            margin[j] = gap if better else margin[j]
            closest[j] = number if better else closest[j]


@compiled()
def invert(lists, best, keys, kept):  # type: ignore[no-untyped-def]
    """The `kept` queries that rank each of the first `keys` keys best: `[keys, kept]` int32, -1 pads.

    `lists` `[Q, N]`, `best` their scores. A query ranks a key by its score above the last one of the list.
    """
    found = np.full((keys, kept), -1, np.int32)
    margins = np.full((keys, kept), -np.inf, np.float32)
    for q in range(lists.shape[0]):
        size = lists.shape[1]
        while size and lists[q, size - 1] < 0:
            size -= 1
        for n in range(size):
            key = lists[q, n]
            if key >= keys:
                continue
            into_beam(margins, found, key, kept, best[q, n] - best[q, size - 1], q)
    return found


@compiled()
def project_edges(table, lists, found, closest, starts, attached, forward, occlusion, edges, gaps):  # type: ignore[no-untyped-def]
    """Links each key to the other keys that its queries find, those for which it is the pivot.

    Candidates of a key are the merged lists of its queries; a key in no list takes the list of the query that nearly
    found it, and the other keys of that kind. Candidates are visited from the nearest on; one that is nearer to an
    accepted one than to the key is postponed, and taken only if there is room.

    Parameters
    ----------
    table : `[N, R]` float32, what keys are compared in; its first rows are the S keys that get edges.
    lists : `[Q, K]` rows of the table that each query finds, -1 pads.
    found : `[S, m]` from `invert`. closest : `[S]` from `nearest_rows`.
    starts, attached : keys in no list, grouped by the query that nearly found them: `[Q + 1]` int64, int32.
    forward : edges a key, at most `DEGREE`.
    edges, gaps : `[S, 32, 3]` and `[S, forward]` float32, written.
    """
    keys, most = found.shape
    seen = np.full(table.shape[0], -1, np.int32)
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
            set_edge(edges, key, slot, candidates[taken[slot]] if slot < size else NO_EDGE)
        for slot in range(forward):
            gaps[key, slot] = lengths[taken[slot]] if slot < size else np.inf


@compiled()
def reverse_edges(edges, gaps):  # type: ignore[no-untyped-def]
    """Adds the reverse of edges where there is room, shortest first."""
    keys, forward = gaps.shape
    wanted = np.full((keys, DEGREE), -1, np.int64)
    lengths = np.full((keys, DEGREE), -np.inf, np.float32)
    sizes = np.zeros(keys, np.int64)
    for key in range(keys):
        for slot in range(forward):
            to = edge(edges, key, slot)
            if to == NO_EDGE:
                break
            if _has_edge(edges, to, key):
                continue
            place = into_beam(lengths, wanted, to, sizes[to], -gaps[key, slot], key)
            if place < DEGREE:
                sizes[to] = min(sizes[to] + 1, DEGREE)
    for key in range(keys):
        n = 0
        for slot in range(DEGREE):
            if n == sizes[key]:
                break
            if edge(edges, key, slot) == NO_EDGE:
                set_edge(edges, key, slot, wanted[key, n])
                n += 1


@compiled()
def reverse_into(edges, first, forward):  # type: ignore[no-untyped-def]
    """Adds the reverse of the edges of the nodes from `first` on to older nodes.

    If a node has no room, one of its reverse edges is replaced. `connect` links again what this cuts off.
    """
    for node in range(first, edges.shape[0]):
        for slot in range(forward):
            to = edge(edges, node, slot)
            if to == NO_EDGE:
                break
            if _has_edge(edges, to, node):
                continue
            place = forward + node % (DEGREE - forward)
            for free in range(DEGREE):
                if edge(edges, to, free) == NO_EDGE:
                    place = free
                    break
            set_edge(edges, to, place, node)


@compiled()
def _has_edge(edges, node, to):  # type: ignore[no-untyped-def]
    found = False
    for slot in range(DEGREE):
        found |= edge(edges, node, slot) == to
    return found


@compiled()
def connect(edges, entries):  # type: ignore[no-untyped-def]
    """Makes every node reachable from the entries, and returns how many were not.

    An unreachable node gets an edge from a reachable neighbour of its own, or from the next reachable node. An edge by
    which another node was first reached is never replaced, so reachable nodes stay reachable.
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
                to = edge(edges, node, slot)
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
            near = edge(edges, unreached, slot)
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


@compiled()
def _give_slot(edges, node, to, parent):  # type: ignore[no-untyped-def]
    """Writes the edge over the last free one, or over the last one by which no node was first reached."""
    for slot in range(DEGREE - 1, -1, -1):
        old = edge(edges, node, slot)
        if old == NO_EDGE or parent[old] != node:
            set_edge(edges, node, slot, to)
            return True
    return False
