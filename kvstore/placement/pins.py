"""Which chunks must stay, and until when."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Iterable

from ...core import ChunkKey


class Pins:
    """Pins, counted for every key; guarded by the lock of `Books`.

    A pin belongs to a hold, and ends with it: when it is released or when its deadline has passed, whatever is first.

    Attributes
    ----------
    overdue : holds that their deadline ended before they were released.
    """

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._holds: dict[int, tuple[ChunkKey, ...]] = {}
        self._counts: Counter[ChunkKey] = Counter()
        self._deadlines: list[tuple[float, int]] = []  # a heap, with holds released since
        self.overdue = 0

    def __len__(self) -> int:
        """Different keys."""
        return len(self._counts)

    def __contains__(self, key: object) -> bool:
        return key in self._counts

    def hold(self, keys: Iterable[ChunkKey], deadline_s: float | None) -> int:
        """Pins `keys` until `deadline_s` (a time of the store's clock), or without end; the number of the hold."""
        number = next(self._numbers)
        self._holds[number] = tuple(keys)
        self._counts.update(self._holds[number])
        if deadline_s is not None:
            heapq.heappush(self._deadlines, (deadline_s, number))
            if len(self._deadlines) > 2 * len(self._holds) + 64:
                self._deadlines = [entry for entry in self._deadlines if entry[1] in self._holds]
                heapq.heapify(self._deadlines)
        return number

    def release(self, number: int) -> None:
        """Ends a hold; nothing if its deadline has ended it."""
        for key in self._holds.pop(number, ()):
            self._counts[key] -= 1
            if not self._counts[key]:
                del self._counts[key]

    def lapse(self, now_s: float) -> None:
        """Ends the holds whose deadline has passed."""
        while self._deadlines and self._deadlines[0][0] <= now_s:
            _, number = heapq.heappop(self._deadlines)
            if number in self._holds:
                self.overdue += 1
                self.release(number)

    def check(self) -> list[str]:
        held = Counter(key for keys in self._holds.values() for key in keys)
        return [
            f"chunk {key.hex()} has {self._counts.get(key, 0)} pins, {held[key]} are held"
            for key in held.keys() | self._counts.keys()
            if self._counts.get(key, 0) != held[key]
        ]
