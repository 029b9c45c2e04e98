"""What the scheduler's half makes of a reset: nothing that it derived before outlives it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kvloom.connectors.serving.messages import Load, Loaded, Revocation, Scheduled, StepReport
from kvloom.connectors.serving.scheduler.planner import Planner

from ..support.fakes import Clock
from .test_planner import CHUNK, PLAIN, SPEC, Shelf, blocks_for, planner, run_prompt

TOKENS = list(range(24))
RANKS = [replace(SPEC, shard=(rank, 2)) for rank in (0, 1)]
LOST = Loaded({}, True, 0.1)


class Everything(Shelf):
    """A store that has all chunks, of whatever name."""

    def __call__(self, lookup: object) -> tuple[str, ...]:
        super().__call__(lookup)  # type: ignore[arg-type]
        return ("host",) * len(lookup.keys[0])  # type: ignore[attr-defined]


def loading(shelf: Shelf | None = None) -> tuple[Planner, Load]:
    """A request whose load the workers have begun."""
    plan = planner(shelf or Everything())
    plan.open("r", TOKENS, b"", PLAIN)
    plan.allocated("r", plan.matched_tokens("r", 4) or 0, blocks_for(24))
    (load,) = plan.plan_step([]).loads
    return plan, load


def test_a_stale_request_loads_and_saves_nothing() -> None:
    plan = planner(Everything())
    plan.open("r", TOKENS, b"", PLAIN)
    assert plan.matched_tokens("r", 0) == 24
    plan.reset()
    assert plan.is_stale("r")
    assert plan.matched_tokens("r", 0) == 0
    assert plan.plan_step([Scheduled("r", 24, blocks_for(24))]).saves == []
    plan.open("r", TOKENS, b"", PLAIN)
    assert not plan.is_stale("r")
    assert plan.matched_tokens("r", 0) == 24
    plan.close("r")
    assert plan.is_idle


def test_names_before_and_after_have_nothing_in_common() -> None:
    plan = planner(Shelf())
    names = []
    for _ in range(3):
        names.append(run_prompt(plan, "r", TOKENS))
        plan.reset()
    assert [len(each) for each in names] == [3, 3, 3]
    assert len(set.union(*names)) == 9


def test_the_workers_hear_of_a_reset_once_and_let_go_of_offers() -> None:
    plan = planner(Everything())
    plan.open("r", TOKENS, b"", PLAIN)
    plan.matched_tokens("r", 0)
    plan.reset()
    assert not plan.is_quiet({"other": 1})
    first, second = plan.plan_step([]), plan.plan_step([])
    assert (first.is_reset, second.is_reset) == (True, False)
    assert (first.released, second.released) == ([1], [])


def test_a_load_that_is_over_later_is_reported_as_lost() -> None:
    plan, load = loading()
    plan.reset()
    (revocation,) = plan.plan_step([]).revocations
    assert revocation == Revocation("r", frozenset(load.blocks[1:]))
    plan.apply_report(StepReport(revoked={"r"}))
    assert plan.arrived(set()) == set()
    plan.apply_report(StepReport(loaded={"r": LOST}))
    assert plan.arrived({"r"}) == {"r"}, "the workers have reported its blocks"
    plan.close("r")
    assert plan.is_idle


def test_a_load_that_is_over_already_waits_until_its_blocks_are_reported() -> None:
    """An engine that plans ahead gets the outcome of a step after the reset that the step came before."""
    plan, _ = loading()
    plan.reset()
    plan.apply_report(StepReport(loaded={"r": Loaded({"host": 20}, False, 0.1)}))
    assert plan.arrived({"r", "other"}) == {"other"}
    assert len(plan.plan_step([]).revocations) == 1
    assert plan.arrived(set()) == set()
    plan.apply_report(StepReport(revoked={"r"}))
    assert plan.arrived(set()) == {"r"}
    assert plan.arrived(set()) == set()
    plan.close("r")
    assert plan.is_idle


@pytest.mark.parametrize("first", ["one rank", "both ranks", "no rank"])
def test_ranks_are_waited_for(first: str) -> None:
    plan = planner(None, RANKS)
    plan.open("r", TOKENS, b"", PLAIN)
    assert plan.matched_tokens("r", 0) is None
    (lookup,) = plan.plan_step([]).lookups
    plan.apply_report(StepReport(found_prefixes={lookup.number: ("host",) * 3}))
    plan.allocated("r", plan.matched_tokens("r", 0) or 0, blocks_for(24))
    plan.plan_step([])
    done = Loaded({"host": 24}, False, 0.1)
    if first == "one rank":
        plan.apply_report(StepReport(loaded={"r": done}))
    plan.reset()
    if first == "both ranks":
        plan.apply_report(StepReport(loaded={"r": replace(done, ranks=2)}))
        assert plan.arrived({"r"}) == set()
    plan.plan_step([])
    plan.apply_report(StepReport(revoked={"r"}))
    if first == "both ranks":
        assert plan.arrived(set()) == {"r"}
        return
    assert plan.arrived(set()) == set()
    plan.apply_report(StepReport(loaded={"r": LOST if first == "one rank" else replace(LOST, ranks=2)}))
    assert plan.arrived({"r"}) == {"r"}


def test_an_answer_to_an_old_question_is_none() -> None:
    plan = planner(None, RANKS)
    plan.open("r", TOKENS, b"", PLAIN)
    assert plan.matched_tokens("r", 0) is None
    (old,) = plan.plan_step([]).lookups
    plan.reset()
    plan.open("r", TOKENS, b"", PLAIN)
    assert plan.matched_tokens("r", 0) is None
    (new,) = plan.plan_step([]).lookups
    plan.apply_report(StepReport(found_prefixes={old.number: ("host",) * 3}))
    assert plan.matched_tokens("r", 0) is None
    plan.apply_report(StepReport(found_prefixes={new.number: ()}))
    assert plan.matched_tokens("r", 0) == 0


def test_an_offer_that_is_taken_after_the_reset_is_a_load_of_nothing() -> None:
    """VLLM 0.33 may take an offer some steps after it asked for it."""
    plan = planner(Everything())
    plan.open("r", TOKENS, b"", PLAIN)
    assert plan.matched_tokens("r", 4) == 20
    plan.reset()
    plan.allocated("r", 20, blocks_for(24))
    planned = plan.plan_step([])
    (load,) = planned.loads
    assert (load.keys, load.start, load.stop) == (((),), 4, 24)
    assert planned.revocations == []
    plan.apply_report(StepReport(loaded={"r": LOST}))
    assert plan.arrived({"r"}) == {"r"}


def test_a_load_that_was_not_sent_yet_is_sent_and_revoked() -> None:
    plan = planner(Everything())
    plan.open("r", TOKENS, b"", PLAIN)
    plan.allocated("r", plan.matched_tokens("r", 0) or 0, blocks_for(24))
    plan.reset()
    planned = plan.plan_step([])
    assert [load.request_id for load in planned.loads] == [each.request_id for each in planned.revocations] == ["r"]


def test_choices_of_fusions_and_documents_are_forgotten(tmp_path: Path) -> None:
    shelf, document = Shelf(), list(range(100, 116))
    settings = {"match_tokens": 8, "fusion_ratio": 0.5, "disk_path": str(tmp_path)}
    plan = planner(shelf, **settings)
    shelf.tiers = dict.fromkeys(run_prompt(plan, "d", document, documents=((0, 16),)), "host")
    tokens = [1, 2, 3, *document, *range(20, 30)]
    assert plan.open("r", tokens, b"", PLAIN) == 3
    plan.allocated("r", plan.matched_tokens("r", 0) or 0, blocks_for(32))
    plan.plan_step([])
    chosen = np.arange(3, 9, dtype=np.int32)
    plan.apply_report(StepReport(loaded={"r": Loaded({"host": 13}, False, 0.1, 6, chosen=chosen)}))
    assert plan.matched_tokens("r", 8) == 8, "it goes on with its choice"
    plan.reset()
    assert plan.open("r", tokens, b"", PLAIN) is None, "the document is not known"
    journal = next(tmp_path.glob("documents*")).stat().st_size
    shelf.tiers |= dict.fromkeys(run_prompt(plan, "d", document, documents=((0, 16),)), "host")
    assert plan.open("r", tokens, b"", PLAIN) == 3, "it is stored again"
    assert next(tmp_path.glob("documents*")).stat().st_size == journal, "and others would not find it"
    assert plan.matched_tokens("r", 8) == 0, "what an earlier fusion chose is forgotten"


def test_a_result_that_waited_for_long_is_asked_for_again() -> None:
    """Its chunks are about to lose their pins."""
    clock = Clock()
    plan = planner(None, RANKS, clock=clock)
    plan.open("r", TOKENS, b"", PLAIN)
    assert plan.matched_tokens("r", 0) is None
    (lookup,) = plan.plan_step([]).lookups
    plan.apply_report(StepReport(found_prefixes={lookup.number: ("host",) * 3}))
    assert plan.matched_tokens("r", 0) == 3 * CHUNK
    clock.now_s += 25.0
    assert plan.matched_tokens("r", 0) is None
    (again,) = plan.plan_step([]).lookups
    assert again.replaces == lookup.number
