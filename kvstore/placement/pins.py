"""Which chunks must stay, and until when."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, deque

from ...core import ChunkKey


class Pins:
    """Pins, counted for every key; guarded by the lock of `Catalog`.

    A pin belongs to a hold, and ends with it: when it is released or when its deadline has passed, whatever is first.

    Attributes
    ----------
    overdue : holds that their deadline ended before they were released.
    numbers : gives the number of the next hold; needs no lock.
    dropped : numbers of holds whose owner is gone; filled without the lock, and released by `end_overdue`.
    """

    def __init__(self) -> None:
        self.overdue = 0
        self.numbers = itertools.count()
        self.dropped: deque[int] = deque()
        self._holds: dict[int, tuple[ChunkKey, ...]] = {}
        self._counts: Counter[ChunkKey] = Counter()
        self._deadlines: list[tuple[float, int]] = []  # a heap, with holds released since

    def __len__(self) -> int:
        """Different keys."""
        return len(self._counts)

    def __contains__(self, key: object) -> bool:
        return key in self._counts

    def hold(self, number: int, keys: tuple[ChunkKey, ...], deadline_s: float | None) -> None:
        """Pin `keys` until `deadline_s` (a time of the store's clock), or without end."""
        self._holds[number] = keys
        self._counts.update(keys)
        if deadline_s is not None:
            heapq.heappush(self._deadlines, (deadline_s, number))
            if len(self._deadlines) > 2 * len(self._holds) + 64:
                self._deadlines = [entry for entry in self._deadlines if entry[1] in self._holds]
                heapq.heapify(self._deadlines)

    def release(self, number: int) -> None:
        """End a hold; nothing if it has ended."""
        for key in self._holds.pop(number, ()):
            self._counts[key] -= 1
            if not self._counts[key]:
                del self._counts[key]

    def end_overdue(self, now_s: float) -> None:
        """End the holds whose deadline has passed or whose owner is gone."""
        while self.dropped:
            self.release(self.dropped.popleft())
        while self._deadlines and self._deadlines[0][0] <= now_s:
            _, number = heapq.heappop(self._deadlines)
            if number in self._holds:
                self.overdue += 1
                self.release(number)

    def rebuild(self) -> None:
        """Count again what is held: a change was interrupted."""
        self._counts = Counter(key for keys in self._holds.values() for key in keys)

    def check(self) -> list[str]:
        """What is inconsistent, in words."""
        held = Counter(key for keys in self._holds.values() for key in keys)
        return [
            f"chunk {key.hex()} has {self._counts.get(key, 0)} pins, {held[key]} are held"
            for key in held.keys() | self._counts.keys()
            if self._counts.get(key, 0) != held[key]
        ]
