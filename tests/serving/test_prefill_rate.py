"""What computing takes the engine, by its steps; and what requests are told that they were saved."""

import pytest

from kvloom.connectors.serving.messages import Loaded, Scheduled, StepReport
from kvloom.connectors.serving.scheduler.planner import Planner
from kvloom.connectors.serving.scheduler.prefill_rate import PrefillRate
from kvloom.connectors.serving.settings import RequestOptions

from .test_planner import Shelf, blocks_for, planner


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_steps_of_prompts_are_timed() -> None:
    clock = Clock()
    pace = PrefillRate(clock)
    assert pace.begin({"writer": 1, "drafter": 5}) == 0
    assert pace.token_s() is None
    number = pace.begin({"r": 200, "writer": 1, "drafter": 49})
    clock.now_s += 5.0
    pace.end(number)
    assert pace.token_s() == pace.token_s("r") == pytest.approx(5.0 / 250)
    clock.now_s += 1000.0  # idle
    number = pace.begin({"r": 100})
    clock.now_s += 4.0
    pace.end(number)
    assert pace.token_s("r") == pytest.approx(0.04)
    assert pace.token_s("another") == pytest.approx((0.9 * 5 + 4) / (0.9 * 250 + 100))
    pace.forget("r")
    assert pace.token_s("r") == pace.token_s()


def test_steps_planned_ahead_are_not_counted_twice() -> None:
    clock = Clock()
    pace = PrefillRate(clock)
    first, second = pace.begin({"a": 100}), pace.begin({"b": 100})
    clock.now_s += 2.0
    pace.end(first)
    clock.now_s += 3.0
    pace.end(0)  # a step of one generated token, without a number
    clock.now_s += 1.0
    pace.end(second)
    assert pace.token_s("a") == pytest.approx(0.02)
    assert pace.token_s("b") == pytest.approx(0.01)


def step(plan: Planner, clock: Clock, name: str, computed: int, new: int, spent_s: float) -> list[float | None]:
    """The costs of what it saves."""
    planned = plan.plan_step([Scheduled(name, computed, blocks_for(computed), new)])
    clock.now_s += spent_s
    plan.apply_report(StepReport(number=planned.number))
    return [save.recompute_s for save in planned.saves]


def test_chunks_are_saved_with_what_they_cost() -> None:
    clock = Clock()
    plan = planner(Shelf(), clock=clock)
    plan.open("r", list(range(128)), b"", RequestOptions())
    assert set(step(plan, clock, "r", 64, 64, 0.64)) == {None}, "nothing was measured before"
    assert step(plan, clock, "r", 128, 64, 1.28) == [pytest.approx(8 * 0.01)] * 8
    plan.open("s", list(range(200, 264)), b"", RequestOptions())
    pace_s = (0.9 * 0.64 + 1.28) / (0.9 * 64 + 64)
    assert step(plan, clock, "s", 64, 64, 1.0) == [pytest.approx(8 * pace_s)] * 8


def test_seconds_saved() -> None:
    """By what the chunks say, else by the engine's pace; less what loading took; unknown rather than guessed."""
    clock = Clock()
    plan = planner(Shelf(), clock=clock)

    def told(*loads: Loaded) -> object:
        plan.open("r", list(range(40)), b"", RequestOptions())
        for loaded in loads:
            plan.apply_report(StepReport(loaded={"r": loaded}))
        usage = plan.close("r")
        assert usage is not None
        return usage["seconds_saved"]

    priced = Loaded({"host": 16}, False, 0.5, 0, recompute_s=2.0)
    silent = Loaded({"disk": 10}, False, 0.5, 0, unpriced_tokens=10)
    assert told() == 0.0
    assert told(priced) == 1.5
    assert told(priced, silent) is None
    plan.open("other", list(range(100, 140)), b"", RequestOptions())
    step(plan, clock, "other", 40, 40, 4.0)
    assert told(silent) == pytest.approx(10 * 0.1 - 0.5)
    assert told(priced, silent) == pytest.approx(2.0)
    plan.take_counts()
    assert told(Loaded({"host": 16}, False, 3.0, 0, recompute_s=2.0)) == pytest.approx(-1.0)
    assert plan.take_counts().get("seconds_saved", 0.0) == 0.0
    told(priced)
    assert plan.take_counts()["seconds_saved"] == pytest.approx(1.5)
