"""What goes when a tier is full. A tier holds bytes, a policy orders victims; the books ask it under their lock."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Protocol, TypeVar, runtime_checkable

from ...core import ChunkKey
from .learned import HitDensity
from .queues import GDSF, LRU, S3FIFO, PrefixLRU

T = TypeVar("T")


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
    return chosen("policy", policy, POLICIES, "an EvictionPolicy")


def chosen(
    what: str, choice: str | Callable[[], T], known: Mapping[str, Callable[[], T]], kind: str
) -> Callable[[], T]:
    """A maker of `kind` from its name; a callable is taken as it is.

    Raises
    ------
    ValueError : no such name is known.
    """
    if not isinstance(choice, str):
        return choice
    if choice not in known:
        raise ValueError(f"{what} is {choice!r}; expected one of {', '.join(known)}, or what makes {kind}")
    return known[choice]
