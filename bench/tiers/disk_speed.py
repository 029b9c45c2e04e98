"""The disk tier beside raw writes and reads of the same bytes in the same folder.

Put: everything is written, then one sync makes it durable, for raw pwrite + fdatasync and for the tier (`batch`) alike.
Get: chunks in random order. Every read, the raw one too, goes into tensors of its own, as what `get` hands out must:
the same allocations and the same page faults on both sides.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory

import torch
from rich.progress import Progress

from ...core import ChunkKey, EncodedChunk, KVChunk
from ...kvstore.store import KVStore
from ...kvstore.tiers.disk.tier import DiskTier
from ..harness.rounds import Comparison, exhaust, interleave, size_text, timed
from ..harness.samples import encoded, present, sample_chunks
from .disk_files import fill, in_random_order, read_raw, reading, write_raw
from .verification import verification_speeds

PUT, WARM_GET, COLD_GET = "disk put, one sync at the end", "disk get, page cache", "disk get, cold"
RAW_WRITE, RAW_READ = "pwrite + fdatasync", "preadv"
STORE_PUT, TIER_PUT = "KVStore.put", "DiskTier.put"
STORE_GET, TIER_GET = "KVStore.get", "DiskTier.get"


def disk_speeds(folder: Path, sizes: Sequence[int], total_bytes: int, rounds: int, bar: Progress) -> list[Comparison]:
    """Put, get and verification for every size of chunk; a round moves about `total_bytes` each way.

    Parameters
    ----------
    folder : on the disk that is measured; nothing stays there.
    """
    found = []
    for size in sizes:
        chunks = sample_chunks(size, total_bytes)
        blobs = encoded(chunks)
        with TemporaryDirectory(dir=folder, prefix="kvloom-bench-") as place:
            found.append(_put_speed(Path(place), chunks, blobs, rounds, bar, size_text(size)))
            fill(Path(place) / "tier", blobs)
            found += _get_speeds(Path(place), blobs, rounds, bar, size_text(size))
            found += verification_speeds(Path(place), blobs, rounds, bar, size_text(size))
    return found


def _put_speed(
    folder: Path,
    chunks: Mapping[ChunkKey, KVChunk],
    blobs: Mapping[ChunkKey, EncodedChunk],
    rounds: int,
    bar: Progress,
    size: str,
) -> Comparison:
    raw, raw_path, tier_path = _as_bytes(blobs), folder / "raw", folder / "tier"

    def put_raw() -> float:
        spent = timed(lambda: write_raw(raw_path, raw))
        raw_path.unlink()
        return spent

    def put(use_store: bool) -> float:
        tier = DiskTier(tier_path, durability="batch")
        with KVStore([tier]) as store:

            def put_all() -> None:
                if use_store:
                    for key, chunk in chunks.items():
                        store.put(key, chunk)
                else:
                    for key, blob in blobs.items():
                        tier.put(key, blob)
                tier.flush()

            spent = timed(put_all)
        rmtree(tier_path)
        return spent

    ways = {RAW_WRITE: put_raw, STORE_PUT: lambda: put(True), TIER_PUT: lambda: put(False)}
    return Comparison(PUT, len(raw[0]), len(raw), RAW_WRITE, interleave(ways, rounds, bar, f"{PUT}, {size}"))


def _get_speeds(
    folder: Path, blobs: Mapping[ChunkKey, EncodedChunk], rounds: int, bar: Progress, size: str
) -> list[Comparison]:
    raw, raw_folder = _as_bytes(blobs), folder / "raw"
    nbytes, tensor_bytes = len(raw[0]), [t.nbytes for t in next(iter(blobs.values())).tensors.values()]
    raw_folder.mkdir()
    write_raw(raw_folder / "chunks", raw)
    places = in_random_order(blobs)
    fd = os.open(raw_folder / "chunks", os.O_RDONLY)
    found = []
    try:
        tier = DiskTier(folder / "tier", durability="batch")
        with KVStore([tier]) as store:
            reads: dict[str, tuple[Path, Callable[[], object]]] = {
                RAW_READ: (
                    raw_folder,
                    lambda: exhaust(read_raw(fd, place * nbytes, tensor_bytes) for place in places.values()),
                ),
                STORE_GET: (tier.path, lambda: exhaust(present(store.get(key)) for key in places)),
                TIER_GET: (tier.path, lambda: exhaust(present(tier.get(key)) for key in places)),
            }
            for what, cold in ((WARM_GET, False), (COLD_GET, True)):
                ways = {name: reading(path, read, cold=cold) for name, (path, read) in reads.items()}
                seconds = interleave(ways, rounds, bar, f"{what}, {size}")
                found.append(Comparison(what, nbytes, len(raw), RAW_READ, seconds))
    finally:
        os.close(fd)
    return found


def _as_bytes(blobs: Mapping[ChunkKey, EncodedChunk]) -> Sequence[bytes]:
    """The tensors of every chunk, one behind the other."""
    return [b"".join(t.view(-1).view(torch.uint8).numpy().data for t in b.tensors.values()) for b in blobs.values()]
