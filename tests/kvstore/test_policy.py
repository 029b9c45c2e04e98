"""Eviction policies: what each evicts, against a naive copy of its rule; and what the store makes of them."""

import itertools
import math
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom.core import ChunkKey
from kvloom.errors import TierFullError
from kvloom.kvstore.eviction.learned import HitDensity, age_bucket, hit_density
from kvloom.kvstore.eviction.lru import LRU, PrefixLRU
from kvloom.kvstore.eviction.policy import POLICIES, EvictionPolicy, policy_factory
from kvloom.kvstore.store import KVStore
from kvloom.kvstore.tiers.disk.tier import DiskTier
from kvloom.kvstore.tiers.host import HostTier
from kvloom.testing import PolicyContract, make_chunk, make_key

from ..support.fakes import filled
from ..support.policies import ACTIONS, Action, MayGo, act_on_both, evict
from .test_store import CHUNK_BYTES, FILE_BYTES, FailingTier


class TestLRU(PolicyContract):
    make_policy = LRU


class TestPrefixLRU(PolicyContract):
    make_policy = PrefixLRU


class TestHitDensity(PolicyContract):
    make_policy = HitDensity


def test_every_policy_has_its_contract_tested() -> None:
    tested = {getattr(value, "make_policy", None) for value in globals().values() if isinstance(value, type)}
    assert set(POLICIES.values()) <= tested


class NaiveLRU:
    """Also by leaves; every rule below is written for reading, and scans all it holds."""

    def __init__(self, *, leaves_first: bool) -> None:
        self.leaves_first = leaves_first
        self.order: list[ChunkKey] = []
        self.after: dict[ChunkKey, ChunkKey | None] = {}

    def add(self, key: ChunkKey, nbytes: int, after: ChunkKey | None, recompute_s: float | None) -> None:
        if key in self.order:
            self.touch(key)
        else:
            self.order.append(key)
            self.after[key] = after

    def touch(self, key: ChunkKey) -> None:
        self.order.remove(key)
        self.order.append(key)

    def remove(self, key: ChunkKey, *, evicted: bool) -> None:
        self.order.remove(key)
        del self.after[key]

    def victim(self, may_go: MayGo) -> ChunkKey | None:
        free = [key for key in self.order if may_go(key)]
        leaves = [key for key in free if key not in self.after.values()] if self.leaves_first else []
        return next(iter(leaves + free), None)


PAIRS: dict[str, tuple[Callable[[], EvictionPolicy], Callable[[], object]]] = {
    "lru": (LRU, lambda: NaiveLRU(leaves_first=False)),
    "prefix-lru": (PrefixLRU, lambda: NaiveLRU(leaves_first=True)),
    "density without a history": (HitDensity, lambda: NaiveLRU(leaves_first=True)),
}


@pytest.mark.parametrize("name", PAIRS)
@given(actions=st.lists(ACTIONS, max_size=60))
@settings(max_examples=60, deadline=None)
def test_evicts_what_the_naive_rule_does(name: str, actions: list[Action]) -> None:
    make, make_naive = PAIRS[name]
    act_on_both(make(), make_naive(), actions)


