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
from kvloom.kvstore.eviction.policy import POLICIES, EvictionPolicy, policy_factory
from kvloom.kvstore.eviction.queues import GDSF, LRU, S3FIFO, PrefixLRU
from kvloom.kvstore.store import KVStore
from kvloom.kvstore.tiers.disk.tier import DiskTier
from kvloom.kvstore.tiers.host import HostTier
from kvloom.testing import PolicyContract, make_chunk, make_key

from .test_store import CHUNK_BYTES, FILE_BYTES, FailingTier

KEYS = [make_key(n) for n in range(8)]
MayGo = Callable[[ChunkKey], bool]


class TestLRU(PolicyContract):
    make_policy = LRU


class TestPrefixLRU(PolicyContract):
    make_policy = PrefixLRU


class TestS3FIFO(PolicyContract):
    make_policy = S3FIFO


class TestGDSF(PolicyContract):
    make_policy = GDSF


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


class NaiveGDSF:
    def __init__(self) -> None:
        self.measured: list[tuple[float, int]] = []
        self.floor = 0.0
        self.entries: dict[ChunkKey, list[float]] = {}  # priority, time, uses, worth
        self.time = 0

    def add(self, key: ChunkKey, nbytes: int, after: ChunkKey | None, recompute_s: float | None) -> None:
        worth = 1.0
        if recompute_s is not None:
            self.measured.append((recompute_s, nbytes))
            worth = recompute_s / nbytes * sum(n for _, n in self.measured) / sum(s for s, _ in self.measured)
        uses = self.entries[key][2] if key in self.entries else 0
        self.entries[key] = [0.0, 0.0, uses, worth]
        self.touch(key)

    def touch(self, key: ChunkKey) -> None:
        self.time += 1
        _, _, uses, worth = self.entries[key]
        self.entries[key] = [self.floor + (uses + 1) * worth, self.time, uses + 1, worth]

    def remove(self, key: ChunkKey, *, evicted: bool) -> None:
        priority = self.entries.pop(key)[0]
        if evicted:
            self.floor = max(self.floor, priority)

    def victim(self, may_go: MayGo) -> ChunkKey | None:
        return min((key for key in self.entries if may_go(key)), key=lambda key: self.entries[key][:2], default=None)


class NaiveS3FIFO:
    """Algorithm 1 of the paper on lists of [key, uses]; what may not go is passed over and stays in its place."""

    def __init__(self) -> None:
        self.small: list[list] = []
        self.main: list[list] = []
        self.ghosts: list[ChunkKey] = []

    def add(self, key: ChunkKey, nbytes: int, after: ChunkKey | None, recompute_s: float | None) -> None:
        if any(entry[0] == key for entry in self.small + self.main):
            self.touch(key)
        elif key in self.ghosts:
            self.ghosts.remove(key)
            self.main.append([key, 0])
        else:
            self.small.append([key, 0])

    def touch(self, key: ChunkKey) -> None:
        for entry in self.small + self.main:
            if entry[0] == key:
                entry[1] = min(entry[1] + 1, 3)

    def remove(self, key: ChunkKey, *, evicted: bool) -> None:
        if evicted and any(entry[0] == key for entry in self.small):
            self.ghosts.append(key)
        self.small = [entry for entry in self.small if entry[0] != key]
        self.main = [entry for entry in self.main if entry[0] != key]
        del self.ghosts[: max(0, len(self.ghosts) - len(self.small) - len(self.main) - 1)]

    def victim(self, may_go: MayGo) -> ChunkKey | None:
        passed: list[ChunkKey] = []  # as if they were not there
        while True:
            small = [entry for entry in self.small if entry[0] not in passed]
            main = [entry for entry in self.main if entry[0] not in passed]
            if not small and not main:
                return None
            if not main or 10 * len(small) >= len(small) + len(main):
                entry = small[0]
                if entry[1] > 1:
                    self.small.remove(entry)
                    self.main.append([entry[0], 0])
                    continue
            else:
                entry = main[0]
                if entry[1] > 0:
                    self.main.remove(entry)
                    self.main.append([entry[0], entry[1] - 1])
                    continue
            if may_go(entry[0]):
                return entry[0]
            passed.append(entry[0])


def cost_s(number: int) -> float | None:
    """Measured for two chunks in three; whole numbers, so that sums are exact."""
    return None if number % 3 == 0 else float(1 << number)


PAIRS: dict[str, tuple[Callable[[], EvictionPolicy], Callable[[], object]]] = {
    "lru": (LRU, lambda: NaiveLRU(leaves_first=False)),
    "prefix-lru": (PrefixLRU, lambda: NaiveLRU(leaves_first=True)),
    "density without a history": (HitDensity, lambda: NaiveLRU(leaves_first=True)),
    "gdsf": (GDSF, NaiveGDSF),
    "s3-fifo": (S3FIFO, NaiveS3FIFO),
}
ACTIONS = st.tuples(
    st.sampled_from(["add", "add", "touch", "evict", "evict", "remove"]),
    st.integers(0, 7),
    st.one_of(st.none(), st.integers(0, 7)),
    st.frozensets(st.integers(0, 7), max_size=4),
)


