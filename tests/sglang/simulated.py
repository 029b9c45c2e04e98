"""A host pool with SGLang's layouts, without SGLang."""

from typing import Any

import torch

LAYERS, HEADS, DIM, PAGE, TOKENS = 3, 2, 8, 4, 32
LAYOUTS = {
    "layer_first": (LAYERS, TOKENS, HEADS, DIM),
    "page_first": (TOKENS, LAYERS, HEADS, DIM),
    "page_first_direct": (TOKENS // PAGE, LAYERS, PAGE, HEADS, DIM),
    "page_head": (TOKENS // PAGE, HEADS, PAGE, LAYERS, DIM),
}


class Pool:
    """As SGLang's `MHATokenToKVPoolHost`: the parts that kvloom reads."""

    def __init__(self, layout: str = "layer_first", *, dtype: torch.dtype = torch.float32) -> None:
        self.layout, self.page_size, self.layer_num, self.dtype = layout, PAGE, LAYERS, dtype
        self.head_num, self.head_dim, self.v_head_dim = HEADS, DIM, DIM
        self.kv_buffer = torch.zeros(2, *LAYOUTS[layout], dtype=dtype)

    @property
    def k_buffer(self) -> torch.Tensor:
        return self.kv_buffer[0]

    @property
    def v_buffer(self) -> torch.Tensor:
        return self.kv_buffer[1]

    def fill(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.kv_buffer.copy_(torch.randn(self.kv_buffer.shape, generator=generator))

    def flat(self, first: int) -> torch.Tensor:
        """As SGLang's `get_data_page`."""
        if self.layout == "layer_first":
            return self.kv_buffer[:, :, first : first + PAGE].flatten()
        if self.layout == "page_first":
            return self.kv_buffer[:, first : first + PAGE].flatten()
        return self.kv_buffer[:, first // PAGE].flatten()

    def token(self, side: int, layer: int, head: int, token: int) -> torch.Tensor:
        """The `[D]` numbers of one token, by the layout's own definition."""
        buffer = self.kv_buffer[side]
        page, within = divmod(token, PAGE)
        where: dict[str, Any] = {
            "layer_first": (layer, token, head),
            "page_first": (token, layer, head),
            "page_first_direct": (page, layer, within, head),
            "page_head": (page, head, within, layer),
        }
        return buffer[where[self.layout]]


class LatentPool:
    """As SGLang's `MLATokenToKVPoolHost`."""

    def __init__(self, layout: str) -> None:
        self.layout, self.page_size, self.layer_num = layout, PAGE, LAYERS
        shape = {
            "layer_first": (LAYERS, TOKENS, 1, DIM),
            "page_first": (TOKENS, LAYERS, 1, DIM),
            "page_first_direct": (TOKENS // PAGE, LAYERS, PAGE, 1, DIM),
            "page_head": (TOKENS // PAGE, 1, PAGE, LAYERS, DIM),
        }[layout]
        self.kv_buffer = torch.randn(shape, generator=torch.Generator().manual_seed(3))
