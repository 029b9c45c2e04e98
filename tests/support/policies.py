"""Eviction policies driven beside naive copies of their rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from hypothesis import strategies as st

from kvloom.core import ChunkKey
from kvloom.kvstore.eviction.policy import EvictionPolicy
from kvloom.testing import make_key

KEYS = [make_key(n) for n in range(8)]
MayGo: TypeAlias = Callable[[ChunkKey], bool]
Action: TypeAlias = tuple[str, int, int | None, frozenset[int]]
ACTIONS = st.tuples(
    st.sampled_from(["add", "add", "touch", "evict", "evict", "remove"]),
    st.integers(0, 7),
    st.one_of(st.none(), st.integers(0, 7)),
    st.frozensets(st.integers(0, 7), max_size=4),
)


def cost_s(number: int) -> float | None:
    """Measured for two chunks in three; whole numbers, so that sums are exact."""
    return None if number % 3 == 0 else float(1 << number)


def act_on_both(policy: EvictionPolicy, naive: Any, actions: list[Action]) -> None:
    """Both name the same victims."""
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
