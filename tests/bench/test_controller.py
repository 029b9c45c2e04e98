"""`kvloom bench controller` without engines: how often cells are measured, and what is made of their times."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from kvloom.bench.controller.situations import situation
from kvloom.bench.controller.sweep import ALWAYS, AUTO, NEVER, WAYS, Cell, Rounds, Sweep, p99_ratio, throughput_ratio
from kvloom.bench.vllm.inputs import Prompts
from kvloom.bench.vllm.server import Served


class MadeUp:
    """An engine that takes `token_s` for each token of a prompt."""

    def __init__(self, name: str, token_s: float) -> None:
        self.name, self.token_s, self.asked = name, token_s, 0
        self.choice, self.chosen = "auto", list[tuple[str, bool]]()

    def reset(self) -> None:
        pass

    def choose(self, load_or_recompute: str) -> None:
        self.choice = load_or_recompute

    def generate(self, prompts: Sequence[Sequence[int]], options: Mapping[str, Any]) -> Served:
        self.asked += 1
        loads = bool(options.get("load", True))
        self.chosen.append((self.choice, loads))
        each = tuple(len(prompt) * self.token_s * (1.0 if loads else 3.0) for prompt in prompts)
        usage = tuple({"decision": "loads", "loaded_tokens": {"host": len(prompt) - 32}} for prompt in prompts)
        return Served(sum(each), 0.0, ((1,),) * len(each), (0,) * len(each), usage, first_s=each)


def test_short_cells_are_measured_more_often() -> None:
    engine = MadeUp("auto", 1e-4)
    texts, done = [[1] * 4096] * 4, []
    sweep = Sweep("host", engine, texts, Prompts(100, (), seed=0))  # type: ignore[arg-type]
    cells = sweep.measure([256, 1024, 4096], [4], Rounds(least=3, most=15, seconds=4.0), lambda: done.append(1))
    rounds = [len(cell.total_s[AUTO]) for cell in cells]
    seconds = [sum(sum(each) for each in cell.total_s.values()) for cell in cells]
    assert rounds == [7, 3, 3] and len(done) == 3
    assert seconds[0] >= 4.0 and seconds[0] - sum(cells[0].total_s[way][0] for way in WAYS) < 4.0
    assert engine.asked == 3 * (sum(rounds) + 3), "and a round that does not count"
    ways = [("always", True), ("auto", False), ("auto", True)]
    assert {way: engine.chosen.count(way) for way in ways} == dict.fromkeys(ways, sum(rounds) + 3)
    assert all(cell.ratio == pytest.approx(1.0) and cell.best_fixed == ALWAYS for cell in cells)
    quick = Cell("host", 256, 1)
    assert not quick.is_done(Rounds(1, 1, 0.0))


def test_a_cell_is_compared_with_the_better_way_round_by_round() -> None:
    cell = Cell("disk", 256, 1)
    for always, never, auto in ((1.0, 2.0, 1.1), (2.0, 4.0, 2.0), (3.0, 3.5, 3.6)):
        for way, seconds in ((ALWAYS, always), (NEVER, never), (AUTO, auto)):
            cell.add(way, Served(seconds, 0.0, (), (), ({"decision": "loads"},), first_s=(seconds,)))
    assert (cell.best_fixed, cell.ratio) == (ALWAYS, pytest.approx(1.1))
    assert throughput_ratio([cell]) == pytest.approx(1.0)
    assert p99_ratio([cell]) == pytest.approx(3.57 / 3.99, rel=0.01)
    assert cell.decisions == {"loads": 3}


def test_a_situation_is_right_if_one_is_told_so_and_none_is_told_wrong() -> None:
    def told(*words: str) -> Served:
        return Served(0.0, 0.0, (), (), tuple({"decision": word} for word in words))

    assert situation("queue", told("loads", "load queue"), ["load queue"], also=["loads"]).is_right
    assert not situation("queue", told("loads"), ["load queue"], also=["loads"]).is_right
    assert not situation("queue", told("load queue", "slow tier"), ["load queue"], also=["loads"]).is_right
