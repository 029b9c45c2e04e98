"""Pages of a host pool in every layout: the canonical form, in both directions, and what is refused."""

import pytest
import torch

from kvloom.connectors.sglang.host_pages import HostPages
from kvloom.errors import EngineError

from .simulated import DIM, HEADS, LAYERS, LAYOUTS, PAGE, LatentPool, Pool


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_page_is_canonical(layout: str) -> None:
    pool = Pool(layout)
    pool.fill()
    pages = HostPages(pool)
    assert (pages.num_layers, pages.num_kv_heads, pages.head_dim, pages.v_head_dim) == (LAYERS, HEADS, DIM, DIM)
    for first in (0, 3 * PAGE):
        for side, tensor in enumerate(pages.page(first)):
            assert tensor.shape == (LAYERS, HEADS, PAGE, DIM)
            for layer in range(LAYERS):
                for head in range(HEADS):
                    for token in range(PAGE):
                        expected = pool.token(side, layer, head, first + token)
                        assert torch.equal(tensor[layer, head, token], expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_writing_a_page_changes_nothing_else(layout: str) -> None:
    pool, source = Pool(layout), Pool("page_first")
    source.fill(1)
    pages = HostPages(pool)
    keys, values = pages.page(2 * PAGE)
    for into, tensor in zip((keys, values), HostPages(source).page(0), strict=True):
        into.copy_(tensor)
    assert torch.equal(pool.token(1, 2, 1, 2 * PAGE + 3), source.token(1, 2, 1, 3))
    keys.zero_()
    values.zero_()
    assert not pool.kv_buffer.any(), "the page is all that was written"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_flat_pages_are_the_same_pages(layout: str) -> None:
    pool = Pool(layout)
    pool.fill()
    pages = HostPages(pool)
    flat = pool.flat(PAGE)
    for here, there in zip(pages.page(PAGE), pages.flat_page(flat), strict=True):
        assert torch.equal(here, there)
    pages.flat_page(flat)[0].zero_()
    assert not flat[: len(flat) // 2].any() and flat[len(flat) // 2 :].all(), "a view, of the keys alone"


@pytest.mark.parametrize("layout", ["layer_first", "page_first", "page_first_direct"])
def test_latent_pages_are_all_keys(layout: str) -> None:
    pages = HostPages(LatentPool(layout))
    keys, values = pages.page(PAGE)
    assert keys.shape == (LAYERS, 1, PAGE, DIM) and values.shape == (LAYERS, 1, PAGE, 0)
    first = HostPages(LatentPool("layer_first")).page(0)[0]
    assert first[1, 0, 2].tolist() == LatentPool("layer_first").kv_buffer[1, 2, 0].tolist()


def test_what_is_refused() -> None:
    pool = Pool()
    pool.layout = "page_unified"
    with pytest.raises(EngineError, match="--hicache-mem-layout one of layer_first"):
        HostPages(pool)
    with pytest.raises(EngineError, match="'page_head' is not known"):
        HostPages(LatentPool("page_head"))
    wrong = Pool()
    wrong.layer_num = 7
    with pytest.raises(EngineError, match=r"expected \[layers, heads, tokens, dim\] of \[7, 2, 4\]"):
        HostPages(wrong)
    pages = HostPages(Pool())
    for flat in (torch.zeros(5), torch.zeros(2 * LAYERS * HEADS * PAGE * DIM, dtype=torch.float16)):
        with pytest.raises(EngineError, match="a page is"):
            pages.flat_page(flat)
