"""The functions of ops.py compiled for this processor; needs numba (`pip install "kvloom[retrieval]"`).

ops.py and paged_kv.py have checked what they dispatch here. KV heads are divided among threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor

from .ranks_numba import largest
from .rows_numba import (
    DOT_QUERIES,
    KINDS,
    VECTOR_LENGTH,
    compiled,
    copy_bytes,
    dots_with_four,
    exp_less,
    prefetch,
    run,
    tile_of_four,
    widen,
    widen_apart,
)

_AHEAD = 12  # rows prefetched: about as many loads as a core has under way at a time
_TILES_AHEAD = 4  # tiles of a range that are prefetched
_ROWS = 4  # rows widened before they are multiplied, so that sums stay in registers for as long
_LINE_BYTES = 64
_u = np.uint64


def row_addresses(tensor: Tensor) -> tuple[int, int, int]:
    """Address of the first row of `[H, T, D]`, and bytes from head to head and from token to token."""
    width = tensor.element_size()
    return tensor.data_ptr(), tensor.stride(0) * width, tensor.stride(1) * width


def gather_attend(
    queries: Tensor,
    pages: np.ndarray[Any, Any],
    page_tokens: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    v_dim: int,
    ids: Tensor,
    scale: float,
    *,
    channel_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """See ops.py. `pages` `[P, 6]` int64: `row_addresses` of each page's keys, then values; ids are in range.

    `channel_bytes`: from channel to channel of a key; None where they are side by side.
    """
    Hq, H = queries.shape[0], ids.shape[0]
    out, lse = torch.empty(Hq, v_dim), torch.empty(Hq)
    step = dtypes[0].itemsize if channel_bytes is None else channel_bytes
    run(
        _attend, _grouped(queries, H, scale), queries.shape[1], pages, max(1, page_tokens), *map(KINDS.get, dtypes),
        step, ids.contiguous().numpy(), out.numpy().reshape(H, Hq // H, v_dim), lse.numpy().reshape(H, Hq // H),
    )  # fmt: skip
    return out, lse


def gather_rows(
    pages: np.ndarray[Any, Any], page_tokens: int, ids: Tensor, keys: Tensor, values: Tensor | None = None
) -> None:
    """Copies rows of pages to contiguous `[H, K, D]` and `[H, K, Dv]`; rows of -1 are not written."""
    numbers = ids.contiguous().numpy()
    for first, out in ((0, keys), *([] if values is None else [(3, values)])):
        row_bytes = out.shape[-1] * out.element_size()
        run(_copy_rows, pages, first, max(1, page_tokens), numbers, out.data_ptr(), row_bytes)


def landmark_scores(queries: Tensor, landmarks: Tensor, scale: float) -> Tensor:
    """See ops.py."""
    Hq, (H, C, _) = queries.shape[0], landmarks.shape
    scores = torch.empty(Hq, C)
    blocks = max(1, -(-C // 1024))
    run(
        _score, _grouped(queries, H, scale), queries.shape[1], *row_addresses(landmarks), KINDS[landmarks.dtype],
        blocks, scores.numpy().reshape(H, Hq // H, C),
    )  # fmt: skip
    return scores


def tile_scores(queries: Tensor, tiles: Tensor, firsts: Tensor, ends: Tensor, count: int, scale: float) -> Tensor:
    """See ops.py; ranges are within the tiles. `ends` `[H, R]`: tokens up to the end of each range."""
    Hq, (H, N, r, tile) = queries.shape[0], tiles.shape
    scores = torch.empty(Hq, count)
    blocks = max(1, -(-count // 4096))
    run(
        _score_tiles, _grouped(queries, H, scale), r, tiles.data_ptr(), N * r * tile * 2, blocks,
        firsts.contiguous().numpy(), ends.contiguous().numpy(), Hq // H, scores.numpy().reshape(H, -1),
    )  # fmt: skip
    return scores


def top_pooled(scores: Tensor, kv_heads: int, k: int, pooling: str, near: Tensor | None) -> Tensor:
    """See ops.py; k is above 0 and below N."""
    ids = torch.empty(kv_heads, k, dtype=torch.int64)
    grouped = scores.contiguous().numpy().reshape(kv_heads, -1, scores.shape[1])
    others = torch.full(scores.shape[:1], -torch.inf) if near is None else near.contiguous()
    run(_top, grouped, others.view(kv_heads, -1).numpy(), pooling == "sum", ids.numpy())
    return ids


def _grouped(queries: Tensor, kv_heads: int, scale: float) -> np.ndarray[Any, Any]:
    """Scaled queries, `[H, G D]` with zeros up to multiples of 4 query heads and 16 channels."""
    grouped = (queries.float() * scale).view(kv_heads, -1, queries.shape[1])
    pads = (0, -queries.shape[1] % VECTOR_LENGTH, 0, -grouped.shape[1] % _ROWS)
    found: np.ndarray[Any, Any] = torch.nn.functional.pad(grouped, pads).flatten(1).contiguous().numpy()
    return found


@compiled()
def _dots(queries: Any, dim: Any, rows: Any, width: Any, found: Any, scores: Any, at: Any, count: Any) -> None:
    """Inner products of a group's queries (flat, each of `dim` numbers) with 4 rows that begin every `width` numbers.

    `count` rows are kept; `found` is scratch memory for 16 numbers. Arrays are not sliced here: counting the reference
    of a slice takes as long as a row.
    """
    group = _u(scores.shape[0])
    for g in range(_u(0), group, _u(DOT_QUERIES)):
        dots_with_four(queries, g * dim, rows, width, dim, found)
        for q in range(min(_u(DOT_QUERIES), group - g)):
            if count == _u(_ROWS):
                scores[g + q, at] = found[_u(4) * q]
                scores[g + q, at + _u(1)] = found[_u(4) * q + _u(1)]
                scores[g + q, at + _u(2)] = found[_u(4) * q + _u(2)]
                scores[g + q, at + _u(3)] = found[_u(4) * q + _u(3)]
            else:
                for n in range(count):
                    scores[g + q, at + n] = found[_u(4) * q + n]


@compiled()
def _prefetch_row(address: Any, row_bytes: Any) -> None:
    for line in range(_u(0), row_bytes, _u(_LINE_BYTES)):
        prefetch(address + line)


@compiled()
def _attend_head(
    queries: Any,
    dim: Any,
    h: Any,
    pages: Any,
    page_tokens: Any,
    key_kind: Any,
    value_kind: Any,
    channel_bytes: Any,
    ids: Any,
    out: Any,
    lse: Any,
) -> None:
    """Attention of one KV head: addresses of rows, scores of 4 rows at a time, softmax, sums of 4 weighted rows."""
    G, D, v_dim, count = out.shape[0], _u(dim), _u(out.shape[1]), _u(0)
    keys, values = np.empty(len(ids) + 4, np.uint64), np.empty(len(ids) + 4, np.uint64)
    for n in range(len(ids)):
        if ids[n] >= 0:
            page, token = _u(ids[n]) // _u(page_tokens), _u(ids[n]) % _u(page_tokens)
            keys[count] = _u(pages[page, 0]) + _u(h) * _u(pages[page, 1]) + token * _u(pages[page, 2])
            values[count] = _u(pages[page, 3]) + _u(h) * _u(pages[page, 4]) + token * _u(pages[page, 5])
            count += _u(1)
    if count == _u(0):
        out[:] = np.float32(0)
        lse[:] = -np.inf
        return
    key_bytes, value_bytes = D * _u(4 if key_kind == 0 else 2), v_dim * _u(4 if value_kind == 0 else 2)
    channel, is_apart = _u(channel_bytes), _u(channel_bytes) * D != key_bytes
    padded, width = (
        (D + _u(VECTOR_LENGTH - 1)) // _u(VECTOR_LENGTH) * _u(VECTOR_LENGTH),
        max(D, v_dim) + _u(VECTOR_LENGTH),
    )
    rows = np.zeros(_u(_ROWS) * width, np.float32)
    scores, bits = np.empty((G, count), np.float32), np.empty(count, np.int32)
    found = np.empty(_ROWS * _ROWS, np.float32)
    if not is_apart:
        for n in range(min(count, _u(_AHEAD))):
            _prefetch_row(keys[n], key_bytes)
    for n in range(_u(0), count, _u(_ROWS)):
        some = min(_u(_ROWS), count - n)
        for i in range(some):
            if is_apart:  # a line for each channel, as many loads as a core has under way
                widen_apart(keys[n + i], key_kind, D, channel, rows, i * width)
                continue
            if n + i + _u(_AHEAD) < count:
                _prefetch_row(keys[n + i + _u(_AHEAD)], key_bytes)
            widen(keys[n + i], key_kind, D, rows, i * width)
        _dots(queries, padded, rows, width, found, scores, n, some)
    for n in range(min(count, _u(_AHEAD))):
        _prefetch_row(values[n], value_bytes)
    for g in range(G):
        top = scores[g, 0]
        for n in range(count):
            top = max(top, scores[g, n])
        exp_less(scores[g], top, count, bits)
        total = np.float32(0)
        for n in range(count):
            total += scores[g, n]
        lse[g] = top + np.log(total)
        share = np.float32(1) / total
        for n in range(count):
            scores[g, n] *= share
    out[:] = np.float32(0)
    two, three = _u(2) * width, _u(3) * width
    for n in range(_u(0), count, _u(_ROWS)):
        some = min(_u(_ROWS), count - n)
        for i in range(some):
            if n + i + _u(_AHEAD) < count:
                _prefetch_row(values[n + i + _u(_AHEAD)], value_bytes)
            widen(values[n + i], value_kind, v_dim, rows, i * width)
        for g in range(G):
            a = scores[g, n]
            b = scores[g, n + _u(1)] if some > _u(1) else np.float32(0)
            c = scores[g, n + _u(2)] if some > _u(2) else np.float32(0)
            d = scores[g, n + _u(3)] if some > _u(3) else np.float32(0)
            for i in range(v_dim):
                out[g, i] += a * rows[i] + b * rows[width + i] + c * rows[two + i] + d * rows[three + i]


@compiled(parallel=True)
def _attend(
    queries: Any, dim: Any, pages: Any, page_tokens: Any, key_kind: Any, value_kind: Any, channel_bytes: Any, ids: Any,
    out: Any, lse: Any,
) -> None:  # fmt: skip
    for h in prange(len(queries)):
        _attend_head(
            queries[h], dim, h, pages, page_tokens, key_kind, value_kind, channel_bytes, ids[h], out[h], lse[h]
        )


@compiled()
def _copy_row(pages: Any, first: Any, page_tokens: Any, h: Any, ids: Any, target: Any, row_bytes: Any) -> None:
    for n in range(len(ids)):
        if ids[n] >= 0:
            page, token = _u(ids[n]) // _u(page_tokens), _u(ids[n]) % _u(page_tokens)
            source = _u(pages[page, first]) + _u(h) * _u(pages[page, first + 1]) + token * _u(pages[page, first + 2])
            copy_bytes(source, _u(target) + _u(h * len(ids) + n) * _u(row_bytes), _u(row_bytes))


@compiled(parallel=True)
def _copy_rows(pages: Any, first: Any, page_tokens: Any, ids: Any, target: Any, row_bytes: Any) -> None:
    for h in prange(len(ids)):
        _copy_row(pages, first, page_tokens, h, ids[h], target, row_bytes)


@compiled()
def _score_block(
    queries: Any, dim: Any, address: Any, step: Any, kind: Any, start: Any, stop: Any, scores: Any
) -> None:
    D, found = _u(dim), np.empty(_ROWS * _ROWS, np.float32)
    padded = (D + _u(VECTOR_LENGTH - 1)) // _u(VECTOR_LENGTH) * _u(VECTOR_LENGTH)
    rows = np.zeros(_u(_ROWS) * padded, np.float32)
    for n in range(_u(start), _u(stop), _u(_ROWS)):
        some = min(_u(_ROWS), _u(stop) - n)
        for i in range(some):
            widen(address + (n + i) * step, kind, D, rows, i * padded)
        _dots(queries, padded, rows, padded, found, scores, n, some)


@compiled(parallel=True)
def _score(
    queries: Any, dim: Any, address: Any, head_step: Any, step: Any, kind: Any, blocks: Any, scores: Any
) -> None:
    """Scores in blocks of landmarks, so that few heads still occupy all threads."""
    C = scores.shape[2]
    for part in prange(len(queries) * blocks):
        h, block = part // blocks, part % blocks
        _score_block(
            queries[h], dim, _u(address) + _u(h) * _u(head_step), _u(step), kind, C * block // blocks,
            C * (block + 1) // blocks, scores[h],
        )  # fmt: skip


@compiled()
def _score_tiles_block(
    queries: Any, r: Any, address: Any, firsts: Any, ends: Any, start: Any, stop: Any, group: Any, scores: Any
) -> None:
    """Scores of columns `[start, stop)`; `scores` are flat, the queries of a group one after the other."""
    rank, length, width = _u(r), _u(VECTOR_LENGTH), _u(len(scores) // group)
    padded, tile_bytes = (rank + length - _u(1)) // length * length, rank * length * _u(2)
    found = np.empty(_u(_ROWS) * length, np.float32)
    n, number = start, np.searchsorted(ends, start, side="right")
    while n < stop:
        token = _u(firsts[number] + n - (ends[number - 1] if number else 0))
        end = min(stop, ends[number])
        if number + 1 < len(ends):
            some = min(_u(_TILES_AHEAD), _u(ends[number + 1] - ends[number]) // length + _u(1))
            _prefetch_row(address + _u(firsts[number + 1]) // length * tile_bytes, some * tile_bytes)
        while n < end:
            column = token % length
            some = min(length - column, _u(end - n))
            tile = address + token // length * tile_bytes
            if np.int64(n) + _TILES_AHEAD * VECTOR_LENGTH < end:
                _prefetch_row(tile + _u(_TILES_AHEAD) * tile_bytes, tile_bytes)
            for g in range(_u(0), _u(group), _u(4)):
                if some == length and g + _u(4) <= _u(group):
                    tile_of_four(queries, g * padded, padded, tile, rank, scores, g * width + _u(n), width)
                    continue
                tile_of_four(queries, g * padded, padded, tile, rank, found, _u(0), length)
                for q in range(min(_u(4), _u(group) - g)):
                    for i in range(some):
                        scores[(g + q) * width + _u(n) + i] = found[q * length + column + i]
            n += np.int64(some)
            token += some
        number += 1


@compiled(parallel=True)
def _score_tiles(
    queries: Any, r: Any, address: Any, head_bytes: Any, blocks: Any, firsts: Any, ends: Any, group: Any, scores: Any
) -> None:
    K = scores.shape[1] // group
    for part in prange(len(queries) * blocks):
        h, block = part // blocks, part % blocks
        _score_tiles_block(
            queries[h], r, _u(address) + _u(h) * _u(head_bytes), firsts[h], ends[h],
            K * block // blocks, K * (block + 1) // blocks, group, scores[h],
        )  # fmt: skip


@compiled()
def _top_of_head(scores: Any, near: Any, adds: Any, ids: Any) -> None:
    """The k largest of one KV head: log-sum-exp of each query head in blocks that fit a first-level cache, pooled."""
    count, block = scores.shape[1], 2048
    importance, room, bits = np.empty(count, np.float32), np.empty(block, np.float32), np.empty(block, np.int32)
    importance[:] = np.float32(0) if adds else -np.inf
    for g in range(len(scores)):
        top, total = scores[g, 0], np.float32(0)
        for n in range(count):
            top = max(top, scores[g, n])
        for start in range(0, count, block):
            some = min(block, count - start)
            room[:some] = scores[g, start : start + some]
            exp_less(room, top, some, bits)
            for n in range(some):
                total += room[n]
        lse = top + np.log(total)
        most = max(lse, near[g])
        lse = most + np.log(np.exp(lse - most) + np.exp(near[g] - most))
        if not adds:
            for n in range(count):
                importance[n] = max(importance[n], scores[g, n] - lse)
            continue
        for start in range(0, count, block):
            some = min(block, count - start)
            room[:some] = scores[g, start : start + some]
            exp_less(room, lse, some, bits)
            for n in range(some):
                importance[start + n] += room[n]
    largest(importance.view(np.int32), ids)


@compiled(parallel=True)
def _top(scores: Any, near: Any, adds: Any, ids: Any) -> None:
    for h in prange(len(scores)):
        _top_of_head(scores[h], near[h], adds, ids[h])
