"""Small keys, chunks and encoded chunks for tests, and what makes two of them equal."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import ChunkKey, EncodedChunk, KVChunk, KVSpec, RopeSpec

ROPE = RopeSpec(inv_freq=tuple(10000.0 ** -(i / 4) for i in range(4)))
SPEC = KVSpec("tiny@1", num_layers=3, num_kv_heads=2, head_dim=8, dtype=torch.float32, rope=ROPE)


def make_key(number: int) -> ChunkKey:
    """The key that holds a number; equal numbers give equal keys."""
    return ChunkKey(number.to_bytes(32, "big"))


def make_chunk(seed: int, *, tokens: int = 5, spec: KVSpec = SPEC, start: int = 0) -> KVChunk:
    """Random keys and values of `tokens` tokens from position `start` on; equal arguments give equal chunks."""
    random = torch.Generator().manual_seed(seed)
    shape = (spec.num_layers, spec.num_kv_heads, tokens)
    return KVChunk(
        spec,
        torch.randint(0, 1000, (tokens,), generator=random),
        torch.arange(start, start + tokens),
        torch.randn(*shape, spec.head_dim, generator=random).to(spec.dtype),
        torch.randn(*shape, spec.value_dim, generator=random).to(spec.dtype),
    )


def make_blob(seed: int, *, numbers: int = 100) -> EncodedChunk:
    """An encoded chunk of `4 * numbers` bytes in 4 layers, and 24 bytes that belong to no layer."""
    random = torch.Generator().manual_seed(seed)
    tensors = {
        "codes": torch.randint(0, 256, (4, numbers), generator=random).to(torch.uint8),
        "scale": torch.randn(6, generator=random),
    }
    return EncodedChunk("test", tensors, {"seed": str(seed), "first_layer": "0"}, frozenset({"codes"}))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal dtype, shape and every bit; NaN equals itself, 0.0 is not -0.0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    left, right = (t.cpu().contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(left, right)


def same_chunk(a: KVChunk, b: KVChunk) -> bool:
    """Equal spec, first layer, and every bit of token ids, positions, keys and values; extras are not compared."""
    fields = ("token_ids", "positions", "keys", "values")
    return (
        a.spec == b.spec
        and a.first_layer == b.first_layer
        and all(same_bits(getattr(a, name), getattr(b, name)) for name in fields)
    )


def same_blob(a: EncodedChunk, b: EncodedChunk) -> bool:
    """Equal codec, text, names of tensors, and every bit of the tensors."""
    return (a.codec, a.meta, a.layered, a.tensors.keys()) == (b.codec, b.meta, b.layered, b.tensors.keys()) and all(
        same_bits(a.tensors[name], b.tensors[name]) for name in a.tensors
    )
