"""Tokens that a codec stores exactly: those it does not cover, and those with numbers that it cannot represent."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import CodecError
from .rotation import KeyRotation

EXACT_PARTS = ("_exact", "_exact_tokens")
"""Suffixes of the names of the tensors that `take_exact` makes."""

LARGEST = 16384.0
"""Tokens with larger numbers are kept exact; no model has keys or values that large. Up to it, float16 holds the scale
of any group, the rotated result and its error."""


def unusual_tokens(x: Tensor) -> Tensor:
    """Tokens of `[L, H, T, D]` that have NaN, infinity or a number beyond `LARGEST` in any layer: `[T]` bool."""
    if x.numel() == 0:
        return torch.zeros(x.shape[2], dtype=torch.bool, device=x.device)
    return ~(x.abs().amax((0, 1, 3)) <= LARGEST)  # a NaN is not less than anything


def take_exact(prefix: str, x: Tensor, unusual: Tensor) -> dict[str, Tensor]:
    """Copies of the tokens of `x` (`[L, H, T, D]`) that are kept: unusual covered ones, and all that are not covered.

    Parameters
    ----------
    unusual : `[C]` bool for the first C tokens, which the codec covers.

    Returns
    -------
    `{prefix}_exact` `[L, H, E, D]` in the dtype of `x`, `{prefix}_exact_tokens` `[L, E]` int32, ascending. The tokens
    are those of all layers, repeated for each, so that layers stand alone.
    """
    L, _, T, _ = x.shape
    tokens = torch.cat([unusual.nonzero()[:, 0], torch.arange(len(unusual), T, device=x.device)])
    return {
        f"{prefix}_exact": x.index_select(2, tokens).cpu(),
        f"{prefix}_exact_tokens": tokens.to("cpu", torch.int32).repeat(L, 1),
    }


def read_exact(
    codec: str,
    tensors: Mapping[str, Tensor],
    prefix: str,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    covered: int,
    rotation: KeyRotation | None,
) -> tuple[Tensor, Tensor]:
    """Reads what `take_exact` kept of a tensor `[L, H, T, D]`: tokens `[E]` int64 on the cpu, and rows `[L, H, E, D]`.

    Parameters
    ----------
    covered : number of tokens that the codec covers; all later ones must be among those kept.
    rotation : of keys with rotary positions; None for other tensors.

    Raises
    ------
    CodecError : the tensors contradict dtype or shape, or a token from `covered` on is missing; or the dtype is no
        floating one, or D is not the width of `rotation`.
    """
    rows, tokens = tensors[f"{prefix}_exact"], tensors[f"{prefix}_exact_tokens"]
    L, H, T, D = shape
    E = tokens.shape[-1] if tokens.ndim else 0
    if (tokens.dtype, rows.dtype) != (torch.int32, dtype) or (tokens.shape, rows.shape) != ((L, E), (L, H, E, D)):
        raise CodecError(
            f"{codec} chunk contradicts itself: {prefix}_exact is {rows.dtype} {list(rows.shape)} for tokens "
            f"{tokens.dtype} {list(tokens.shape)}; expected {dtype} [{L}, {H}, E, {D}] for torch.int32 [{L}, E]"
        )
    if not dtype.is_floating_point or (rotation is not None and not rotation.fits(D)):
        raise CodecError(f"{codec} chunk contradicts itself: {prefix} of {D} channels in {dtype} do not fit its spec")
    if L == 0:
        return torch.arange(0), rows[:, :, :0]
    tokens = tokens.cpu()  # once: each question of a device waits for it
    first, unusual = tokens[0].long(), E - (T - covered)
    if (
        unusual < 0
        or not bool((tokens == tokens[:1]).all())
        or not torch.equal(first[unusual:], torch.arange(covered, T))
        or not bool(((first[:unusual] >= 0) & (first[:unusual] < covered)).all())
    ):
        raise CodecError(
            f"{codec} chunk contradicts itself: {prefix}_exact_tokens must be of {T}, all from {covered} on included"
        )
    return first, rows


def put_exact(out: Tensor, tokens: Tensor, rows: Tensor, rotation: KeyRotation | None) -> None:
    """Writes rows (`[L, H, E, D]`) over these tokens (`[E]`) of `out` (`[L, H, T, D]`); keys are rotated first."""
    if len(tokens):
        moved = rows
        if rotation is not None:
            moved = rotation.spec.shift(rows, rotation.exact[tokens], rotation.first_layer)
        out.index_copy_(2, tokens.to(out.device), moved)
