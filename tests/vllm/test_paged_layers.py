"""Reading what an attention backend has written, whatever its packing; and refusing what cannot be read."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvloom.connectors.vllm.packings import PACKINGS
from kvloom.connectors.vllm.paged_layers import PagedLayers
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


class Rounding(Backend):
    """Rounds what it is given to eight bits, as fp8 caches do."""

    def __init__(self, packing: str, number: torch.dtype) -> None:
        super().__init__(packing)
        self.number = number

    def do_kv_cache_update(self, layer: Any, keys: Tensor, values: Tensor, cache: Tensor, slots: Tensor) -> None:
        assert keys.dtype == values.dtype == torch.bfloat16, "what the model computes"
        rounded = [
            (part.float() / scale).to(self.number).view(torch.uint8)
            for part, scale in ((keys, layer._k_scale), (values, layer._v_scale))
        ]
        super().do_kv_cache_update(layer, *rounded, cache, slots)


def make_rounding_layer(packing: str, kind: str, scale: float = 1.0, **options: int) -> SimpleNamespace:
    layer = make_layer(packing, **options)
    layer.kv_cache = torch.randint(256, layer.kv_cache.shape, dtype=torch.uint8)
    layer.kv_cache_dtype = kind
    for name in ("_k_scale", "_v_scale", "_q_scale", "_prob_scale"):
        setattr(layer, name, torch.tensor(scale))
        scale *= 1.5
    layer.impl = Rounding(packing, torch.float8_e5m2 if kind.endswith("e5m2") else torch.float8_e4m3fn)
    return layer


@pytest.mark.parametrize("kernel_tokens", [BLOCK, BLOCK // 2])
@pytest.mark.parametrize("scale", [1.0, 0.37])
@pytest.mark.parametrize("kind", ["fp8", "fp8_e5m2"])
@pytest.mark.parametrize("packing", PACKINGS)
def test_an_eight_bit_cache_is_read_and_written_as_its_bytes(
    packing: str, kind: str, scale: float, kernel_tokens: int
) -> None:
    """All 256 of them, numbers that are none included; the backend, which would round them anew, writes nothing."""
    layers = [make_rounding_layer(packing, kind, scale, kernel_tokens=kernel_tokens) for _ in range(2)]
    before = [layer.kv_cache.clone() for layer in layers]
    paged = PagedLayers(layers, BLOCK, torch.bfloat16)
    assert all(torch.equal(layer.kv_cache, cache) for layer, cache in zip(layers, before, strict=True))
    assert paged.dtype == torch.uint8
    for layer in layers:
        layer.impl.written_tokens = 0
    keys, values = (torch.randint(256, (2, H, 29, D), dtype=torch.uint8) for _ in range(2))
    paged.write([7, 2, 9, 4, 5], 5, keys, values)
    assert all(torch.equal(*pair) for pair in zip(paged.read([7, 2, 9, 4, 5], 5, 34), (keys, values), strict=True))
    assert not any(layer.impl.written_tokens for layer in layers)
    for layer, cache in zip(layers, before, strict=True):
        kernel = [b * (BLOCK // kernel_tokens) + i for b in (0, 1, 3, 6, 8) for i in range(BLOCK // kernel_tokens)]
        assert torch.equal(layer.kv_cache[kernel], cache[kernel])


def test_scales_and_kinds_of_eight_bits_are_part_of_the_name() -> None:
    states = [
        PagedLayers([make_rounding_layer("side by side", kind, scale)], BLOCK, torch.bfloat16).state()
        for kind, scale in (("fp8", 1.0), ("fp8_e4m3", 1.0), ("fp8_e5m2", 1.0), ("fp8", 0.5))
    ]
    assert states[0] == states[1] and states[0] not in states[2:] and states[2] != states[3]
    assert PagedLayers([make_layer("side by side")], BLOCK).state() == {}


@pytest.mark.parametrize("kind", ["fp8_per_token_head", "nvfp4", "fp8_ds_mla"])
def test_other_quantised_caches_are_refused(kind: str) -> None:
    with pytest.raises(EngineError, match=rf"keeps KV as {kind}.*--kv-cache-dtype fp8 or auto"):
        PagedLayers([make_rounding_layer("side by side", kind)], BLOCK)
    layer = make_rounding_layer("side by side", kind)
    layer.kv_cache = layer.kv_cache[..., :D]
    with pytest.raises(EngineError, match="as they are computed or as fp8"):
        PagedLayers([layer], BLOCK)


def test_a_scale_for_each_head_is_refused() -> None:
    layer = make_rounding_layer("side by side", "fp8")
    layer._k_scale = torch.ones(H)
    with pytest.raises(EngineError, match=f"fp8 with {H} scales"):
        PagedLayers([layer], BLOCK)


def test_eight_bits_that_only_the_backend_may_write_are_refused() -> None:
    layer = make_rounding_layer("side by side", "fp8")
    layer.impl.retrieving = None
    with pytest.raises(EngineError, match=r"does not let kvloom write the bytes.*--kv-cache-dtype auto"):
        PagedLayers([layer], BLOCK, torch.bfloat16)


class Latent:
    """Writes a latent and rotated channels side by side, as backends of latent attention do."""

    def do_kv_cache_update(
        self, latent: Tensor, rotated: Tensor, cache: Tensor, slots: Tensor, kind: str, scale: Tensor
    ) -> None:
        assert rotated.shape[1] == 1 and cache.ndim == 3 and kind == "auto"
        cache.view(-1, cache.shape[2])[slots] = torch.cat((latent, rotated[:, 0]), dim=1)


def make_latent_layer() -> SimpleNamespace:
    """Of 6 + 2 numbers a token; without heads, and without values, whatever size the model's values have."""
    return SimpleNamespace(
        layer_name="model.layers.0.self_attn.attn",
        num_kv_heads=1,
        head_size=8,
        v_head_dim=5,
        kv_lora_rank=6,
        kv_cache=torch.randn(12, BLOCK, 8),
        kv_cache_dtype="auto",
        _k_scale=torch.tensor(1.0),
        impl=Latent(),
    )


