"""Redis as a tier: the contract, and what is particular to it."""

import os
import time

import pytest
import redis as redis_py

from kvloom.bench.harness.samples import encoded, sample_chunk, sample_key
from kvloom.bench.harness.servers import Server, redis_server
from kvloom.core import ChunkInfo, Tier
from kvloom.errors import ChunkCorruptError, ChunkTooLargeError, TierFullError, TierUnavailableError
from kvloom.kvstore.store import KVStore
from kvloom.kvstore.tiers.distributed.redis_tier import RedisTier
from kvloom.kvstore.tiers.distributed.tier import Sharing
from kvloom.kvstore.tiers.host import HostTier
from kvloom.testing import TierContract, make_blob, make_chunk, make_key, same_blob, same_chunk

from .servers import a_prefix

KIB, MIB = 1 << 10, 1 << 20


def open_tier(server: Server, *, prefix: str | None = None, ttl_s: float | None = None, **sharing: object) -> RedisTier:
    sharing = {"name": "redis", "prefix": prefix or a_prefix(), "recheck_s": 0.0, **sharing}
    return RedisTier(f"redis://127.0.0.1:{server.port}/0", ttl_s=ttl_s, sharing=Sharing(**sharing))


class TestRedisTier(TierContract):
    server: Server

    @pytest.fixture(autouse=True)
    def served(self, redis: Server) -> None:
        self.server = redis

    def make_tier(self, capacity_bytes: int | None) -> Tier:
        return open_tier(self.server, capacity_bytes=capacity_bytes)


@pytest.mark.parametrize("nbytes", [64 * KIB, MIB, 4 * MIB, 16 * MIB])
def test_bytes_come_back_as_they_were(redis: Server, nbytes: int) -> None:
    key = sample_key(nbytes)
    (blob,) = encoded({key: sample_chunk(nbytes, seed=nbytes)}).values()
    writer, reader = (open_tier(redis, prefix=f"sizes-{nbytes}:") for _ in range(2))
    writer.put(key, blob)
    found = reader.get(key)
    assert found is not None and same_blob(found, blob)
    layers = reader.get_layers(key, 1, 3)
    assert layers is not None and same_blob(layers, blob.layers(1, 3))
    writer.close()
    reader.close()


def test_what_one_machine_puts_another_finds(redis: Server) -> None:
    prefix = a_prefix()
    stores = [KVStore([HostTier(None), open_tier(redis, prefix=prefix)]) for _ in range(2)]
    one, other = stores
    keys = [make_key(n) for n in range(100)]
    assert other.match(keys) == 0
    for n, key in enumerate(keys):
        one.put(key, make_chunk(n), after=keys[n - 1] if n else None, namespace="rag", recompute_s=0.5)
    assert other.match(keys) == 100 and other.locate_prefix(keys[:2]) == ("redis", "redis")
    hit = other.read(keys[3])
    assert hit is not None and same_chunk(hit.chunk, make_chunk(3)) and hit.recompute_s == 0.5
    assert other.stats().tiers[1].arrivals == 100 and other.stats().tiers[1].namespace_bytes.keys() == {"rag"}
    part = other.get(keys[5], layers=(1, 2))
    assert part is not None and part.first_layer == 1
    assert other.prefetch([make_key(7)]).result(10) == 1
    one.delete(keys[50])
    assert other.get(keys[50]) is None and other.stats().tiers[1].departures == 1
    assert other.match(keys) == 50
    for store in stores:
        assert [each for each in store.check() if "disagrees" not in each] == []
        store.close()


def test_stores_of_other_prefixes_share_nothing(redis: Server) -> None:
    one, other = open_tier(redis), open_tier(redis)
    one.put(make_key(1), make_blob(1))
    assert other.get(make_key(1)) is None and make_key(1) not in other
    one.close()
    other.close()


def test_a_key_that_was_absent_is_asked_for_again_after_a_while(redis: Server) -> None:
    prefix = a_prefix()
    now_s = [0.0]
    tier = open_tier(redis, prefix=prefix, recheck_s=5.0)
    store = KVStore([tier], monotonic=lambda: now_s[0])
    writer = open_tier(redis, prefix=prefix)
    assert store.match([make_key(1)]) == 0
    writer.put(make_key(1), make_blob(1))
    now_s[0] = 4.9
    assert store.match([make_key(1)]) == 0
    now_s[0] = 5.1
    assert store.match([make_key(1)]) == 1
    store.close()
    writer.close()


def test_chunks_expire(redis: Server) -> None:
    tier = open_tier(redis, ttl_s=100.0)
    client = redis_py.Redis("127.0.0.1", redis.port)
    tier.put(make_key(1), make_blob(1))
    tier.put(make_key(2), make_blob(2), ChunkInfo(expires_at_s=time.time() + 0.3))
    left_s = [client.pttl(tier._prefix + make_key(n).hex()) / 1000 for n in (1, 2)]
    assert 90 < left_s[0] <= 100 and 0 < left_s[1] <= 0.3
    assert tier.get(make_key(2)) is not None
    time.sleep(0.4)
    assert tier.get(make_key(2)) is None and make_key(2) not in tier
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


def test_layers_of_a_chunk_that_was_replaced(redis: Server) -> None:
    prefix = a_prefix()
    tier, other = open_tier(redis, prefix=prefix), open_tier(redis, prefix=prefix)
    tier.put(make_key(1), make_blob(1))
    first = tier.get_layers(make_key(1), 0, 1)
    other.put(make_key(1), make_blob(2, numbers=333))
    second = tier.get_layers(make_key(1), 1, 2)
    assert first is not None and same_blob(first, make_blob(1).layers(0, 1))
    assert second is not None and same_blob(second, make_blob(2, numbers=333).layers(1, 2))
    other.delete(make_key(1))
    assert tier.get_layers(make_key(1), 2, 3) is None
    tier.close()
    other.close()


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
