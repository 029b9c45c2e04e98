"""Chunks in a disk tier and in a plain file: written, synced, and read in one order, cached or not."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import torch

from ...core import ChunkKey, EncodedChunk
from ...kvstore.tiers.disk.tier import DiskTier
from ..harness.page_cache import drop_page_cache
from ..harness.rounds import timed
from ..harness.samples import expect_same, present


def fill(path: Path, blobs: Mapping[ChunkKey, EncodedChunk]) -> None:
    """Make a disk tier of these chunks, durable and closed, after a look at whether it gives back what it was given."""
    with closing(DiskTier(path, durability="batch")) as tier:
        for key, blob in blobs.items():
            tier.put(key, blob)
        tier.flush()
        for key, blob in blobs.items():
            expect_same(present(tier.get(key)).tensors, blob.tensors, "the disk tier")


def in_random_order(keys: Iterable[ChunkKey]) -> dict[ChunkKey, int]:
    """The place that each key was written at, in the order of reading, which is always the same."""
    places = list({key: place for place, key in enumerate(keys)}.items())
    random.Random(0).shuffle(places)
    return dict(places)


def reading(path: Path, read: Callable[[], object], *, cold: bool) -> Callable[[], float]:
    """The seconds of a pass of reads; if cold, past the page cache."""

    def once() -> float:
        if cold:
            drop_page_cache(path)
        return timed(read)

    return once


def write_raw(path: Path, chunks: Sequence[bytes]) -> None:
    """One pwrite for each chunk, fdatasync at the end."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        offset = 0
        for chunk in chunks:
            data = memoryview(chunk)
            while data:
                written = os.pwrite(fd, data, offset)
                data, offset = data[written:], offset + written
        os.fdatasync(fd)
    finally:
        os.close(fd)


def read_raw(fd: int, offset: int, sizes: Sequence[int]) -> list[torch.Tensor]:
    """One preadv into tensors of their own, of so many bytes each: memory as a tier must give it."""
    tensors = [torch.empty(nbytes, dtype=torch.uint8) for nbytes in sizes]
    views = [tensor.numpy().data for tensor in tensors]
    while views:
        count = os.preadv(fd, views, offset)
        if not count:
            raise RuntimeError(f"the raw file ends at byte {offset}; was it cut off meanwhile?")
        offset += count
        while views and count >= len(views[0]):
            count -= len(views.pop(0))
        if views:
            views[0] = views[0][count:]
    return tensors
