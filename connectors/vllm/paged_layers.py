"""KV of tokens in vLLM's paged cache: written by the attention backend itself, read by a packing found by trying.

vLLM shows every layer's cache as `[B, H, N, C]` (blocks, KV heads, tokens a block, content of a token), whatever the
physical order. What the C numbers of a token mean is the backend's affair and has changed between releases. So nothing
is taken for granted here: at the start a block of random tokens is written by the backend, the one that vLLM keeps for
nobody, and the packing is the one that reads them back, bit for bit. If none does, the connector refuses to start.

Whole blocks are copied straight to and from the cache, in a third of the time, where the same tokens written by the
packing have given the very bytes that the backend gave. All else is written by the backend.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ...errors import EngineError

Packing: TypeAlias = "Callable[[Tensor, int, int], tuple[Tensor, Tensor]]"
"""Blocks `[B, H, N, C]`, D and Dv -> keys `[B, H, N, D]` and values `[B, H, N, Dv]`: views where memory permits."""

Run: TypeAlias = "tuple[int, int]"
"""A block's number, and how many follow one another from there."""

Gather: TypeAlias = "Callable[[Tensor, int, Tensor, Tensor], tuple[Tensor, Tensor]]"
"""A cache `[B, H, N, C]`, D, and for each KV head blocks and places in them, `[H, K]` -> `[H, K, D]`, `[H, K, Dv]`."""

_NULL_BLOCK = 0  # vLLM never gives it to a request
_RUN_TOKENS = 64  # shorter runs take longer, each in a copy of its own, than all of them by their numbers


def side_by_side(blocks: Tensor, key_dim: int, value_dim: int) -> tuple[Tensor, Tensor]:
    """Each token's key, then its value: FlashAttention, Triton, FlashInfer and Flex since vLLM 0.26."""
    return blocks[..., :key_dim], blocks[..., key_dim : key_dim + value_dim]


def keys_transposed(blocks: Tensor, key_dim: int, value_dim: int) -> tuple[Tensor, Tensor]:
    """For each block and head, all keys as `[D, N]`, then all values as `[N, Dv]`: the processor's vector kernels."""
    count, heads, block_tokens, _ = blocks.shape
    pages = blocks.reshape(count, heads, block_tokens * (key_dim + value_dim))
    keys = pages[..., : block_tokens * key_dim].view(count, heads, key_dim, block_tokens)
    values = pages[..., block_tokens * key_dim :].view(count, heads, block_tokens, value_dim)
    return keys.transpose(2, 3), values


PACKINGS: Mapping[str, Packing] = MappingProxyType({"side by side": side_by_side, "keys transposed": keys_transposed})


