"""What Mooncake does not do, seen from a store: nodes and masters that die, replicas that are not made."""

import time
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest

from kvloom.errors import TierError, TierUnavailableError
from kvloom.kvstore.store import KVStore
from kvloom.testing import make_blob, make_chunk, make_key, same_blob, same_chunk

from ..support.patience import LONG_S, eventually
from .servers import Cluster, a_cluster, a_prefix, a_sharing, expect, mooncake_tier

pytestmark = pytest.mark.slow

CHUNKS = 24
TIMEOUT_S = 2.0
SLACK_S = 5.0  # on a busy machine


@pytest.fixture
def cluster(tmp_path: Path):
    expect("mooncake")
    with a_cluster(tmp_path, segment_bytes=128 << 20) as cluster:
        yield cluster


def read_all(store: KVStore) -> tuple[int, float]:
    """How many chunks are hits, all of them right; and the longest time that one took."""
    hits, longest_s = 0, 0.0
    for number in range(CHUNKS):
        began_s = time.monotonic()
        found = store.get(make_key(number))
        longest_s = max(longest_s, time.monotonic() - began_s)
        assert found is None or same_chunk(found, make_chunk(number, tokens=500))
        hits += found is not None
    return hits, longest_s


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_node_that_dies_costs_its_chunks_and_little_time(cluster: Cluster, replicas: int) -> None:
    sharing = a_sharing()
    store = KVStore([mooncake_tier(cluster, sharing, replicas)], timeout_s=TIMEOUT_S)
    for number in range(CHUNKS):
        store.put(make_key(number), make_chunk(number, tokens=500))
    assert read_all(store)[0] == CHUNKS
    cluster.nodes[0].kill()
    hits, longest_s = read_all(store)
    counts = store.stats().tiers[0]
    assert 0 < hits < CHUNKS and longest_s < TIMEOUT_S + SLACK_S
    assert counts.unreachable == CHUNKS - hits == store.stats().misses["unavailable"]
    began_s = time.monotonic()
    again, _ = read_all(store)
    waited_s = TIMEOUT_S * (CHUNKS - hits)  # if what its node held were waited for again
    assert again >= hits and time.monotonic() - began_s < waited_s / 2
    until_s = time.monotonic() + LONG_S
    for number in count(100):  # a dead node may be chosen, until the master has dropped it
        assert time.monotonic() < until_s
        with suppress(TierError):
            store.put(make_key(number), make_chunk(number))
            break
        time.sleep(0.2)
    if replicas == 2:  # once the master has dropped the node, the other replica is read
        assert eventually(lambda: read_all(store)[0] == CHUNKS)
    store.close()


def test_a_master_that_is_restarted_has_forgotten_everything(cluster: Cluster) -> None:
    store = KVStore([mooncake_tier(cluster, a_sharing())], timeout_s=TIMEOUT_S)
    for number in range(CHUNKS):
        store.put(make_key(number), make_chunk(number, tokens=500))
    cluster.master.kill()
    began_s = time.monotonic()
    assert store.get(make_key(0)) is None and store.get(make_key(1)) is None
    assert time.monotonic() - began_s < 2 * TIMEOUT_S + SLACK_S
    cluster.master.start()
    until_s = time.monotonic() + LONG_S
    while time.monotonic() < until_s:
        try:
            store.put(make_key(200), make_chunk(200))
        except TierError:  # full, as long as no node has come back
            time.sleep(0.5)
            continue
        break
    assert store.get(make_key(200)) is not None
    hits, _ = read_all(store)
    counts = store.stats().tiers[0]
    assert hits == 0 and counts.departures > 0 and counts.errors > 0
    assert "lost there" in str(store.explain([make_key(5)])[0])
    store.close()


def test_replicas_that_could_not_be_made_are_counted(mooncake: Cluster) -> None:
    sharing = a_sharing()
    for replicas, fewer in ((2, 0), (3, 1)):
        with KVStore([mooncake_tier(mooncake, sharing, replicas)]) as store:
            store.put(make_key(replicas), make_chunk(1))
            assert store.stats().tiers[0].fewer_replicas == fewer


def test_chunks_that_the_staging_memory_does_not_hold(mooncake: Cluster) -> None:
    from kvloom.kvstore.tiers.distributed.mooncake_tier import MooncakeOptions, MooncakeTier

    tier = MooncakeTier(mooncake.address, options=MooncakeOptions(staging_bytes=100_000), sharing=a_sharing())
    kept = []
    for number in range(6):  # each of 40 kB, all of them held
        tier.put(make_key(number), make_blob(number, numbers=10_000))
        kept.append(tier.get(make_key(number)))
    assert all(found is not None and same_blob(found, make_blob(n, numbers=10_000)) for n, found in enumerate(kept))
    tier.close()


def test_a_master_that_is_not_there_is_told_at_once() -> None:
    expect("mooncake")
    from kvloom.kvstore.tiers.distributed.mooncake_tier import MooncakeOptions, MooncakeTier

    tier = MooncakeTier("127.0.0.1:1", sharing=a_sharing())
    began_s = time.monotonic()
    with pytest.raises(TierUnavailableError, match="cannot be reached"):
        tier.get(make_key(1))
    assert time.monotonic() - began_s < LONG_S / 4  # Mooncake's own client tries for 90 s
    tier.close()
    for wrong in ("master", "master:port", ":50051"):
        with pytest.raises(ValueError, match="host:port"):
            MooncakeTier(wrong)
    with pytest.raises(ValueError, match="replicas is 0"):
        MooncakeTier("a:1", options=MooncakeOptions(replicas=0))
    assert a_prefix() != a_prefix()
