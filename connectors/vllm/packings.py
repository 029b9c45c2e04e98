"""What the numbers of a token mean in a layer's paged cache of vLLM: a packing, found by trying.

vLLM shows every layer's cache as `[B, H, N, C]` (blocks, KV heads, tokens a block, content of a token), whatever the
physical order. What the C numbers of a token mean depends on the backend and has changed between releases. So nothing
is taken for granted here: at the start the backend writes a block of random tokens into the block that vLLM gives to no
request, and the packing is the one that reads them back, bit for bit. A quantised cache has to read back what the
backend rounded them to. If none does, the connector refuses to start.

A latent cache (MLA) has one row of numbers for each token, with one KV head and no values: D = C, Dv = 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ...errors import EngineError

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


@dataclass(frozen=True, slots=True)
class Quantised:
    """How a layer's cache rounds: a key is its number times `key_scale`, a value likewise.

    Attributes
    ----------
    number : of one byte.
    given : dtype of the keys and values that the backend is given.
    """

    number: torch.dtype
    given: torch.dtype
    key_scale: float
    value_scale: float

    def keeps(self, numbers: Tensor, exact: Tensor, scale: float) -> bool:
        """Whether bytes `numbers` are what `exact` was rounded to, as far as so few bits can say."""
        read = numbers.contiguous().view(self.number).float() * scale
        return torch.allclose(read, exact.float(), rtol=0.25, atol=scale * 2**-8)


def cache_of(layer: Any) -> Tensor:
    """A layer's cache as `[B, H, N, C]`, a view; numbers of one byte as bytes."""
    cache: Tensor = layer.kv_cache
    if cache.ndim == 3:  # of latent attention, without heads
        cache = cache[:, None]
    return cache.view(torch.uint8) if cache.dtype.itemsize == 1 else cache


def is_latent(layer: Any) -> bool:
    """Whether a layer keeps one latent for each token, which every rank has whole, and no values."""
    return hasattr(layer, "kv_lora_rank")


@torch.inference_mode()
def find_packing(
    layer: Any, cache: Tensor, key_dim: int, value_dim: int, count: int = 1, quantised: Quantised | None = None
) -> tuple[Packing, bool]:
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
        torch.randn(shape, generator=generator)
        for shape in ((cache.shape[1], tokens, key_dim), (cache.shape[1], tokens, value_dim), tuple(blocks.shape))
    )
    scales, given = (1.0, 1.0), cache.dtype
    if quantised is not None:
        scales, given = (quantised.key_scale, quantised.value_scale), quantised.given
    keys, values = ((keys * scales[0]).to(given), (values * scales[1]).to(given))
    keys, values = keys.to(cache.device), values.to(cache.device)
    other = other.to(cache.device).view(torch.uint8)[..., : blocks.shape[-1]] if quantised else other.to(blocks)
    blocks.copy_(other)
    write_layer(layer, keys, values, torch.arange(tokens, device=cache.device), cache)
    written = blocks.clone()
    rows = [part.unflatten(1, (count, -1)).transpose(0, 1) for part in (keys, values)]
    try:
        for packing in PACKINGS.values():
            views = packing(blocks, key_dim, value_dim)
            if quantised is None:
                is_read = all(torch.equal(view, row) for view, row in zip(views, rows, strict=True))
            else:
                is_read = all(quantised.keeps(*each) for each in zip(views, rows, scales, strict=True))
            if is_read:
                if quantised is not None:
                    rows = [view.clone() for view in views]
                blocks.copy_(other)
                for view, row in zip(packing(blocks, key_dim, value_dim), rows, strict=True):
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
    """Write keys `[H, T, D]` and values `[H, T, Dv]` into a layer's cache at `slots`, by the backend itself.

    `cache`: `[B, H, N, C]`, instead of the layer's.
    """
    cache = cache_of(layer) if cache is None else cache
    k, v = keys.transpose(0, 1).contiguous(), values.transpose(0, 1).contiguous()
    if is_latent(layer):
        latent, rotated = k[:, 0, : layer.kv_lora_rank], k[:, :, layer.kv_lora_rank :]
        scale = layer._k_scale  # noqa: SLF001  vLLM has no public name for it
        layer.impl.do_kv_cache_update(
            latent.contiguous(), rotated.contiguous(), cache[:, 0], slots, layer.kv_cache_dtype, scale
        )
        return
    layer.impl.do_kv_cache_update(layer, k, v, cache, slots)


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
