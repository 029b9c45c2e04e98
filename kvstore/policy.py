"""What goes when a tier is full. A tier holds bytes, a policy orders victims; the books ask it under their lock."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Protocol, runtime_checkable

from ..core import ChunkKey
from .density import HitDensity
from .queues import GDSF, LRU, S3FIFO, PrefixLRU


@runtime_checkable
class EvictionPolicy(Protocol):
    """Orders the chunks of one room of a tier. Needs no lock of its own; every call is O(log n) or less, pins aside.

    `Level` keeps the books: it calls `touch` and `remove` only for keys that were added and not removed since, and
    pins are its business.
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
    {"default": HitDensity, "lru": LRU, "prefix-lru": PrefixLRU, "s3-fifo": S3FIFO, "gdsf": GDSF}
)
"""Policies by name. `kvloom simulate` compares them on a recorded trace."""


def policy_factory(policy: str | Callable[[], EvictionPolicy]) -> Callable[[], EvictionPolicy]:
    """What makes the policies of a store, from a name in `POLICIES`; a callable is taken as it is."""
    if not isinstance(policy, str):
        return policy
    if policy not in POLICIES:
        raise ValueError(
            f"policy is {policy!r}; expected one of {', '.join(POLICIES)}, or what makes an EvictionPolicy"
        )
    return POLICIES[policy]
