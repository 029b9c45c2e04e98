"""Stock SGLang's engine on a processor, with HiCache of three tiers."""

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PAGE = 16
DEVICE_TOKENS = 2048  # so that some prompts evict the others from the device, and more of them from the host
BACKEND = {"backend_name": "kvloom", "module_path": "kvloom.connectors.sglang", "class_name": "KVLoomStorage"}
OWN = {"interface_v1": 1, "hicache_storage_pass_prefix_keys": True, "prefetch_threshold": PAGE}


@contextmanager
def engine(model: Path, storage: Mapping[str, Any] | None, **options: Any) -> Iterator[Any]:
    """An engine in processes of its own. `storage`: kvloom's settings; None for no storage."""
    os.environ.update(
        SGLANG_USE_CPU_ENGINE="1", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", SGLANG_CPU_OMP_THREADS_BIND=""
    )
    os.environ.pop("SGLANG_CPU_OMP_THREADS_BIND")
    import sglang

    extra: dict[str, Any] = {}
    if storage is not None:
        extra = {
            "hicache_storage_backend": "dynamic",
            "hicache_storage_prefetch_policy": "wait_complete",
            "hicache_storage_backend_extra_config": json.dumps({**BACKEND, **OWN, **storage}),
        }
    settings: dict[str, Any] = {
        "device": "cpu",
        "attention_backend": "torch_native",
        "dtype": "float32",
        "max_total_tokens": DEVICE_TOKENS,
        "page_size": PAGE,
        "disable_cuda_graph": True,
        "mem_fraction_static": 0.3,
        "log_level": "warning",
        "skip_tokenizer_init": True,
        "enable_hierarchical_cache": True,
        "hicache_ratio": 2.0,
        "hicache_io_backend": "kernel",
        "hicache_mem_layout": "page_first",
        "hicache_write_policy": "write_through",
        **extra,
        **options,
    }
    if settings.get("enable_metrics"):
        _forget_metrics()
    running = sglang.Engine(model_path=str(model), **settings)
    try:
        yield running
    finally:
        running.shutdown()


def _forget_metrics() -> None:
    """Those of an engine that was here before: a process can have one by each name, and one folder."""
    from prometheus_client import REGISTRY

    os.environ.pop("PROMETHEUS_MULTIPROC_DIR", None)
    for collector, names in list(REGISTRY._collector_to_names.items()):
        if any(name.startswith("sglang:") for name in names):
            REGISTRY.unregister(collector)


def generate(running: Any, prompt: Sequence[int], *, tokens: int = 12, **more: Any) -> tuple[list[int], dict[str, Any]]:
    """Greedy tokens, and where the prompt's KV came from: SGLang's own `cached_tokens_details`."""
    sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    output = running.generate(input_ids=list(prompt), sampling_params=sampling, **more)
    return list(output["output_ids"]), dict(output["meta_info"].get("cached_tokens_details") or {})


def push_out(running: Any, seed: int, tokens: int) -> None:
    """Fill the caches with other prompts of so many tokens in all."""
    from ...support.engines import prompts

    length = 480
    for prompt in prompts(seed, [length] * -(-tokens // length)):
        generate(running, prompt, tokens=1)


def settle(disk: Path, chunks: int, timeout_s: float = 60.0) -> None:
    """Wait until so many chunks are in the folder."""
    from kvloom.kvstore.tiers.disk.tier import DiskTier

    end_s = time.monotonic() + timeout_s
    while time.monotonic() < end_s:
        tier = DiskTier(disk, read_only=True)
        try:
            if len(tier.entries()) >= chunks:
                return
        finally:
            tier.close()
        time.sleep(0.2)
    raise TimeoutError(f"fewer than {chunks} chunks in {disk}")
