"""What a tier can do beyond `core.Tier`, and the store asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from ..core import ChunkKey, EncodedChunk, Entry


@runtime_checkable
class ReadsLayers(Protocol):
    """Optional capability of a tier: it reads some layers of a chunk alone."""

    def get_layers(self, key: ChunkKey, start: int, stop: int) -> EncodedChunk | None:
        """Layers `[start, stop)` of a chunk, verified; errors as `Tier.get`."""
        ...


@runtime_checkable
class MayStall(Protocol):
    """Optional capability of a tier: its methods wait for a device or a network, which may never answer.

    The store wraps such a tier in a `GuardedTier`, which gives up in time. The tier's properties are answered from
    memory all the same.
    """

    @property
    def may_stall(self) -> bool:
        """True; a class attribute will do."""
        ...


class HoldsChunks(Protocol):
    """The reading part of a tier."""

    def get(self, key: ChunkKey) -> EncodedChunk | None: ...


class NonBlockingReader(HoldsChunks, Protocol):
    """Reads what a tier has in memory, by the tier's own methods (`get`, and `get_layers` if it has that).

    Raises `BlockingIOError` where it would have to wait for a device, a lock or another process, and where there is
    more to do than to read: for a chunk that is absent or damaged, for instance.
    """

    def has_changes(self) -> bool:
        """False only if `ReportsChanges.changes` would return nothing."""
        ...


@runtime_checkable
class ReadsCached(Protocol):
    """Optional capability of a tier that may stall: what it has in memory can be read without waiting."""

    @property
    def cached(self) -> NonBlockingReader: ...


@runtime_checkable
class ReportsChanges(Protocol):
    """Optional capability of a tier: other processes write to it, too."""

    def changes(self) -> list[Entry | ChunkKey]:
        """What others put (an entry) or removed (its key) since the last call, in order; microseconds if nothing."""
        ...


@runtime_checkable
class FindsChunks(Protocol):
    """Optional capability of a tier: others write to it, and it can only be asked for chunks that are wanted.

    Attributes
    ----------
    recheck_s : a chunk that it did not have is not asked for again within this time.
    """

    @property
    def recheck_s(self) -> float: ...
    def find(self, keys: Sequence[ChunkKey]) -> list[Entry | None]:
        """What it holds of each key, in few exchanges for all; reads no payload."""
        ...


@runtime_checkable
class CountsItself(Protocol):
    """Optional capability of a tier: it counts what only it can see."""

    @property
    def counts(self) -> Mapping[str, int]:
        """By field of `TierStats`; microseconds."""
        ...


@runtime_checkable
class ChecksItself(Protocol):
    """Optional capability of a tier: finding its own inconsistencies."""

    def check(self) -> list[str]:
        """What is inconsistent, in words; empty if all is well."""
        ...
