"""KV of tokens in vLLM's paged cache: written by the attention backend itself, read by a packing found by trying.

Whole blocks are copied straight to and from the cache, in a third of the time, where the same tokens written by the
packing have given the very bytes that the backend gave. Everything else is written by the backend. Quantised caches are
read and written as their bytes, never by the backend, which would round them anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import EngineError
from ..serving.worker.block_copies import copy_in, copy_out, kernel_blocks, runs_of_blocks
from .packings import Packing, Quantised, cache_of, find_packing, is_latent, unpacked, write_layer

_EIGHT_BITS = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


class PagedLayers:
    """The caches of a worker's attention layers.

    Parameters
    ----------
    layers : vLLM's attention modules in the order of the model, with their caches allocated.
    block_tokens : tokens of a block in the scheduler's numbers. A layer may divide it into smaller ones.
    computes : dtype of the keys and values that a backend is given, where its cache rounds them.

    Attributes
    ----------
    dtype : of the numbers that are read and written: bytes, where the cache is quantised.

    Raises
    ------
    EngineError : layers differ in shape or dtype, a backend cannot write given tokens, or no packing reads what it
        wrote.
    """

    def __init__(self, layers: Sequence[Any], block_tokens: int, computes: torch.dtype = torch.float32) -> None:
        if not layers:
            raise EngineError("the model has no attention layer with a KV cache")
        first, cache = layers[0], cache_of(layers[0])
        self.layers = tuple(layers)
        self.num_layers = len(layers)
        self.block_tokens = block_tokens
        self.num_kv_heads, self.head_dim = int(first.num_kv_heads), int(first.head_size)
        self.is_latent = is_latent(first)
        self.v_head_dim = 0 if self.is_latent else int(getattr(first, "head_size_v", None) or first.head_size)
        self.dtype: torch.dtype = cache.dtype
        self.device: torch.device = cache.device
        for layer in layers:
            cache = cache_of(layer)
            shape = (cache.shape[1], cache.shape[3], layer.head_size, cache.dtype) if cache.ndim == 4 else None
            if shape != (self.num_kv_heads, self.head_dim + self.v_head_dim, self.head_dim, self.dtype):
                raise EngineError(
                    f"layer {layer.layer_name} has a KV cache of {cache.dtype} {list(cache.shape)}; expected "
                    f"{self.dtype} with {self.num_kv_heads} heads of {self.head_dim} + {self.v_head_dim} numbers a "
                    "token, as in the first layer: kvloom serves caches of one shape, as they are computed or as fp8 "
                    "(--kv-cache-dtype auto or fp8)"
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
        self.quantised = tuple(_quantised(layer, computes) for layer in layers)
        for layer, quantised in zip(layers, self.quantised, strict=True):
            cache = cache_of(layer)
            count = block_tokens // cache.shape[2]
            packing, is_direct = find_packing(layer, cache, self.head_dim, self.v_head_dim, count, quantised)
            self._packings.append(packing)
            # A backend that retrieves has to see every write: an index over other keys would give a wrong answer.
            is_direct = is_direct and not hasattr(layer.impl, "retrieving")
            if quantised is not None and not is_direct:
                raise EngineError(
                    f"layer {layer.layer_name} keeps KV as {layer.kv_cache_dtype}, and its backend "
                    f"{type(layer.impl).__name__} does not let kvloom write the bytes themselves: --kv-cache-dtype auto"
                )
            self._views.append(packing(cache, self.head_dim, self.v_head_dim) if is_direct else None)

    def state(self) -> dict[str, object]:
        """What the numbers stand for beside shape and dtype, for a name of them; empty for plain keys and values."""
        state: dict[str, object] = {}
        if self.is_latent:
            state["latent"] = int(self.layers[0].kv_lora_rank)
        if any(self.quantised):
            state["kind"] = [None if each is None else str(each.number) for each in self.quantised]
            scales = ("_k_scale", "_v_scale", "_q_scale", "_prob_scale")
            state["scales"] = [[getattr(layer, name).flatten().tolist() for name in scales] for layer in self.layers]
        return state

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
        cache = cache_of(self.layers[index])
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
        self._put(index, keys, values, self.slots(blocks, positions))

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
            views = self._views[index]
            if views is None or not runs:
                all_slots = self.slots(blocks, positions) if all_slots is None else all_slots
                self._put(index, k, v, all_slots)
                continue
            for view, tokens in zip(views, (k, v), strict=True):
                copy_in(view, runs, tokens[:, whole], size)
            if edge_slots is not None:
                self._put(index, k[:, edges], v[:, edges], edge_slots)

    def slots(self, blocks: Sequence[int], positions: Tensor) -> Tensor:
        """Slots of a request's tokens: block number times `block_tokens`, plus the place in the block; int64."""
        numbers = torch.tensor(blocks, dtype=torch.int64)[positions // self.block_tokens]
        return (numbers * self.block_tokens + positions % self.block_tokens).to(self.device)

    def _put(self, index: int, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        """Write single tokens of a layer."""
        views = self._views[index]
        if self.quantised[index] is None or views is None:
            write_layer(self.layers[index], keys, values, slots)
            return
        for view, tokens in zip(views, (keys, values), strict=True):
            view[slots // view.shape[2], :, slots % view.shape[2]] = tokens.transpose(0, 1)


def _quantised(layer: Any, computes: torch.dtype) -> Quantised | None:
    """How a layer's cache rounds; None if it does not.

    Raises
    ------
    EngineError : in a way whose bytes kvloom does not know.
    """
    if cache_of(layer).dtype != torch.uint8:
        return None
    if is_latent(layer):
        raise EngineError(
            f"layer {layer.layer_name} keeps latents (MLA) as {layer.kv_cache_dtype}: vLLM attends to a prompt as "
            "computed, and to what is cached as rounded, so that a hit could give another token; --kv-cache-dtype auto"
        )
    kind, key_scale, value_scale = str(layer.kv_cache_dtype), layer._k_scale, layer._v_scale  # noqa: SLF001
    if kind not in _EIGHT_BITS or key_scale.numel() != 1 or value_scale.numel() != 1:
        raise EngineError(
            f"layer {layer.layer_name} keeps KV as {kind} with {key_scale.numel()} scales; kvloom serves fp8 with one "
            "scale for the keys of a layer and one for its values: --kv-cache-dtype fp8 or auto"
        )
    return Quantised(_EIGHT_BITS[kind], computes, float(key_scale), float(value_scale))
