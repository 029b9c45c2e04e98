"""What `kvloom bench controller` makes of what it measured, without an engine."""

import pytest

from kvloom.bench.controller.situations import Situation
from kvloom.bench.controller.sweep import ALWAYS, AUTO, NEVER, Cell, p99_ratio, throughput_ratio
from kvloom.bench.vllm.server import Served


def cell(always: float, never: float, auto: float) -> Cell:
    found = Cell("disk", 256, 2)
    for way, seconds in ((ALWAYS, always), (NEVER, never), (AUTO, auto)):
        for factor in (1.0, 2.0, 1.0):
            usage = ({"decision": "loads"}, None)
            found.add(way, Served(seconds * factor * 2, 0.0, (), (), usage, first_s=(seconds * factor,) * 2))
    return found


def test_a_cell_is_compared_with_the_better_fixed_way() -> None:
    slow, fast = cell(3.0, 1.0, 1.02), cell(0.5, 1.0, 0.6)
    assert (slow.best_fixed, fast.best_fixed) == (NEVER, ALWAYS)
    assert (slow.ratio, fast.ratio) == (pytest.approx(1.02), pytest.approx(1.2))
    assert slow.decisions == {"loads": 3, "None": 3}
    assert slow.row()["ratio"] == pytest.approx(1.02)
    assert throughput_ratio([slow, fast]) == pytest.approx(2.0 / 1.62), "never, for the whole sweep"
    assert p99_ratio([slow]) == pytest.approx(1.02)


def test_a_situation_is_right_if_some_are_told_so_and_none_otherwise() -> None:
    right, also = frozenset({"load queue"}), frozenset({"loads"})
    assert Situation("q", ("loads", "load queue"), right, also).is_right
    assert not Situation("q", ("loads", "loads"), right, also).is_right
    assert not Situation("q", ("load queue", "slow tier"), right, also).is_right
