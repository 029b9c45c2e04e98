"""Which blocks are told of, by what the workers say of chunks; without an engine."""

from types import SimpleNamespace

import pytest

from kvloom.connectors.serving.messages import Load, StepPlan
from kvloom.connectors.vllm.events import KVEvents, Residence, Residences, StoredBlocks
from kvloom.kvstore.placement.catalog import PlacementChange as Move

BLOCKS = StoredBlocks((b"b1", b"b2"), b"b0", (1, 2, 3, 4), (None, None))
KEYS = (b"k0", b"k1")


def told(residences: Residences) -> list[tuple[str, bool]]:
    found = residences.take()
    assert all(each == Residence(BLOCKS, each.tier, each.is_there) for each in found)
    return [(each.tier, each.is_there) for each in found]


def test_a_chunk_is_there_when_all_ranks_have_it_in_that_tier() -> None:
    residences = Residences()
    residences.describe(KEYS, BLOCKS)
    residences.apply([Move(b"k0", "host", True), Move(b"k1", "disk", True), Move(b"unknown", "host", True)])
    assert told(residences) == []
    residences.apply([Move(b"k1", "host", True), Move(b"k1", "host", True)])
    assert told(residences) == [("host", True)]
    residences.apply([Move(b"k0", "host", False), Move(b"k1", "host", False), Move(b"k0", "disk", True)])
    assert told(residences) == [("host", False), ("disk", True)]


def test_what_left_all_tiers_is_forgotten() -> None:
    residences = Residences()
    residences.describe(KEYS, BLOCKS)
    residences.apply([Move(key, "host", True) for key in KEYS] + [Move(key, "host", False) for key in KEYS])
    assert told(residences) == [("host", True), ("host", False)]
    residences.apply([Move(key, "host", True) for key in KEYS])
    assert told(residences) == [], "its blocks are not known any more"
    residences.describe(KEYS, BLOCKS)
    residences.apply([Move(key, "", False) for key in KEYS])
    residences.apply([Move(key, "host", True) for key in KEYS])
    assert told(residences) == [], "it was not stored"


def test_a_reset_removes_everything() -> None:
    residences = Residences()
    residences.describe(KEYS, BLOCKS)
    residences.apply([Move(key, "host", True) for key in KEYS] + [Move(KEYS[0], "disk", True)])
    residences.take()
    residences.clear()
    assert told(residences) == [("host", False)]
    residences.apply([Move(key, "host", False) for key in KEYS])
    assert told(residences) == []


def test_chunks_are_described_however_they_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What another engine stored is told of when a request here loads it: in the background, or within its step."""
    load = Load("r", ((b"k0",),), 0, 0, 8, (1, 2))
    for plan in (StepPlan(loads=[load]), StepPlan(layer_loads=[load])):
        events, described = (
            KVEvents(4, 8, {"r": SimpleNamespace(request_id="r")}),
            list[tuple[tuple[bytes, ...], int]](),
        )
        monkeypatch.setattr(
            events, "_describe", lambda _, keys, start, described=described: described.append((keys, start))
        )
        events.describe(plan)
        assert described == [((b"k0",), 0)]
