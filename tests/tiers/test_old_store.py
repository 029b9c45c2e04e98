"""A store whose chunks were named by an older key format opens, and its chunks are misses that eviction removes.

`data/store_of_key_format_1.tar.xz` was written by the release before key format 2: three chunks by their text, of which
the second was deleted, and two of a prefix.
"""

import tarfile
from pathlib import Path

import pytest
import torch

from kvloom.core import KVChunk, KVSpec
from kvloom.kvstore.keys import content_key, prefix_keys
from kvloom.kvstore.store import KVStore
from kvloom.kvstore.tiers.disk.tier import DiskTier
from kvloom.testing import make_chunk, make_key, same_chunk

SPEC = KVSpec("old@1", 1, 1, 8, torch.float32, None)
OLD_KEYS = [
    bytes.fromhex(text)
    for text in (
        "b7d4ff74a29545e88e1560b1d6b9d71030be249a0e59180dcdd4cfa7b99b73c1",
        "9f2e70d6f797bf918d97e0fd6e6eeeff655eada9c0298e55fe1170b132897685",
        "9444913ff234a2057bf44111f252cbc934918017cda5898b1f6758e0dc97a801",
        "4c2206482506d7ce77cc6f58da5e724431817ed2488a9762375a5e4c2941e6e6",
    )
]


@pytest.fixture
def old(tmp_path: Path) -> Path:
    with tarfile.open(Path(__file__).parent / "data" / "store_of_key_format_1.tar.xz") as archive:
        archive.extractall(tmp_path / "kv", filter="data")
    return tmp_path / "kv"


@pytest.mark.parametrize("read_only", [False, True])
def test_it_opens_and_reads_as_it_was_written(old: Path, read_only: bool) -> None:
    tier = DiskTier(old, read_only=read_only)
    assert [entry.key for entry in tier.entries()] == OLD_KEYS and tier.check() == []
    assert [entry.info.namespace for entry in tier.entries()] == ["tenant", "tenant", "", ""]
    assert tier.entries()[1].info.after is not None and tier.entries()[1].info.recompute_s == 0.5
    for key in OLD_KEYS:
        assert tier.get(key) is not None
    tier.close()


def test_its_chunks_are_misses(old: Path) -> None:
    with KVStore([DiskTier(old)]) as store:
        now = [content_key(SPEC, list(range(n, n + 4))) for n in (10, 20, 30)]
        now += prefix_keys(SPEC, list(range(8)), chunk_tokens=4)
        assert not set(now) & set(OLD_KEYS)
        assert [store.get(key) for key in now] == [None] * 5 and not store.locate_prefix(now[3:])
        assert store.stats().misses == {"absent": 5} and store.check() == []
        ids = torch.arange(4) + 10
        zeros = torch.zeros(1, 1, 4, 8)
        store.put(now[0], KVChunk(SPEC, ids, torch.arange(4), zeros, zeros))
        assert store.get(now[0]) is not None and store.stats().tiers[0].chunks == 5


def test_eviction_removes_them(old: Path) -> None:
    with KVStore([DiskTier(old, capacity_bytes=6 * 4096)]) as store:
        for number in range(6):
            store.put(make_key(number), make_chunk(number))
        assert not any(key in store for key in OLD_KEYS)
        for number in range(6):
            found = store.get(make_key(number))
            assert found is not None and same_chunk(found, make_chunk(number))
        disk = store.stats().tiers[0]
        assert disk.evictions == 4 and disk.used_bytes == 6 * 4096 and store.check() == []
    taken = sum(file.stat().st_blocks * 512 for file in (old / "segments").iterdir())
    assert taken <= 7 * 4096
