"""Reading what an attention backend has written, whatever its packing; and refusing what cannot be read."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvloom.connectors.vllm_layout import PACKINGS, PagedLayers
from kvloom.errors import EngineError

H, D, BLOCK = 2, 6, 8


class Backend:
    """Writes token by token, as backends say they do; `packing` is how."""

    def __init__(self, packing: str) -> None:
        self.packing = packing

    def do_kv_cache_update(self, layer: Any, keys: Tensor, values: Tensor, cache: Tensor, slots: Tensor) -> None:
        tokens, dim, value_dim = cache.shape[2], keys.shape[-1], values.shape[-1]
        for key, value, slot in zip(keys, values, slots.tolist(), strict=True):
            block, place = divmod(slot, tokens)
            for head in range(len(key)):
                flat = cache[block, head].view(-1)
                if self.packing == "side by side":
                    cache[block, head, place] = torch.cat((key[head], value[head]))
                elif self.packing == "keys transposed":
                    for channel in range(dim):
                        flat[channel * tokens + place] = key[head, channel]
                    begin = tokens * dim + place * value_dim
                    flat[begin : begin + value_dim] = value[head]
                else:  # values first: a packing nobody reads
                    cache[block, head, place] = torch.cat((value[head], key[head]))


def make_layer(packing: str, *, value_dim: int = D, kernel_tokens: int = BLOCK, blocks: int = 12) -> SimpleNamespace:
    cache = torch.randn(blocks * BLOCK // kernel_tokens, H, kernel_tokens, D + value_dim)
    return SimpleNamespace(
        layer_name="model.layers.0",
        num_kv_heads=H,
        head_size=D,
        head_size_v=value_dim,
        kv_cache=cache,
        impl=Backend(packing),
    )


@pytest.mark.parametrize("kernel_tokens", [BLOCK, BLOCK // 2])
@pytest.mark.parametrize("value_dim", [D, 4])
@pytest.mark.parametrize("packing", PACKINGS)
def test_what_is_written_is_read(packing: str, value_dim: int, kernel_tokens: int) -> None:
    """Blocks in any order, ranges that begin and end within blocks, and nothing else is touched."""
    layers = [make_layer(packing, value_dim=value_dim, kernel_tokens=kernel_tokens) for _ in range(3)]
    before = [layer.kv_cache.clone() for layer in layers]
    paged = PagedLayers(layers, BLOCK)
    assert all(torch.equal(layer.kv_cache, cache) for layer, cache in zip(layers, before, strict=True))
    blocks = [7, 2, 9, 4]
    rest = paged.read(blocks, 0, 4 * BLOCK)
    keys, values = torch.randn(3, H, 17, D), torch.randn(3, H, 17, value_dim)
    paged.write(blocks, 5, keys, values)
    read_keys, read_values = paged.read(blocks, 5, 22)
    assert torch.equal(read_keys, keys)
    assert torch.equal(read_values, values)
    after = paged.read(blocks, 0, 4 * BLOCK)
    for old, new in zip(rest, after, strict=True):
        assert torch.equal(old[:, :, :5], new[:, :, :5])
        assert torch.equal(old[:, :, 22:], new[:, :, 22:])
    others = [b for b in range(12) if b not in blocks]
    for layer, cache in zip(layers, before, strict=True):
        ratio = BLOCK // kernel_tokens
        kernel = [b * ratio + i for b in others for i in range(ratio)]
        assert torch.equal(layer.kv_cache[kernel], cache[kernel])


def test_layers_may_differ_in_packing() -> None:
    paged = PagedLayers([make_layer(name) for name in PACKINGS], BLOCK)
    keys, values = torch.randn(2, H, 3, D), torch.randn(2, H, 3, D)
    paged.write([3], 2, keys, values)
    assert torch.equal(paged.read([3], 2, 5)[0], keys)


def test_an_unknown_packing_is_refused() -> None:
    with pytest.raises(EngineError, match=r"model\.layers\.0 keeps keys and values in none of the packings"):
        PagedLayers([make_layer("side by side"), make_layer("values first")], BLOCK)


def test_a_quantised_cache_is_refused() -> None:
    layer = make_layer("side by side")
    layer.kv_cache = layer.kv_cache[..., :D].to(torch.uint8)
    with pytest.raises(EngineError, match="unquantised caches of one shape"):
        PagedLayers([layer], BLOCK)


def test_layers_that_differ_in_shape_are_refused() -> None:
    with pytest.raises(EngineError, match="as in the first layer"):
        PagedLayers([make_layer("side by side"), make_layer("side by side", value_dim=4)], BLOCK)


def test_a_backend_that_cannot_write_is_refused() -> None:
    layer = make_layer("side by side")
    layer.impl = object()
    with pytest.raises(EngineError, match="cannot write given keys"):
        PagedLayers([layer], BLOCK)
