"""The allocator of ranges against a plain list of them."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvloom.kvstore.tiers.arena import ALIGNMENT_BYTES, Arena, aligned

CAPACITY_BYTES = 40 * ALIGNMENT_BYTES


class ArenaMachine(RuleBasedStateMachine):
    """`taken` holds what the arena should: offset and rounded bytes of each range."""

    def __init__(self) -> None:
        super().__init__()
        self.arena = Arena(CAPACITY_BYTES + 7)
        self.taken: dict[int, int] = {}

    def gaps(self, without: int | None = None) -> list[tuple[int, int]]:
        """(bytes, offset) of every largest stretch that no range but `without` touches."""
        found, end = [], 0
        for offset, nbytes in [*sorted(self.taken.items()), (CAPACITY_BYTES, 0)]:
            if offset == without:
                continue
            if offset > end:
                found.append((offset - end, end))
            end = offset + nbytes
        return sorted(found)

    def expected(self, nbytes: int) -> int | None:
        """Best fit, the lowest of equals."""
        return next((offset for gap_bytes, offset in self.gaps() if gap_bytes >= nbytes), None)

    @rule(nbytes=st.integers(1, 12 * ALIGNMENT_BYTES))
    def allocate(self, nbytes: int) -> None:
        expected = self.expected(aligned(nbytes))
        offset = self.arena.allocate(nbytes)
        assert offset == expected
        if offset is not None:
            self.taken[offset] = aligned(nbytes)

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        offset = data.draw(st.sampled_from(sorted(self.taken)))
        self.arena.release(offset)
        del self.taken[offset]

    @precondition(lambda self: self.taken)
    @rule(data=st.data(), nbytes=st.integers(1, 20 * ALIGNMENT_BYTES))
    def exchange(self, data: st.DataObject, nbytes: int) -> None:
        offset = data.draw(st.sampled_from(sorted(self.taken)))
        fits = any(gap_bytes >= aligned(nbytes) for gap_bytes, _ in self.gaps(without=offset))
        before = self.arena.taken
        found = self.arena.exchange(offset, nbytes)
        assert (found is not None) == fits
        if found is None:
            assert self.arena.taken == before
            return
        del self.taken[offset]
        assert found == self.expected(aligned(nbytes))
        self.taken[found] = aligned(nbytes)

    @invariant()
    def agrees(self) -> None:
        assert self.arena.taken == self.taken and self.arena.check() == []
        assert self.arena.used_bytes == sum(self.taken.values())
        ends = [0, *(offset + nbytes for offset, nbytes in sorted(self.taken.items()))]
        assert all(end <= offset for end, offset in zip(ends, [*sorted(self.taken), CAPACITY_BYTES], strict=True))
        assert all(offset % ALIGNMENT_BYTES == 0 for offset in self.taken)
        assert self.arena.largest_free_bytes == max((gap_bytes for gap_bytes, _ in self.gaps()), default=0)

    def teardown(self) -> None:
        for offset in list(self.taken):
            self.arena.release(offset)
        assert self.arena.used_bytes == 0 and self.arena.largest_free_bytes == CAPACITY_BYTES
        assert self.arena.allocate(CAPACITY_BYTES) == 0


TestArena = ArenaMachine.TestCase


@given(st.integers(0, 5000))
def test_rounding(nbytes: int) -> None:
    assert 0 <= aligned(nbytes) - nbytes < ALIGNMENT_BYTES and aligned(nbytes) % ALIGNMENT_BYTES == 0


def test_release_in_any_order_leaves_one_range() -> None:
    for seed in range(20):
        arena = Arena(CAPACITY_BYTES)
        offsets = [arena.allocate(1) for _ in range(40)]
        assert None not in offsets and arena.allocate(1) is None and arena.largest_free_bytes == 0
        random.Random(seed).shuffle(offsets)
        for offset in offsets:
            arena.release(offset)
        assert arena.allocate(CAPACITY_BYTES) == 0


def test_refuses_nonsense() -> None:
    arena = Arena(CAPACITY_BYTES)
    for call in (
        lambda: Arena(-1),
        lambda: arena.allocate(0),
        lambda: arena.release(0),
        lambda: arena.exchange(ALIGNMENT_BYTES, 1),
    ):
        with pytest.raises(ValueError, match=r"is -1|is 0|is 256"):
            call()
    assert arena.allocate(1) == 0
    with pytest.raises(ValueError, match="offset is 256"):
        arena.release(ALIGNMENT_BYTES)
    assert Arena(ALIGNMENT_BYTES - 1).allocate(1) is None


@pytest.mark.parametrize("damage", ["taken", "free", "used", "joined"])
def test_check_finds_damage(damage: str) -> None:
    arena = Arena(CAPACITY_BYTES)
    offsets = [arena.allocate(1000) for _ in range(3)]
    arena.release(offsets[1])
    assert arena.check() == []
    match damage:
        case "taken":
            arena._taken[offsets[0]] += ALIGNMENT_BYTES
        case "free":
            arena._free.pop()
        case "used":
            arena._used_bytes += 1
        case "joined":
            del arena._taken[offsets[0]]
            arena._add(offsets[0], offsets[1])
    assert arena.check() != []
