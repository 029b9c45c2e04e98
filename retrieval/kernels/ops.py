"""Scores of landmarks, keys from a low-rank factor, attention over chosen tokens: references and their dispatch.

Tensors on a CUDA device go to the kernels of the same names in ops_triton.py, on the cpu to ops_numba.py where numba is
installed, otherwise to torch. `vq_scores` and its like are in code_ops.py.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from ...compress.kernels.ops import packed_bytes, unpack_bits
from ...core import rotate_pairs
from ..attention import PartialAttention, attend_at, empty_attention
from ..selector import Pooling

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def landmark_scores(queries: Tensor, landmarks: Tensor, *, scale: float) -> Tensor:
    """Scaled inner products of query heads with the landmarks of their KV head, summed in float32.

    Parameters
    ----------
    queries : `[Hq, D]` floating.
    landmarks : `[H, C, D]` of 16 or 32 bits; H divides Hq. Rows are contiguous, but may lie apart.

    Returns
    -------
    `[Hq, C]` float32.
    """
    _check_rows(queries, landmarks, "landmarks")
    if not landmarks.shape[1]:
        return torch.empty(queries.shape[0], 0, device=queries.device)
    if queries.is_cuda:
        from . import ops_triton

        with torch.cuda.device(queries.device):
            return ops_triton.landmark_scores(queries, landmarks, scale)
    kernel = compiled_for_cpu()
    if kernel is not None:
        scores: Tensor = kernel.landmark_scores(queries, landmarks, scale)
        return scores
    grouped = queries.float().view(landmarks.shape[0], -1, queries.shape[1])
    return (grouped @ landmarks.float().mT).flatten(0, 1) * scale


TILE_TOKENS = 16  # as many as the compiled kernel has lanes


def tiled(rows: Tensor) -> Tensor:
    """Rows `[H, S, r]` as tiles `[H, ceil(S / 16), r, 16]`, padded with zeros.

    One dimension of 16 tokens lies side by side, so that a query's number is multiplied with 16 tokens at once.
    """
    H, S, r = rows.shape
    padded = torch.nn.functional.pad(rows, (0, 0, 0, -S % TILE_TOKENS))
    return padded.view(H, -1, TILE_TOKENS, r).transpose(2, 3).contiguous()


def untiled(tiles: Tensor, tokens: int) -> Tensor:
    """The inverse of `tiled`: rows `[H, tokens, r]`."""
    return tiles.transpose(2, 3).flatten(1, 2)[:, :tokens]


def tile_scores(queries: Tensor, tiles: Tensor, firsts: Tensor, counts: Tensor, *, scale: float) -> Tensor:
    """Scores of ranges of tokens `[first, first + count)`, range after range.

    Parameters
    ----------
    queries : `[Hq, r]` floating.
    tiles : by `tiled`, float16.
    firsts, counts : `[H, R]` int64; the counts of each head sum to the same K.

    Returns
    -------
    `[Hq, K]` float32.
    """
    H = tiles.shape[0]
    if tiles.ndim != 4 or tiles.shape[3] != TILE_TOKENS or tiles.dtype != torch.float16 or not tiles.is_contiguous():
        raise ValueError(f"tiles are {tiles.dtype} {list(tiles.shape)}; expected float16 [H, N, r, {TILE_TOKENS}]")
    if queries.ndim != 2 or queries.shape[1] != tiles.shape[2] or not H or queries.shape[0] % H:
        raise ValueError(f"queries are {list(queries.shape)}; expected [Hq, {tiles.shape[2]}], Hq a multiple of {H}")
    if firsts.shape != counts.shape or firsts.ndim != 2 or firsts.shape[0] != H:
        raise ValueError(f"ranges are {list(firsts.shape)} and {list(counts.shape)}; expected [{H}, R] twice")
    if bool(((firsts < 0) | (counts < 0) | (firsts + counts > tiles.shape[1] * TILE_TOKENS)).any()):
        raise ValueError(f"ranges reach beyond {tiles.shape[1]} tiles")
    ends = counts.cumsum(1)
    count = int(ends[0, -1]) if ends.shape[1] else 0
    if bool((ends[:, -1:] != count).any()):
        raise ValueError(f"ranges sum to {ends[:, -1].tolist()} tokens; expected as many for each KV head")
    kernel = None if queries.is_cuda else compiled_for_cpu()
    if kernel is not None and count:
        scores: Tensor = kernel.tile_scores(queries, tiles, firsts, ends, count, scale)
        return scores
    offsets = (firsts - ends + counts).flatten().repeat_interleave(counts.flatten(), output_size=H * count)
    ids = offsets.view(H, count) + torch.arange(count, device=offsets.device)
    if queries.is_cuda and count:
        from . import ops_triton

        with torch.cuda.device(queries.device):
            return ops_triton.tile_scores(queries, tiles, ids, scale)
    heads = torch.arange(H, device=ids.device)[:, None]
    rows = tiles[heads, ids // TILE_TOKENS, :, ids % TILE_TOKENS]
    return ((queries.float() * scale).view(H, -1, queries.shape[1]) @ rows.float().mT).flatten(0, 1)


def top_pooled(
    scores: Tensor,
    kv_heads: int,
    k: int,
    *,
    pooling: Pooling = "max",
    near: Tensor | None = None,
    parts: Tensor | None = None,
) -> Tensor:
    """The k candidates of each KV head with the largest `pooled` softmax; the last ones among equals.

    Sums below the smallest normal float32 may count as equal; on a device, importances are compared in steps of 1/2048
    nat, and those below exp(-32) are equal.

    Parameters
    ----------
    scores : `[Hq, N]` float32, scaled, without NaN; each row has a finite number.
    near : `[Hq]` float32, see `pooled`.
    parts : `[2, Hq, P]` float32, if they are known: the largest score and the sum of exponentials less it of parts of
        each row, equally many columns each.

    Returns
    -------
    `[H, min(k, N)]` int64, ascending.
    """
    if scores.ndim != 2 or scores.dtype != torch.float32 or kv_heads < 1 or scores.shape[0] % kv_heads:
        raise ValueError(
            f"scores are {scores.dtype} {list(scores.shape)}; expected torch.float32 [Hq, N] for {kv_heads} KV heads"
        )
    if pooling not in get_args(Pooling):
        raise ValueError(f"pooling is {pooling!r}; expected one of {', '.join(get_args(Pooling))}")
    if k < 0:
        raise ValueError(f"k is {k}; expected at least 0")
    count = scores.shape[1]
    if near is not None and (near.shape, near.dtype) != (scores.shape[:1], torch.float32):
        raise ValueError(f"near is {near.dtype} {list(near.shape)}; expected torch.float32 [{len(scores)}]")
    if k == 0 or k >= count:
        return torch.arange(min(k, count), device=scores.device).expand(kv_heads, -1).contiguous()
    if scores.is_cuda:
        from . import top_triton

        with torch.cuda.device(scores.device):
            return top_triton.top_pooled(scores, kv_heads, k, pooling, near=near, parts=parts)
    kernel = compiled_for_cpu()
    if kernel is not None:
        if parts is not None and pooling == "max" and k <= parts.shape[2] and count == TILE_TOKENS * parts.shape[2]:
            of_parts = compiled_for_cpu("parts_numba")
            if of_parts is not None:
                best: Tensor = of_parts.top_of_parts(scores, parts, kv_heads, k, near)
                return best
        ids: Tensor = kernel.top_pooled(scores, kv_heads, k, pooling, near)
        return ids
    total = scores.logsumexp(1) if near is None else torch.logaddexp(scores.logsumexp(1), near)
    grouped = (scores - total[:, None]).view(kv_heads, -1, count)
    importance = grouped.amax(1) if pooling == "max" else grouped.logsumexp(1)
    backwards = importance.flip(1).argsort(dim=1, descending=True, stable=True)[:, :k]
    return (count - 1 - backwards).sort(dim=1).values


def rebuild_keys(
    factor: Tensor,
    basis: Tensor,
    ids: Tensor,
    *,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
) -> Tensor:
    """Keys of chosen tokens from their low-rank factors, rotated: `(factor[id] * scale) @ basis + bias`.

    Parameters
    ----------
    factor : `[S, r]` floating or int8, shared by the heads; or `[S, packed_bytes(r, 4)]` uint8, codes of 4 bits
        by `pack_bits` that stand for themselves less 8.
    basis : `[H, r, D]` floating.
    ids : `[H, K]` int64 rows of the factor; -1 makes zeros.
    scale : `[r]` float32, of columns; None for 1.
    bias : `[H, D]` float32, what a row of zeros stands for before rotation; None for 0.
    cos, sin : `[S, D / 2]` float32 (`RopeSpec.cos_sin`), angles of the factor's tokens; None leaves keys unrotated.
    interleaved : channel pairs are (2i, 2i + 1) instead of (i, i + D / 2).

    Returns
    -------
    `[H, K, D]` of the basis's dtype.
    """
    _check_rebuild(factor, basis, ids, scale, bias, cos, sin)
    if not ids.numel():
        return basis.new_empty(*ids.shape, basis.shape[2])
    if basis.is_cuda:
        from . import ops_triton

        with torch.cuda.device(basis.device):
            return ops_triton.rebuild_keys(factor, basis, ids, scale, bias, cos, sin, interleaved)
    numbers = numbers_of(factor[ids.clamp(min=0)], basis.shape[1])
    # columns' scales go into the basis, which is smaller
    x = numbers @ (basis.float() if scale is None else basis.float() * scale[:, None])
    if bias is not None:
        x = x + bias[:, None]
    if cos is not None and sin is not None:
        x = rotate_pairs(x, cos[ids.clamp(min=0)], sin[ids.clamp(min=0)], interleaved)
    return x.masked_fill_((ids < 0)[..., None], 0.0).to(basis.dtype)


def numbers_of(stored: Tensor, rank: int) -> Tensor:
    """Stored rows of a factor (see `rebuild_keys`) as float32, without scale and bias."""
    return unpack_bits(stored, 4, rank).float() - 8 if stored.dtype == torch.uint8 else stored.float()


def gather_attend(queries: Tensor, keys: Tensor, values: Tensor, ids: Tensor, *, scale: float) -> PartialAttention:
    """Attention of one query token over the rows `ids` of a context, without a copy of them.

    Parameters
    ----------
    queries : `[Hq, D]` floating.
    keys, values : `[H, S, D]`, `[H, S, Dv]` of 16 or 32 bits; rows are contiguous, but may lie apart.
    ids : `[H, K]` int64, no token twice in a row; -1 for none.
    scale : factor on the scores.

    Returns
    -------
    `[Hq, Dv]` and `[Hq]` float32, see `attend`.
    """
    _check_rows(queries, keys, "keys")
    _check_rows(queries, values, "values", width=values.shape[-1])
    if keys.shape[:2] != values.shape[:2]:
        raise ValueError(f"keys are {list(keys.shape)}, values {list(values.shape)}; expected equal heads and tokens")
    check_ids(ids, keys.shape[0], keys.shape[1])
    if not ids.numel():
        return empty_attention(queries.shape[0], values.shape[-1], queries.device)
    if queries.is_cuda:
        from . import attend_triton

        with torch.cuda.device(queries.device):
            return attend_triton.gather_attend(queries, keys, values, ids, scale)
    kernel = compiled_for_cpu()
    if kernel is None:
        return attend_at(queries, keys, values, ids, scale=scale)
    page = np.array([[*kernel.row_addresses(keys), *kernel.row_addresses(values)]], np.int64)
    dtypes = (keys.dtype, values.dtype)
    found: PartialAttention = kernel.gather_attend(queries, page, keys.shape[1], dtypes, values.shape[2], ids, scale)
    return found


def check_ids(ids: Tensor, kv_heads: int, tokens: int) -> None:
    """Raises `ValueError` for what is not `[H, K]` int64 from -1 to below `tokens`."""
    if ids.ndim != 2 or ids.shape[0] != kv_heads or ids.dtype != torch.int64:
        raise ValueError(f"ids are {ids.dtype} {list(ids.shape)}; expected torch.int64 [{kv_heads}, K]")
    if ids.numel():
        low, high = (int(bound) for bound in ids.aminmax())
        if low < -1 or high >= tokens:
            raise ValueError(f"ids reach from {low} to {high}; expected tokens of [0, {tokens}), or -1")


@cache
def compiled_for_cpu(kernels: str = "ops_numba") -> ModuleType | None:
    """The module of compiled kernels in this folder, or None if numba is not installed."""
    # numba takes a second to import, and only attention needs it
    try:
        return import_module(f".{kernels}", __package__)
    except ImportError:
        return None


def _check_rows(queries: Tensor, rows: Tensor, name: str, width: int | None = None) -> None:
    width = queries.shape[-1] if width is None else width
    if queries.ndim != 2 or not queries.is_floating_point():
        raise ValueError(f"queries are {queries.dtype} {list(queries.shape)}; expected floats [Hq, D]")
    if rows.ndim != 3 or rows.shape[2] != width or not rows.shape[0] or queries.shape[0] % rows.shape[0]:
        raise ValueError(
            f"{name} are {list(rows.shape)}; expected [H, tokens, {width}] with H a divisor of {queries.shape[0]}"
        )
    if rows.dtype not in _FLOATS or (width > 1 and rows.stride(-1) != 1):
        raise ValueError(f"{name} are {rows.dtype} in steps of {list(rows.stride())}; expected 16 or 32 bits in rows")
    if rows.device != queries.device:
        raise ValueError(f"{name} are on {rows.device}, queries on {queries.device}; expected one device")


def _check_rebuild(
    factor: Tensor,
    basis: Tensor,
    ids: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
) -> None:
    if basis.ndim != 3 or not basis.is_floating_point():
        raise ValueError(f"basis is {basis.dtype} {list(basis.shape)}; expected floats [H, r, D]")
    H, r, D = basis.shape
    is_known = factor.is_floating_point() or factor.dtype in (torch.int8, torch.uint8)
    width = packed_bytes(r, 4) if factor.dtype == torch.uint8 else r
    if factor.ndim != 2 or factor.shape[1] != width or not is_known:
        raise ValueError(f"factor is {factor.dtype} {list(factor.shape)}; expected floats, int8 or packed [S, {width}]")
    check_ids(ids, H, factor.shape[0])
    if scale is not None and (scale.shape != (r,) or scale.dtype != torch.float32):
        raise ValueError(f"scale is {scale.dtype} {list(scale.shape)}; expected torch.float32 [{r}]")
    if bias is not None and (bias.shape != (H, D) or bias.dtype != torch.float32):
        raise ValueError(f"bias is {bias.dtype} {list(bias.shape)}; expected torch.float32 [{H}, {D}]")
    if cos is None and sin is None:
        return
    for name, table in (("cos", cos), ("sin", sin)):
        if table is None or D % 2 or table.dtype != torch.float32 or table.shape != (factor.shape[0], D // 2):
            found = None if table is None else f"{table.dtype} {list(table.shape)}"
            raise ValueError(f"{name} is {found}; expected torch.float32 [{factor.shape[0]}, {D // 2}]")
