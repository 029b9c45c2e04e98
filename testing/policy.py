"""What every eviction policy must do."""

from __future__ import annotations

import random

import pytest

from ..core import ChunkKey
from ..kvstore.eviction.policy import EvictionPolicy
from .chunks import make_key


class PolicyContract:
    """Subclasses give `make_policy()`."""

    def make_policy(self) -> EvictionPolicy:
        """A policy without chunks."""
        raise NotImplementedError

    @pytest.fixture
    def policy(self) -> EvictionPolicy:
        return self.make_policy()

    def test_is_a_policy(self, policy: EvictionPolicy) -> None:
        assert isinstance(policy, EvictionPolicy)
        assert policy.victim(lambda _: True) is None

    def test_asking_changes_nothing_that_is_held(self, policy: EvictionPolicy) -> None:
        policy.add(make_key(1), 100)
        assert policy.victim(lambda _: False) is None
        assert policy.victim(lambda _: True) == policy.victim(lambda _: True) == make_key(1)

    @pytest.mark.parametrize("seed", range(3))
    def test_every_key_goes_exactly_once(self, policy: EvictionPolicy, seed: int) -> None:
        draw = random.Random(seed)
        held: set[ChunkKey] = set()
        for step in range(6000):
            key = make_key(draw.randrange(400))
            if key not in held or draw.random() < 0.1:
                policy.add(key, 100, draw.choice([None, make_key(draw.randrange(400))]))
                held.add(key)
            elif draw.random() < 0.1:
                policy.remove(key)
                held.remove(key)
            else:
                policy.touch(key)
            if len(held) > 100:
                pinned = set(draw.sample(sorted(held), 5))
                victim = policy.victim(lambda key: key not in pinned)  # noqa: B023
                assert victim is not None and victim in held - pinned, step
                policy.remove(victim, evicted=True)
                held.remove(victim)
        last = draw.choice(sorted(held))
        assert policy.victim(lambda key: key == last) == last
        while held:
            victim = policy.victim(lambda _: True)
            assert victim is not None
            held.remove(victim)
            policy.remove(victim, evicted=draw.random() < 0.5)
        assert policy.victim(lambda _: True) is None
