"""SGLang's real HiCache without its engine: device pool, host pool, controller and storage threads on a processor."""

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ["SGLANG_USE_CPU_ENGINE"] = "1"

import torch

LAYERS, HEADS, DIM, PAGE, TOKENS = 4, 2, 64, 16, 2048
BACKEND = {"backend_name": "kvloom", "module_path": "kvloom.connectors.sglang", "class_name": "KVLoomStorage"}


@contextmanager
def sglang(model: Path) -> Iterator[None]:
    """Set up what SGLang sets up in a scheduler's process."""
    from sglang.srt.plugins import load_plugins
    from sglang.srt.runtime_context import get_parallel
    from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

    load_plugins()
    set_global_server_args_for_scheduler(
        ServerArgs(model_path=str(model), device="cpu", attention_backend="torch_native", dtype="float32")
    )
    with get_parallel().override(tp_rank=0, tp_size=1, pp_rank=0, pp_size=1, attn_dcp_size=1, attn_dcp_rank=0):
        yield


class Cache:
    """A controller with a storage backend, and KV in its device pool."""

    def __init__(self, layout: str, backend: str, extra: Mapping[str, Any], *, latent: bool = False) -> None:
        from sglang.srt.managers.cache_controller import HiCacheController
        from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator

        self.device, self.host = (_latent_pools if latent else _pools)(layout)
        self.allocator = PagedTokenToKVPoolAllocator(
            size=TOKENS, page_size=PAGE, dtype=torch.float32, device="cpu", kvcache=self.device, need_sort=False
        )
        self.controller = HiCacheController(
            self.allocator,
            self.host,
            PAGE,
            tp_group=None,
            load_cache_event=threading.Event(),
            write_policy="write_through",
            io_backend="direct" if layout in ("layer_first", "page_first_direct") else "kernel",
            storage_backend=backend,
            prefetch_threshold=PAGE,
            model_name="tiny",
            storage_backend_extra_config=dict(extra),
        )

    @property
    def buffers(self) -> list[torch.Tensor]:
        device = self.device
        return list(device.kv_buffer) if hasattr(device, "kv_buffer") else [*device.k_buffer, *device.v_buffer]

    def fill(self, count: int, seed: int) -> torch.Tensor:
        """Device tokens with KV of their own."""
        where = self.allocator.alloc(count)
        generator = torch.Generator().manual_seed(seed)
        for buffer in self.buffers:
            buffer[where] = torch.randn(buffer[where].shape, generator=generator)
        return where

    def kv(self, where: torch.Tensor) -> list[torch.Tensor]:
        return [buffer[where].clone() for buffer in self.buffers]

    def save(self, where: torch.Tensor, tokens: Sequence[int], hashes: list[str], before: list[str] | None) -> int:
        """Device to host to storage; tokens that were stored."""
        host = self.controller.write(where)
        assert host is not None
        self.controller.write_storage(host, list(tokens), hashes, before)
        done = self.controller.ack_backup_queue.get(timeout=60).completed_tokens
        self.host.free(host)
        return int(done)

    def wipe(self) -> None:
        for buffer in self.buffers:
            buffer.zero_()
        for buffer in (self.host.kv_buffer,):
            buffer.zero_()

    def load(self, tokens: Sequence[int]) -> tuple[int, torch.Tensor | None]:
        """Storage to host to device: tokens that were found, and where those that arrived are."""
        self.controller.prefetch("request", list(tokens), None)
        found = self.controller.prefetch_hit_queue.get(timeout=60)
        if not found.storage_hit_count:
            return 0, None
        found.host_indices = self.host.alloc(found.storage_hit_count)
        self.controller.prefetch_buffer.put(found)
        arrived = 0
        while True:
            ack = self.controller.ack_prefetch_queue.get(timeout=60)
            arrived = arrived if ack.completed_tokens is None else ack.completed_tokens
            if ack.completed_req:
                break
        where = self.controller.load(found.host_indices[:arrived])
        self.controller.start_loading()
        return int(found.storage_hit_count), where

    def close(self) -> None:
        self.controller.detach_storage_backend()


def _pools(layout: str) -> tuple[Any, Any]:
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
    from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost

    device = MHATokenToKVPool(
        size=TOKENS, page_size=PAGE, dtype=torch.float32, head_num=HEADS, head_dim=DIM, layer_num=LAYERS, device="cpu",
        enable_memory_saver=False,
    )  # fmt: skip
    info = device.get_device_pool_infos()[0].buffer_info
    host = MHATokenToKVPoolHost(
        info, 2.0, 0, PAGE, layout, device_capacity_tokens=TOKENS, start_layer=0, end_layer=LAYERS
    )
    return device, host


def _latent_pools(layout: str) -> tuple[Any, Any]:
    from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool
    from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost

    device = MLATokenToKVPool(
        size=TOKENS, page_size=PAGE, dtype=torch.float32, kv_lora_rank=48, qk_rope_head_dim=16, layer_num=LAYERS,
        device="cpu", enable_memory_saver=False,
    )  # fmt: skip
    info = device.get_device_pool_infos()[0].buffer_info
    host = MLATokenToKVPoolHost(
        info, 2.0, 0, PAGE, layout, device_capacity_tokens=TOKENS, start_layer=0, end_layer=LAYERS,
        target_layer_num=LAYERS, override_kv_cache_dim=device.kv_cache_dim,
    )  # fmt: skip
    return device, host
