"""Keys of two bits a channel, values of one: how they are made, scores, and the rest: references and their dispatch.

Tensors on a CUDA device go to quantized_ops_triton.py, on the cpu to quantized_ops_numba.py where numba is installed.

Tokens form groups of 256. A key is stored as `mean + scale * mix^T (code - 1.5)`: the mean of its group, a scale of its
own and a code from 0 to 3 for each channel after an orthonormal mixing of channels. Sixteen codes share a word of 32
bits, the code of channel `16 w + i` in bits 2 i and 2 i + 1 of word w; words of neighbouring tokens lie side by side.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..attention import PartialAttention
from .ops import compiled_for_cpu

GROUP_TOKENS = 256
PART_TOKENS = 16  # that share a largest score and a sum of exponentials
WORD_CODES = 16  # codes of a word
WORD_SIGNS = 32  # signs of a word
LIGHT = 2.0**-13  # see attend_to_rest
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
    `[Hq, 256 n]` float32. On a processor with numba, what a query has in common with codes is rounded to 8 bits of its
    largest channel: scores are off by less than a hundredth of their deviation. On a device, to half precision.
    """
    return scores_and_parts(queries, words, scales, means, scale=scale)[0]


def scores_and_parts(
    queries: Tensor, words: Tensor, scales: Tensor, means: Tensor, *, scale: float, skip: int = 0, padding: int = 0
) -> tuple[Tensor, Tensor]:
    """The same, and what a softmax of the scores needs, summed when they are made.

    Parameters
    ----------
    skip : so many first tokens get a score of -inf.
    padding : so many places behind the last token are left to the caller to fill, a multiple of 256; their parts, too.

    Returns
    -------
    Scores `[Hq, 256 n + padding]`, and of parts of each row of equally many tokens the largest score and the sum of
    exponentials less that, `[2, Hq, P]`, see `parts_of`; both float32.
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
    if padding % size:
        raise ValueError(f"padding is {padding}; expected a multiple of {size}")
    if not 0 <= skip <= n * size:
        raise ValueError(f"skip is {skip}; expected some of {n * size} tokens")
    kernel = None if queries.is_cuda else compiled_for_cpu("quantized_ops_numba")
    if kernel is not None and skip <= size:
        found: tuple[Tensor, Tensor] = kernel.scores_and_parts(queries, words, scales, means, scale, skip, padding)
        return found
    size = GROUP_TOKENS if queries.is_cuda and n else PART_TOKENS  # of a part
    if queries.is_cuda and n:
        from . import quantized_ops_triton

        with torch.cuda.device(queries.device):
            scores, parts = quantized_ops_triton.quantized_scores(queries, words, scales, means, scale)
    else:
        keys = dequantize_keys(words, scales, means).flatten(1, 2)
        scores = (queries.float().view(H, -1, D) @ keys.mT).flatten(0, 1) * scale
        parts = parts_of(scores)
    if skip:
        scores[:, :skip] = -torch.inf
        of_first = -(-skip // size)
        parts[:, :, :of_first] = parts_of(scores[:, : of_first * size], size)
    pad = torch.nn.functional.pad
    return pad(scores, (0, padding)), pad(parts, (0, padding // size))


def parts_of(scores: Tensor, size: int = PART_TOKENS) -> Tensor:
    """Of each `size` tokens of rows `[Hq, N]` the largest score and the sum of exponentials less that, `[2, Hq, P]`."""
    pieces = scores.unflatten(1, (-1, size))
    tops = pieces.amax(2)
    return torch.stack((tops, (pieces - tops.clamp(min=torch.finfo(torch.float32).min)[..., None]).exp().sum(2)))


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
    H, n, _, D = words.shape
    _expect_coded_values(words, scales, means)
    tokens = n * GROUP_TOKENS
    is_fitting = weights.ndim == 2 and weights.dtype == torch.float32 and weights.shape[1] == tokens
    if not is_fitting or not H or weights.shape[0] % H:
        raise ValueError(
            f"weights are {weights.dtype} {list(weights.shape)}; expected float32 [Hq, {tokens}] for {H} KV heads"
        )
    if not n:
        return torch.zeros(weights.shape[0], D, device=weights.device)
    if weights.is_cuda:
        from . import quantized_ops_triton

        with torch.cuda.device(weights.device):
            return quantized_ops_triton.quantized_sums(weights, words, scales, means)
    values = dequantize_values(words, scales, means).flatten(1, 2)
    return (weights.view(H, -1, tokens) @ values).flatten(0, 1)


def attend_to_rest(
    scores: Tensor,
    parts: Tensor,
    ids: Tensor,
    words: Tensor,
    scales: Tensor,
    means: Tensor,
    behind: Tensor,
    *,
    begin: int,
    light: float = LIGHT,
) -> PartialAttention:
    """Attention over all tokens but `ids`, each by its score and what its value's signs stand for.

    The mean of its group stands for a token whose weight is below `light`. That adds at most this share of the variance
    of values to the error, as far as values do not follow the weights. On a device every token counts by its signs.

    Parameters
    ----------
    scores, parts : by `scores_and_parts`, what lies behind the last token filled with -inf.
    ids : `[H, K]` int64 columns of the scores, ascending; -1 for none.
    words, scales : by `quantize_values`, of the first n groups of the scores.
    means : `[H, n, Dv]` float16.
    behind : `[H, m, Dv]` float32, mixed: what stands for the values of m columns from `begin` on, behind those groups.
    light : of all weights, those of the tokens `ids` not counted.

    Returns
    -------
    Output `[Hq, Dv]`, mixed, and log-sum-exp `[Hq]`, both float32; zeros and -inf where nothing is left.
    """
    (H, n), tokens = means.shape[:2], means.shape[1] * GROUP_TOKENS
    _expect_coded_values(words, scales, means)
    if begin < tokens or begin + behind.shape[1] > scores.shape[1] or scores.shape[1] % GROUP_TOKENS:
        raise ValueError(
            f"scores are of {scores.shape[1]} tokens; expected whole groups, {n} of them coded, and "
            f"{behind.shape[1]} tokens from {begin} on"
        )
    kernel = None if scores.is_cuda else compiled_for_cpu("parts_numba")
    if kernel is not None:
        found: PartialAttention = kernel.attend_to_rest(scores, parts, ids, words, scales, means, behind, begin, light)
        return found
    group = scores.shape[0] // H
    left = torch.nn.functional.pad(scores, (0, 1), value=-torch.inf)  # a token more, which ids of none name
    at = torch.where(ids < 0, scores.shape[1], ids).to(left.device)
    left.scatter_(1, at.repeat_interleave(group, 0), -torch.inf)
    peak = left.amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    weights = left.sub_(peak).exp_()[:, :-1]
    total = weights.sum(1)
    weights /= total.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    out = weights[:, begin : begin + behind.shape[1]].unflatten(0, (H, -1)) @ behind
    coded = weights[:, :tokens].contiguous()
    if scores.is_cuda:
        out += quantized_sums(coded, words, scales, means).view_as(out)
    elif n:
        out += coded.view(H, group, n, -1).sum(-1) @ means.float()
        coded *= coded >= light
        signed = dequantize_values(words, scales, torch.zeros_like(means)).flatten(1, 2)
        out += coded.view(H, group, -1) @ signed
    return out.flatten(0, 1), peak[:, 0] + total.log()


def _expect_coded_values(words: Tensor, scales: Tensor, means: Tensor) -> None:
    H, n, rows, D = words.shape
    if rows != GROUP_TOKENS // WORD_SIGNS or words.dtype != torch.int32 or not words[0].is_contiguous():
        raise ValueError(
            f"words are {words.dtype} {list(words.shape)}; expected contiguous int32 "
            f"[H, n, {GROUP_TOKENS // WORD_SIGNS}, Dv]"
        )
    is_fitting = (scales.shape, scales.dtype) == ((H, n, GROUP_TOKENS), torch.float16)
    if not is_fitting or not scales[0].is_contiguous():
        raise ValueError(f"scales are {scales.dtype} {list(scales.shape)}; expected float16 [{H}, {n}, {GROUP_TOKENS}]")
    if (means.shape, means.dtype) != ((H, n, D), torch.float16) or not means[0].is_contiguous():
        raise ValueError(f"means are {means.dtype} {list(means.shape)}; expected float16 [{H}, {n}, {D}]")
