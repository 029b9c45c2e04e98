"""What is particular to Redis as a tier."""

import os
import time

import pytest
import redis as redis_py

from kvloom.bench.harness.servers import Server, redis_server
from kvloom.core import ChunkInfo
from kvloom.errors import ChunkCorruptError, ChunkTooLargeError, TierFullError, TierUnavailableError
from kvloom.kvstore.store import KVStore
from kvloom.kvstore.tiers.distributed.redis_tier import RedisTier
from kvloom.kvstore.tiers.distributed.tier import Sharing
from kvloom.kvstore.tiers.host import HostTier
from kvloom.testing import make_blob, make_chunk, make_key

from ..support.patience import eventually
from .servers import a_prefix

KIB, MIB = 1 << 10, 1 << 20


def open_tier(server: Server, *, prefix: str | None = None, ttl_s: float | None = None, **sharing: object) -> RedisTier:
    sharing = {"name": "redis", "prefix": prefix or a_prefix(), "recheck_s": 0.0, **sharing}
    return RedisTier(f"redis://127.0.0.1:{server.port}/0", ttl_s=ttl_s, sharing=Sharing(**sharing))


def test_chunks_expire(redis: Server) -> None:
    tier = open_tier(redis, ttl_s=100.0)
    client = redis_py.Redis("127.0.0.1", redis.port)
    tier.put(make_key(1), make_blob(1))
    tier.put(make_key(2), make_blob(2), ChunkInfo(expires_at_s=time.time() + 2.0))
    left_s = [client.pttl(tier._prefix + make_key(n).hex()) / 1000 for n in (1, 2)]
    assert 90 < left_s[0] <= 100 and 0 < left_s[1] <= 2.0
    assert tier.get(make_key(2)) is not None
    assert eventually(lambda: tier.get(make_key(2)) is None) and make_key(2) not in tier
    tier.close()


def test_damage_is_found(redis: Server) -> None:
    tier = open_tier(redis)
    client = redis_py.Redis("127.0.0.1", redis.port)
    for n in range(4):
        tier.put(make_key(n), make_blob(n))
    names = [tier._prefix + make_key(n).hex() for n in range(4)]
    for name, offset in ((names[0], -3), (names[1], 20), (names[2], 400)):  # payload, record, header
        data = bytearray(client.get(name))
        data[offset] ^= 1
        client.set(name, bytes(data))
    client.set(names[3], client.get(names[3])[:-10])
    for n in range(4):
        with pytest.raises(ChunkCorruptError):
            tier.get(make_key(n))
        with pytest.raises(ChunkCorruptError):
            tier.get_layers(make_key(n), 0, 4)
    client.set(names[0], client.get(names[2]))  # another chunk's object
    store = KVStore([HostTier(None), tier])
    assert store.get(make_key(0)) is None
    assert store.stats().tiers[1].corruptions == 1 and not client.exists(names[0])
    store.close()


def test_a_server_that_is_full(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("full")
    with redis_server(folder, "--maxmemory", "8mb", "--maxmemory-policy", "noeviction") as server:
        tier = open_tier(server)
        with pytest.raises(TierFullError) as full:
            for n in range(20):
                tier.put(make_key(n), make_blob(n, numbers=MIB // 4))
        assert full.value.needed_bytes > MIB and tier.get(make_key(0)) is not None
        with KVStore([tier]) as store:  # it evicts what it knows of
            for n in range(100, 120):
                store.put(make_key(n), make_chunk(n, tokens=2000))
            assert store.stats().tiers[0].evictions > 0 and store.get(make_key(119)) is not None


def test_chunks_that_no_value_may_hold(redis: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvloom.kvstore.tiers.distributed.redis_tier._MOST_BYTES", 1000)
    with KVStore([HostTier(None), open_tier(redis)]) as store:
        store.put(make_key(1), make_chunk(1, tokens=500))
        assert store.locate(make_key(1)) == "host"
        counts = store.stats().tiers[1]
        assert counts.rejections == 1 and counts.evictions == 0
    with pytest.raises(ChunkTooLargeError):
        open_tier(redis).put(make_key(1), make_blob(1, numbers=1000))


def test_passwords(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("secret")
    (folder / "password").write_text("s3cret\n")
    with redis_server(folder, "--requirepass", "s3cret") as server:
        url = f"redis://127.0.0.1:{server.port}"
        tier = RedisTier(url, password_file=folder / "password")
        tier.put(make_key(1), make_blob(1))
        assert tier.get(make_key(1)) is not None
        tier.close()
        for wrong in (url, f"redis://:wr0ng@127.0.0.1:{server.port}"):
            with pytest.raises(TierUnavailableError) as refused:
                RedisTier(wrong).get(make_key(1))
            assert "wr0ng" not in str(refused.value)


def test_wrong_arguments(tmp_path: os.PathLike[str]) -> None:
    with pytest.raises(ValueError, match="ttl_s is 0"):
        RedisTier("redis://127.0.0.1", ttl_s=0)
    with pytest.raises(ValueError):
        RedisTier("http://127.0.0.1")
    for wrong in ({"prefix": ""}, {"capacity_bytes": -1}, {"in_flight_bytes": 0}, {"recheck_s": -1}, {"timeout_s": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Sharing(name="x", **wrong)
    with pytest.raises(OSError):
        RedisTier("redis://127.0.0.1", password_file=tmp_path / "none")
