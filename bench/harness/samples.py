"""Chunks to measure with: random bytes of an exact size, so that nothing on the way can make them fewer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from hashlib import blake2b
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from ...compress.raw import RawCodec
from ...core import ChunkKey, EncodedChunk, KVChunk, KVSpec
from ...kvstore.encoding.buffer_pool import BufferPool

Found = TypeVar("Found")

KV_HEADS, HEAD_DIM = 8, 64
MANY_LAYERS, FEW_LAYERS = 32, 8  # of chunks from 4 MiB on, and of smaller ones
MANY_LAYERS_BYTES = 4 << 20


def sample_chunk(size_bytes: int, seed: int) -> KVChunk:
    """A chunk whose keys and values take `size_bytes`; token ids and positions come on top (1 byte in 1,000 or 2,000).

    Raises
    ------
    ValueError : `size_bytes` is no whole number of tokens.
    """
    layers = MANY_LAYERS if size_bytes >= MANY_LAYERS_BYTES else FEW_LAYERS
    spec = KVSpec("bench@1", layers, KV_HEADS, HEAD_DIM, torch.bfloat16, rope=None)
    tokens, rest = divmod(size_bytes, spec.token_bytes)
    if rest or not tokens:
        raise ValueError(f"size_bytes is {size_bytes}; expected a multiple of {spec.token_bytes}")
    numbers = np.random.default_rng(seed).integers(-(1 << 62), 1 << 62, size_bytes // 8, dtype=np.int64)
    both = torch.from_numpy(numbers).view(torch.bfloat16).view(2, layers, KV_HEADS, tokens, HEAD_DIM)
    return KVChunk(spec, torch.arange(tokens) + seed, torch.arange(tokens), both[0], both[1])


def sample_chunks(size_bytes: int, total_bytes: int) -> dict[ChunkKey, KVChunk]:
    """Chunks of one size that take about `total_bytes` together, at least one; always the same."""
    count = max(1, total_bytes // size_bytes)
    return {sample_key(size_bytes, i): sample_chunk(size_bytes, seed=i) for i in range(count)}


def encoded(chunks: Mapping[ChunkKey, KVChunk]) -> dict[ChunkKey, EncodedChunk]:
    """Returns encoded chunks in memory of their own, as tiers hold them."""
    codec, memory = RawCodec(), BufferPool()
    return {key: memory.copy(codec.encode(chunk)) for key, chunk in chunks.items()}


def sample_key(*names: object) -> ChunkKey:
    """A key like those of `keys.py`: 32 bytes in which nothing can be seen."""
    return ChunkKey(blake2b(repr(names).encode(), digest_size=32).digest())


def tensors_of(chunk: KVChunk) -> dict[str, Tensor]:
    """Returns the tensors of a raw chunk by name."""
    return {
        "keys": chunk.keys,
        "values": chunk.values,
        "token_ids": chunk.token_ids,
        "positions": chunk.positions,
    }


def copy_into(targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Plain copies, name by name."""
    for name, target in targets.items():
        target.copy_(tensors[name])


def touched_like(chunks: Iterable[KVChunk]) -> list[dict[str, Tensor]]:
    """Memory of the same shapes that has been written to: an engine's own buffers."""
    return [{name: torch.zeros_like(t) for name, t in tensors_of(chunk).items()} for chunk in chunks]


def present(found: Found | None) -> Found:
    """Returns what was found.

    Raises
    ------
    RuntimeError : nothing was.
    """
    if found is None:
        raise RuntimeError("a chunk that was put is not there; a speed of misses means nothing")
    return found


def expect_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str) -> None:
    """Speed of wrong bytes is no figure.

    Raises
    ------
    RuntimeError : a tensor differs.
    """
    for name, tensor in expected.items():
        if not torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)):
            raise RuntimeError(f"{where} gave back other {name} than it was given; its speed means nothing")
