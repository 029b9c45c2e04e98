"""Keys of two bits a channel, values of one: how they are made, scores and sums: references and their dispatch.

Tensors on a CUDA device go to quantized_ops_triton.py, on the cpu to quantized_ops_numba.py where numba is installed.

Tokens form groups of 256. A key is stored as `mean + scale * mix^T (code - 1.5)`: the mean of its group, a scale of its
own and a code from 0 to 3 for each channel after an orthonormal mixing of channels. Sixteen codes share a word of 32
bits, the code of channel `16 w + i` in bits 2 i and 2 i + 1 of word w; words of neighbouring tokens lie side by side.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .ops import compiled_for_cpu

GROUP_TOKENS = 256
WORD_CODES = 16  # codes of a word
WORD_SIGNS = 32  # signs of a word
STEP = 0.9957  # between levels, in deviations: the least mean squared error of 4 even steps for a normal distribution
MIDDLE = 1.5  # the code that would stand for the mean

_HALF = 65504.0


@lru_cache(maxsize=16)
def channel_mixing(dim: int) -> Tensor:
    """An orthonormal matrix `[D, D]` float32 that spreads each channel over many: the same for all keys and runs.

    Channels are put in a random order and given random signs, then a Hadamard matrix mixes those of each run of P, the
    largest power of two that divides D.
    """
    random = torch.Generator().manual_seed(0)
    order, signs = torch.randperm(dim, generator=random), torch.randint(0, 2, (dim,), generator=random) * 2.0 - 1.0
    width = dim & -dim
    block = torch.ones(1, 1)
    while len(block) < width:
        block = torch.cat((torch.cat((block, block), 1), torch.cat((block, -block), 1)))
    mixed = torch.kron(torch.eye(dim // width), block / width**0.5) * signs
    found = torch.empty_like(mixed)
    found[:, order] = mixed
    return found


def quantize_keys(keys: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of groups of mixed keys.

    The scale makes the product of a key with its own code exact, as RaBitQ does (Gao & Long, arXiv 2405.12497), so that
    scores of keys that a query points at are not biased.

    Parameters
    ----------
    keys : `[H, n, 256, D]` float32, mixed.
    means : `[H, n, D]` float32, mixed.

    Returns
    -------
    words `[H, n, ceil(D / 16), 256]` int32, scales `[H, n, 256]` float16.
    """
    rest = keys - means[:, :, None]
    energy = rest.square().sum(-1, keepdim=True)
    deviation = (energy / keys.shape[-1]).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    codes = (rest / (STEP * deviation) + MIDDLE).round().clamp(0, 3)
    along = ((codes - MIDDLE) * rest).sum(-1, keepdim=True)
    scales = torch.where(energy > 0, energy / along.clamp(min=torch.finfo(torch.float32).tiny), 0.0)
    words = -(-keys.shape[-1] // WORD_CODES)
    padded = torch.nn.functional.pad(codes.long(), (0, words * WORD_CODES - keys.shape[-1]))
    shifts = 2 * torch.arange(WORD_CODES, device=keys.device)
    packed = (padded.unflatten(-1, (words, WORD_CODES)) << shifts).sum(-1)
    packed = packed - ((packed >> 31) << 32)  # the same 32 bits, signed
    return packed.to(torch.int32).transpose(2, 3).contiguous(), scales[..., 0].clamp(max=_HALF).half()


def dequantize_keys(words: Tensor, scales: Tensor, means: Tensor) -> Tensor:
    """The mixed keys that codes stand for, `[H, n, 256, D]` float32; see `quantize_keys`."""
    shifts = 2 * torch.arange(WORD_CODES, device=words.device)
    codes = ((words.transpose(2, 3).long()[..., None] >> shifts) & 3).flatten(3)[..., : means.shape[-1]]
    return (codes - MIDDLE) * scales.float()[..., None] + means.float()[:, :, None]


def quantized_scores(queries: Tensor, words: Tensor, scales: Tensor, means: Tensor, *, scale: float) -> Tensor:
    """Scaled inner products of query heads with the quantised keys of their KV head.

    Parameters
    ----------
    queries : `[Hq, D]` floating, mixed (`queries @ channel_mixing(D).T`); H divides Hq.
    words, scales : by `quantize_keys`.
    means : `[H, n, D]` float16.

    Returns
    -------
    `[Hq, 256 n]` float32.
    """
    H, n, W, size = words.shape
    D = queries.shape[-1]
    if size != GROUP_TOKENS or words.dtype != torch.int32 or W != -(-D // WORD_CODES) or not words[0].is_contiguous():
        raise ValueError(
            f"words are {words.dtype} {list(words.shape)}; expected contiguous int32 "
            f"[H, n, {-(-D // WORD_CODES)}, {GROUP_TOKENS}] for {D} channels"
        )
    if queries.ndim != 2 or not H or queries.shape[0] % H or not queries.is_floating_point():
        raise ValueError(f"queries are {queries.dtype} {list(queries.shape)}; expected floats [Hq, D] for {H} KV heads")
    if (scales.shape, scales.dtype) != ((H, n, size), torch.float16) or not scales[0].is_contiguous():
        raise ValueError(f"scales are {scales.dtype} {list(scales.shape)}; expected float16 [{H}, {n}, {size}]")
    if (means.shape, means.dtype) != ((H, n, D), torch.float16) or not means[0].is_contiguous():
        raise ValueError(f"means are {means.dtype} {list(means.shape)}; expected float16 [{H}, {n}, {D}]")
    if not n:
        return torch.empty(queries.shape[0], 0, device=queries.device)
    if queries.is_cuda:
        from . import quantized_ops_triton

        with torch.cuda.device(queries.device):
            return quantized_ops_triton.quantized_scores(queries, words, scales, means, scale)[0]
    kernel = compiled_for_cpu("quantized_ops_numba")
    if kernel is not None:
        scores: Tensor = kernel.quantized_scores(queries, words, scales, means, scale)
        return scores
    keys = dequantize_keys(words, scales, means).flatten(1, 2)
    return (queries.float().view(H, -1, D) @ keys.mT).flatten(0, 1) * scale


def quantize_values(values: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
    """Signs and scales of groups of mixed values: the scale is that of the least squared error.

    Mixed channels are nearly normally distributed, so about a third (1 - 2 / pi) of the variance within a group is
    lost.

    Parameters
    ----------
    values : `[H, n, 256, Dv]` float32, mixed.
    means : `[H, n, Dv]` float32, mixed.

    Returns
    -------
    words `[H, n, 8, Dv]` int32, scales `[H, n, 256]` float16.
    """
    rest = values - means[:, :, None]
    shifts = torch.arange(WORD_SIGNS, device=values.device)[:, None]
    packed = ((rest > 0).long().unflatten(2, (-1, WORD_SIGNS)) << shifts).sum(3)
    packed = packed - ((packed >> 31) << 32)  # the same 32 bits, signed
    return packed.to(torch.int32), rest.abs().mean(-1).clamp(max=_HALF).half()


def dequantize_values(words: Tensor, scales: Tensor, means: Tensor) -> Tensor:
    """The mixed values that signs stand for, `[H, n, 256, Dv]` float32; see `quantize_values`."""
    shifts = torch.arange(WORD_SIGNS, device=words.device)[:, None]
    signs = 2 * ((words.long()[:, :, :, None] >> shifts) & 1).flatten(2, 3) - 1
    return signs * scales.float()[..., None] + means.float()[:, :, None]


def quantized_sums(weights: Tensor, words: Tensor, scales: Tensor, means: Tensor) -> Tensor:
    """Weighted sums of quantised values, for query heads.

    Parameters
    ----------
    weights : `[Hq, 256 n]` float32, at least 0; H divides Hq.
    words, scales : by `quantize_values`.
    means : `[H, n, Dv]` float16.

    Returns
    -------
    `[Hq, Dv]` float32, mixed.
    """
    H, n, rows, D = words.shape
    if rows != GROUP_TOKENS // WORD_SIGNS or words.dtype != torch.int32 or not words[0].is_contiguous():
        raise ValueError(
            f"words are {words.dtype} {list(words.shape)}; expected contiguous int32 "
            f"[H, n, {GROUP_TOKENS // WORD_SIGNS}, Dv]"
        )
    tokens = n * GROUP_TOKENS
    is_fitting = weights.ndim == 2 and weights.dtype == torch.float32 and weights.shape[1] == tokens
    if not is_fitting or not H or weights.shape[0] % H:
        raise ValueError(
            f"weights are {weights.dtype} {list(weights.shape)}; expected float32 [Hq, {tokens}] for {H} KV heads"
        )
    is_fitting = (scales.shape, scales.dtype) == ((H, n, GROUP_TOKENS), torch.float16)
    if not is_fitting or not scales[0].is_contiguous():
        raise ValueError(f"scales are {scales.dtype} {list(scales.shape)}; expected float16 [{H}, {n}, {GROUP_TOKENS}]")
    if (means.shape, means.dtype) != ((H, n, D), torch.float16) or not means[0].is_contiguous():
        raise ValueError(f"means are {means.dtype} {list(means.shape)}; expected float16 [{H}, {n}, {D}]")
    if not n:
        return torch.zeros(weights.shape[0], D, device=weights.device)
    if weights.is_cuda:
        from . import quantized_ops_triton

        with torch.cuda.device(weights.device):
            return quantized_ops_triton.quantized_sums(weights, words, scales, means)
    kernel = compiled_for_cpu("quantized_values_numba")
    if kernel is not None:
        sums: Tensor = kernel.quantized_sums(weights, words, scales, means)
        return sums
    values = dequantize_values(words, scales, means).flatten(1, 2)
    return (weights.view(H, -1, tokens) @ values).flatten(0, 1)
