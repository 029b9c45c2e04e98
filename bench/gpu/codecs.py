"""Codecs whose encoding and decoding run on the device of the chunk, beside the same on the cpu.

Decoding: one encoded chunk, decoded on both, must give the same numbers to the last bit of the dtype. Encoding: float32
arithmetic may differ in its last bit between processors, so that a number halfway between two codes becomes the other
one here and there; few codes may differ, none by more than one step.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...compress.kernels.ops import unpack_bits
from ...compress.registry import codec_by_name
from ...core import EncodedChunk, KVChunk, KVSpec, RopeSpec
from .rows import Row, median_ms, part_of, until

_CODECS = {"raw": None, "fp8": None, "int8": 8, "int4": 4}  # bits of packed codes
_TOLERANCE = 1e-3  # of the largest number: one step of float16
_MOST_DIFFERENT = 1e-3  # share of codes


def run(is_cpu: bool, stop_s: float) -> dict[str, Any]:
    """One row for each codec: errors and times, beside a copy of the raw chunk."""
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
        blob, true_blob = codec.encode(on_device), codec.encode(chunk)
        moved = EncodedChunk(blob.codec, _layered_on(blob, device), blob.meta, blob.layered)
        found, true = codec.decode(moved, positions), codec.decode(blob, positions)
        error = max(_error(getattr(found, half), getattr(true, half)) for half in ("keys", "values"))
        different, steps = _differences(blob, true_blob, name, dim)
        return {
            "name": name,
            "passed": error <= _TOLERANCE and different <= _MOST_DIFFERENT and steps <= 1,
            "error": error,
            "tolerance": _TOLERANCE,
            "codes_different": different,
            "largest_steps": steps,
            "bytes": blob.nbytes,
            "encode": median_ms(partial(codec.encode, on_device), device),
            "decode": median_ms(partial(codec.decode, moved, positions), device),
            "copy_of_raw": {"ms": 2 * plain["ms"]},
        }

    return part_of(until(stop_s, [partial(row, name) for name in _CODECS]))


def _layered_on(blob: EncodedChunk, device: torch.device) -> dict[str, Tensor]:
    return {name: t.to(device) if name in blob.layered else t for name, t in blob.tensors.items()}


def _error(found: Tensor, true: Tensor) -> float:
    """The largest difference, relative to the largest number."""
    return float((found.cpu().float() - true.float()).abs().max() / true.float().abs().max())


def _differences(found: EncodedChunk, true: EncodedChunk, name: str, dim: int) -> tuple[float, int]:
    """Share of the codes that differ, and by how many steps at most."""
    share, steps = 0.0, 0
    for half in ("keys", "values"):
        codes = [_ordered(blob.tensors[half], _CODECS[name], dim) for blob in (found, true)]
        off = (codes[0] - codes[1]).abs()
        share, steps = max(share, float((off > 0).float().mean())), max(steps, int(off.max()))
    return share, steps


def _ordered(codes: Tensor, bits: int | None, dim: int) -> Tensor:
    """Codes as integers, so that neighbours differ by one: floats are ordered as their magnitude bits are."""
    if bits is not None:
        return unpack_bits(codes, bits, dim).int()
    numbers = codes.view(torch.int8 if codes.dtype.itemsize == 1 else torch.int16).int()
    top = 0x7F if codes.dtype.itemsize == 1 else 0x7FFF
    return torch.where(numbers < 0, -(numbers & top), numbers)
