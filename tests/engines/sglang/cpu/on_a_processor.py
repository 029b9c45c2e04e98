"""Copies between SGLang's device pool and its host pool where both lie in plain memory.

SGLang has kernels for these copies on devices only, and registers the memory of its host pool with CUDA. SGLang calls
`register` in each of its processes, through the entry point `sglang.srt.plugins`. Radix tree, controller, threads and
storage are SGLang's own.
"""

import inspect
from typing import Any

import torch


def register() -> None:
    from sglang.srt.mem_cache.pool_host import common, mha, mla

    common.ALLOC_MEMORY_FUNCS["cpu"] = _allocate
    for kind in (mha.MHATokenToKVPoolHost, mla.MLATokenToKVPoolHost):
        kind.__init__ = _unpinned(kind.__init__)
    mha.MHATokenToKVPoolHost.backup_from_device_all_layer = _back_up
    mha.MHATokenToKVPoolHost.load_to_device_per_layer = _load
    mla.MLATokenToKVPoolHost.backup_from_device_all_layer = _back_up_latent
    mla.MLATokenToKVPoolHost.load_to_device_per_layer = _load_latent


def _allocate(dims: Any, dtype: torch.dtype, device: str, pin_memory: bool, allocator: Any, **_: object) -> Any:
    return allocator.allocate(dims, dtype=dtype, device=device)


def _unpinned(original: Any) -> Any:
    signature = inspect.signature(original)

    def init(*args: Any, **kwargs: Any) -> None:
        bound = signature.bind(*args, **kwargs)
        bound.arguments["pin_memory"] = False
        original(*bound.args, **bound.kwargs)

    return init


def _place(pool: Any, layer: int, tokens: torch.Tensor) -> tuple[Any, ...]:
    """Index of these tokens of a layer in the host buffer of keys, or of values."""
    page, within = tokens // pool.page_size, tokens % pool.page_size
    places = {
        "layer_first": (layer, tokens),
        "page_first": (tokens, layer),
        "page_first_direct": (page, layer, within),
        "page_head": (page, slice(None), within, layer),
    }
    return places[pool.layout]


def _back_up(pool: Any, device_pool: Any, host_indices: Any, device_indices: Any, io_backend: str) -> None:
    there, here = host_indices.long(), device_indices.long()
    for layer in range(pool.layer_num):
        place = _place(pool, layer, there)
        pool.k_buffer[place] = pool.device_k_buffers[layer][here]
        pool.v_buffer[place] = pool.device_v_buffers[layer][here]


def _load(
    pool: Any, device_pool: Any, host_indices: Any, device_indices: Any, layer_id: int, io_backend: str, **more: Any
) -> None:
    if more.get("is_draft") or 0 <= layer_id < pool.target_layer_num:
        there, here = host_indices.long(), device_indices.long()
        place = _place(pool, layer_id, there)
        pool.device_k_buffers[layer_id][here] = pool.k_buffer[place]
        pool.device_v_buffers[layer_id][here] = pool.v_buffer[place]


def _back_up_latent(pool: Any, device_pool: Any, host_indices: Any, device_indices: Any, io_backend: str) -> None:
    there, here = host_indices.long(), device_indices.long()
    for layer in range(pool.layer_num):
        pool.kv_buffer[_place(pool, layer, there)] = device_pool.kv_buffer[layer][here]


def _load_latent(
    pool: Any, device_pool: Any, host_indices: Any, device_indices: Any, layer_id: int, io_backend: str, **more: Any
) -> None:
    there, here = host_indices.long(), device_indices.long()
    device_pool.kv_buffer[layer_id][here] = pool.kv_buffer[_place(pool, layer_id, there)]
