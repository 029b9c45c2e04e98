"""Who may evict others: chunks that are used only once need not push out those that are used again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Protocol, runtime_checkable

from ...core import ChunkKey
from .policy import chosen


@runtime_checkable
class AdmissionPolicy(Protocol):
    """Says for one tier whether a new chunk is worth the eviction of another. Needs no lock of its own."""

    def admit(self, key: ChunkKey, nbytes: int) -> bool:
        """Whether `key` may evict others.

        It is told of every chunk that is new to the tier; its answer counts only if the chunk does not fit otherwise.
        A chunk that was read meanwhile in another tier (promoted, or demoted after a read) is not asked for.
        """
        ...


class Always:
    """Every chunk may evict others."""

    def admit(self, key: ChunkKey, nbytes: int) -> bool:
        return True


class SecondUse:
    """Only a chunk that was put before, not long ago, may evict others.

    A chunk that nobody asks for again passes by; one that is computed a second time stays from then on. Keys are
    remembered by 8 of their bytes in two generations, of which the older is forgotten at once: a collision admits a
    chunk early, nothing worse.

    Parameters
    ----------
    most_keys : remembered at most, and at least half as many of the last; about 100 bytes each.

    Notes
    -----
    The doorkeeper of Einziger, Friedman & Manes, TinyLFU: a highly efficient cache admission policy, ACM ToS 2017.
    Deviation: sets of hashes instead of a Bloom filter, generations instead of a reset.
    """

    def __init__(self, *, most_keys: int = 1 << 16) -> None:
        if most_keys < 2:
            raise ValueError(f"most_keys is {most_keys}; expected at least 2")
        self._most_keys = most_keys
        self._young: set[int] = set()
        self._old: set[int] = set()

    def admit(self, key: ChunkKey, nbytes: int) -> bool:
        name = int.from_bytes(key[-8:], "little")
        known = name in self._young or name in self._old
        self._young.add(name)
        if 2 * len(self._young) >= self._most_keys:
            self._young, self._old = set(), self._young
        return known


ADMISSIONS: Mapping[str, Callable[[], AdmissionPolicy]] = MappingProxyType({"always": Always, "second-use": SecondUse})
"""Admission policies by name."""


def admission_factory(admission: str | Callable[[], AdmissionPolicy]) -> Callable[[], AdmissionPolicy]:
    """What makes the admission policies of a store, from a name in `ADMISSIONS`; a callable is taken as it is."""
    return chosen("admission", admission, ADMISSIONS, "an AdmissionPolicy")