def test_rounded_latents_are_refused() -> None:
    layer = make_latent_layer()
    layer.kv_cache, layer.kv_cache_dtype = layer.kv_cache.to(torch.float8_e4m3fn), "fp8"
    with pytest.raises(EngineError, match=r"keeps latents .MLA. as fp8.*--kv-cache-dtype auto"):
        PagedLayers([layer], BLOCK)


@pytest.mark.parametrize("span", [(0, 32), (5, 29)], ids=str)
def test_latents_are_keys_of_one_head_without_values(span: tuple[int, int]) -> None:
    layers = [make_latent_layer() for _ in range(2)]
    before = [layer.kv_cache.clone() for layer in layers]
    paged = PagedLayers(layers, BLOCK)
    assert (paged.num_kv_heads, paged.head_dim, paged.v_head_dim) == (1, 8, 0)
    assert paged.state() == {"latent": 6}
    keys = torch.randn(2, 1, span[1] - span[0], 8)
    paged.write([7, 2, 9, 4], span[0], keys, keys[..., :0])
    read_keys, read_values = paged.read([7, 2, 9, 4], *span)
    assert torch.equal(read_keys, keys) and read_values.shape == (2, 1, len(keys[0, 0]), 0)
    for index, (layer, cache) in enumerate(zip(layers, before, strict=True)):
        rows, old = (each[[7, 2, 9, 4]].flatten(0, 1) for each in (layer.kv_cache, cache))
        assert torch.equal(rows[slice(*span)], keys[index, 0])
        assert torch.equal(rows[: span[0]], old[: span[0]]) and torch.equal(rows[span[1] :], old[span[1] :])
        assert torch.equal(layer.kv_cache[[0, 1, 3, 5]], cache[[0, 1, 3, 5]])


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
