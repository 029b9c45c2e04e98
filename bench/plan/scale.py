"""Very many machines that share very many chunks, by arithmetic: what is needed of each part, and which gives in."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import cast

import numpy as np
import torch

from ...core import ChunkInfo, ChunkKey, EncodedChunk
from ...evaluation.page import Row, Table
from ...kvstore.store import KVStore
from ...kvstore.tiers.host import HostTier
from .machines import read_assignments
from .setup import Setup

_EXACT_RANKS = 10_000  # most popular chunks, each for itself; the others in bands
_BANDS = 4000
_PROBE_CHUNKS = 20_000
_KEY_BYTES = 32
_HELD, _LISTED = "catalog of what it holds", "catalog, if it listed all chunks"
_FIXED = (_HELD, _LISTED)  # whatever the rate


@dataclass(frozen=True, slots=True)
class Pool:
    """Machines that share their chunks.

    Attributes
    ----------
    nodes : machines with one engine each.
    chunks : different ones that anybody asks for.
    alpha : the i-th most popular one is asked for in proportion to `i ** -alpha`.
    rate : requests a second of each machine.
    tokens : of a prompt.
    network : bytes a second between a machine and all others.
    """

    nodes: int = 1000
    chunks: float = 1e9
    alpha: float = 1.0
    rate: float = 1.0
    tokens: int = 8192
    network: float = 12.5e9

    @classmethod
    def read(cls, text: str) -> Pool:
        """`nodes=1000,chunks=1e9,alpha=1,rate=1,tokens=8192,network=12.5e9`; what is left out has its default."""
        names = ("nodes", "chunks", "alpha", "rate", "tokens", "network")
        found = read_assignments(text, names, "--pool") if text else {}
        for name, value in found.items():
            if value < (0 if name == "alpha" else 1e-9) or (name in ("nodes", "tokens") and value != int(value)):
                raise ValueError(f"{name} of --pool is {value:g}; expected a number above 0, nodes and tokens whole")
        whole = {name: int(value) for name, value in found.items() if name in ("nodes", "tokens")}
        return cls(**(found | whole))  # type: ignore[arg-type]


def lru_hit_ratio(chunks: float, alpha: float, capacity: float) -> float:
    """Hits of an LRU cache under independent requests by Zipf's law.

    Notes
    -----
    Che, Tung & Wang, Hierarchical web caching systems, IEEE JSAC 2002: a chunk is there if it was asked for within the
    time in which as many different ones come as fit. Ranks behind the first 10,000 are taken together in bands.
    """
    if capacity >= chunks:
        return 1.0
    if capacity < 1:
        return 0.0
    exact = int(min(chunks, _EXACT_RANKS))
    edges = np.geomspace(exact + 0.5, chunks + 0.5, _BANDS + 1) if chunks > exact else np.array([exact + 0.5])
    counts = np.concatenate([np.ones(exact), np.diff(edges)])
    ranks = np.concatenate([np.arange(1, exact + 1), np.sqrt(edges[1:] * edges[:-1])])
    weights = ranks**-alpha
    popularity = weights / (weights * counts).sum()
    low, high = 0.0, 1e3 * chunks / popularity[-1]
    for _ in range(200):
        time = math.sqrt(low * high) if low else high / 2**20
        held = (counts * -np.expm1(-popularity * time)).sum()
        low, high = (low, time) if held > capacity else (time, high)
        if low and high / low < 1 + 1e-9:
            break
    return float((counts * popularity * -np.expm1(-popularity * high)).sum())


def catalog_bytes(chunks: int = _PROBE_CHUNKS) -> float:
    """Bytes of this process that a store takes to know of a chunk, measured on a store that holds so many."""
    blob = EncodedChunk("none", {"x": torch.zeros(1, dtype=torch.uint8)}, {})
    keys = [ChunkKey(blake2b(b"%d" % i, digest_size=_KEY_BYTES).digest()) for i in range(chunks)]
    tracemalloc.start()
    try:
        with KVStore([HostTier(None, pinned=False)]) as store:
            before, _ = tracemalloc.get_traced_memory()
            for i, key in enumerate(keys):
                store.put_encoded(key, blob, ChunkInfo(after=keys[i - 1] if i % 32 else None))
            return (tracemalloc.get_traced_memory()[0] - before) / chunks + _KEY_BYTES
    finally:
        tracemalloc.stop()


def scale_tables(setup: Setup, pool: Pool) -> tuple[list[Table], list[dict[str, object]]]:
    """Needed and available of every part, for every codec, all tiers of all machines as one cache."""
    per_chunk, tables, rows = catalog_bytes(), list[Table](), list[dict[str, object]]()
    for codec in setup.forms:
        found = parts_of(setup, pool, codec, per_chunk)
        hit_ratio, parts = found
        cells: list[Row] = []
        for name, need, have, unit in parts:
            most = f"{pool.rate * have / need:.3g}" if need else "-"
            cells.append(
                [name, _amount(need), _amount(have), f"{need / have:.1%}", "-" if name in _FIXED else most, unit]
            )
        name, need, have, _ = max((part for part in parts if part[0] != _LISTED), key=lambda part: part[1] / part[2])
        verdict = "gives in first" if need > have else "is used most"
        caption = (
            f"{pool.nodes:,} machines, {pool.chunks:.3g} chunks, {codec}: hit ratio {hit_ratio:.1%}; "
            f"{name} {verdict} ({need / have:.0%}) at {pool.rate:g} requests of {pool.tokens:,} tokens a second each"
        )
        heads = ["part of each machine", "needed", "there is", "used", "requests/s at most", "of"]
        tables.append(Table(heads, cells, caption, left=(0, 5)))
        shares = {part: needed / there for part, needed, there, _ in parts}
        row = {"subject": "pool", "codec": codec, "hit_ratio": hit_ratio, "used": shares, "bottleneck": name}
        rows.append(row | {"catalog_bytes_per_chunk": per_chunk})
    return tables, rows


def parts_of(
    setup: Setup, pool: Pool, codec: str, catalog_chunk_bytes: float
) -> tuple[float, Sequence[tuple[str, float, float, str]]]:
    """Hit ratio; and name, need, supply and unit of every part of a machine."""
    form, machine = setup.forms[codec], setup.machine
    held = {tier.name: tier.capacity_bytes // form.bytes_in(tier.name) for tier in setup.tiers}
    # Every tier holds what the ones before it hold, so the largest one says how much there is.
    ratios = {name: lru_hit_ratio(pool.chunks, pool.alpha, pool.nodes * count) for name, count in held.items()}
    hit_ratio = max(ratios.values())
    asked = pool.rate * pool.tokens / form.tokens  # chunks a second
    hit_tokens = min(hit_ratio * pool.tokens, pool.tokens - setup.assume.question_tokens)
    prefill_s = machine.prefill.seconds(pool.tokens - hit_tokens, hit_tokens)
    elsewhere = (pool.nodes - 1) / pool.nodes
    parts = [("computing", pool.rate * prefill_s, 1.0, "seconds a second")]
    served = 0.0
    for tier in sorted(setup.tiers, key=lambda tier: held[tier.name]):
        share, served = max(0.0, ratios[tier.name] - served), max(served, ratios[tier.name])
        if math.isfinite(tier.read_bytes_s) and served:
            need = asked * share * form.bytes_in(tier.name)
            parts.append((f"reading from {tier.name}", need, tier.read_bytes_s, "bytes a second"))
            written = asked * (1 - hit_ratio) * form.bytes_in(tier.name)
            parts.append(
                (f"writing to {tier.name}", written, tier.read_bytes_s, "bytes a second, taken as for reading")
            )
    wire = asked * hit_ratio * elsewhere * form.disk_bytes
    parts += [
        ("network", wire, pool.network, "bytes a second, in each direction"),
        ("host to engine", asked * hit_ratio * form.raw_bytes, machine.link_bytes_s, "bytes a second"),
        (
            "decoding threads",
            asked * hit_ratio * form.decode_s / setup.assume.decode_factor,
            float(machine.lanes),
            "threads",
        ),
    ]
    memory = float(sum(tier.capacity_bytes for tier in setup.tiers if tier.name == "host")) or math.inf
    here = min(max(held.values()), pool.chunks / pool.nodes)
    parts.append((_HELD, here * catalog_chunk_bytes, memory, "bytes of host memory"))
    parts.append(
        (
            _LISTED,
            min(pool.chunks, pool.nodes * here) * catalog_chunk_bytes,
            memory,
            "bytes of host memory",
        )
    )
    return hit_ratio, cast("Sequence[tuple[str, float, float, str]]", parts)


def _amount(value: float) -> str:
    for factor, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.3g}"
