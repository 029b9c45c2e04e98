"""Scores and choices of tokens by vector-quantiser codes: the reference in torch, and the dispatch to kernels.

Tokens of one code share their score, so codes are ranked instead of tokens: the softmax over tokens needs only the
number of tokens of each code, and one pass finds the tokens of the chosen codes. Tensors on a CUDA device go to
code_ops_triton.py, on the cpu to code_ops_numba.py where numba is installed.

If scores depend on a token's distance, tokens form bands, each with its own table. `band_starts` are the first tokens
of all bands but the first, ascending; code c of band b of B is numbered `b C / B + c` among C codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from ..selector import Pooling
from .ops import compiled_for_cpu
from .thresholds import thresholds

CODE_BITS = (12, 16)


def packed_code_bytes(tokens: int, bits: int) -> int:
    """Bytes that a row of so many codes takes: two of 12 bits share three bytes, one alone has two."""
    _check_bits(bits)
    return (tokens * bits + 7) // 8


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """`[..., T]` integers below `2 ** bits` to `[..., packed_code_bytes(T, bits)]` uint8, little endian: codes a, b of
    12 bits are the bytes of `a | b << 12`.
    """
    _check_bits(bits)
    codes = codes.int()
    if bits == 16:
        return torch.stack([codes & 255, codes >> 8], -1).flatten(-2).to(torch.uint8)
    tokens = codes.shape[-1]
    pairs = torch.nn.functional.pad(codes, (0, tokens % 2)).unflatten(-1, (-1, 2))
    word = pairs[..., 0] | pairs[..., 1] << 12
    packed = torch.stack([word & 255, word >> 8 & 255, word >> 16], -1).flatten(-2).to(torch.uint8)
    return packed[..., : packed_code_bytes(tokens, bits)]


def unpack_codes(packed: Tensor, bits: int, tokens: int) -> Tensor:
    """The inverse of `pack_codes`: `[..., T]` int64. Bytes behind the last code are room, and ignored.

    Raises
    ------
    ValueError : fewer bytes than `tokens` codes take.
    """
    _check_packed(packed, bits, tokens)
    if bits == 16:
        codes: Tensor = packed[..., : 2 * tokens].long().unflatten(-1, (-1, 2))
        return codes[..., 0] | codes[..., 1] << 8
    count = -(-tokens // 2) * 3
    needed = packed[..., :count].long()
    triples = torch.nn.functional.pad(needed, (0, count - needed.shape[-1])).unflatten(-1, (-1, 3))
    word = triples[..., 0] | triples[..., 1] << 8 | triples[..., 2] << 16
    return torch.stack([word & 4095, word >> 12], -1).flatten(-2)[..., :tokens]


def code_counts(packed: Tensor, tokens: int, codes: int, *, bits: int = 12, band_starts: Sequence[int] = ()) -> Tensor:
    """Number of tokens of each code: `[H, bytes]` uint8 to `[H, C]` int64, all bands side by side.

    Raises
    ------
    ValueError : a packed code is not below `codes / B`.
    """
    bands = _check(packed, bits, tokens, codes, band_starts)
    if packed.is_cuda:
        from . import code_ops_triton

        with torch.cuda.device(packed.device):
            counts = code_ops_triton.code_counts(packed, bits, tokens, band_starts)
    elif (kernel := compiled_for_cpu("code_ops_numba")) is not None:
        counts = kernel.code_counts(packed, bits, tokens, band_starts)
    else:
        found = in_bands(unpack_codes(packed, bits, tokens), 1 << bits, band_starts)
        counts = torch.zeros(len(packed), len(band_starts) + 1 << bits, dtype=torch.int64)
        counts.scatter_add_(1, found, torch.ones_like(found))
    counts = counts.view(len(packed), -1, 1 << bits)
    if bool(counts[..., bands:].any()):
        raise ValueError(f"a code is {int(counts.any(0).any(0).nonzero().max())}; expected below {bands}")
    return counts[..., :bands].flatten(1).contiguous()


def in_bands(codes: Tensor, count: int, band_starts: Sequence[int]) -> Tensor:
    """Codes `[H, T]`, each below `count`, numbered over all bands."""
    first = torch.tensor(band_starts, dtype=torch.int64, device=codes.device)
    return codes + count * torch.bucketize(torch.arange(codes.shape[1], device=codes.device), first, right=True)


def vq_scores(table: Tensor, packed: Tensor, tokens: int, *, bits: int = 12, band_starts: Sequence[int] = ()) -> Tensor:
    """The scores of tokens, which are those of their codes.

    Parameters
    ----------
    table : `[Hq, C]` floating: each query head with each code of its KV head.
    packed : `[H, bytes]` uint8, see `pack_codes`; H divides Hq, and no code is `C / B` or more (not checked:
        `code_counts` does).

    Returns
    -------
    `[Hq, T]` float32.
    """
    _check_table(table, packed, bits, tokens, band_starts)
    if packed.is_cuda:
        from . import code_ops_triton

        with torch.cuda.device(packed.device):
            return code_ops_triton.vq_scores(table, packed, bits, tokens, band_starts)
    kernel = compiled_for_cpu("code_ops_numba")
    if kernel is not None:
        scores: Tensor = kernel.vq_scores(table, packed, bits, tokens, band_starts)
        return scores
    codes = in_bands(unpack_codes(packed, bits, tokens), table.shape[1] // (len(band_starts) + 1), band_starts)
    return table.float().gather(1, codes.repeat_interleave(table.shape[0] // packed.shape[0], 0))


def code_importance(table: Tensor, counts: Tensor, *, pooling: Pooling = "max") -> Tensor:
    """Importance of a token of each code for its KV head, without a pass over the tokens.

    It is the logarithm of `pooled`: of the softmax over all tokens for each query head, then the maximum or sum over
    the group.

    Parameters
    ----------
    table : `[Hq, C]` scaled scores.
    counts : `[H, C]` int64, by `code_counts`; a row of zeros gives -inf.

    Returns
    -------
    `[H, C]` float32; codes without tokens have a number, too.
    """
    H, C = counts.shape
    if table.ndim != 2 or table.shape[1] != C or not H or table.shape[0] % H:
        raise ValueError(f"table is {list(table.shape)}; expected [Hq, {C}] of query heads that share {H} evenly")
    if pooling not in get_args(Pooling):
        raise ValueError(f"pooling is {pooling!r}; expected one of {', '.join(get_args(Pooling))}")
    grouped = table.float().view(H, -1, C)
    lse = (grouped + counts.float().log()[:, None]).logsumexp(-1, keepdim=True)
    grouped = grouped - lse.where(lse > -torch.inf, torch.inf)
    return grouped.amax(1) if pooling == "max" else grouped.logsumexp(1)


def vq_select(
    importance: Tensor,
    packed: Tensor,
    tokens: int,
    counts: Tensor,
    budget: int,
    *,
    bits: int = 12,
    band_starts: Sequence[int] = (),
) -> Tensor:
    """The tokens of the most important codes of each KV head, as many as the budget allows.

    Of the tokens of equal importance that are not all taken, the most recent are.

    Parameters
    ----------
    importance : `[H, C]` float32 without NaN, such as by `code_importance`.
    packed, counts, band_starts : see `vq_scores`, `code_counts`; they are of the same tokens.

    Returns
    -------
    `[H, min(budget, T)]` int64, ascending, the first token being 0.
    """
    _check_table(importance, packed, bits, tokens, band_starts)
    if importance.shape != counts.shape or len(counts) != len(packed) or counts.dtype != torch.int64:
        raise ValueError(
            f"importance is {list(importance.shape)}, counts {counts.dtype} {list(counts.shape)}; expected "
            f"[{len(packed)}, C] and torch.int64 [{len(packed)}, C]"
        )
    if budget < 0:
        raise ValueError(f"budget is {budget}; expected at least 0 tokens")
    if budget == 0 or budget >= tokens:
        return torch.arange(min(budget, tokens), device=packed.device).expand(len(packed), -1).contiguous()
    if bool((counts.sum(1) != tokens).any()):
        raise ValueError(f"counts add up to {counts.sum(1).tolist()}; expected {tokens} tokens in each row")
    if packed.is_cuda:
        from . import code_ops_triton

        with torch.cuda.device(packed.device):
            return code_ops_triton.vq_select(importance.float(), packed, bits, tokens, counts, budget, band_starts)
    kernel = compiled_for_cpu("code_ops_numba")
    if kernel is not None:
        ids: Tensor = kernel.vq_select(importance.float(), packed, bits, tokens, counts, budget, band_starts)
        return ids
    threshold, skipped = thresholds(importance, counts, budget)
    found = vq_scores(importance, packed, tokens, bits=bits, band_starts=band_starts)
    at = found == threshold[:, None]
    chosen = (found > threshold[:, None]) | at & (at.cumsum(1) > skipped[:, None])
    return chosen.nonzero()[:, 1].view(len(packed), budget)


def _check_bits(bits: int) -> None:
    if bits not in CODE_BITS:
        raise ValueError(f"bits is {bits}; expected one of {', '.join(map(str, CODE_BITS))}")


def _check_packed(packed: Tensor, bits: int, tokens: int) -> None:
    needed = packed_code_bytes(tokens, bits)
    if packed.dtype != torch.uint8 or packed.ndim < 1 or packed.shape[-1] < needed:
        raise ValueError(
            f"packed is {packed.dtype} {list(packed.shape)}; {tokens} codes of {bits} bits take {needed} bytes a row"
        )


def _check(packed: Tensor, bits: int, tokens: int, codes: int, band_starts: Sequence[int]) -> int:
    """Codes of one band."""
    _check_packed(packed, bits, tokens)
    bands = len(band_starts) + 1
    if packed.ndim != 2 or not len(packed) or codes % bands:
        raise ValueError(
            f"packed is {list(packed.shape)}, codes {codes}; expected [H, bytes] and a multiple of {bands}"
        )
    if list(band_starts) != sorted(band_starts) or (
        len(band_starts) and not 0 <= band_starts[0] <= band_starts[-1] <= tokens
    ):
        raise ValueError(f"band_starts are {list(band_starts)}; expected ascending tokens of [0, {tokens}]")
    return codes // bands


def _check_table(table: Tensor, packed: Tensor, bits: int, tokens: int, band_starts: Sequence[int]) -> None:
    if table.ndim != 2 or not table.is_floating_point():
        raise ValueError(f"table is {table.dtype} {list(table.shape)}; expected floats [Hq, C]")
    _check(packed, bits, tokens, table.shape[1], band_starts)
    if table.shape[0] % packed.shape[0]:
        raise ValueError(f"{table.shape[0]} query heads cannot share {packed.shape[0]} KV heads evenly")
