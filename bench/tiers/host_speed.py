"""Memory: putting a chunk into the host tier and getting it out, beside plain copies of the same tensors.

The baseline has the same page faults as what is compared with it, for the first touch of fresh memory costs as much as
the copy. What is put must lie in memory that the store did not have before, so put is measured against a copy into
fresh memory. What is got goes into buffers that the caller has had for long (an engine's), so get, and a copy behind
it, is measured against a copy into memory that was written to before. The other kind of copy stands beside it, and so
does a put into a tier that is full, where memory comes from the chunks that go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from rich.progress import Progress
from torch import Tensor

from ...core import ChunkKey, KVChunk
from ...kvstore.store import KVStore
from ...kvstore.tiers.host import HostTier
from ..harness.rounds import Comparison, exhaust, interleave, return_free_memory, size_text, timed
from ..harness.samples import (
    copy_into,
    encoded,
    expect_same,
    present,
    sample_chunks,
    sample_key,
    tensors_of,
    touched_like,
)

PUT, GET = "host put", "host get"
FRESH, WARM = "plain copy, fresh memory", "plain copy, warm memory"
STORE_PUT, FULL_PUT, TIER_PUT = "KVStore.put", "KVStore.put, evicting", "HostTier.put (a reference)"
STORE_GET, TIER_GET = "KVStore.get and copy", "HostTier.get and copy"
STORE_REFERENCE, TIER_REFERENCE = "KVStore.get (zero-copy)", "HostTier.get (zero-copy)"


def host_speeds(sizes: Sequence[int], total_bytes: int, rounds: int, bar: Progress) -> list[Comparison]:
    """Put and get for every size of chunk; a round moves about `total_bytes` each way."""
    found = []
    for size in sizes:
        chunks = sample_chunks(size, total_bytes)
        targets = touched_like(chunks.values())
        found.append(_put_speed(chunks, targets, rounds, bar, f"{PUT}, {size_text(size)}"))
        found.append(_get_speed(chunks, targets, rounds, bar, f"{GET}, {size_text(size)}"))
    return found


def _put_speed(
    chunks: Mapping[ChunkKey, KVChunk], targets: Sequence[dict[str, Tensor]], rounds: int, bar: Progress, title: str
) -> Comparison:
    blobs = encoded(chunks)
    nbytes = next(iter(blobs.values())).nbytes

    def put_in_store() -> float:
        return_free_memory()
        with KVStore([HostTier(None)]) as store:
            return timed(lambda: exhaust(map(store.put, chunks.keys(), chunks.values())))

    def put_in_full_store() -> float:
        return_free_memory()
        with KVStore([HostTier(nbytes * len(chunks))]) as store:
            for i, chunk in enumerate(chunks.values()):
                store.put(sample_key("old", i), chunk)
            return timed(lambda: exhaust(map(store.put, chunks.keys(), chunks.values())))

    def put_in_tier() -> float:
        tier = HostTier(None)
        spent = timed(lambda: exhaust(map(tier.put, blobs.keys(), blobs.values())))
        tier.close()
        return spent

    ways: dict[str, Callable[[], float]] = {
        FRESH: lambda: _copy_to_fresh(chunks.values()),
        WARM: lambda: _copy_to_warm(chunks.values(), targets),
        STORE_PUT: put_in_store,
        FULL_PUT: put_in_full_store,
        TIER_PUT: put_in_tier,
    }
    seconds = interleave(ways, rounds, bar, title)
    return Comparison(PUT, nbytes, len(chunks), FRESH, seconds, frozenset({TIER_PUT}))


def _get_speed(
    chunks: Mapping[ChunkKey, KVChunk], targets: Sequence[dict[str, Tensor]], rounds: int, bar: Progress, title: str
) -> Comparison:
    tier = HostTier(None)
    with KVStore([tier]) as store:
        for key, chunk in chunks.items():
            store.put(key, chunk)

        def from_store() -> Iterable[Mapping[str, Tensor]]:
            return (tensors_of(present(store.get(key))) for key in chunks)

        def from_tier() -> Iterable[Mapping[str, Tensor]]:
            return (present(tier.get(key)).tensors for key in chunks)

        ways: dict[str, Callable[[], float]] = {
            WARM: lambda: _copy_to_warm(chunks.values(), targets),
            FRESH: lambda: _copy_to_fresh(chunks.values()),
            STORE_GET: lambda: timed(lambda: _copy_all(targets, from_store())),
            TIER_GET: lambda: timed(lambda: _copy_all(targets, from_tier())),
            STORE_REFERENCE: lambda: timed(lambda: list(from_store())),
            TIER_REFERENCE: lambda: timed(lambda: list(from_tier())),
        }
        seconds = interleave(ways, rounds, bar, title)
        _copy_all(targets, from_store())
        for target, chunk in zip(targets, chunks.values(), strict=True):
            expect_same(target, tensors_of(chunk), "the host tier")
        nbytes = tier.used_bytes // len(chunks)
    return Comparison(GET, nbytes, len(chunks), WARM, seconds, frozenset({STORE_REFERENCE, TIER_REFERENCE}))


def _copy_to_fresh(chunks: Iterable[KVChunk]) -> float:
    return_free_memory()
    return timed(lambda: [[t.clone() for t in tensors_of(chunk).values()] for chunk in chunks])


def _copy_to_warm(chunks: Iterable[KVChunk], targets: Sequence[Mapping[str, Tensor]]) -> float:
    return timed(lambda: _copy_all(targets, map(tensors_of, chunks)))


def _copy_all(targets: Sequence[Mapping[str, Tensor]], sources: Iterable[Mapping[str, Tensor]]) -> None:
    for target, tensors in zip(targets, sources, strict=True):
        copy_into(target, tensors)
