"""The disk tier beside what a person would use instead, at equal durability.

Put: durable after a sync at the end, or each put for itself. Get: into the caller's buffers, in random order, out of
the page cache or past it; every store is closed and opened again before a cold read, for pages that are mapped stay.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory

from rich.progress import Progress
from torch import Tensor

from ...core import ChunkKey, KVChunk
from ..harness.page_cache import drop_page_cache
from ..harness.rounds import Comparison, interleave, size_text, timed
from ..harness.samples import expect_same, sample_chunks, tensors_of, touched_like
from .alternatives import KVLOOM, Store, installed_stores
from .disk_files import in_random_order

PUT_END, PUT_EACH = "put, one sync at the end", "put, each synced"
WARM_GET, COLD_GET = "get, page cache", "get, cold"
SYNCED_PUTS = 32  # a sync for each: a few tell as much as many

Open = Callable[..., Store]


def alternative_speeds(
    folder: Path, sizes: Sequence[int], total_bytes: int, rounds: int, bar: Progress
) -> list[Comparison]:
    """Every store of `installed_stores` at every size of chunk; a round moves about `total_bytes` each way."""
    stores = installed_stores()
    found = []
    for size in sizes:
        chunks = sample_chunks(size, total_bytes)
        few = dict(list(chunks.items())[:SYNCED_PUTS])
        with TemporaryDirectory(dir=folder, prefix="kvloom-bench-") as place:
            found.append(_put_speed(Path(place), stores, chunks, rounds, bar, PUT_END))
            found.append(_put_speed(Path(place), stores, few, rounds, bar, PUT_EACH))
            found += _get_speeds(Path(place), stores, chunks, rounds, bar)
    return found


def _put_speed(
    folder: Path,
    stores: Mapping[str, Open],
    chunks: Mapping[ChunkKey, KVChunk],
    rounds: int,
    bar: Progress,
    what: str,
) -> Comparison:
    sync_each = what == PUT_EACH
    nbytes = _nbytes(chunks)

    def put(open_store: Open) -> float:
        place = folder / "put"
        place.mkdir()
        store = open_store(place, sync_each=sync_each)
        start = time.perf_counter()
        for key, chunk in chunks.items():
            store.put(key, tensors_of(chunk))
        if not sync_each:
            store.sync()
        spent = time.perf_counter() - start
        store.close()
        rmtree(place)
        return spent

    ways = {name: partial(put, open_store) for name, open_store in stores.items()}
    seconds = interleave(ways, rounds, bar, f"{what}, {size_text(nbytes)}")
    return Comparison(what, nbytes, len(chunks), KVLOOM, seconds)


def _get_speeds(
    folder: Path, stores: Mapping[str, Open], chunks: Mapping[ChunkKey, KVChunk], rounds: int, bar: Progress
) -> list[Comparison]:
    nbytes = _nbytes(chunks)
    targets = touched_like(chunks.values())
    opened = {name: _filled(folder / str(i), store, chunks) for i, (name, store) in enumerate(stores.items())}
    places = in_random_order(chunks)
    found = []

    def read_all(store: Store) -> None:
        for key, place in places.items():
            store.get(key, targets[place])

    def warm(name: str) -> float:
        return timed(lambda: read_all(opened[name]))

    def cold(name: str) -> float:
        opened[name].close()
        place = folder / str(list(stores).index(name))
        drop_page_cache(place)
        opened[name] = stores[name](place, sync_each=False)
        return timed(lambda: read_all(opened[name]))

    try:
        for name, store in opened.items():
            _check(store, chunks, targets, name)
        for what, read in ((WARM_GET, warm), (COLD_GET, cold)):
            ways = {name: partial(read, name) for name in stores}
            seconds = interleave(ways, rounds, bar, f"{what}, {size_text(nbytes)}")
            found.append(Comparison(what, nbytes, len(chunks), KVLOOM, seconds))
    finally:
        for store in opened.values():
            store.close()
    return found


def _filled(place: Path, open_store: Open, chunks: Mapping[ChunkKey, KVChunk]) -> Store:
    place.mkdir()
    store = open_store(place, sync_each=False)
    for key, chunk in chunks.items():
        store.put(key, tensors_of(chunk))
    store.sync()
    return store


def _check(store: Store, chunks: Mapping[ChunkKey, KVChunk], targets: Sequence[dict[str, Tensor]], name: str) -> None:
    for (key, chunk), target in zip(chunks.items(), targets, strict=True):
        for tensor in target.values():
            tensor.zero_()
        store.get(key, target)
        expect_same(target, tensors_of(chunk), name)


def _nbytes(chunks: Mapping[ChunkKey, KVChunk]) -> int:
    return sum(t.nbytes for t in tensors_of(next(iter(chunks.values()))).values())