@pytest.mark.parametrize("name", PAIRS)
@given(actions=st.lists(ACTIONS, max_size=60))
@settings(max_examples=60, deadline=None)
def test_evicts_what_the_naive_rule_does(name: str, actions: list[tuple]) -> None:
    make, make_naive = PAIRS[name]
    policy, naive = make(), make_naive()
    held: set[ChunkKey] = set()
    for action, number, parent, blocked in actions:
        key, after = KEYS[number], None if parent is None else KEYS[parent]
        if action == "add":
            held.add(key)
            for one in (policy, naive):
                one.add(key, 100 + number, after, cost_s(number))
        elif action == "evict":
            may_go = {KEYS[n] for n in range(8) if n not in blocked}.__contains__
            victim = policy.victim(may_go)
            assert victim == naive.victim(may_go)
            assert (victim is None) == (not any(map(may_go, held)))
            if victim is not None:
                held.remove(victim)
                for one in (policy, naive):
                    one.remove(victim, evicted=True)
        elif key in held:
            for one in (policy, naive):
                if action == "touch":
                    one.touch(key)
                else:
                    one.remove(key, evicted=False)
            held -= {key} if action == "remove" else set()


def fill(policy: EvictionPolicy, keys: list[ChunkKey]) -> None:
    for key in keys:
        policy.add(key, 100)


def evict(policy: EvictionPolicy) -> ChunkKey:
    victim = policy.victim(lambda _: True)
    policy.remove(victim, evicted=True)
    return victim


def test_s3_fifo_remembers_whom_it_turned_away() -> None:
    policy = S3FIFO()
    fill(policy, KEYS[:6])
    assert evict(policy) == KEYS[0]
    policy.add(KEYS[0], 100)  # its key was in the ghost queue: straight into the main queue
    assert [evict(policy) for _ in range(6)] == [*KEYS[1:6], KEYS[0]]
    policy = S3FIFO()
    fill(policy, KEYS[:6])
    policy.remove(KEYS[0])  # deleted, not turned away: it starts anew
    policy.add(KEYS[0], 100)
    policy.touch(KEYS[1]), policy.touch(KEYS[1]), policy.touch(KEYS[2])
    assert [evict(policy) for _ in range(6)] == [KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[0], KEYS[1]]


def test_s3_fifo_ghosts_are_forgotten() -> None:
    policy = S3FIFO()
    fill(policy, KEYS[:3])
    gone = [evict(policy) for _ in range(3)]
    assert gone == KEYS[:3] and len(policy._ghosts) <= 1


def test_gdsf_keeps_what_is_dear_until_it_is_old() -> None:
    policy = GDSF()
    for number in range(50):  # so many of ordinary cost that the dear one hardly moves the mean
        policy.add(make_key(100 + number), 100, None, 1.0)
    policy.add(KEYS[0], 100, None, 5.0)
    for number in range(50):
        policy.remove(make_key(100 + number))
    order = []
    for _ in range(3):  # each round of uses raises what the dear one must beat
        fill(policy, KEYS[1:4])
        for key in KEYS[1:4]:
            policy.touch(key)
        order += [evict(policy) for _ in range(3)]
    assert KEYS[0] in order and order.index(KEYS[0]) >= 3


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


def test_density_memory_is_bounded() -> None:
    policy = HitDensity()
    for n in range(3000):
        policy.add(make_key(n), 100)
        if n >= 50:
            evict(policy)
    assert len(policy._ghosts) <= 4 * (50 + 1) and sum(policy._waiting.values()) == 50 + len(policy._ghosts)
    assert len(policy._leaves) == len(policy._place) == len(policy._held) == 50


def test_equal_calls_give_equal_victims() -> None:
    references = [make_key(random.Random(n).randrange(400)) for n in range(5000)]
    assert hits_of(HitDensity(), references, 150) == hits_of(HitDensity(), references, 150) > 0


def put_chain(store: KVStore, numbers: range) -> None:
    for number in numbers:
        store.put(make_key(number), make_chunk(number), after=make_key(number - 1) if number > numbers[0] else None)


@pytest.mark.parametrize("policy", POLICIES)
def test_store_respects_pins_and_keeps_its_books(policy: str) -> None:
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
    with KVStore([HostTier(CHUNK_BYTES), below], policy=make, write_through=False) as store:
        store.put(make_key(0), make_chunk(0))
        for layer in range(3):
            store.get(make_key(0), layers=(layer, layer + 1))
        store.match([make_key(0)])
        assert len(made) == 2 and made[0].touched == [make_key(0)]
        store.put(make_key(1), make_chunk(1))
        assert store.locate(make_key(0)) == "below" and made[0].touched == [make_key(0)] and made[1].touched == []


def test_failed_delete_keeps_the_books() -> None:
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
    assert policy_factory("lru") is LRU and policy_factory(S3FIFO) is S3FIFO
    with pytest.raises(ValueError, match="policy is 'fifo'; expected one of default, lru"):
        KVStore([HostTier(None)], policy="fifo")