def _gather_side_by_side(cache: Tensor, key_dim: int, blocks: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    heads = torch.arange(cache.shape[1], device=cache.device)[:, None]
    rows = cache[blocks, heads, places]
    return rows[..., :key_dim], rows[..., key_dim:]


def _gather_transposed(cache: Tensor, key_dim: int, blocks: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    count, heads, block_tokens, width = cache.shape
    pages = cache.view(count, heads, block_tokens * width)
    head = torch.arange(heads, device=cache.device)[:, None]
    keys = pages[..., : block_tokens * key_dim].unflatten(2, (key_dim, block_tokens))
    values = pages[..., block_tokens * key_dim :].unflatten(2, (block_tokens, width - key_dim))
    return keys[blocks, head, :, places], values[blocks, head, places]


GATHERS: Mapping[Packing, Gather] = MappingProxyType(
    {side_by_side: _gather_side_by_side, keys_transposed: _gather_transposed}
)
"""How single tokens are read, by how they are packed."""


class PagedLayers:
    """The caches of a worker's attention layers.

    Parameters
    ----------
    layers : vLLM's attention modules in the order of the model, with their caches allocated.
    block_tokens : tokens of a block in the scheduler's numbers. A layer may divide it into smaller ones.

    Raises
    ------
    EngineError : layers differ in shape or dtype, a backend cannot write given tokens, or no packing reads what it
        wrote.
    """

    def __init__(self, layers: Sequence[Any], block_tokens: int) -> None:
        if not layers:
            raise EngineError("the model has no attention layer with a KV cache")
        first = layers[0]
        self.layers = tuple(layers)
        self.block_tokens = block_tokens
        self.num_kv_heads, self.head_dim = int(first.num_kv_heads), int(first.head_size)
        self.v_head_dim = int(getattr(first, "head_size_v", None) or first.head_size)
        self.dtype: torch.dtype = first.kv_cache.dtype
        self.device: torch.device = first.kv_cache.device
        for layer in layers:
            cache = layer.kv_cache
            shape = (cache.shape[1], cache.shape[3], layer.head_size, cache.dtype) if cache.ndim == 4 else None
            if shape != (self.num_kv_heads, self.head_dim + self.v_head_dim, self.head_dim, self.dtype):
                raise EngineError(
                    f"layer {layer.layer_name} has a KV cache of {cache.dtype} {list(cache.shape)}; expected "
                    f"{self.dtype} with {self.num_kv_heads} heads of {self.head_dim} + {self.v_head_dim} numbers a "
                    "token, as in the first layer: kvloom serves unquantised caches of one shape"
                )
            if block_tokens % cache.shape[2]:
                raise EngineError(f"layer {layer.layer_name} has blocks of {cache.shape[2]} tokens, not {block_tokens}")
            if not hasattr(layer.impl, "do_kv_cache_update"):
                raise EngineError(
                    f"attention backend {type(layer.impl).__name__} cannot write given keys and values; choose "
                    "another one with --attention-backend"
                )
        # Every layer is asked: backends may differ from layer to layer, and a wrong byte is worse than a slow start.
        self._packings: list[Packing] = []
        self._views: list[tuple[Tensor, Tensor] | None] = []  # of the whole cache; None: whole blocks as all else
        for layer in layers:
            packing, is_direct = self._find_packing(layer)
            self._packings.append(packing)
            # A backend that retrieves must be told of every write: an index over other keys would be a wrong answer.
            is_told = hasattr(layer.impl, "retrieving")
            views = packing(layer.kv_cache, self.head_dim, self.v_head_dim) if is_direct and not is_told else None
            self._views.append(views)

    def read(self, blocks: Sequence[int], start: int, stop: int) -> tuple[Tensor, Tensor]:
        """KV of tokens `[start, stop)` of a row of blocks: copies, keys `[L, H, T, D]` and values `[L, H, T, Dv]`."""
        count = stop - start
        keys = torch.empty(
            len(self.layers), self.num_kv_heads, count, self.head_dim, dtype=self.dtype, device=self.device
        )
        values = torch.empty(*keys.shape[:3], self.v_head_dim, dtype=self.dtype, device=self.device)
        size = self.block_tokens
        is_whole = start % size == 0 and stop % size == 0
        runs = runs_of_blocks(blocks[start // size : stop // size]) if is_whole else []
        for index, views in enumerate(self._views):
            if is_whole and views is not None:
                for view, tokens in zip(views, (keys[index], values[index]), strict=True):
                    self._copy_out(view, runs, tokens)
            else:
                keys[index], values[index] = self.read_layer(index, blocks, start, stop)
        return keys, values

    def read_layer(self, index: int, blocks: Sequence[int], start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Of one layer: copies, keys `[H, T, D]` and values `[H, T, Dv]`."""
        first, last = start // self.block_tokens, -(-stop // self.block_tokens)
        numbers = self._kernel_blocks(self.layers[index].kv_cache.shape[2], blocks[first:last])
        pages = self.layers[index].kv_cache[numbers]
        keys, values = unpacked(self._packings[index], pages, self.head_dim, self.v_head_dim)
        here = slice(start - first * self.block_tokens, stop - first * self.block_tokens)
        return keys[:, here], values[:, here]

    def write(self, blocks: Sequence[int], start: int, keys: Tensor, values: Tensor) -> None:
        """Overwrite the KV of tokens from `start` on of a row of blocks, shapes as `read` gives."""
        self._write(range(len(self.layers)), blocks, start, keys, values)

    def write_layer(self, index: int, blocks: Sequence[int], start: int, keys: Tensor, values: Tensor) -> None:
        """The same for one layer, shapes as `read_layer` gives."""
        self._write((index,), blocks, start, keys[None], values[None])

    @torch.inference_mode()
    def _write(self, layers: Sequence[int], blocks: Sequence[int], start: int, keys: Tensor, values: Tensor) -> None:
        size, stop = self.block_tokens, start + keys.shape[2]
        first, last = -(-start // size), stop // size  # whole blocks
        runs = runs_of_blocks(blocks[first:last])
        whole = slice(first * size - start, last * size - start) if runs else slice(0, 0)
        positions = torch.arange(start, stop)
        edges = torch.cat((positions[: whole.start], positions[whole.stop :])) - start
        edge_slots = self.slots(blocks, positions[edges]) if runs and len(edges) else None
        all_slots = None
        for index, k, v in zip(layers, keys.to(self.device), values.to(self.device), strict=True):
            views, layer = self._views[index], self.layers[index]
            if views is None or not runs:
                all_slots = self.slots(blocks, positions) if all_slots is None else all_slots
                write_layer(layer, k, v, all_slots)
                continue
            for view, tokens in zip(views, (k, v), strict=True):
                self._copy_in(view, runs, tokens[:, whole])
            if edge_slots is not None:
                write_layer(layer, k[:, edges], v[:, edges], edge_slots)

    def _copy_in(self, view: Tensor, runs: Sequence[Run], tokens: Tensor) -> None:
        """Tokens `[H, T, D]` into whole blocks of a cache's view `[B, H, N, D]`."""
        rows = tokens.unflatten(1, (-1, view.shape[2])).transpose(0, 1)
        if len(runs) * _RUN_TOKENS > tokens.shape[1]:
            view[self._kernel_blocks(view.shape[2], numbers_of(runs))] = rows
            return
        for here, there in self._slices(runs, view.shape[2]):
            view[there].copy_(rows[here])

    def _copy_out(self, view: Tensor, runs: Sequence[Run], tokens: Tensor) -> None:
        """The reverse."""
        rows = tokens.unflatten(1, (-1, view.shape[2])).transpose(0, 1)
        if len(runs) * _RUN_TOKENS > tokens.shape[1]:
            rows.copy_(view[self._kernel_blocks(view.shape[2], numbers_of(runs))])
            return
        for here, there in self._slices(runs, view.shape[2]):
            rows[here].copy_(view[there])

    def _slices(self, runs: Sequence[Run], kernel_tokens: int) -> list[tuple[slice, slice]]:
        """Of a row of the layer's own blocks, and where they are in its cache."""
        ratio, done, slices = self.block_tokens // kernel_tokens, 0, []
        for first, count in runs:
            slices.append((slice(done, done + count * ratio), slice(first * ratio, (first + count) * ratio)))
            done += count * ratio
        return slices

    def slots(self, blocks: Sequence[int], positions: Tensor) -> Tensor:
        """Where tokens of a request lie: block number times `block_tokens`, plus the place in the block; int64."""
        numbers = torch.tensor(blocks, dtype=torch.int64)[positions // self.block_tokens]
        return (numbers * self.block_tokens + positions % self.block_tokens).to(self.device)

    def _kernel_blocks(self, kernel_tokens: int, blocks: Sequence[int]) -> Tensor:
        ratio = self.block_tokens // kernel_tokens
        numbers = torch.tensor(blocks, dtype=torch.int64, device=self.device)
        return numbers if ratio == 1 else (numbers[:, None] * ratio + torch.arange(ratio, device=self.device)).flatten()

    def _find_packing(self, layer: Any) -> tuple[Packing, bool]:
        count = self.block_tokens // layer.kv_cache.shape[2]
        return find_packing(layer, layer.kv_cache, self.head_dim, self.v_head_dim, count)


@torch.inference_mode()
def find_packing(layer: Any, cache: Tensor, key_dim: int, value_dim: int, count: int = 1) -> tuple[Packing, bool]:
    """How a layer's backend keeps D and Dv numbers of a token, and whether writing them so gives byte for byte
    what it gives. Tried in the first `count` blocks of `cache`, which are nobody's.

    Raises
    ------
    EngineError : in no way that is known.
    """
    blocks = cache[_NULL_BLOCK * count : (_NULL_BLOCK + 1) * count]
    before, tokens = blocks.clone(), count * cache.shape[2]
    generator = torch.Generator().manual_seed(0)
    keys, values, other = (
        torch.randn(shape, generator=generator).to(cache.dtype).to(cache.device)
        for shape in ((cache.shape[1], tokens, key_dim), (cache.shape[1], tokens, value_dim), tuple(blocks.shape))
    )
    blocks.copy_(other)
    write_layer(layer, keys, values, torch.arange(tokens, device=cache.device), cache)
    written = blocks.clone()
    rows = [part.unflatten(1, (count, -1)).transpose(0, 1) for part in (keys, values)]
    try:
        for packing in PACKINGS.values():
            views = packing(blocks, key_dim, value_dim)
            if all(torch.equal(view, row) for view, row in zip(views, rows, strict=True)):
                blocks.copy_(other)
                for view, row in zip(views, rows, strict=True):
                    view.copy_(row)
                return packing, _same_bytes(blocks, written)
    finally:
        blocks.copy_(before)
    raise EngineError(
        f"layer {layer.layer_name} keeps keys and values in none of the packings that kvloom reads "
        f"({', '.join(PACKINGS)}); choose another attention backend, or leave the connector out"
    )


def unpacked(packing: Packing, blocks: Tensor, key_dim: int, value_dim: int) -> tuple[Tensor, Tensor]:
    """Tokens of blocks `[B, H, N, C]` one behind the other: keys `[H, B * N, D]` and values `[H, B * N, Dv]`."""
    keys, values = packing(blocks, key_dim, value_dim)
    return keys.transpose(0, 1).flatten(1, 2), values.transpose(0, 1).flatten(1, 2)


def write_layer(layer: Any, keys: Tensor, values: Tensor, slots: Tensor, cache: Tensor | None = None) -> None:
    """Keys `[H, T, D]` and values `[H, T, Dv]` into a layer's cache at `slots`, by the backend's own operation."""
    k, v = keys.transpose(0, 1).contiguous(), values.transpose(0, 1).contiguous()
    layer.impl.do_kv_cache_update(layer, k, v, layer.kv_cache if cache is None else cache, slots)


def runs_of_blocks(blocks: Sequence[int]) -> list[Run]:
    """Numbers in the given order, as runs."""
    cuts = [i for i, (a, b) in enumerate(pairwise(blocks), start=1) if b != a + 1]
    return [(blocks[a], b - a) for a, b in pairwise([0, *cuts, len(blocks)]) if a < b]


def numbers_of(runs: Sequence[Run]) -> list[int]:
    """The reverse."""
    return [number for first, count in runs for number in range(first, first + count)]


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
