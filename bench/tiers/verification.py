"""Measures what verification costs: reads with checksums, and reads whose checksums are a constant, in turn.

A share of the whole read, measured rather than reckoned from the speed of the checksum, which counts bytes that are in
no cache and knows nothing of what runs beside it; that speed is shown as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TypeAlias

import torch
import xxhash
from rich.progress import Progress

from ...core import ChunkKey, EncodedChunk
from ...evaluation.report import Metric
from ...kvstore.tiers.disk.tier import DiskTier
from ..harness.rounds import Comparison, exhaust, interleave, timed
from ..harness.samples import present
from .disk_files import fill, in_random_order, reading

WARM_VERIFY, COLD_VERIFY = "verification, page cache", "verification, cold"
UNVERIFIED, VERIFIED, HASH_ALONE = "unverified", "DiskTier.get", "xxh3 alone"

Bytes: TypeAlias = bytes | bytearray | memoryview

_DIGEST = bytes([0, 0, 0, 0, 0, 0, 0, 1])
_HEXDIGEST = _DIGEST.hex()


def overhead(comparison: Comparison) -> Metric:
    """What verification adds to a read, as a share of the read without it."""
    pairs = zip(comparison.seconds[VERIFIED], comparison.seconds[UNVERIFIED], strict=True)
    return Metric.of_samples([own / bare - 1 for own, bare in pairs], unit="share", baseline=UNVERIFIED)


def verification_speeds(
    folder: Path, blobs: Mapping[ChunkKey, EncodedChunk], rounds: int, bar: Progress, size: str
) -> list[Comparison]:
    """Reads of the tier in `folder / "tier"`, and of another of the same chunks that never knew a checksum.

    Raises
    ------
    RuntimeError : the disk tier takes its checksums from functions that `constant_checksums` does not replace.
    """
    keys = in_random_order(blobs)
    nbytes = blobs[next(iter(keys))].nbytes
    views = [t.view(-1).view(torch.uint8).numpy().data for blob in blobs.values() for t in blob.tensors.values()]
    with constant_checksums() as asked:
        fill(folder / "bare", blobs)
    if sum(asked) < 2 * nbytes * len(blobs):
        raise RuntimeError(
            f"of {2 * nbytes * len(blobs)} bytes written and read, {sum(asked)} went through the functions that "
            "constant_checksums replaces; it must replace those that the disk tier calls now"
        )
    with constant_checksums():
        bare = DiskTier(folder / "bare", durability="batch")

    def get_bare() -> None:
        with constant_checksums():
            exhaust(present(bare.get(key)) for key in keys)

    found = []
    try:
        with closing(DiskTier(folder / "tier", durability="batch")) as tier:
            for what, cold in ((WARM_VERIFY, False), (COLD_VERIFY, True)):
                ways = {
                    UNVERIFIED: reading(bare.path, get_bare, cold=cold),
                    VERIFIED: reading(tier.path, lambda: exhaust(present(tier.get(key)) for key in keys), cold=cold),
                    HASH_ALONE: lambda: timed(lambda: exhaust(map(xxhash.xxh3_64_intdigest, views))),
                }
                seconds = interleave(ways, rounds, bar, f"{what}, {size}")
                found.append(Comparison(what, nbytes, len(blobs), UNVERIFIED, seconds))
    finally:
        with constant_checksums():
            bare.close()
    return found


@contextmanager
def constant_checksums() -> Iterator[list[int]]:
    """Within, every xxh3 checksum is 1 and costs nothing. Yields the list of how many bytes each was asked for.

    For the benchmark alone: it has no other way to see a read without its verification. A tier that is read within must
    have been written, opened and closed within, and no other may be used meanwhile.
    """
    asked: list[int] = []

    class Nothing:
        """A running checksum that stays 1."""

        def __init__(self, data: Bytes = b"", _: int = 0) -> None:
            self.update(data)

        def update(self, data: Bytes) -> None:
            asked.append(len(data))

        def intdigest(self) -> int:
            return 1

        def digest(self) -> bytes:
            return _DIGEST

        def hexdigest(self) -> str:
            return _HEXDIGEST

    def intdigest(data: Bytes, seed: int = 0) -> int:
        asked.append(len(data))
        return 1

    def digest(data: Bytes, seed: int = 0) -> bytes:
        asked.append(len(data))
        return _DIGEST

    def hexdigest(data: Bytes, seed: int = 0) -> str:
        asked.append(len(data))
        return _HEXDIGEST

    stand_ins: dict[str, object] = {
        "xxh3_64": Nothing,
        "xxh3_64_intdigest": intdigest,
        "xxh3_64_digest": digest,
        "xxh3_64_hexdigest": hexdigest,
    }
    real = {name: getattr(xxhash, name) for name in stand_ins}
    try:
        for name, stand_in in stand_ins.items():
            setattr(xxhash, name, stand_in)
        yield asked
    finally:
        for name, function in real.items():
            setattr(xxhash, name, function)
