"""KV of tokens in vLLM's paged cache: written by the attention backend itself, read by a packing found by trying.

vLLM shows every layer's cache as `[B, H, N, C]` (blocks, KV heads, tokens a block, content of a token), whatever the
physical order. What the C numbers of a token mean depends on the backend and has changed between releases. So nothing
is taken for granted here: at the start the backend writes a block of random tokens into the block that vLLM gives to no
request, and the packing is the one that reads them back, bit for bit. If none does, the connector refuses to start.

Whole blocks are copied straight to and from the cache, in a third of the time, where the same tokens written by the
packing have given the very bytes that the backend gave. Everything else is written by the backend.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ...errors import EngineError
from ..serving.worker.block_copies import copy_in, copy_out, kernel_blocks, runs_of_blocks

Packing: TypeAlias = "Callable[[Tensor, int, int], tuple[Tensor, Tensor]]"
"""Blocks `[B, H, N, C]`, D and Dv -> keys `[B, H, N, D]` and values `[B, H, N, Dv]`: views where memory permits."""

Gather: TypeAlias = "Callable[[Tensor, int, Tensor, Tensor], tuple[Tensor, Tensor]]"
"""A cache `[B, H, N, C]`, D, and for each KV head blocks and places in them, `[H, K]` -> `[H, K, D]`, `[H, K, Dv]`."""

_NULL_BLOCK = 0  # vLLM never gives it to a request


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
"""How single tokens are read, by packing."""


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
        self.num_layers = len(layers)
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
                    "token, as in the first layer: kvloom serves caches of one shape that are not quantised "
                    "(--kv-cache-dtype auto)"
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
            # A backend that retrieves has to see every write: an index over other keys would give a wrong answer.
            sees_writes = hasattr(layer.impl, "retrieving")
            views = packing(layer.kv_cache, self.head_dim, self.v_head_dim) if is_direct and not sees_writes else None
            self._views.append(views)

    def read(self, blocks: Sequence[int], start: int, stop: int) -> tuple[Tensor, Tensor]:
        """A copy of tokens `[start, stop)` of a row of blocks: keys `[L, H, T, D]` and values `[L, H, T, Dv]`."""
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
                    copy_out(view, runs, tokens, size)
            else:
                keys[index], values[index] = self.read_layer(index, blocks, start, stop)
        return keys, values

    def read_layer(self, index: int, blocks: Sequence[int], start: int, stop: int) -> tuple[Tensor, Tensor]:
        """The same of one layer: keys `[H, T, D]` and values `[H, T, Dv]`."""
        first, last = start // self.block_tokens, -(-stop // self.block_tokens)
        cache = self.layers[index].kv_cache
        pages = cache[kernel_blocks(blocks[first:last], self.block_tokens // cache.shape[2], self.device)]
        keys, values = unpacked(self._packings[index], pages, self.head_dim, self.v_head_dim)
        here = slice(start - first * self.block_tokens, stop - first * self.block_tokens)
        return keys[:, here], values[:, here]

    def write(self, blocks: Sequence[int], start: int, keys: Tensor, values: Tensor) -> None:
        """Overwrite the KV of tokens from `start` on of a row of blocks, shapes as `read` gives."""
        self._write(range(len(self.layers)), blocks, start, keys, values)

    def write_layer(self, index: int, blocks: Sequence[int], start: int, keys: Tensor, values: Tensor) -> None:
        """The same for one layer, shapes as `read_layer` gives."""
        self._write((index,), blocks, start, keys[None], values[None])

    def write_tokens(self, index: int, blocks: Sequence[int], positions: Tensor, keys: Tensor, values: Tensor) -> None:
        """Overwrite the KV of tokens at `positions` `[T]` of a row of blocks, in one layer, by the backend."""
        write_layer(self.layers[index], keys, values, self.slots(blocks, positions))

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
                copy_in(view, runs, tokens[:, whole], size)
            if edge_slots is not None:
                write_layer(layer, k[:, edges], v[:, edges], edge_slots)

    def slots(self, blocks: Sequence[int], positions: Tensor) -> Tensor:
        """Slots of a request's tokens: block number times `block_tokens`, plus the place in the block; int64."""
        numbers = torch.tensor(blocks, dtype=torch.int64)[positions // self.block_tokens]
        return (numbers * self.block_tokens + positions % self.block_tokens).to(self.device)

    def _find_packing(self, layer: Any) -> tuple[Packing, bool]:
        count = self.block_tokens // layer.kv_cache.shape[2]
        return find_packing(layer, layer.kv_cache, self.head_dim, self.v_head_dim, count)


@torch.inference_mode()
def find_packing(layer: Any, cache: Tensor, key_dim: int, value_dim: int, count: int = 1) -> tuple[Packing, bool]:
    """The packing of a layer's backend for D and Dv numbers of a token, and whether a write through it gives the same
    bytes as a write by the backend. Tries the first `count` blocks of `cache`, which belong to no request.

    Raises
    ------
    EngineError : it is none of `PACKINGS`.
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
    """The tokens of blocks `[B, H, N, C]` in a row: keys `[H, B * N, D]` and values `[H, B * N, Dv]`."""
    keys, values = packing(blocks, key_dim, value_dim)
    return keys.transpose(0, 1).flatten(1, 2), values.transpose(0, 1).flatten(1, 2)


def write_layer(layer: Any, keys: Tensor, values: Tensor, slots: Tensor, cache: Tensor | None = None) -> None:
    """Write keys `[H, T, D]` and values `[H, T, Dv]` into a layer's cache at `slots`, by the backend itself."""
    k, v = keys.transpose(0, 1).contiguous(), values.transpose(0, 1).contiguous()
    layer.impl.do_kv_cache_update(layer, k, v, layer.kv_cache if cache is None else cache, slots)


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
