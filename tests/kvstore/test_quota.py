"""Namespaces: what one is sure of, what it may take at most, and that the books say so to the byte."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom.compress.raw import RawCodec
from kvloom.core import ChunkInfo, ChunkKey
from kvloom.errors import TierFullError
from kvloom.kvstore.eviction.lru import LRU
from kvloom.kvstore.eviction.policy import POLICIES
from kvloom.kvstore.placement.catalog import Catalog
from kvloom.kvstore.placement.quota import Quota
from kvloom.kvstore.store import KVStore
from kvloom.kvstore.tiers.host import HostTier
from kvloom.testing import TierContract, make_blob, make_chunk, make_key

from ..support.fakes import HEADER_BYTES, Clock, SharedShelfTier, Shelf, ShelfTier, assert_adds_up

CHUNK_BYTES = RawCodec().encode(make_chunk(0)).nbytes
TAKEN_BYTES = CHUNK_BYTES + HEADER_BYTES


class TestShelfTier(TierContract):
    def make_tier(self, capacity_bytes: int | None) -> ShelfTier:
        return ShelfTier(Shelf(), capacity_bytes)


class TestSharedShelfTier(TierContract):
    def make_tier(self, capacity_bytes: int | None) -> ShelfTier:
        return SharedShelfTier(Shelf(), capacity_bytes)


def put(store: KVStore, namespace: str, *numbers: int) -> None:
    for number in numbers:
        store.put(make_key(number), make_chunk(number), namespace=namespace)


def held(store: KVStore, namespace: str, tier: int = 0) -> int:
    """Chunks of a namespace, all of one size."""
    chunks, rest = divmod(store.stats().tiers[tier].namespace_bytes.get(namespace, 0), TAKEN_BYTES)
    assert rest == 0
    return chunks


def keys(*numbers: int) -> list[ChunkKey]:
    return [make_key(number) for number in numbers]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_flood_leaves_the_reserve_of_another(policy: str) -> None:
    """Several do, and leave it nothing of what is reserved for no one."""
    tiers = [
        ShelfTier(Shelf(), 10 * TAKEN_BYTES, name="host"),
        ShelfTier(Shelf(), 20 * TAKEN_BYTES, name="disk"),
    ]
    floods = [f"flood {n}" for n in range(12)]
    quotas = {"careful": Quota(reserve_ratio=0.4), **dict.fromkeys(floods, Quota())}
    with KVStore(tiers, policy=policy, quotas=quotas) as store:
        put(store, "careful", *range(12))
        for number in range(1000, 1240):  # more than ten times the capacity of the larger tier
            put(store, floods[number % 12], number)
        assert held(store, "careful", 0) == 4 and 8 <= held(store, "careful", 1) <= 9
        assert all(tier.chunks * TAKEN_BYTES == tier.capacity_bytes for tier in store.stats().tiers)
        for number in range(12):  # promotion and what it demotes cost nobody else anything
            store.get(make_key(number))
            assert held(store, "careful", 0) >= 4 and held(store, "careful", 1) >= 8
        for number in range(2000, 2100):
            put(store, floods[number % 12], number)
        assert held(store, "careful", 0) >= 4 and held(store, "careful", 1) >= 8
        assert store.check() == []
        assert_adds_up(store.stats())


@pytest.mark.parametrize("policy", POLICIES)
def test_one_flood_takes_no_more_of_the_rest_than_the_other_holds(policy: str) -> None:
    with KVStore([ShelfTier(Shelf(), 10 * TAKEN_BYTES)], policy=policy, quotas={"a": Quota(0.4)}) as store:
        put(store, "a", *range(10))
        put(store, "", *range(100, 300))
        assert held(store, "a") == 4 + 3 and held(store, "") == 3


def test_the_reserve_is_lent_and_comes_back() -> None:
    with KVStore([HostTier(10 * CHUNK_BYTES)], quotas={"a": Quota(0.4)}, policy="lru") as store:
        put(store, "b", *range(10))
        assert len(store.stats().tiers[0].namespace_bytes) == 1  # nothing is kept empty
        put(store, "a", *range(100, 110))
        by_namespace = store.stats().tiers[0].namespace_bytes
        # Whoever exceeds its reserve most gives, so both end with as much beyond it: 4 + 3 and 3.
        assert {name: nbytes // CHUNK_BYTES for name, nbytes in by_namespace.items()} == {"a": 8, "b": 2}


def test_at_its_limit_a_namespace_evicts_its_own() -> None:
    quotas = {"a": Quota(limit_ratio=0.3), "b": Quota()}
    with KVStore([ShelfTier(Shelf(), 10 * TAKEN_BYTES)], quotas=quotas, policy="lru") as store:
        put(store, "b", 0)  # the least recently used of all
        put(store, "a", *range(100, 120))
        assert held(store, "a") == 3 and held(store, "b") == 1 and store.match(keys(117, 118, 119, 0)) == 4
        with store.pinned(keys(117, 118, 119)), pytest.raises(TierFullError, match="limit of namespace 'a'"):
            put(store, "a", 120)
        assert store.stats().puts == {"stored": 21, "refused": 1} and store.check() == []
        with pytest.raises(TierFullError, match="limit of namespace 'a'"):  # evicts nothing in vain
            store.put(make_key(121), make_chunk(121, tokens=30), namespace="a")
        assert held(store, "a") == 3


def test_written_again_at_the_limit_a_chunk_evicts_nothing() -> None:
    with KVStore([ShelfTier(Shelf(), 10 * TAKEN_BYTES)], quotas={"a": Quota(limit_ratio=0.3)}) as store:
        put(store, "a", 0, 1, 2)
        put(store, "a", 1)
        assert held(store, "a") == 3 and store.stats().tiers[0].evictions == 0


def test_two_threads_together_do_not_take_more_than_can_be_spared() -> None:
    tier = HostTier(4 * CHUNK_BYTES)
    for number in range(3):
        tier.put(make_key(number), RawCodec().encode(make_chunk(number)), ChunkInfo(namespace="a"))
    quotas = {"a": Quota(0.5)}
    catalog = Catalog([tier], make_policy=LRU, quotas=quotas, clock=Clock())
    (state,) = catalog.states
    assert catalog.choose_victim(state, make_key(8), ChunkInfo(namespace="b"), own_group=False) == make_key(0)
    # While that one is on its way out, no other can be spared: the second thread helps with it.
    assert catalog.choose_victim(state, make_key(9), ChunkInfo(namespace="b"), own_group=False) == make_key(0)
    assert catalog.remove(state, make_key(0), "evictions") is not None
    assert catalog.choose_victim(state, make_key(9), ChunkInfo(namespace="b"), own_group=False) is None
    assert catalog.choose_victim(state, make_key(9), ChunkInfo(namespace="a"), own_group=False) == make_key(1)


def test_the_limit_counts_what_the_tier_adds() -> None:
    """Two chunks' tensors fit, their headers do not."""
    capacity_bytes = 20 * CHUNK_BYTES
    with KVStore([ShelfTier(Shelf(), capacity_bytes)], quotas={"a": Quota(0.0, 0.101)}) as store:
        put(store, "a", 0, 1)
        assert held(store, "a") == 1 and make_key(1) in store and store.stats().tiers[0].evictions == 1


