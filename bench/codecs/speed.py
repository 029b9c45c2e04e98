"""Codecs on the clock: a hit from a cold disk, encoding and decoding in memory, and ShadowKV's factorisation."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.progress import Progress
from torch.nn.functional import scaled_dot_product_attention

from ...compress.gram import factorize
from ...core import Codec
from ...kvstore.store import KVStore
from ...kvstore.tiers.disk.tier import DiskTier
from ..harness.page_cache import drop_page_cache
from ..harness.rounds import Comparison, interleave, timed
from ..harness.samples import present, sample_key
from .samples import chunk_8b

COLD_HIT, DECODE, ENCODE = "cold hit", "decode", "encode"
COPY = "plain copy"
QUERY_HEADS = 32


def cold_hits(
    folder: Path, codecs: Mapping[str, Codec], *, tokens: int, chunks: int, rounds: int, bar: Progress
) -> Comparison:
    """`KVStore.get` of 8B-shaped chunks past the page cache, by codec; the first codec is what the others are held to.

    Parameters
    ----------
    codecs : by the name to show.
    """
    samples = {sample_key(i): chunk_8b(i, tokens=tokens) for i in range(chunks)}
    with TemporaryDirectory(dir=folder, prefix="kvloom-bench-") as place:
        stores = {}
        for name, codec in codecs.items():
            tier = DiskTier(Path(place) / name, durability="batch")
            stores[name] = KVStore([tier], codec=codec, allow_uncertified=True, timeout_s=60)
            for key, chunk in samples.items():
                stores[name].put(key, chunk)
            tier.flush()

        def get(name: str) -> float:
            drop_page_cache(Path(place) / name)
            return timed(lambda: [present(stores[name].get(key)) for key in samples])

        try:
            seconds = interleave({name: _bound(get, name) for name in codecs}, rounds, bar, COLD_HIT)
        finally:
            for store in stores.values():
                store.close()
    nbytes = sum(t.nbytes for t in (samples[sample_key(0)].keys, samples[sample_key(0)].values))
    return Comparison(COLD_HIT, nbytes, chunks, next(iter(codecs)), seconds)


def in_memory(codecs: Mapping[str, Codec], *, tokens: int, rounds: int, bar: Progress) -> list[Comparison]:
    """Encoding and decoding one 8B-shaped chunk, beside a copy of as many bytes into memory in use."""
    chunk = chunk_8b(0, tokens=tokens)
    both = torch.stack([chunk.keys, chunk.values])
    target = torch.zeros_like(both)
    blobs = {name: codec.encode(chunk) for name, codec in codecs.items()}
    found = []
    for what, work in (
        (DECODE, {name: _bound(codec.decode, blobs[name]) for name, codec in codecs.items()}),
        (ENCODE, {name: _bound(codec.encode, chunk) for name, codec in codecs.items()}),
    ):
        ways = {COPY: lambda: timed(lambda: target.copy_(both))}
        ways |= {name: _bound(timed, call) for name, call in work.items()}
        found.append(Comparison(what, both.nbytes, 1, COPY, interleave(ways, rounds, bar, f"{what}, in memory")))
    return found


def factor_time(*, tokens: int, heads: int = 8, head_dim: int = 128, rank: int = 160) -> tuple[float, float]:
    """Seconds to factorise one layer's keys, and to compute its dense causal attention (32 query heads, float32)."""
    keys = torch.randn(tokens, heads * head_dim)
    began_s = time.perf_counter()
    factorize(keys, rank=rank)
    factor_s = time.perf_counter() - began_s
    shape = (1, heads, tokens, head_dim)
    q, k, v = torch.randn(1, QUERY_HEADS, tokens, head_dim), torch.randn(shape), torch.randn(shape)
    began_s = time.perf_counter()
    scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return factor_s, time.perf_counter() - began_s


def _bound(call: Callable[..., object], *arguments: object) -> Callable[[], float]:
    return lambda: call(*arguments)  # type: ignore[return-value]
