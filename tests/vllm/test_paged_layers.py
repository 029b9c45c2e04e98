"""Reading what an attention backend has written, whatever its packing; and refusing what cannot be read."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvloom.connectors.vllm.paged_layers import PACKINGS, PagedLayers
from kvloom.errors import EngineError

H, D, BLOCK = 2, 6, 8


class Backend:
    """Writes token by token, as backends say they do; `packing` is how."""

    def __init__(self, packing: str) -> None:
        self.packing = packing
        self.written_tokens = 0

    def do_kv_cache_update(self, layer: Any, keys: Tensor, values: Tensor, cache: Tensor, slots: Tensor) -> None:
        self.written_tokens += len(slots)
        tokens, dim, value_dim = cache.shape[2], keys.shape[-1], values.shape[-1]
        for key, value, slot in zip(keys, values, slots.tolist(), strict=True):
            block, place = divmod(slot, tokens)
            for head in range(len(key)):
                page = cache[block, head]
                flat = page.reshape(-1)  # in the order of the numbers, wherever they are in memory
                if self.packing == "side by side":
                    cache[block, head, place] = torch.cat((key[head], value[head]))
                elif self.packing == "keys transposed":
                    for channel in range(dim):
                        flat[channel * tokens + place] = key[head, channel]
                    begin = tokens * dim + place * value_dim
                    flat[begin : begin + value_dim] = value[head]
                    page.copy_(flat.view(page.shape))
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


ROWS = {
    "in one run": list(range(2, 12)),
    "backwards": list(range(11, 1, -1)),
    "scattered": [9, 2, 3, 11, 5, 4, 8, 7, 10, 6],
    "in two runs": [7, 8, 9, 10, 11, 2, 3, 4, 5, 6],
}


@pytest.mark.parametrize("kernel_tokens", [BLOCK, BLOCK // 2])
@pytest.mark.parametrize("span", [(0, 80), (3, 80), (8, 77), (3, 77)], ids=str)
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("packing", PACKINGS)
def test_whole_blocks_past_the_backend_have_the_bytes_that_it_gives(
    packing: str, row: str, span: tuple[int, int], kernel_tokens: int
) -> None:
    start, stop = span
    layers = [make_layer(packing, value_dim=4, kernel_tokens=kernel_tokens) for _ in range(2)]
    paged = PagedLayers(layers, BLOCK)
    expected = [layer.kv_cache.clone() for layer in layers]
    keys, values = torch.randn(2, H, stop - start, D), torch.randn(2, H, stop - start, 4)
    slots = paged.slots(ROWS[row], torch.arange(start, stop))
    for layer, cache, k, v in zip(layers, expected, keys, values, strict=True):
        layer.impl.do_kv_cache_update(layer, k.transpose(0, 1), v.transpose(0, 1), cache, slots)
        layer.impl.written_tokens = 0
    paged.write(ROWS[row], start, keys, values)
    for layer, cache in zip(layers, expected, strict=True):
        assert layer.impl.written_tokens == -start % BLOCK + stop % BLOCK
        assert torch.equal(layer.kv_cache, cache)
    read_keys, read_values = paged.read(ROWS[row], start, stop)
    assert torch.equal(read_keys, keys)
    assert torch.equal(read_values, values)


@pytest.mark.parametrize("start", [0, 3])
def test_a_cache_that_no_view_can_write_is_left_to_the_backend(start: int) -> None:
    """Tokens outside of heads: a head's keys as `[D, N]` are no view of that, and what is written would be lost."""
    layer = make_layer("keys transposed")
    layer.kv_cache = layer.kv_cache.transpose(1, 2).contiguous().transpose(1, 2)
    paged = PagedLayers([layer], BLOCK)
    layer.impl.written_tokens = 0
    keys, values = torch.randn(1, H, 16, D), torch.randn(1, H, 16, D)
    paged.write([4, 5, 6], start, keys, values)
    assert layer.impl.written_tokens == 16
    assert torch.equal(paged.read([4, 5, 6], start, start + 16)[0], keys)
    assert torch.equal(paged.read([4, 5, 6], start, start + 16)[1], values)


def test_tokens_outside_of_heads_are_written_straight_where_a_view_can() -> None:
    """Keys and values side by side, in the physical order of FlashAttention."""
    layer = make_layer("side by side")
    layer.kv_cache = layer.kv_cache.transpose(1, 2).contiguous().transpose(1, 2)
    paged = PagedLayers([layer], BLOCK)
    layer.impl.written_tokens = 0
    keys, values = torch.randn(1, H, 16, D), torch.randn(1, H, 16, D)
    paged.write([6, 4], 0, keys, values)
    assert layer.impl.written_tokens == 0
    assert torch.equal(paged.read([6, 4], 0, 16)[0], keys)
    assert torch.equal(paged.read_layer(0, [6, 4], 3, 16)[1], values[0, :, 3:])


def test_a_backend_that_writes_otherwise_than_the_packing_keeps_its_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers that read equal and are other bytes: a zero has a sign."""

    class Signless(Backend):
        def do_kv_cache_update(self, layer: Any, keys: Tensor, values: Tensor, cache: Tensor, slots: Tensor) -> None:
            super().do_kv_cache_update(layer, keys + 0.0, values + 0.0, cache, slots)

    layer = make_layer("side by side")
    layer.impl = Signless("side by side")
    monkeypatch.setattr(torch, "randn", lambda shape, generator: -torch.zeros(shape))
    paged = PagedLayers([layer], BLOCK)
    layer.impl.written_tokens = 0
    paged.write([4], 0, *(-torch.zeros(1, H, BLOCK, D),) * 2)
    assert layer.impl.written_tokens == BLOCK
    assert not torch.signbit(layer.kv_cache[4]).any()


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
    with pytest.raises(EngineError, match="caches of one shape that are not quantised"):
        PagedLayers([layer], BLOCK)


def test_layers_that_differ_in_shape_are_refused() -> None:
    with pytest.raises(EngineError, match="as in the first layer"):
        PagedLayers([make_layer("side by side"), make_layer("side by side", value_dim=4)], BLOCK)


def test_a_backend_that_cannot_write_is_refused() -> None:
    layer = make_layer("side by side")
    layer.impl = object()
    with pytest.raises(EngineError, match="cannot write given keys"):
        PagedLayers([layer], BLOCK)


def test_a_backend_that_retrieves_is_told_of_every_write() -> None:
    """Its indexes belong to blocks as they were last written: a write past it would leave an index over other keys."""
    layer = make_layer("side by side")
    layer.impl.retrieving = None
    paged = PagedLayers([layer], BLOCK)
    before = layer.impl.written_tokens
    paged.write([3, 4], 0, *(torch.randn(1, H, 2 * BLOCK, D),) * 2)
    assert layer.impl.written_tokens - before == 2 * BLOCK
