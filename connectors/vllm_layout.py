"""KV of tokens in vLLM's paged cache: written by the attention backend itself, read by a packing found by trying.

vLLM shows every layer's cache as `[B, H, N, C]` (blocks, KV heads, tokens a block, content of a token), whatever the
physical order. What the C numbers of a token mean is the backend's affair and has changed between releases. So nothing
is taken for granted here: at the start a few random tokens are written by the backend, into the block that vLLM keeps
for nobody, and the packing is the one that reads them back, bit for bit. If none does, the connector refuses to start.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..errors import EngineError

Packing: TypeAlias = "Callable[[Tensor, int, int], tuple[Tensor, Tensor]]"
"""Blocks `[B, H, N, C]`, D and Dv -> keys `[H, B * N, D]` and values `[H, B * N, Dv]`."""

Gather: TypeAlias = "Callable[[Tensor, int, Tensor, Tensor], tuple[Tensor, Tensor]]"
"""A cache `[B, H, N, C]`, D, and for each KV head blocks and places in them, `[H, K]` -> `[H, K, D]`, `[H, K, Dv]`."""

_NULL_BLOCK = 0  # vLLM never gives it to a request


def side_by_side(blocks: Tensor, key_dim: int, value_dim: int) -> tuple[Tensor, Tensor]:
    """Each token's key, then its value: FlashAttention, Triton, FlashInfer and Flex since vLLM 0.26."""
    tokens = blocks.transpose(0, 1).flatten(1, 2)
    return tokens[..., :key_dim], tokens[..., key_dim : key_dim + value_dim]


def keys_transposed(blocks: Tensor, key_dim: int, value_dim: int) -> tuple[Tensor, Tensor]:
    """For each block and head, all keys as `[D, N]`, then all values as `[N, Dv]`: the processor's vector kernels."""
    count, heads, block_tokens, _ = blocks.shape
    pages = blocks.reshape(count, heads, block_tokens * (key_dim + value_dim))
    keys = pages[..., : block_tokens * key_dim].view(count, heads, key_dim, block_tokens)
    values = pages[..., block_tokens * key_dim :].view(count, heads, block_tokens, value_dim)
    return keys.permute(1, 0, 3, 2).flatten(1, 2), values.transpose(0, 1).flatten(1, 2)


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
        self._packings = [self._find_packing(layer) for layer in layers]

    def read(self, blocks: Sequence[int], start: int, stop: int) -> tuple[Tensor, Tensor]:
        """KV of tokens `[start, stop)` of a row of blocks: copies, keys `[L, H, T, D]` and values `[L, H, T, Dv]`."""
        count = stop - start
        keys = torch.empty(
            len(self.layers), self.num_kv_heads, count, self.head_dim, dtype=self.dtype, device=self.device
        )
        values = torch.empty(*keys.shape[:3], self.v_head_dim, dtype=self.dtype, device=self.device)
        for index in range(len(self.layers)):
            keys[index], values[index] = self.read_layer(index, blocks, start, stop)
        return keys, values

    def read_layer(self, index: int, blocks: Sequence[int], start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Of one layer: copies, keys `[H, T, D]` and values `[H, T, Dv]`."""
        first, last = start // self.block_tokens, -(-stop // self.block_tokens)
        numbers = self._kernel_blocks(self.layers[index], blocks[first:last])
        pages = self.layers[index].kv_cache[numbers]
        keys, values = self._packings[index](pages, self.head_dim, self.v_head_dim)
        here = slice(start - first * self.block_tokens, stop - first * self.block_tokens)
        return keys[:, here], values[:, here]

    @torch.inference_mode()
    def write(self, blocks: Sequence[int], start: int, keys: Tensor, values: Tensor) -> None:
        """Overwrite the KV of tokens from `start` on of a row of blocks, shapes as `read` gives."""
        slots = self.slots(blocks, torch.arange(start, start + keys.shape[2]))
        for index, layer in enumerate(self.layers):
            write_layer(layer, keys[index].to(self.device), values[index].to(self.device), slots)

    @torch.inference_mode()
    def write_layer(self, index: int, blocks: Sequence[int], start: int, keys: Tensor, values: Tensor) -> None:
        """The same for one layer, shapes as `read_layer` gives."""
        slots = self.slots(blocks, torch.arange(start, start + keys.shape[1]))
        write_layer(self.layers[index], keys.to(self.device), values.to(self.device), slots)

    def slots(self, blocks: Sequence[int], positions: Tensor) -> Tensor:
        """Where tokens of a request lie: block number times `block_tokens`, plus the place in the block; int64."""
        numbers = torch.tensor(blocks, dtype=torch.int64)[positions // self.block_tokens]
        return (numbers * self.block_tokens + positions % self.block_tokens).to(self.device)

    def _kernel_blocks(self, layer: Any, blocks: Sequence[int]) -> Tensor:
        ratio = self.block_tokens // layer.kv_cache.shape[2]
        numbers = torch.tensor(blocks, dtype=torch.int64, device=self.device)
        return numbers if ratio == 1 else (numbers[:, None] * ratio + torch.arange(ratio, device=self.device)).flatten()

    def _find_packing(self, layer: Any) -> Packing:
        return find_packing(layer, layer.kv_cache, self.head_dim, self.v_head_dim)


@torch.inference_mode()
def find_packing(layer: Any, cache: Tensor, key_dim: int, value_dim: int) -> Packing:
    """How a layer's backend keeps D and Dv numbers of a token, tried in a block of `cache` that is nobody's.

    Raises
    ------
    EngineError : in no way that is known.
    """
    block = cache[_NULL_BLOCK]
    before = block.clone()
    generator = torch.Generator().manual_seed(0)
    heads, block_tokens = cache.shape[1], cache.shape[2]
    places = torch.tensor(sorted({0, 1, block_tokens // 2, block_tokens - 1}))
    keys, values = (
        torch.randn(heads, len(places), dim, generator=generator).to(cache.dtype).to(cache.device)
        for dim in (key_dim, value_dim)
    )
    write_layer(layer, keys, values, places.to(cache.device), cache)
    try:
        for packing in PACKINGS.values():
            k, v = packing(cache[_NULL_BLOCK : _NULL_BLOCK + 1], key_dim, value_dim)
            if torch.equal(k[:, places], keys) and torch.equal(v[:, places], values):
                return packing
    finally:
        block.copy_(before)
    raise EngineError(
        f"layer {layer.layer_name} keeps keys and values in none of the packings that kvloom reads "
        f"({', '.join(PACKINGS)}); choose another attention backend, or leave the connector out"
    )


def write_layer(layer: Any, keys: Tensor, values: Tensor, slots: Tensor, cache: Tensor | None = None) -> None:
    """Keys `[H, T, D]` and values `[H, T, Dv]` into a layer's cache at `slots`, by the backend's own operation."""
    k, v = keys.transpose(0, 1).contiguous(), values.transpose(0, 1).contiguous()
    layer.impl.do_kv_cache_update(layer, k, v, layer.kv_cache if cache is None else cache, slots)