def test_nothing_may_go() -> None:
    with KVStore([HostTier(4 * CHUNK_BYTES)], quotas={"a": Quota(0.5), "b": Quota(0.5)}) as store:
        put(store, "a", 0, 1)
        put(store, "b", 2, 3)
        with pytest.raises(TierFullError):
            put(store, "c", 4)
        assert store.match(keys(0, 1, 2, 3)) == 4
        put(store, "a", 5)  # its own it may
        assert make_key(5) in store and store.match(keys(2, 3)) == 2


def test_another_reserve_is_not_broken_for_a_large_chunk() -> None:
    """One byte over its reserve, a namespace does not give a chunk that would take it far below."""
    large = make_chunk(1, tokens=40)
    large_bytes = RawCodec().encode(large).nbytes
    capacity_bytes = large_bytes + 4 * CHUNK_BYTES
    reserve_ratio = (large_bytes - 1) / capacity_bytes
    quotas = {"a": Quota(reserve_ratio), "b": Quota(4 * CHUNK_BYTES / capacity_bytes)}
    with KVStore([HostTier(capacity_bytes)], quotas=quotas) as store:
        store.put(make_key(0), large, namespace="a")
        put(store, "b", *range(10, 20))
        assert make_key(0) in store


def test_pins_of_one_do_not_break_the_reserve_of_another() -> None:
    with KVStore([HostTier(4 * CHUNK_BYTES)], quotas={"a": Quota(0.5)}) as store:
        put(store, "a", 0, 1)
        put(store, "b", 2, 3)
        with store.pinned(keys(2, 3)), pytest.raises(TierFullError):
            put(store, "b", 4)
        assert store.match(keys(0, 1, 2, 3)) == 4


