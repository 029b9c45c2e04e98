"""The chosen tokens of one step, most of which the next step chooses again."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

Fetch: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Keys `[H, N, D]` and values `[H, N, Dv]` of positions `[H, N]`; those of -1 may be anything, even not finite."""


class ResidentSet:
    """Keys and values of the tokens chosen last, of one layer of one sequence (ShadowKV, arXiv 2410.21465, 4.2).

    Of the next choice only what is not here yet is fetched, over what is not needed any more; tokens keep their places,
    since the order of rotated keys does not matter to attention. Right as long as a position means the same token; see
    `clear`.

    Attributes
    ----------
    hits, misses : tokens asked for since it was made that were here, or had to be fetched; summed over KV heads.
    """

    def __init__(self) -> None:
        self.hits = self.misses = 0
        self._ids: Tensor | None = None  # [H, C], -1 for a free place; owns the places of the same index in the others
        self._keys, self._values = torch.empty(0), torch.empty(0)

    @property
    def hit_ratio(self) -> float:
        """0 to 1; 0 if nothing was asked for."""
        return self.hits / max(1, self.hits + self.misses)

    @property
    def held_bytes(self) -> int:
        return self._keys.nbytes + self._values.nbytes

    def update(self, ids: Tensor, fetch: Fetch) -> tuple[Tensor, Tensor, Tensor]:
        """The tokens of `ids` and no other.

        Parameters
        ----------
        ids : `[H, K]` int64, no position twice in a row, -1 for none.
        fetch : called once, if there is a miss or it never was.

        Returns
        -------
        keys, values, ids : `[H, C, D]`, `[H, C, Dv]`, `[H, C]`, of the largest K so far: each token of a row once, at
            any place, and -1 in the places that hold none. Keys and values are this set's own memory, read-only, until
            the next update.

        Raises
        ------
        ValueError : a position stands twice in a row, H changes, or `fetch` gives another shape.
        """
        if ids.ndim != 2 or (self._ids is not None and len(ids) != len(self._ids)):
            expected = "H" if self._ids is None else str(len(self._ids))
            raise ValueError(f"ids are {list(ids.shape)}; expected [{expected}, K]")
        wanted = ids.sort(1).values
        if bool(((wanted[:, 1:] == wanted[:, :-1]) & (wanted[:, 1:] >= 0)).any()):
            raise ValueError("ids name a token twice in a row")
        held = ids.new_full(ids.shape, -1) if self._ids is None else self._ids
        held = torch.nn.functional.pad(held, (0, max(0, ids.shape[1] - held.shape[1])), value=-1)
        places = torch.searchsorted(wanted, held).clamp(max=max(0, ids.shape[1] - 1))
        stays = (held >= 0) & (wanted.gather(1, places) == held) if ids.shape[1] else torch.zeros_like(held).bool()
        is_here = torch.zeros_like(wanted).scatter_add_(1, places, stays.long()) > 0 if ids.shape[1] else wanted > 0
        is_missing = (wanted >= 0) & ~is_here
        hits, misses = int(stays.sum()), int(is_missing.sum())
        held = held.masked_fill(~stays, -1)
        if misses or self._keys.ndim != 3:  # the first fetch, of no token too, says what shape they have
            width = int(is_missing.sum(1).max())
            order = (~is_missing).to(torch.uint8).sort(dim=1, stable=True).indices[:, :width]
            missing = wanted.gather(1, order).masked_fill(~is_missing.gather(1, order), -1)
            free = stays.to(torch.uint8).sort(dim=1, stable=True).indices[:, :width]
            self._write(fetch(missing), missing, free, held.shape[1])
            held = held.scatter(1, free, torch.where(missing >= 0, missing, held.gather(1, free)))
        self._ids = held
        self.hits, self.misses = self.hits + hits, self.misses + misses
        return self._keys, self._values, held

    def clear(self) -> None:
        """Forgets all tokens: they have moved, or were recomputed."""
        if self._ids is not None:
            self._ids = torch.full_like(self._ids, -1)

    def _write(self, fetched: tuple[Tensor, Tensor], missing: Tensor, free: Tensor, count: int) -> None:
        heads, width = missing.shape
        if any(part.ndim != 3 or part.shape[:2] != missing.shape for part in fetched):
            shapes = " and ".join(str(list(part.shape)) for part in fetched)
            raise ValueError(
                f"fetch gave {shapes} for {width} tokens of {heads} KV heads; expected [{heads}, {width}, _]"
            )
        keys, values = (_grown(old, new, count) for old, new in zip((self._keys, self._values), fetched, strict=True))
        rows, places = torch.nonzero(missing >= 0, as_tuple=True)
        for memory, new in ((keys, fetched[0]), (values, fetched[1])):
            memory[rows, free[rows, places]] = new[rows, places]
        self._keys, self._values = keys, values


def _grown(memory: Tensor, like: Tensor, count: int) -> Tensor:
    """Room for `count` tokens; free places hold zeros, so that a masked one makes no NaN."""
    if memory.ndim == 3 and memory.shape[1] >= count:
        return memory
    grown = like.new_zeros(like.shape[0], count, like.shape[2])
    if memory.ndim == 3:
        grown[:, : memory.shape[1]] = memory
    return grown
