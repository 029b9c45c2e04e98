"""What a tier needs of an engine that keeps bytes by name on other machines."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ....errors import TierTimeoutError
from ...format import Container


@dataclass(frozen=True, slots=True)
class Found:
    """An object that is there.

    Attributes
    ----------
    nbytes : its length.
    head : its first bytes, as many as were asked for; None if the engine cannot give them without the rest.
    """

    nbytes: int
    head: bytes | None


@dataclass(frozen=True, slots=True)
class Arriving:
    """An object whose bytes come one after the other.

    Attributes
    ----------
    data : `[n]` uint8, where they come to lie.
    until : returns when the first bytes, as many as it is told, are there.
    """

    data: Tensor
    until: Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Outgoing:
    """An object to be stored: a record and a container."""

    record: bytes
    container: Container

    @property
    def nbytes(self) -> int:
        return len(self.record) + self.container.nbytes

    def parts(self) -> list[memoryview]:
        """Its bytes where they are, for a client that takes them from there."""
        return [memoryview(self.record), *self.container.buffers()]

    def copy_into(self, target: memoryview) -> None:
        """Fills `nbytes` of memory that the engine's client reads."""
        target[: len(self.record)] = self.record
        self.container.copy_into(target[len(self.record) :])


class ByteStore(Protocol):
    """An engine, through its own client. Every method may be called from any thread.

    Each maps what its client raises to `TierUnavailableError`, `TierTimeoutError`, `TierFullError` (for `put`) or
    `ChunkUnreachableError` (for reads), and waits for no longer than its own timeout.

    Attributes
    ----------
    lends : what `reading` gives lies in memory that the engine gets back when the last view of it is gone, and that is
        scarce.
    counts : fields of `TierStats` that only the engine's client can count.
    """

    lends: bool

    @property
    def counts(self) -> Mapping[str, int]: ...

    def put(self, name: str, outgoing: Outgoing, expires_at_s: float | None) -> None:
        """Stores one object in place of any other of its name; it is visible whole or not at all.

        Parameters
        ----------
        expires_at_s : Unix time from which on the engine may remove it by itself; None for never.
        """
        ...

    def reading(self, name: str, nbytes: int | None) -> AbstractContextManager[Arriving | None]:
        """The object, whose bytes may be looked at while others are under way; None if there is none.

        `nbytes` is how long it was when it was last heard of. `until` is called within the `with` alone.
        """
        ...

    def get_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> Sequence[memoryview] | None:
        """The bytes `[start, stop)` of each range, in one exchange; fewer at its end. None if there is no object."""
        ...

    def delete(self, name: str) -> bool:
        """Whether it was there."""
        ...

    def find(self, names: Sequence[str], head_bytes: int) -> list[Found | None]:
        """Which of the objects are there, in few exchanges for all."""
        ...

    def close(self) -> None:
        """Repeated calls do nothing."""
        ...


class BytesInFlight:
    """Bounds what moves at a time. Every method may be called from any thread.

    Parameters
    ----------
    limit_bytes : of all transfers together; a larger one moves alone.
    timeout_s : how long a transfer waits for its turn.
    """

    def __init__(self, limit_bytes: int, timeout_s: float) -> None:
        self._limit_bytes = limit_bytes
        self._timeout_s = timeout_s
        self._changed = threading.Condition()
        self._moving_bytes = 0

    @contextmanager
    def moving(self, nbytes: int) -> Iterator[None]:
        """Raises `TierTimeoutError` if there is no turn in time."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._has_turn(nbytes), self._timeout_s):
                raise TierTimeoutError(
                    f"{nbytes} bytes were not moved: {self._moving_bytes} of {self._limit_bytes} are under way",
                    begun=False,
                )
            self._moving_bytes += nbytes
        try:
            yield
        finally:
            with self._changed:
                self._moving_bytes -= nbytes
                self._changed.notify_all()

    def _has_turn(self, nbytes: int) -> bool:
        return not self._moving_bytes or self._moving_bytes + nbytes <= self._limit_bytes
