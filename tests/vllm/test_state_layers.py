"""States of layers as bytes of blocks: what is read is what is written, and nothing beside it changes."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvloom.connectors.vllm.state_layers import StateLayers
from kvloom.errors import EngineError

BLOCK, BLOCKS = 16, 6
CONVOLUTION, RECURRENT = (3, 5), (2, 4, 3)  # 15 numbers of 16 bits: what follows is not aligned to its own size


def layer(seed: int, inner: int = RECURRENT[1]) -> Any:
    """Both parts of every block's state side by side in a page with something behind them, as vLLM lays them out."""
    sizes = (15 * 2, RECURRENT[0] * inner * RECURRENT[2] * 4)
    pages = torch.randint(0, 256, (BLOCKS, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    first = pages[:, : sizes[0]].view(torch.bfloat16).view(-1, *CONVOLUTION)
    begin = 32
    second = pages[:, begin : begin + sizes[1]].view(torch.float32).view(-1, RECURRENT[0], inner, RECURRENT[2])
    return SimpleNamespace(kv_cache=(first, second), pages=pages)


def test_bytes_come_back_in_another_block() -> None:
    layers = [layer(1), layer(2), layer(3)]
    states = StateLayers(layers, BLOCK)
    assert (states.num_layers, states.head_dim, states.v_head_dim) == (3, 30 + 96, 0)
    keys, values = states.read((5, 2), BLOCK - 1, BLOCK)
    assert keys.shape == (3, 1, 1, 126) and values.shape == (3, 1, 1, 0)
    for each, row in zip(layers, keys[:, 0, 0], strict=True):
        expected = torch.cat((each.pages[5, :30], each.pages[5, 32:128]))
        assert torch.equal(row, expected)
    before = [each.pages.clone() for each in layers]
    states.write((0, 0, 4), 3 * BLOCK - 1, keys, values)
    for each, page in zip(layers, before, strict=True):
        page[4, :30], page[4, 32:128] = page[5, :30], page[5, 32:128]
        assert torch.equal(each.pages, page)
    kept = keys.clone()
    layers[0].pages.zero_()
    assert torch.equal(keys, kept), "a copy"


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (BLOCK - 2, BLOCK), (BLOCK - 1, 2 * BLOCK), (BLOCK, BLOCK + 1)])
def test_only_the_last_token_of_a_block_has_a_state(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="not the last one of a block of 16 tokens"):
        StateLayers([layer(1)], BLOCK).read((1, 2), start, stop)


def test_states_of_two_sizes_are_refused() -> None:
    with pytest.raises(EngineError, match=r"states of \[102, 126\] bytes.*leave the connector out"):
        StateLayers([layer(1), layer(2, inner=3)], BLOCK)
