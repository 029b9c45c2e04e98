"""States of vLLM's layers that have one (state spaces, linear attention, short convolutions), as bytes of blocks.

In `align` mode, vLLM's way to cache prefixes of such models, a block of such a layer holds the state behind the block's
last token, if a step of the engine ended there. To kvloom that is a token of one head, whose key is all bytes of the
layer's state (a convolution's last inputs, then what recurs). What the bytes mean is the backend's own affair: they are
never moved or converted, and their name says for which backend they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import EngineError


class StateLayers:
    """The states of a worker's layers of one KV cache group; a `PagedCache` that has the last token of each block.

    Parameters
    ----------
    layers : vLLM's modules in the order of the model, with their caches allocated: tensors `[B, ...]`.
    block_tokens : tokens of a block in the scheduler's numbers.

    Raises
    ------
    EngineError : layers differ in the size of their states.
    """

    num_kv_heads = 1
    v_head_dim = 0
    dtype = torch.uint8
    is_latent = False

    def __init__(self, layers: Sequence[Any], block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self.num_layers = len(layers)
        self._states = [tuple(layer.kv_cache) for layer in layers]
        sizes = {sum(state[0].nbytes for state in states) for states in self._states}
        if len(sizes) != 1:
            raise EngineError(
                f"layers of one KV cache group have states of {sorted(sizes)} bytes; kvloom serves states of one size: "
                "leave the connector out"
            )
        (self.head_dim,) = sizes

    def state(self) -> dict[str, object]:
        """What the bytes stand for: shapes and dtypes, and who reads them."""
        import vllm
        from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first

        # A backend may keep a state as suits its kernels, behind shapes that all share.
        kernels = [vllm.__version__, self._states[0][0].device.type, is_conv_state_dim_first()]
        if self._states[0][0].device.type == "cpu":
            kernels.append(torch.backends.cpu.get_cpu_capability())
        shapes = [[[str(each.dtype), list(each.shape[1:])] for each in states] for states in self._states]
        return {"states": shapes, "kernels": kernels}

    def read(self, blocks: Sequence[int], start: int, stop: int) -> tuple[Tensor, Tensor]:
        """A copy of the states behind token `start`, the last one of a block: bytes `[L, 1, 1, D]`, and no values."""
        block = self._block(blocks, start, stop)
        rows = torch.stack([torch.cat([_bytes_of(each[block]) for each in states]) for states in self._states])
        keys = rows[:, None, None]
        return keys, keys.new_empty(self.num_layers, 1, 1, 0)

    @torch.inference_mode()
    def write(self, blocks: Sequence[int], start: int, keys: Tensor, values: Tensor) -> None:
        """Overwrite the states of the block whose last token is `start`, shapes as `read` gives."""
        for index in range(self.num_layers):
            self.write_layer(index, blocks, start, keys[index], values[index])

    def write_layer(self, index: int, blocks: Sequence[int], start: int, keys: Tensor, values: Tensor) -> None:  # noqa: ARG002  as of a `LayerCache`
        """The same for one layer: bytes `[1, 1, D]`, and no values."""
        block, states = self._block(blocks, start, start + keys.shape[1]), self._states[index]
        parts = keys[0, 0].split([each[0].nbytes for each in states])
        for each, part in zip(states, parts, strict=True):
            each[block].copy_(part.clone().view(each.dtype).view(each.shape[1:]))  # a copy, for its alignment

    def _block(self, blocks: Sequence[int], start: int, stop: int) -> int:
        if stop - start != 1 or stop % self.block_tokens:
            raise ValueError(f"tokens [{start}, {stop}) are not the last one of a block of {self.block_tokens} tokens")
        return blocks[start // self.block_tokens]


def _bytes_of(state: Tensor) -> Tensor:
    return state.contiguous().view(torch.uint8).flatten()
