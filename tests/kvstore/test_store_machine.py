"""KVStore with everything that may happen to it, against a dictionary and a fake clock."""

from contextlib import AbstractContextManager
from dataclasses import dataclass

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvloom.compress.raw import RawCodec
from kvloom.core import ChunkInfo, ChunkKey, KVChunk
from kvloom.errors import TierFullError, TierUnavailableError
from kvloom.kvstore.guard.guarded_tier import GuardedTier
from kvloom.kvstore.placement.quota import Quota
from kvloom.kvstore.store import KVStore
from kvloom.testing import make_chunk, make_key, same_chunk

from ..support.fakes import HEADER_BYTES, Clock, SharedShelfTier, Shelf, ShelfTier, assert_adds_up

NUMBERS = st.integers(0, 9)
NAMESPACES = ("", "a", "b", "c")
QUOTAS = {"a": Quota(0.3, 0.6), "b": Quota(0.4), "c": Quota(0.0, 0.5)}
TAKEN_BYTES = RawCodec().encode(make_chunk(0)).nbytes + HEADER_BYTES


@dataclass
class Known:
    """What the store was told last of a chunk."""

    chunk: KVChunk
    namespace: str
    expires_at_s: float  # at the latest, where a copy may be left that could not be reached
    sure_until_s: float


