"""Policies that only `kvloom simulate` knows: what each evicts, against a naive copy of its rule."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom.bench.eviction.policies import GDSF, PGDSF, S3FIFO, SIMULATED_POLICIES, PrefixARC
from kvloom.core import ChunkKey
from kvloom.kvstore.eviction.policy import POLICIES, EvictionPolicy
from kvloom.testing import PolicyContract, make_key

from ...support.policies import ACTIONS, KEYS, Action, MayGo, act_on_both, evict, fill


class TestS3FIFO(PolicyContract):
    make_policy = S3FIFO


class TestGDSF(PolicyContract):
    make_policy = GDSF


class TestPrefixARC(PolicyContract):
    make_policy = PrefixARC


class TestPGDSF(PolicyContract):
    make_policy = PGDSF


def test_every_policy_has_its_contract_tested() -> None:
    assert set(SIMULATED_POLICIES.values()) - set(POLICIES.values()) == {S3FIFO, GDSF, PGDSF, PrefixARC}


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


class NaivePGDSF(NaiveGDSF):
    def __init__(self) -> None:
        super().__init__()
        self.after: dict[ChunkKey, ChunkKey | None] = {}

    def add(self, key: ChunkKey, nbytes: int, after: ChunkKey | None, recompute_s: float | None) -> None:
        if key not in self.entries:
            self.after[key] = after
        super().add(key, nbytes, after, recompute_s)

    def remove(self, key: ChunkKey, *, evicted: bool) -> None:
        del self.after[key]
        super().remove(key, evicted=evicted)

    def victim(self, may_go: MayGo) -> ChunkKey | None:
        leaf = super().victim(lambda key: may_go(key) and key not in self.after.values())
        return leaf or super().victim(may_go)


class NaivePrefixARC:
    """Lists of keys, least recently used first, and of keys gone, oldest first."""

    def __init__(self) -> None:
        self.lists: tuple[list[ChunkKey], list[ChunkKey]] = ([], [])
        self.gone: tuple[list[ChunkKey], list[ChunkKey]] = ([], [])
        self.after: dict[ChunkKey, ChunkKey | None] = {}
        self.time: list[ChunkKey] = []
        self.share = 0.0

    def add(self, key: ChunkKey, nbytes: int, after: ChunkKey | None, recompute_s: float | None) -> None:
        if key in self.after:
            self.touch(key)
            return
        once, again = map(len, self.gone)
        which = 1 if key in self.gone[0] + self.gone[1] else 0
        if key in self.gone[0]:
            self.share = min(len(self.after) + 1, self.share + max(1, again / once))
            self.gone[0].remove(key)
        elif key in self.gone[1]:
            self.share = max(0, self.share - max(1, once / again))
            self.gone[1].remove(key)
        self.after[key] = after
        self.lists[which].append(key)
        self.time.append(key)

    def touch(self, key: ChunkKey) -> None:
        self._drop(key)
        self.lists[1].append(key)
        self.time.append(key)

    def remove(self, key: ChunkKey, *, evicted: bool) -> None:
        which = self._drop(key)
        del self.after[key]
        if evicted:
            self.gone[which].append(key)
        for gone in self.gone:
            del gone[: max(0, len(gone) - len(self.after) - 1)]

    def victim(self, may_go: MayGo) -> ChunkKey | None:
        once, again = self.lists
        ordered = once + again if len(once) > self.share else again + once
        leaves = [key for key in ordered if may_go(key) and key not in self.after.values()]
        return next(iter([*leaves, *filter(may_go, self.time)]), None)

    def _drop(self, key: ChunkKey) -> int:
        which = 0 if key in self.lists[0] else 1
        self.lists[which].remove(key)
        self.time.remove(key)
        return which


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


PAIRS: dict[str, tuple[Callable[[], EvictionPolicy], Callable[[], object]]] = {
    "gdsf": (GDSF, NaiveGDSF),
    "pgdsf": (PGDSF, NaivePGDSF),
    "prefix-arc": (PrefixARC, NaivePrefixARC),
    "s3-fifo": (S3FIFO, NaiveS3FIFO),
}


@pytest.mark.parametrize("name", PAIRS)
@given(actions=st.lists(ACTIONS, max_size=60))
@settings(max_examples=60, deadline=None)
def test_evicts_what_the_naive_rule_does(name: str, actions: list[Action]) -> None:
    make, make_naive = PAIRS[name]
    act_on_both(make(), make_naive(), actions)


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
