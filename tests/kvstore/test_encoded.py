"""Chunks that a store passes on as they are: of any codec, in every tier, never decoded."""

from pathlib import Path

import pytest
import torch

from kvloom.compress.raw import RawCodec
from kvloom.core import ChunkInfo, EncodedChunk
from kvloom.errors import TierFullError
from kvloom.kvstore.placement.quota import Quota
from kvloom.kvstore.store import KVStore
from kvloom.kvstore.tiers.disk.tier import DiskTier
from kvloom.kvstore.tiers.host import HostTier
from kvloom.testing.chunks import make_blob, make_chunk, make_key, same_blob, same_chunk

from ..support.damage import flip
from ..support.fakes import assert_adds_up

KEY = make_key(1)


def test_an_unknown_codec_goes_through_every_tier_as_it_is(tmp_path: Path) -> None:
    blob = make_blob(3)
    info = ChunkInfo(make_key(9), "team/a", 2e9, 0.25)
    with KVStore([HostTier(None), DiskTier(tmp_path)]) as store:
        store.put_encoded(KEY, blob, info)
        found = store.get_encoded(KEY)
        assert found is not None and same_blob(found, blob)
        assert_adds_up(store.stats())
    tier = DiskTier(tmp_path)
    assert [entry.info for entry in tier.entries()] == [info]
    tier.close()


def test_what_is_put_encoded_can_be_decoded_here(tmp_path: Path) -> None:
    chunk = make_chunk(5)
    with KVStore([HostTier(None)]) as store:
        store.put_encoded(KEY, RawCodec().encode(chunk))
        found = store.get(KEY)
        assert found is not None and same_chunk(found, chunk)
        assert store.get_encoded(make_key(2)) is None
        assert store.stats().misses == {"absent": 1}


def test_a_corrupt_chunk_is_a_miss_and_the_slower_tier_is_promoted(tmp_path: Path) -> None:
    with KVStore([DiskTier(tmp_path)]) as store:
        store.put_encoded(KEY, make_blob(3))
    with KVStore([HostTier(None), DiskTier(tmp_path)]) as store:
        assert store.locate(KEY) == "disk"
        assert store.get_encoded(KEY) is not None and store.locate(KEY) == "host"
    flip(tmp_path, KEY, -1)
    with KVStore([HostTier(None), DiskTier(tmp_path)]) as store:
        assert store.get_encoded(KEY) is None
        assert store.stats().misses == {"corrupt": 1}


def test_a_chunk_that_does_not_fit_is_refused() -> None:
    with KVStore([HostTier(100)]) as store, pytest.raises(TierFullError):
        store.put_encoded(KEY, EncodedChunk("test", {"codes": torch.zeros(200, dtype=torch.uint8)}, {}))
    with KVStore([HostTier(None)]) as store, pytest.raises(ValueError, match="key is"):
        store.put_encoded(b"short", make_blob(1))  # type: ignore[arg-type]


def test_the_quota_of_a_namespace_covers_what_is_below_it() -> None:
    nbytes = make_blob(0).nbytes
    with KVStore([HostTier(10 * nbytes)], quotas={"team": Quota(limit_ratio=0.3), "team/vip": Quota()}) as store:
        for number in range(9):
            store.put_encoded(make_key(number), make_blob(number), ChunkInfo(namespace=f"team/{number}"))
        assert store.stats().tiers[0].chunks == 3
        for number in range(20, 25):
            store.put_encoded(make_key(number), make_blob(number), ChunkInfo(namespace="team/vip"))
        assert store.stats().tiers[0].namespace_bytes["team/vip"] == 5 * nbytes
        assert store.check() == []