class FullStoreMachine(RuleBasedStateMachine):
    """The store may forget, but not what is pinned, and what it returns is right and not expired.

    Every shelf is asked by name of the tier; the lower one is shared with another process, and may be guarded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.clock, self.monotonic = Clock(), Clock()
        self.shelf = Shelf()
        self.model: dict[ChunkKey, Known] = {}
        self.pins: list[tuple[list[ChunkKey], float, AbstractContextManager[None]]] = []
        self.kept: set[ChunkKey] = set()  # pinned and stored after the last step
        self.acting: set[str] = set()  # namespaces whose chunks the last step was about
        self.before: dict[str, int] = {}  # bytes of namespaces in the first tier before it

    @initialize(
        chunks=st.sampled_from([(4, 6), (6, 4)]),
        with_quotas=st.booleans(),
        policy=st.sampled_from(["default", "lru", "prefix-lru"]),
        is_guarded=st.sampled_from([False, False, True]),
    )
    def begin(self, chunks: tuple[int, int], with_quotas: bool, policy: str, is_guarded: bool) -> None:
        """`chunks`: that the first and the second tier hold."""
        self.host_bytes, self.disk_bytes = (number * TAKEN_BYTES for number in chunks)
        self.is_guarded = is_guarded
        self.quotas = QUOTAS if with_quotas else {}
        self.options = {
            "policy": policy,
            "quotas": self.quotas,
            "clock": self.clock,
            "monotonic": self.monotonic,
        }
        self.open()

    def open(self) -> None:
        self.host = ShelfTier(Shelf(), self.host_bytes, name="host")
        self.disk = SharedShelfTier(self.shelf, self.disk_bytes, name="disk")
        self.other = ShelfTier(self.shelf, self.disk_bytes, name="of another process")
        self.disk.may_stall = self.is_guarded
        self.store = KVStore([self.host, self.disk], **self.options)
        assert isinstance(self.store.tiers[1], GuardedTier) == self.is_guarded

    def teardown(self) -> None:
        if hasattr(self, "store"):
            while self.pins:
                self.unpin()
            assert self.store.stats().pinned == 0
            self.store.close()

    def namespace(self, key: ChunkKey) -> set[str]:
        return {self.model[key].namespace} if key in self.model else set()

    @rule(
        number=NUMBERS,
        namespace=st.sampled_from(NAMESPACES),
        ttl_s=st.sampled_from([None, None, 5.0, 20.0]),
        parent=st.none() | NUMBERS,
    )
    def put(self, number: int, namespace: str, ttl_s: float | None, parent: int | None) -> None:
        key, chunk = make_key(number), make_chunk(number, tokens=(5, 5, 9)[number % 3])
        self.acting = self.namespace(key) | {namespace}
        after = None if parent is None else make_key(parent)
        try:
            self.store.put(key, chunk, namespace=namespace, ttl_s=ttl_s, after=after)
        except (TierFullError, TierUnavailableError):
            assert self.pins or self.quotas or self.disk.failing  # otherwise there is always room
        else:
            expires_at_s = float("inf") if ttl_s is None else self.clock.now_s + ttl_s
            left = self.disk.failing and key in self.disk
            latest_s = max(expires_at_s, self.model[key].expires_at_s) if left else expires_at_s
            self.model[key] = Known(chunk, namespace, latest_s, expires_at_s)
            assert key in self.store

    @rule(number=NUMBERS)
    def get(self, number: int) -> None:
        key = make_key(number)
        self.acting = self.namespace(key)
        where, found = self.store.locate(key), self.store.get(key)
        if found is not None:
            assert where is not None and same_chunk(found, self.model[key].chunk)
        else:
            assert where is None or (where == "disk" and self.disk.failing)

    @rule(number=NUMBERS, layer=st.integers(0, 2))
    def get_layers(self, number: int, layer: int) -> None:
        key = make_key(number)
        self.acting = self.namespace(key)
        where, found = self.store.locate(key), self.store.get(key, layers=(layer, layer + 1))
        if found is not None:
            assert where is not None and torch.equal(found.values[0], self.model[key].chunk.values[layer])
        else:
            assert where is None or (where == "disk" and self.disk.failing)

    @rule(number=NUMBERS)
    def prefetch(self, number: int) -> None:
        self.acting = self.namespace(make_key(number))
        in_first = self.store.prefetch([make_key(number)]).result(10)
        assert in_first == (self.store.locate(make_key(number)) == "host")

    @rule(number=NUMBERS)
    def delete(self, number: int) -> None:
        key = make_key(number)
        self.acting = self.namespace(key)
        stored = key in self.store
        try:
            deleted = self.store.delete(key)
        except TierUnavailableError:
            assert self.disk.failing
        else:
            assert deleted or not stored
            assert key not in self.store and key not in self.host
        self.kept.discard(key)

    @rule(number=NUMBERS)
    def corrupt(self, number: int) -> None:
        key = make_key(number)
        self.acting = self.namespace(key)
        if self.store.locate(key) != "disk" or self.disk.failing:
            return
        self.shelf.corrupt.add(key)
        before = self.store.stats()
        assert self.store.get(key) is None and key not in self.store
        after = self.store.stats()
        assert after.tiers[1].corruptions == before.tiers[1].corruptions + 1
        assert after.misses["corrupt"] == before.misses.get("corrupt", 0) + 1
        self.kept.discard(key)

    @rule(seconds=st.sampled_from([1.0, 4.0, 30.0]))
    def wait(self, seconds: float) -> None:
        self.acting = set()
        self.clock.now_s += seconds

    @precondition(lambda self: len(self.pins) < 3)
    @rule(chosen=st.lists(NUMBERS, max_size=3), deadline_s=st.sampled_from([None, 3.0, 10.0]))
    def pin(self, chosen: list[int], deadline_s: float | None) -> None:
        keys = [make_key(number) for number in chosen]
        context = self.store.pinned(keys, deadline_s=deadline_s)
        context.__enter__()
        until_s = float("inf") if deadline_s is None else self.clock.now_s + deadline_s
        self.pins.append((keys, until_s, context))

    @precondition(lambda self: self.pins)
    @rule()
    def unpin(self) -> None:
        self.pins.pop(0)[2].__exit__(None, None, None)

    @rule(failing=st.booleans())
    def fail(self, failing: bool) -> None:
        self.disk.failing = failing
        if not failing:
            self.monotonic.now_s += 31.0  # it is asked again at once

    @rule(number=NUMBERS)
    def another_process_puts(self, number: int) -> None:
        key, chunk = make_key(number), make_chunk(number, tokens=(5, 5, 9)[number % 3])
        self.acting = self.namespace(key) | {""}
        try:
            self.other.put(key, RawCodec().encode(chunk), ChunkInfo())
        except TierFullError:
            return
        if key not in self.host:
            self.model[key] = Known(chunk, "", float("inf"), float("inf"))
            assert key in self.store or self.disk.failing
        else:  # the copy in the host is still what the last put of this process said
            self.model[key].expires_at_s = float("inf")
            self.kept.discard(key)

    @rule(number=NUMBERS)
    def another_process_deletes(self, number: int) -> None:
        key = make_key(number)
        self.acting = self.namespace(key)
        self.other.delete(key)
        if not self.disk.failing:
            assert self.store.locate(key) in ("host", None)
        self.kept.discard(key)

    @precondition(lambda self: not self.pins and not self.disk.failing)
    @rule()
    def reopen(self) -> None:
        self.acting = set(NAMESPACES)
        on_disk = {key for key in map(make_key, range(10)) if key in self.disk and self.alive(key)}
        self.store.close()
        self.open()
        assert on_disk <= self.stored

    def alive(self, key: ChunkKey) -> bool:
        return self.disk.shelf.chunks[key][1].expires_at_s is None or (
            self.disk.shelf.chunks[key][1].expires_at_s > self.clock.now_s
        )

    @property
    def stored(self) -> set[ChunkKey]:
        return {key for key in map(make_key, range(10)) if key in self.store}

    @invariant()
    def all_is_in_order(self) -> None:
        if not hasattr(self, "store"):
            return
        stats = self.store.stats()
        if not self.disk.failing:
            assert self.store.check() == []
            stats = self.store.stats()
            assert all(tier.held_bytes == tier.used_bytes <= tier.capacity_bytes for tier in stats.tiers)
        assert_adds_up(stats)
        now_s = self.clock.now_s
        alive = {key for key, known in self.model.items() if known.expires_at_s > now_s}
        sure = {key for key, known in self.model.items() if known.sure_until_s > now_s}
        pinned = {key for keys, until_s, _ in self.pins if until_s > now_s for key in keys}
        assert stats.pinned == len(pinned)
        assert self.stored <= alive
        if not (self.is_guarded and self.disk.failing):  # what cannot be had is not found
            assert self.kept & sure & pinned <= self.stored
        assert self.store.match(sorted(self.stored)) == len(self.stored)
        self.kept = {key for key in self.stored & pinned if key in self.host or key in self.disk}
        self.check_quotas(stats.tiers[0].namespace_bytes)

    def check_quotas(self, now: dict[str, int]) -> None:
        for name, quota in self.quotas.items():
            capacity_bytes = self.host.capacity_bytes
            excess_bytes = now.get(name, 0) - quota.limit_ratio * capacity_bytes
            assert excess_bytes <= (HEADER_BYTES if self.pins else 0)
            may_expire = any(k.namespace == name and k.sure_until_s < float("inf") for k in self.model.values())
            if name not in self.acting and not may_expire:
                reserve_bytes = quota.reserve_ratio * capacity_bytes
                assert now.get(name, 0) >= min(self.before.get(name, 0), reserve_bytes)
        self.before = dict(now)


TestFullStoreMachine = pytest.mark.slow(FullStoreMachine.TestCase)
TestFullStoreMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
