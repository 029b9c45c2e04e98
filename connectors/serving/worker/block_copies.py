"""Copies between tokens and whole blocks of a paged cache, by runs of neighbouring blocks. Imports no engine.

A view of a layer's cache is `[B, H, N, D]`: blocks, KV heads, tokens a block, numbers of a token. An engine's kernels
may divide each block of its scheduler into several smaller ones; `block_tokens` counts those of the scheduler.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor

Run: TypeAlias = "tuple[int, int]"
"""A block's number, and how many blocks follow each other from there."""

_RUN_TOKENS = 64  # shorter runs take longer, each in a copy of its own, than all of them by their numbers


def runs_of_blocks(blocks: Sequence[int]) -> list[Run]:
    """Blocks in the given order, as runs."""
    cuts = [i for i, (a, b) in enumerate(pairwise(blocks), start=1) if b != a + 1]
    return [(blocks[a], b - a) for a, b in pairwise([0, *cuts, len(blocks)]) if a < b]


def copy_in(view: Tensor, runs: Sequence[Run], tokens: Tensor, block_tokens: int) -> None:
    """Write tokens `[H, T, D]` into whole blocks of a view."""
    rows = tokens.unflatten(1, (-1, view.shape[2])).transpose(0, 1)
    if len(runs) * _RUN_TOKENS > tokens.shape[1]:
        view[_kernel_blocks_of(runs, view, block_tokens)] = rows
        return
    for here, there in _slices(runs, block_tokens // view.shape[2]):
        view[there].copy_(rows[here])


def copy_out(view: Tensor, runs: Sequence[Run], tokens: Tensor, block_tokens: int) -> None:
    """Read whole blocks of a view into tokens `[H, T, D]`."""
    rows = tokens.unflatten(1, (-1, view.shape[2])).transpose(0, 1)
    if len(runs) * _RUN_TOKENS > tokens.shape[1]:
        rows.copy_(view[_kernel_blocks_of(runs, view, block_tokens)])
        return
    for here, there in _slices(runs, block_tokens // view.shape[2]):
        rows[here].copy_(view[there])


def kernel_blocks(blocks: Sequence[int], ratio: int, device: torch.device) -> Tensor:
    """Numbers of the kernel's blocks, of which `ratio` make one of the scheduler's `blocks`; int64."""
    numbers = torch.tensor(blocks, dtype=torch.int64, device=device)
    return numbers if ratio == 1 else (numbers[:, None] * ratio + torch.arange(ratio, device=device)).flatten()


def _kernel_blocks_of(runs: Sequence[Run], view: Tensor, block_tokens: int) -> Tensor:
    blocks = [number for first, count in runs for number in range(first, first + count)]
    return kernel_blocks(blocks, block_tokens // view.shape[2], view.device)


def _slices(runs: Sequence[Run], ratio: int) -> Iterator[tuple[slice, slice]]:
    """For each run, its place in a row of kernel blocks, and in the cache."""
    done = 0
    for first, count in runs:
        yield slice(done, done + count * ratio), slice(first * ratio, (first + count) * ratio)
        done += count * ratio