def test_a_chunk_belongs_to_who_put_it_last() -> None:
    with KVStore([HostTier(4 * CHUNK_BYTES)], quotas={"a": Quota(0.25), "b": Quota(0.25)}) as store:
        put(store, "a", 0)
        put(store, "b", 0)
        assert store.stats().tiers[0].namespace_bytes == {"b": CHUNK_BYTES} and store.check() == []
        put(store, "c", *range(10, 30))
        assert make_key(0) in store


def test_accounts_survive_reopening() -> None:
    shelf, quotas = Shelf(), {"a": Quota(0.4, 0.5)}
    with KVStore([ShelfTier(shelf, 10 * TAKEN_BYTES)], quotas=quotas) as store:
        put(store, "a", *range(4))
        put(store, "é", *range(10, 14))
        before = store.stats().tiers[0].namespace_bytes
    with KVStore([ShelfTier(shelf, 10 * TAKEN_BYTES)], quotas=quotas) as store:
        assert store.stats().tiers[0].namespace_bytes == before == {"a": 4 * TAKEN_BYTES, "é": 4 * TAKEN_BYTES}
        assert store.stats().tiers[0].arrivals == 8
        put(store, "b", *range(100, 200))
        assert held(store, "a") == 4 and held(store, "é") == 0
        put(store, "a", *range(20, 24))
        assert held(store, "a") == 5 and store.check() == []


STEPS = st.tuples(
    st.sampled_from("aabbcd"), st.integers(0, 30), st.sampled_from(["put", "put", "put", "get", "delete"])
)


@given(
    steps=st.lists(STEPS, max_size=80),
    policy=st.sampled_from(sorted(POLICIES)),
    reserves=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    limit=st.integers(4, 8),
    sizes=st.sampled_from([(8, 16), (16, 8)]),
)
@settings(max_examples=100, deadline=None)
def test_isolation(
    steps: list[tuple[str, int, str]], policy: str, reserves: tuple[int, int], limit: int, sizes: tuple[int, int]
) -> None:
    """Whatever one namespace does, no other falls below its reserve, and none exceeds its limit."""
    quotas = {"a": Quota(reserves[0] / 8, limit / 8), "b": Quota(reserves[1] / 8), "c": Quota(0, 0.5)}
    limits = {"a": limit, "b": 8, "c": 4, "d": 8}
    tiers = [ShelfTier(Shelf(), size * TAKEN_BYTES, name=str(size)) for size in sizes]
    with KVStore(tiers, policy=policy, quotas=quotas) as store:
        for namespace, number, action in steps:
            before = {(name, tier): held(store, name, tier) for name in "abcd" for tier in (0, 1)}
            key = make_key(100 * ord(namespace) + number)
            if action == "put":
                try:
                    store.put(key, make_chunk(number), namespace=namespace)
                except TierFullError:
                    # Only a namespace without anything of its own, where all others are at or below their reserves.
                    assert before[namespace, 0] == before[namespace, 1] == 0
            elif action == "get":
                store.get(key)
            else:
                store.delete(key)
            for (name, tier), chunks in before.items():
                if name != namespace:
                    reserve = sizes[tier] // 8 * dict(zip("ab", reserves, strict=True)).get(name, 0)
                    assert held(store, name, tier) >= min(chunks, reserve)
                assert held(store, name, tier) <= sizes[tier] // 8 * limits[name]
        assert store.check() == []
        assert_adds_up(store.stats())


