"""kvloom and LMCache in turn.

Both hold chunks in memory and on disk, as their connectors have them do, and neither syncs: LMCache never does, so
kvloom is set to `cache`. Both are timed from the caller's tensors until the store is done, and from the call until the
bytes are in the caller's buffers; what only hands out references is shown beside it. LMCache gets its chunks a batch at
a time and reads files with several threads; kvloom is asked for one after the other, and verifies what it reads.
Both stay open from round to round and are emptied in between, so that both write into memory that they have had before.
kvloom reads the disk with room for two chunks in memory, so that each one that is got evicts another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory

from rich.progress import Progress
from torch import Tensor

from ...core import ChunkKey, KVChunk
from ...kvstore.store import KVStore
from ...kvstore.tiers.disk.tier import DiskTier
from ...kvstore.tiers.host import HostTier
from ..harness.page_cache import drop_page_cache
from ..harness.peer import Peer
from ..harness.rounds import Comparison, interleave, size_text, timed
from ..harness.samples import copy_into, expect_same, present, sample_chunks, tensors_of, touched_like

DISK_PUT, DISK_GET, COLD_DISK_GET = "put to memory and disk", "get from disk, page cache", "get from disk, cold"
HOST_PUT, HOST_GET = "put to memory", "get from memory"
KVLOOM, LMCACHE = "kvloom", "LMCache"
KVLOOM_REFERENCE, LMCACHE_REFERENCE = "kvloom (zero-copy)", "LMCache (zero-copy)"
MIN_POOL_BYTES = 256 << 20


def peer_speeds(
    python: Path, folder: Path, sizes: Sequence[int], total_bytes: int, rounds: int, bar: Progress
) -> tuple[str, list[Comparison]]:
    """LMCache's version, and both systems at every size of chunk; a round moves about `total_bytes` each way.

    Raises
    ------
    PeerError : LMCache cannot be asked.
    """
    found = []
    with TemporaryDirectory(dir=folder, prefix="kvloom-bench-") as place:
        lmcache_path, kvloom_path = Path(place) / "lmcache", Path(place) / "kvloom"
        lmcache_path.mkdir()
        with closing(Peer(python.absolute(), lmcache_path, max(MIN_POOL_BYTES, 4 * total_bytes))) as peer:
            for size in sizes:
                chunks = sample_chunks(size, total_bytes)
                found += _in_memory(peer, chunks, size, rounds, bar)
                found += _on_disk(peer, lmcache_path, kvloom_path, chunks, size, rounds, bar)
            return peer.version, found


def _in_memory(
    peer: Peer, chunks: Mapping[ChunkKey, KVChunk], size: int, rounds: int, bar: Progress
) -> list[Comparison]:
    count, targets = len(chunks), touched_like(chunks.values())

    def put_peer() -> float:
        spent = peer.ask("put", where="host", size_bytes=size, count=count)
        peer.ask("clear")
        return spent

    def compare(what: str, ways: dict[str, Callable[[], float]]) -> Comparison:
        seconds = interleave(ways, rounds, bar, f"{what}, LMCache, {size_text(size)}")
        return Comparison(what, size, count, LMCACHE, seconds, frozenset({KVLOOM_REFERENCE, LMCACHE_REFERENCE}))

    with KVStore([HostTier(None)]) as store:
        found = [compare(HOST_PUT, {LMCACHE: put_peer, KVLOOM: lambda: _put_and_delete_all(store, chunks)})]
    peer.ask("put", where="host", size_bytes=size, count=count)
    with KVStore([HostTier(None)]) as store:
        _put_all(store, chunks)
        ways: dict[str, Callable[[], float]] = {
            LMCACHE: lambda: peer.ask("get", where="host", copy=True),
            KVLOOM: lambda: timed(lambda: _get_all(store, chunks, targets)),
            LMCACHE_REFERENCE: lambda: peer.ask("get", where="host", copy=False),
            KVLOOM_REFERENCE: lambda: timed(lambda: [present(store.get(key)) for key in chunks]),
        }
        found.append(compare(HOST_GET, ways))
    peer.ask("clear")
    return found


def _on_disk(
    peer: Peer,
    lmcache_path: Path,
    kvloom_path: Path,
    chunks: Mapping[ChunkKey, KVChunk],
    size: int,
    rounds: int,
    bar: Progress,
) -> list[Comparison]:
    count, targets = len(chunks), touched_like(chunks.values())

    def open_store(host_bytes: int | None = None) -> KVStore:
        return KVStore([HostTier(host_bytes), DiskTier(kvloom_path, durability="cache")])

    def put_peer() -> float:
        spent = peer.ask("put", where="disk", size_bytes=size, count=count)
        peer.ask("clear")
        return spent

    def get(store: KVStore, cold: bool) -> float:
        if cold:
            drop_page_cache(kvloom_path)
        return timed(lambda: _get_all(store, chunks, targets))

    def get_peer(cold: bool) -> float:
        if cold:
            drop_page_cache(lmcache_path)
        peer.ask("drop_host")
        return peer.ask("get", where="disk", copy=True)

    def compare(what: str, ways: dict[str, Callable[[], float]]) -> Comparison:
        seconds = interleave(ways, rounds, bar, f"{what}, LMCache, {size_text(size)}")
        return Comparison(what, size, count, LMCACHE, seconds)

    with open_store() as store:
        found = [compare(DISK_PUT, {LMCACHE: put_peer, KVLOOM: lambda: _put_and_delete_all(store, chunks)})]
    peer.ask("put", where="disk", size_bytes=size, count=count)
    with open_store() as store:
        _put_all(store, chunks)
    with open_store(host_bytes=2 * size) as store:  # what is got evicts what was got before it
        get(store, cold=False)
        for chunk, target in zip(chunks.values(), targets, strict=True):
            expect_same(target, tensors_of(chunk), "the disk tier")
        for what, cold in ((DISK_GET, False), (COLD_DISK_GET, True)):
            found.append(compare(what, {LMCACHE: partial(get_peer, cold), KVLOOM: partial(get, store, cold)}))
    peer.ask("clear")
    rmtree(kvloom_path)
    return found


def _put_and_delete_all(store: KVStore, chunks: Mapping[ChunkKey, KVChunk]) -> float:
    """Only the puts count. The store stays as it is, as the peer does: both write into memory that they had before."""
    spent = timed(lambda: _put_all(store, chunks))
    for key in chunks:
        store.delete(key)
    return spent


def _put_all(store: KVStore, chunks: Mapping[ChunkKey, KVChunk]) -> None:
    for key, chunk in chunks.items():
        store.put(key, chunk)


def _get_all(store: KVStore, keys: Iterable[ChunkKey], targets: Sequence[Mapping[str, Tensor]]) -> None:
    for key, target in zip(keys, targets, strict=True):
        copy_into(target, tensors_of(present(store.get(key))))
