"""Copies of a chunk between device, pinned memory and tiers, beside plain copies of as many bytes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...core import ChunkKey, EncodedChunk
from ...kvstore.tiers.device import DeviceTier
from ...kvstore.tiers.host import HostTier
from .rows import Row, median_ms, part_of, until

_LAYERS, _CHUNK_BYTES, _CPU_BYTES = 32, 32 << 20, 32 << 10  # 256 tokens of an 8B model in 16 bits; the smallest size


def run(is_cpu: bool, stop_s: float) -> dict[str, Any]:
    """One row for each way; `ratio` is the plain copy's time over ours."""
    device = torch.device("cpu" if is_cpu else "cuda")
    layer_bytes = (_CPU_BYTES if is_cpu else _CHUNK_BYTES) // _LAYERS
    random = torch.Generator().manual_seed(0)
    source = torch.randint(0, 256, (_LAYERS, layer_bytes), dtype=torch.uint8, generator=random)
    pinned = source if is_cpu else source.pin_memory()
    on_device = source.to(device)
    capacity_bytes = 8 * source.nbytes
    host = HostTier(capacity_bytes, pinned=not is_cpu)
    tier = DeviceTier(capacity_bytes, device=device)

    def to_device() -> object:
        target = torch.empty_like(on_device)
        return target.copy_(pinned, non_blocking=True)

    def to_host() -> object:
        return torch.empty_like(source, pin_memory=not is_cpu).copy_(on_device, non_blocking=True)

    ways: list[tuple[str, Callable[[], Tensor], Callable[[], object]]] = [
        ("device to host tier", partial(_through, host, on_device), to_host),
        ("host to host tier", partial(_through, host, source), source.clone),
        ("host tier to device", partial(_from_tier, host, pinned, device), to_device),
        ("host to device tier", partial(_through, tier, pinned), to_device),
        ("device to device tier", partial(_through, tier, on_device), on_device.clone),
    ]

    def row(name: str, ours: Callable[[], Tensor], plain: Callable[[], object]) -> Row:
        passed = torch.equal(ours().cpu(), source)
        found: Row = {"name": name, "passed": passed, "bytes": source.nbytes, **median_ms(ours, device)}
        plain_ms = median_ms(plain, device)["ms"]
        return found | {"plain_ms": plain_ms, "ratio": plain_ms / found["ms"]}

    rows = until(stop_s, [partial(row, *way) for way in ways])
    host.close()
    tier.close()
    return part_of(rows)


def _through(tier: HostTier | DeviceTier, tensor: Tensor) -> Tensor:
    """Puts a chunk of one tensor; gives what the tier holds."""
    key = ChunkKey(bytes(32))
    tier.put(key, EncodedChunk("plain", {"bytes": tensor}, {}, frozenset({"bytes"}), leased=True))
    return _held(tier, key)


def _from_tier(tier: HostTier, tensor: Tensor, device: torch.device) -> Tensor:
    key = ChunkKey(bytes(31) + b"\1")
    if key not in tier:
        tier.put(key, EncodedChunk("plain", {"bytes": tensor}, {}, frozenset({"bytes"}), leased=True))
    return _held(tier, key).to(device, non_blocking=True)


def _held(tier: HostTier | DeviceTier, key: ChunkKey) -> Tensor:
    held = tier.get(key)
    if held is None:
        raise RuntimeError(f"tier {tier.name} has lost the chunk that was put")
    return held.tensors["bytes"]
