"""Which ranges of a buffer are taken. Address-ordered best fit; free neighbours are joined at once."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping
from types import MappingProxyType

ALIGNMENT_BYTES = 256  # of a range and of each tensor in it: what kernels load widest, and what CUDA allocates by


def aligned(nbytes: int) -> int:
    """The least multiple of `ALIGNMENT_BYTES` that is not below `nbytes`."""
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


class Arena:
    """Hands out ranges `[offset, offset + nbytes)` of a buffer that it never touches.

    The smallest free range that is large enough is cut from its start; of equals, the lowest. Both methods that change
    something take O(log n) comparisons in n free ranges, and move up to n entries of a list, which is some
    microseconds for 10,000. Not for several threads: the owner has a lock.

    Any request up to `capacity_bytes` fits once all ranges are released, because they then are one.

    Parameters
    ----------
    capacity_bytes : of the buffer; a rest below `ALIGNMENT_BYTES` stays unused.
    taken : bytes of ranges that are taken from the start, by offset: those of an arena whose last change was cut short.
    """

    # A taken range [a, b) is in `_taken`, as _taken[a] = b - a; whoever allocated it owns it.
    # A free one is in `_free`, `_stops` and `_starts`, as (b - a, a), _stops[a] = b and _starts[b] = a.

    def __init__(self, capacity_bytes: int, taken: Mapping[int, int] = MappingProxyType({})) -> None:
        if capacity_bytes < 0:
            raise ValueError(f"capacity_bytes is {capacity_bytes}; expected 0 or more")
        self.capacity_bytes = capacity_bytes // ALIGNMENT_BYTES * ALIGNMENT_BYTES
        self._taken = dict(sorted(taken.items()))
        self._used_bytes = sum(self._taken.values())
        self._free: list[tuple[int, int]] = []  # (bytes, offset), sorted
        self._stops: dict[int, int] = {}
        self._starts: dict[int, int] = {}
        end = 0
        for start, nbytes in (*self._taken.items(), (self.capacity_bytes, 0)):
            if start > end:
                self._add(end, start)
            end = start + nbytes

    @property
    def used_bytes(self) -> int:
        """Of all taken ranges, as rounded up."""
        return self._used_bytes

    @property
    def largest_free_bytes(self) -> int:
        return self._free[-1][0] if self._free else 0

    @property
    def taken(self) -> dict[int, int]:
        """A copy: bytes of each taken range by its offset."""
        return dict(self._taken)

    def allocate(self, nbytes: int) -> int | None:
        """Takes a range of `nbytes`, at least 1, rounded up to the alignment; its offset, or None if none is so large.

        Raises
        ------
        ValueError : `nbytes` is below 1.
        """
        if nbytes < 1:
            raise ValueError(f"nbytes is {nbytes}; expected at least 1")
        nbytes = aligned(nbytes)
        smallest = bisect_left(self._free, (nbytes, 0))
        if smallest == len(self._free):
            return None
        free_bytes, offset = self._free[smallest]
        self._cut(offset, offset + free_bytes)
        if free_bytes > nbytes:
            self._add(offset + nbytes, offset + free_bytes)
        self._taken[offset] = nbytes
        self._used_bytes += nbytes
        return offset

    def release(self, offset: int) -> None:
        """Makes a taken range free.

        Raises
        ------
        ValueError : no taken range begins at `offset`.
        """
        start, stop = self._gap_without(offset)
        nbytes = self._taken.pop(offset)
        self._used_bytes -= nbytes
        if start < offset:
            self._cut(start, offset)
        if stop > offset + nbytes:
            self._cut(offset + nbytes, stop)
        self._add(start, stop)

    def exchange(self, offset: int, nbytes: int) -> int | None:
        """Releases a taken range and takes one of `nbytes`, which may lie where that was.

        None if that does not fit even then; nothing has changed in that case. Errors as `allocate` and `release`.
        """
        start, stop = self._gap_without(offset)
        if max(self.largest_free_bytes, stop - start) < aligned(nbytes):
            return None
        self.release(offset)
        return self.allocate(nbytes)

    def check(self) -> list[str]:
        """What is inconsistent, in words; empty if all is well."""
        ranges = sorted(
            [(offset, offset + nbytes, True) for offset, nbytes in self._taken.items()]
            + [(offset, offset + nbytes, False) for nbytes, offset in self._free]
        )
        problems, end, taken = [], 0, True
        for start, stop, is_taken in ranges:
            if start != end:
                problems.append(f"the range before {start} ends at {end}")
            if not (taken or is_taken):
                problems.append(f"the free ranges that meet at {start} are not joined")
            end, taken = stop, is_taken
        if end != self.capacity_bytes:
            problems.append(f"ranges end at {end}, the arena at {self.capacity_bytes}")
        if sum(self._taken.values()) != self._used_bytes:
            problems.append(f"ranges take {sum(self._taken.values())} bytes, {self._used_bytes} are accounted")
        if self._free != sorted(self._free) or {(stop - start, start) for start, stop in self._stops.items()} != set(
            self._free
        ):
            problems.append("the lists of free ranges contradict one another")
        return problems

    def _gap_without(self, offset: int) -> tuple[int, int]:
        """The free range that would be there if the taken one at `offset` were not."""
        if offset not in self._taken:
            raise ValueError(f"offset is {offset}; no taken range begins there")
        stop = offset + self._taken[offset]
        return self._starts.get(offset, offset), self._stops.get(stop, stop)

    def _add(self, start: int, stop: int) -> None:
        insort(self._free, (stop - start, start))
        self._stops[start] = stop
        self._starts[stop] = start

    def _cut(self, start: int, stop: int) -> None:
        del self._free[bisect_left(self._free, (stop - start, start))]
        del self._stops[start]
        del self._starts[stop]
