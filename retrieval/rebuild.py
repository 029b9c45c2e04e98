"""Keys of chosen tokens from their low-rank rows."""

from __future__ import annotations

import torch
from torch import Tensor

from ..compress.ops import unpack_bits
from ..core import rotate_pairs


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
    """Keys of chosen tokens from their low-rank rows, rotated: `(factor[id] * scale) @ basis + bias` for each head.

    Parameters
    ----------
    factor : `[S, r]` floating or int8, shared by the heads; or `[S, packed_bytes(r, 4)]` uint8, codes of 4 bits by
        `pack_bits` that stand for themselves less 8.
    basis : `[H, r, D]` floating.
    ids : `[H, K]` int64 rows of the factor; -1 makes zeros.
    scale : `[r]` float32, of columns; None for 1.
    bias : `[H, D]` float32, what rows of zeros stand for before rotation; None for 0.
    cos, sin : `[S, D / 2]` float32 (`RopeSpec.cos_sin`), angles of the factor's tokens; None leaves keys unrotated.
    interleaved : channel pairs are (2i, 2i + 1) instead of (i, i + D / 2).

    Returns
    -------
    `[H, K, D]` of the basis's dtype.
    """
    rows = ids.clamp(min=0)
    # columns' scales go into the basis, which is smaller
    keys = numbers_of(factor[rows], basis.shape[1]) @ (
        basis.float() if scale is None else basis.float() * scale[:, None]
    )
    if bias is not None:
        keys = keys + bias[:, None]
    if cos is not None and sin is not None:
        keys = rotate_pairs(keys, cos[rows], sin[rows], interleaved)
    return keys.masked_fill_((ids < 0)[..., None], 0.0).to(basis.dtype)


def numbers_of(stored: Tensor, rank: int) -> Tensor:
    """Rows as float32, without scale and centre."""
    return unpack_bits(stored, 4, rank).float() - 8 if stored.dtype == torch.uint8 else stored.float()
