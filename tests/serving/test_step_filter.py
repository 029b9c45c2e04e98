"""Steps that are nobody's affair are passed over, and no other ones."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom.connectors.serving.messages import Loaded, Scheduled, StepPlan, StepReport
from kvloom.connectors.serving.scheduler.planner import Planner
from kvloom.connectors.serving.scheduler.step_filter import StepFilter
from kvloom.connectors.serving.settings import RequestOptions

from .test_planner import CHUNK, PLAIN, Shelf, blocks_for, planner


def test_what_is_due_comes_no_later_than_expected() -> None:
    due = StepFilter()
    assert due.passes({"r": 1000})
    due.expect("r", 10)
    assert due.passes({"r": 9, "other": 50})
    assert due.passes({"other": 50})
    assert not due.passes({"r": 1})
    assert not due.passes({"r": 1})
    due.expect("r", 2)
    assert due.passes({"r": 1})
    due.forget("r")
    assert due.passes({"r": 50})


def _plan(plan: Planner, steps: list[Scheduled], *, asks: bool) -> StepPlan:
    """As the connector does it, or without the short way."""
    if asks and plan.is_quiet({each.request_id: each.new_tokens for each in steps}):
        return StepPlan()
    return plan.plan_step(steps)


_REQUEST = st.tuples(
    st.sampled_from([1, 7, 20, 40]),  # tokens of the prompt
    st.booleans(),  # saved
    st.sampled_from([(), ((2, 9),), ((17, 29),)]),  # documents
)
_STEP = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 12), st.integers(0, 3)), max_size=3)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(st.lists(_REQUEST, min_size=1, max_size=3), st.lists(_STEP, max_size=25), st.data())
def test_the_short_way_saves_the_same_in_the_same_steps(
    requests: list[tuple[int, bool, tuple[tuple[int, int], ...]]],
    steps: list[list[tuple[int, int, int]]],
    data: st.DataObject,
) -> None:
    """Prompts in pieces, tokens one by one, drafts, tokens known late, preemptions that begin anew, failed loads."""
    both = planner(Shelf()), planner(Shelf())
    tokens = {str(number): list(range(length)) for number, (length, _, _) in enumerate(requests)}
    for plan in both:
        for number, (length, save, documents) in enumerate(requests):
            spans = tuple(span for span in documents if span[1] <= length)
            options = RequestOptions(save=save, documents=spans, ratio=0.5)
            plan.open(str(number), tokens[str(number)], b"", options)
    computed = dict.fromkeys(tokens, 0)
    for step in steps:
        scheduled = []
        for number, count, rejected in step:
            name = str(number)
            if name not in tokens or any(each.request_id == name for each in scheduled):
                continue
            what = data.draw(st.sampled_from(["go on", "go on", "go on", "preempt", "fail", "late"]))
            if what == "preempt":
                computed[name] = data.draw(st.integers(0, len(tokens[name]) - 1))  # what is found again
                for plan in both:
                    plan.allocated(name, 0, ())
            if what == "fail":
                computed[name] = 0
                for plan in both:
                    plan.apply_report(StepReport(loaded={name: Loaded({}, True, 0.0)}))
            drafted = min(rejected, count - 1)
            done = computed[name] + count - drafted
            scheduled.append(Scheduled(name, done, blocks_for(200), count))
            computed[name] = done + data.draw(st.integers(0, drafted))
            if what != "late":
                tokens[name].extend(range(len(tokens[name]), computed[name] + 1))
        plans = [_plan(plan, scheduled, asks=asks) for plan, asks in zip(both, (True, False), strict=True)]
        told = [[(save.keys, save.start, save.request_id) for save in plan.saves] for plan in plans]
        assert told[0] == told[1]


def test_decoding_is_quiet_until_a_chunk_is_complete() -> None:
    plan = planner(Shelf())
    tokens = list(range(CHUNK + 2))
    plan.open("r", tokens, b"", PLAIN)
    assert not plan.is_quiet({"r": len(tokens)})
    plan.plan_step([Scheduled("r", len(tokens), blocks_for(40), len(tokens))])
    noisy = []
    for done in range(CHUNK + 3, 3 * CHUNK + 1):
        tokens.append(done)
        if not plan.is_quiet({"r": 1}):
            noisy.append(done)
            plan.plan_step([Scheduled("r", done, blocks_for(40), 1)])
    # One step early for what may have been drafted, which may be all of a prompt's piece, for all that is known here.
    assert noisy == [CHUNK + 3, 2 * CHUNK - 1, 2 * CHUNK, 3 * CHUNK - 1, 3 * CHUNK]
    assert plan.close("r")["saved_chunks"] == 3  # type: ignore[index]


def test_who_saves_nothing_is_never_due() -> None:
    plan = planner(Shelf())
    plan.open("r", list(range(100)), b"", RequestOptions(save=False))
    assert all(plan.is_quiet({"r": 1}) for _ in range(100))
    assert not plan.is_quiet({"r": 64}), "the pace of prompts is measured"


def test_what_waits_to_be_told_is_not_passed_over() -> None:
    plan = planner(None)
    plan.open("r", list(range(20)), b"", RequestOptions(save=False))
    assert plan.is_quiet({"other": 1})
    assert plan.matched_tokens("r", 0) is None
    assert not plan.is_quiet({"other": 1})
    assert plan.plan_step([]).lookups
    assert plan.is_quiet({"other": 1})


def test_tokens_that_are_found_again_bring_what_is_due_nearer() -> None:
    """Preempted after one token, a request may go on behind blocks that another one has computed meanwhile."""
    plan = planner(Shelf())
    plan.open("r", list(range(3 * CHUNK)), b"", PLAIN)
    assert not plan.is_quiet({"r": 1})
    plan.plan_step([Scheduled("r", 1, blocks_for(4), 1)])
    assert plan.is_quiet({"r": 1})
    plan.allocated("r", 0, blocks_for(3 * CHUNK))
    assert not plan.is_quiet({"r": 1})
    assert len(plan.plan_step([Scheduled("r", 2 * CHUNK, blocks_for(3 * CHUNK), 1)]).saves) == 2
