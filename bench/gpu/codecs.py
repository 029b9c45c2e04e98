"""Codecs whose encoding and decoding run on the device of the chunk, beside the same on the cpu."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...compress.registry import codec_by_name
from ...core import EncodedChunk, KVChunk, KVSpec, RopeSpec
from .rows import Row, median_ms, part_of, until

_CODECS = ("raw", "fp8", "kv4", "int8", "int4")
_TOLERANCE = 4e-3  # of float16: encoding rounds to the other neighbour here and there, decoding to the last bit


def run(is_cpu: bool, stop_s: float) -> dict[str, Any]:
    """One row for each codec: decoded on the device against on the cpu; times beside a copy of the raw chunk."""
    device = torch.device("cpu" if is_cpu else "cuda")
    layers, heads, dim, tokens = (2, 2, 16, 64) if is_cpu else (32, 8, 128, 256)
    rope = RopeSpec(tuple(10000.0 ** -(2 * i / dim) for i in range(dim // 2)))
    spec = KVSpec("gpu@1", layers, heads, dim, torch.float16, rope)
    random = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(layers, heads, tokens, dim, generator=random).half() for _ in range(2))
    chunk = KVChunk(spec, torch.arange(tokens), torch.arange(tokens), keys, values)
    on_device = KVChunk(spec, chunk.token_ids, chunk.positions, keys.to(device), values.to(device))
    raw = keys if is_cpu else keys.pin_memory()
    plain = median_ms(partial(raw.to, device, non_blocking=True), device)

    def row(name: str) -> Row:
        codec = codec_by_name(name)
        positions = torch.arange(1000, 1000 + tokens)
        blob = codec.encode(on_device)
        moved = EncodedChunk(blob.codec, _layered_on(blob, device), blob.meta, blob.layered)
        found, true = codec.decode(moved, positions), codec.decode(codec.encode(chunk), positions)
        errors = [_error(getattr(found, half), getattr(true, half)) for half in ("keys", "values")]
        return {
            "name": name,
            "passed": max(errors) <= _TOLERANCE,
            "error": max(errors),
            "tolerance": _TOLERANCE,
            "bytes": blob.nbytes,
            "encode": median_ms(partial(codec.encode, on_device), device),
            "decode": median_ms(partial(codec.decode, moved, positions), device),
            "copy_of_raw": {"ms": 2 * plain["ms"]},
        }

    return part_of(until(stop_s, [partial(row, name) for name in _CODECS]))


def _layered_on(blob: EncodedChunk, device: torch.device) -> dict[str, Tensor]:
    return {name: t.to(device) if name in blob.layered else t for name, t in blob.tensors.items()}


def _error(found: Tensor, true: Tensor) -> float:
    """Root of the mean squared difference, relative to the true numbers'."""
    difference = (found.cpu().float() - true.float()).square().mean().sqrt()
    return float(difference / true.float().square().mean().sqrt())
