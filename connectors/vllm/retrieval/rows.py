"""Rows of an engine's step as retrieval sees them: what decodes, what prompts leave, when blocks were written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ....retrieval.settings import CHUNK_TOKENS

_QUERY_STRIDE = 16  # of a prompt's queries, one in so many is kept for indexes that learn

BlockKernel: TypeAlias = "Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]"
"""Queries `[R, G, D]`, a cache, rows of blocks of one KV head `[R, P]` int32, block b of head h being `b H + h`, and
the tokens in each row `[R]` int32, of which all but its last block are full -> `[R, G, Dv]`.
"""


@dataclass(frozen=True, slots=True, eq=False)
class DecodeRow:
    """One request that decodes one token.

    Attributes
    ----------
    number : its row in the batch.
    token : of the batch, by number.
    position : of that token in its context.
    blocks : that its context lies in, `[n]` int64, by the numbers of the kernel.
    """

    number: int
    token: int
    position: int
    blocks: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class PromptPart:
    """Tokens of a prompt that this step computes: those whose queries are kept.

    Attributes
    ----------
    tokens : of the batch, `[Q]` int64.
    positions : in their context, `[Q]` int64, ascending.
    blocks : for each of them, `[Q]`.
    """

    tokens: Tensor
    positions: Tensor
    blocks: list[int]


class RowWrites:
    """When each block of one layer was last written, as a number that grows with every write; 0 for never."""

    def __init__(self) -> None:
        self._clock = count(1)
        self._last = torch.zeros(0, dtype=torch.int64)

    def note(self, slots: Tensor, block_tokens: int, num_blocks: int) -> None:
        """Tokens are written at `slots` `[T]`, those below 0 nowhere, of a cache of so many blocks."""
        if len(self._last) != num_blocks:
            self._last = torch.zeros(num_blocks, dtype=torch.int64)
        places = slots.cpu().numpy()
        self._last.numpy()[places[places >= 0] // block_tokens] = next(self._clock)

    def of(self, blocks: Tensor) -> Tensor:
        """`[n]` of blocks `[n]`."""
        return self._last[blocks]


def window_grid(block_tokens: int) -> int:
    """Tokens that leave the window together: `CHUNK_TOKENS`, or more where blocks do not divide them."""
    return CHUNK_TOKENS if CHUNK_TOKENS % block_tokens == 0 else -(-CHUNK_TOKENS // block_tokens) * block_tokens


def virtual_rows(
    rows: Sequence[DecodeRow], of_blocks: Sequence[NDArray[np.bool_]], block_tokens: int
) -> tuple[Tensor, Tensor]:
    """A table of blocks and lengths for each row and KV head, see `BlockKernel`: in their order, the last one last."""
    counts = np.concatenate([np.count_nonzero(blocks, axis=1) for blocks in of_blocks])
    table = np.zeros((len(counts), counts.max()), np.int32)
    numbers, tails = [], []
    for row, blocks in zip(rows, of_blocks, strict=True):
        heads, which = np.nonzero(blocks)
        numbers.append(row.blocks.numpy()[which] * len(blocks) + heads)
        tails += [row.position % block_tokens + 1] * len(blocks)
    table[np.arange(table.shape[1]) < counts[:, None]] = np.concatenate(numbers)
    lengths = (counts - 1) * block_tokens + tails
    return torch.from_numpy(table), torch.from_numpy(lengths.astype(np.int32))


def kept_queries(first: int, stop: int) -> range:
    """Positions of a prompt's part `[first, stop)` whose queries are kept."""
    return range(-(-first // _QUERY_STRIDE) * _QUERY_STRIDE, stop, _QUERY_STRIDE)
