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


def test_what_is_at_hand_is_what_nothing_has_to_be_waited_for(tmp_path: Path) -> None:
    """Chunks in memory are; those on disk alone, and those of a first tier on disk, are not, and are no misses."""
    blob = make_blob(1)
    with KVStore([HostTier(blob.nbytes), DiskTier(tmp_path / "disk")]) as store:
        store.put_encoded(make_key(1), blob)
        found = store.get_at_hand(make_key(1))
        assert found is not None and same_blob(found, blob)
        store.put_encoded(make_key(2), make_blob(2))
        keys = [make_key(1), make_key(2), make_key(3)]
        held, absent = (keys[0], keys[1]) if store.locate(keys[0]) == "host" else (keys[1], keys[0])
        assert store.get_at_hand(absent) is None and store.get_at_hand(keys[2]) is None
        assert store.get_at_hand(held) is not None
        assert store.locate_at_hand([held, absent, keys[2]]) == ("host", "disk")
        stats = store.stats()
        assert stats.hits == 2 and not stats.misses
    with KVStore([DiskTier(tmp_path / "disk")]) as store:
        assert store.get_at_hand(make_key(1)) is None and store.get_encoded(make_key(1)) is not None


def test_what_others_have_put_is_not_located_at_once(tmp_path: Path) -> None:
    with KVStore([DiskTier(tmp_path)]) as one, KVStore([DiskTier(tmp_path)]) as other:
        assert one.locate_at_hand([make_key(1)]) == ()
        other.put_encoded(make_key(1), make_blob(1))
        assert one.locate_at_hand([make_key(1)]) is None
        assert one.locate_prefix([make_key(1)]) == ("disk",)
        assert one.locate_at_hand([make_key(1)]) == ("disk",)