class NosyLRU(LRU):
    """Counts the chunks that it asks about."""

    asked = 0

    def victim(self, may_go):
        def counted(key: ChunkKey) -> bool:
            NosyLRU.asked += 1
            return may_go(key)

        return super().victim(counted)


def test_a_protected_crowd_is_not_walked_through() -> None:
    """Half of the tier is a reserve, and all of it older than what goes."""
    NosyLRU.asked = 0
    with KVStore([HostTier(2000)], policy=NosyLRU, quotas={"a": Quota(0.5)}, codec=Tiny()) as store:
        put(store, "a", *range(1000))
        put(store, "b", *range(1000, 4000))
        assert store.stats().tiers[0].evictions == 2000 and NosyLRU.asked < 3 * 2000


class Tiny(RawCodec):
    """Chunks of one byte."""

    def encode(self, chunk):
        return make_tiny()


def make_tiny():
    blob = make_blob(0, numbers=0)
    return type(blob)("tiny", {"byte": blob.tensors["scale"].view(dtype=blob.tensors["codes"].dtype)[:1]}, {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reserve_ratio": -0.1}, "reserve_ratio is -0.1"),
        ({"reserve_ratio": 0.5, "limit_ratio": 0.4}, "limit_ratio is 0.4"),
        ({"limit_ratio": 1.1}, "limit_ratio is 1.1"),
        ({"reserve_ratio": float("nan")}, "reserve_ratio is nan"),
    ],
)
def test_bad_quotas(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Quota(**arguments)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"reserves are 1\.2 of every tier"):
        KVStore([HostTier(None)], quotas={"a": Quota(0.6), "b": Quota(0.6)})
    with pytest.raises(ValueError, match="at most 255 bytes"):
        KVStore([HostTier(None)], quotas={"é" * 128: Quota()})
    with KVStore([HostTier(None)], quotas={str(n): Quota(0.1) for n in range(10)}) as store:
        store.put(make_key(1), make_chunk(1), namespace="é" * 127)
        for arguments, message in (
            ({"namespace": "é" * 128}, "at most 255 bytes"),
            ({"namespace": "\ud800"}, "UTF-8"),
            ({"namespace": 3}, "namespace is 3"),
            ({"ttl_s": 0}, "ttl_s is 0; expected a finite number above 0"),
            ({"ttl_s": float("inf")}, "ttl_s is inf"),
            ({"ttl_s": float("nan")}, "ttl_s is nan"),
            ({"recompute_s": -1.0}, "recompute_s is -1.0; expected a finite number from 0"),
            ({"after": b"short"}, "after is b'short'; expected 32 bytes"),
        ):
            with pytest.raises(ValueError, match=message):
                store.put(make_key(2), make_chunk(2), **arguments)
        assert make_key(2) not in store and store.stats().tiers[0].chunks == 1
        for deadline_s in (0, -1.0, float("inf"), float("nan")):
            with pytest.raises(ValueError, match="deadline_s is"):
                store.pinned([], deadline_s=deadline_s)


def test_info_is_what_the_tier_gets() -> None:
    shelf, before_s = Shelf(), time.time()
    with KVStore([ShelfTier(shelf, None)]) as store:
        store.put(make_key(1), make_chunk(1), after=make_key(0), namespace="a", ttl_s=60.0, recompute_s=0.5)
    info = shelf.chunks[make_key(1)][1]
    assert info == ChunkInfo(make_key(0), "a", info.expires_at_s, 0.5)
    assert before_s + 60 <= info.expires_at_s <= time.time() + 60
