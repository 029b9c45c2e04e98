"""What goes when a tier is full: a tier holds bytes, a policy orders victims; the catalog asks it under its lock."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Protocol, runtime_checkable

from ...core import ChunkKey
from .learned import HitDensity
from .lru import LRU, PrefixLRU


@runtime_checkable
class EvictionPolicy(Protocol):
    """Orders the chunks of one quota group of a tier. Needs no lock; every call is O(log n) or less, pins aside.

    `TierState` calls `touch` and `remove` only for keys that were added and not removed since, and says which chunks
    may go.
    """

    def add(self, key: ChunkKey, nbytes: int, after: ChunkKey | None = None, recompute_s: float | None = None) -> None:
        """`key` was written, for the first time or again.

        Parameters
        ----------
        nbytes : what it takes in the tier.
        after : the chunk that it continues, held or not; None if it continues none, or that is unknown.
        recompute_s : seconds that computing it took; None if that was not measured.
        """
        ...

    def touch(self, key: ChunkKey) -> None:
        """`key` was read."""
        ...

    def remove(self, key: ChunkKey, *, evicted: bool = False) -> None:
        """`key` is gone: for space, or deleted, corrupt or lost."""
        ...

    def victim(self, may_go: Callable[[ChunkKey], bool]) -> ChunkKey | None:
        """The chunk to evict next among those that may go; None if none may. It stays until `remove`."""
        ...


POLICIES: Mapping[str, Callable[[], EvictionPolicy]] = MappingProxyType(
    {"default": HitDensity, "lru": LRU, "prefix-lru": PrefixLRU}
)
"""Policies by name. `kvloom simulate` compares them, and some that are not shipped, on a recorded trace."""


def policy_factory(policy: str | Callable[[], EvictionPolicy]) -> Callable[[], EvictionPolicy]:
    """What makes the policies of a store, from a name in `POLICIES`; a callable is taken as it is.

    Raises
    ------
    ValueError : no such name is known.
    """
    if not isinstance(policy, str):
        return policy
    if policy not in POLICIES:
        raise ValueError(
            f"policy is {policy!r}; expected one of {', '.join(POLICIES)}, or what makes an EvictionPolicy"
        )
    return POLICIES[policy]
