"""Tokens that a codec keeps as they are: those it does not cover, and those whose numbers it cannot hold."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import CodecError
from .rotation import Turn

EXACT_PARTS = ("_exact", "_exact_tokens")
"""What follows the prefix in the names of the tensors that `take_exact` makes."""

LARGEST = 16384.0
"""What is larger (no model's keys or values are) is kept exact. It leaves float16 room for the scale of a group of any
width, for rotating the result and for its error."""


def unusual_tokens(x: Tensor) -> Tensor:
    """Which tokens of `[L, H, T, D]` hold, in any layer, NaN, infinity or a number beyond `LARGEST`: `[T]` bool."""
    if x.numel() == 0:
        return torch.zeros(x.shape[2], dtype=torch.bool, device=x.device)
    return ~(x.abs().amax((0, 1, 3)) <= LARGEST)  # a NaN is not less than anything


def take_exact(prefix: str, x: Tensor, unusual: Tensor) -> dict[str, Tensor]:
    """Copies of what is kept of `x` (`[L, H, T, D]`): the unusual ones of its first tokens, and all that follow these.

    Parameters
    ----------
    unusual : `[C]` bool for the C tokens that the codec covers.

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
    turn: Turn | None,
) -> tuple[Tensor, Tensor]:
    """What `take_exact` made of a tensor `[L, H, T, D]`: tokens `[E]` int64 on the cpu, and their rows `[L, H, E, D]`.

    Parameters
    ----------
    covered : tokens that the codec covers; all others must be there.
    turn : of the tensor, if it is rotated.

    Raises
    ------
    CodecError : they contradict dtype or shape, or leave out a token from `covered` on; or no such tensor is coded: it
        is not of floats, or not as wide as `turn` says.
    """
    rows, tokens = tensors[f"{prefix}_exact"], tensors[f"{prefix}_exact_tokens"]
    L, H, T, D = shape
    E = tokens.shape[-1] if tokens.ndim else 0
    if (tokens.dtype, rows.dtype) != (torch.int32, dtype) or (tokens.shape, rows.shape) != ((L, E), (L, H, E, D)):
        raise CodecError(
            f"{codec} chunk contradicts itself: {prefix}_exact is {rows.dtype} {list(rows.shape)} for tokens "
            f"{tokens.dtype} {list(tokens.shape)}; expected {dtype} [{L}, {H}, E, {D}] for torch.int32 [{L}, E]"
        )
    if not dtype.is_floating_point or (turn is not None and 2 * len(turn.rope.inv_freq) != D):
        raise CodecError(f"{codec} chunk contradicts itself: {prefix} of {D} channels in {dtype} do not fit its spec")
    if L == 0:
        return torch.arange(0), rows[:, :, :0]
    first, unusual = tokens[0].cpu().long(), E - (T - covered)
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


def put_exact(out: Tensor, tokens: Tensor, rows: Tensor, turn: Turn | None) -> None:
    """Writes rows (`[L, H, E, D]`) over these tokens (`[E]`) of `out` (`[L, H, T, D]`), moved if they are keys."""
    if len(tokens):
        moved = rows if turn is None else turn.rope.shift(rows, turn.exact[tokens])
        out.index_copy_(2, tokens.to(out.device), moved)