def test_densities_are_the_best_over_all_horizons() -> None:
    random_numbers = np.random.default_rng(0)
    hits, ends = random_numbers.integers(0, 5, (2, 3, 80)).astype(float)
    starts = [0.0, 1, 2, 3] + [(4 + i % 4) << (i // 4) for i in range(76)]
    widths = [b - a for a, b in itertools.pairwise(starts)] + [starts[-1] / 4]
    found = hit_density(hits, ends)
    for kind in range(3):
        for first in (0, 1, 17, 50, 79):
            best = 0.0
            for last in range(first, 80):
                gained = sum(hits[kind, first : last + 1])
                time = 0.0
                for age in range(first, last + 1):
                    alive = sum(hits[kind, age:]) + sum(ends[kind, age:])
                    later = sum(hits[kind, age + 1 :]) + sum(ends[kind, age + 1 :])
                    time += widths[age] * (alive + later) / 2
                best = max(best, gained / time if time else 0.0)
            assert math.isclose(found[kind, first], best, rel_tol=1e-9)
    assert not hit_density(np.zeros((1, 80)), np.zeros((1, 80))).any()


def test_age_buckets_are_in_order_and_a_quarter_octave_wide() -> None:
    buckets = [age_bucket(age) for age in range(5000)]
    assert buckets[:8] == list(range(8)) and all(0 <= b - a <= 1 for a, b in itertools.pairwise(buckets))
    assert buckets.count(age_bucket(4096 - 1)) == 2048 // 4 and age_bucket(1 << 60) == 79


def hits_of(policy: EvictionPolicy, references: list[ChunkKey], capacity: int) -> int:
    held: set[ChunkKey] = set()
    hits = 0
    for key in references:
        if key in held:
            hits += 1
            policy.touch(key)
            continue
        if len(held) == capacity:
            held.remove(evict(policy))
        policy.add(key, 100)
        held.add(key)
    return hits


def test_density_learns_a_loop_that_defeats_lru() -> None:
    loop = [make_key(n % 300) for n in range(12_000)]
    assert hits_of(LRU(), loop, 200) == 0
    best = 12_000 * 199 // 299  # Belady on a loop
    assert hits_of(HitDensity(), loop, 200) > 0.6 * best


@pytest.mark.slow
def test_density_forgets_when_habits_change() -> None:
    """First what was used once never returns and the rest does; then it is the other way round."""
    draw = random.Random(1)
    recent = [make_key(draw.randrange(60)) if n % 2 else make_key(1000 + n) for n in range(8000)]
    loop = [make_key(10**6 + n % 150) for n in range(40_000)]
    alone, after = hits_of(HitDensity(), loop, 100), hits_of(HitDensity(), recent + loop, 100)
    assert alone > 10_000 and after - hits_of(HitDensity(), recent, 100) > 0.6 * alone


def test_density_is_never_far_below_lru_where_lru_is_right() -> None:
    """References by stack distance: the more recent, the likelier."""
    draw = random.Random(2)
    stack = [make_key(n) for n in range(2000)]
    references = []
    for _ in range(12_000):
        key = stack.pop(min(int(draw.expovariate(1 / 150)), len(stack) - 1))
        stack.insert(0, key)
        references.append(key)
    assert hits_of(HitDensity(), references, 200) > 0.97 * hits_of(LRU(), references, 200) > 5000


def test_few_old_returns_do_not_make_all_old_chunks_dear() -> None:
    """One of a thousand chunks came back very late: no reason to keep every old chunk rather than fresh ones."""
    policy = HitDensity()
    policy._hits[0, age_bucket(600)] += 50
    policy._ends[0, age_bucket(2000)] += 950
    policy._hits[0, age_bucket(5000)] += 1
    policy._fit()
    young, late = policy._density[0][age_bucket(1)], policy._density[0][age_bucket(4096)]
    assert 0 < late < 2 * young < 2 * 50 / (1000 * 400)


def test_density_memory_is_bounded() -> None:
    policy = HitDensity()
    for n in range(3000):
        policy.add(make_key(n), 100)
        if n >= 50:
            evict(policy)
    assert len(policy._ghosts) <= 4 * (50 + 1) and sum(policy._waiting.values()) == 50 + len(policy._ghosts)
    assert len(policy._leaves) == len(policy._held) == 50
    assert [record.place for record in policy._leaves] == list(range(50))


def test_equal_calls_give_equal_victims() -> None:
    references = [make_key(random.Random(n).randrange(400)) for n in range(5000)]
    assert hits_of(HitDensity(), references, 150) == hits_of(HitDensity(), references, 150) > 0


def put_chain(store: KVStore, numbers: range) -> None:
    for number in numbers:
        store.put(make_key(number), make_chunk(number), after=make_key(number - 1) if number > numbers[0] else None)


@pytest.mark.parametrize("policy", POLICIES)
def test_store_respects_pins_and_its_catalog_is_right(policy: str) -> None:
    with KVStore([HostTier(3 * CHUNK_BYTES)], policy=policy) as store:
        put_chain(store, range(3))
        with store.pinned([make_key(0), make_key(2)]):
            for number in range(3, 12):
                store.put(make_key(number), make_chunk(number))
                assert make_key(0) in store and make_key(2) in store and make_key(number) in store
        with store.pinned([make_key(0), make_key(2), make_key(11)]), pytest.raises(TierFullError):
            store.put(make_key(12), make_chunk(12))
        assert store.check() == [] and store.stats().tiers[0].evictions == 9


@pytest.mark.parametrize("policy", ["default", "prefix-lru"])
def test_store_evicts_leaves_before_their_prefixes(policy: str) -> None:
    with KVStore([HostTier(6 * CHUNK_BYTES)], policy=policy) as store:
        put_chain(store, range(4))
        for number in (3, 2, 1):  # the prefix is the least recently used
            store.get(make_key(number))
        for count, number in enumerate(range(10, 15), 1):
            store.put(make_key(number), make_chunk(number))
            if count > 2:
                assert store.match([make_key(n) for n in range(4)]) == 4 - (count - 2)
                assert sum(make_key(n) in store for n in range(4)) == 4 - (count - 2)


def test_store_without_the_hint_strands_chunks() -> None:
    with KVStore([HostTier(4 * CHUNK_BYTES)], policy="lru") as store:
        put_chain(store, range(4))
        store.put(make_key(10), make_chunk(10))
        assert store.match([make_key(n) for n in range(4)]) == 0 and make_key(3) in store


@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_continued_goes_last_of_all(policy: str) -> None:
    with KVStore([HostTier(2 * CHUNK_BYTES)], policy=policy) as store:
        for number in range(5):
            store.put(make_key(number), make_chunk(number), after=make_key(number - 1) if number else None)
            assert not number or make_key(number - 1) in store
    with KVStore([HostTier(CHUNK_BYTES)], policy=policy) as store:  # but it goes rather than that the store refuses
        put_chain(store, range(2))
        assert store.locate(make_key(1)) == "host" and make_key(0) not in store


def test_order_survives_promotion(tmp_path: Path) -> None:
    with KVStore([HostTier(3 * CHUNK_BYTES), DiskTier(tmp_path)], policy="prefix-lru") as store:
        put_chain(store, range(2))
        for number in range(10, 13):
            store.put(make_key(number), make_chunk(number))
        assert store.locate(make_key(0)) == store.locate(make_key(1)) == "disk"
        store.get(make_key(0)), store.get(make_key(1))
        store.put(make_key(13), make_chunk(13))
        store.put(make_key(14), make_chunk(14))
        assert store.locate(make_key(0)) == "host" and store.locate(make_key(1)) == "disk"


class CountingLRU(LRU):
    """Counts reads."""

    def __init__(self) -> None:
        super().__init__()
        self.touched: list[ChunkKey] = []

    def touch(self, key: ChunkKey) -> None:
        self.touched.append(key)
        super().touch(key)


def test_layers_count_as_one_use_and_demotion_as_none() -> None:
    made: list[CountingLRU] = []

    def make() -> CountingLRU:
        made.append(CountingLRU())
        return made[-1]

    below = HostTier(None, name="below")
    with KVStore([filled(HostTier(CHUNK_BYTES), 0), below], policy=make) as store:
        for layer in range(3):
            store.get(make_key(0), layers=(layer, layer + 1))
        store.match([make_key(0)])
        assert len(made) == 2 and made[0].touched == [make_key(0)]
        store.put(make_key(1), make_chunk(1))
        assert store.locate(make_key(0)) == "below" and made[0].touched == [make_key(0)] and made[1].touched == []


def test_a_failed_delete_changes_nothing() -> None:
    node = FailingTier(2 * CHUNK_BYTES, name="node")
    with KVStore([node]) as store:
        put_chain(store, range(2))
        node.failing = True
        with pytest.raises(ConnectionError):
            store.delete(make_key(0))
        node.failing = False
        assert make_key(0) in store and store.check() == []
        store.put(make_key(2), make_chunk(2))
        assert store.check() == [] and store.stats().tiers[0].evictions == 1


def test_policies_take_over_what_a_tier_holds(tmp_path: Path) -> None:
    for policy in POLICIES:
        with KVStore([DiskTier(tmp_path / policy, 3 * FILE_BYTES)], policy=policy) as store:
            put_chain(store, range(3))
        with KVStore([DiskTier(tmp_path / policy, 3 * FILE_BYTES)], policy=policy) as store:
            store.put(make_key(3), make_chunk(3))
            assert store.check() == [] and store.stats().tiers[0].chunks == 3 and make_key(3) in store


def test_policy_by_name_or_factory() -> None:
    assert policy_factory("lru") is LRU and policy_factory(PrefixLRU) is PrefixLRU
    with pytest.raises(ValueError, match="policy is 'fifo'; expected one of default, lru"):
        KVStore([HostTier(None)], policy="fifo")
