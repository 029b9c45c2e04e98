"""What a chunk takes under each codec: encoded by the codec itself, and written as the tiers write it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ...connectors.break_even import median_s
from ...core import ChunkKey, Codec, KVChunk, KVSpec
from ...kvstore.format import Container
from ...kvstore.tiers.disk.index import ALIGNMENT_BYTES
from ..harness.rounds import return_free_memory

FIXED_SIZES = frozenset({"raw", "int8", "int4", "int2", "fp8"})
"""Codecs whose chunks take the same bytes whatever the model says in them."""


@dataclass(frozen=True, slots=True)
class StoredForm:
    """A chunk under one codec.

    Attributes
    ----------
    tokens : of the chunk.
    raw_bytes : of its keys and values as the engine has them.
    memory_bytes : that it takes in a tier in memory.
    disk_bytes : that it takes on a disk, in whole pages, its header included.
    decode_s : seconds to decode it on this machine's processor into memory that was not touched before, as chunks of a
        request are, which are all held at once; 0 where nothing is to be done.
    moved_s : seconds to decode it to another position, where its keys are rotated.
    is_sampled : of KV of the model itself; otherwise of random numbers, which take the same bytes.
    """

    codec: str
    tokens: int
    raw_bytes: int
    memory_bytes: int
    disk_bytes: int
    decode_s: float
    moved_s: float
    is_lossless: bool
    is_sampled: bool

    @property
    def ratio(self) -> float:
        """How many times smaller than as the engine has it."""
        return self.raw_bytes / self.memory_bytes

    @property
    def token_bytes(self) -> float:
        return self.memory_bytes / self.tokens

    def bytes_in(self, tier: str, chunks: int = 1) -> int:
        """Bytes of so many chunks in a tier of that kind."""
        return chunks * (self.memory_bytes if tier == "host" else self.disk_bytes)


def random_chunk(spec: KVSpec, tokens: int, seed: int = 0) -> KVChunk:
    """Normal random keys and values."""
    random = torch.Generator().manual_seed(seed)
    keys, values = (
        torch.randn(spec.num_layers, spec.num_kv_heads, tokens, dim, generator=random).to(spec.dtype)
        for dim in (spec.head_dim, spec.value_dim)
    )
    return KVChunk(spec, torch.arange(tokens), torch.arange(tokens), keys, values)


def stored_form(name: str, codec: Codec, chunk: KVChunk, *, is_sampled: bool = False) -> StoredForm:
    """What a chunk takes, measured on the chunk that the codec makes of it.

    Raises
    ------
    CodecError, SpecMismatchError, ValueError : the codec cannot encode such chunks.
    """
    blob = codec.encode(chunk)
    disk_bytes = Container(ChunkKey(bytes(32)), blob).nbytes
    is_raw = blob.codec == "raw"
    return StoredForm(
        codec=name,
        tokens=len(chunk),
        raw_bytes=chunk.keys.nbytes + chunk.values.nbytes,
        memory_bytes=blob.nbytes,
        disk_bytes=-(-disk_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES,
        decode_s=0.0 if is_raw else _into_fresh_memory_s(lambda: codec.decode(blob)),
        moved_s=_into_fresh_memory_s(lambda: codec.decode(blob, chunk.positions + 1)),
        is_lossless=codec.is_lossless,
        is_sampled=is_sampled,
    )


def _into_fresh_memory_s(decode: Callable[[], object]) -> float:
    """Median seconds of a call that makes something, with all that was made before still held."""
    held: list[object] = []
    return_free_memory()
    return median_s(lambda: held.append(decode()))
