"""Fusions by cost in the scheduler's half: what is fused, under which name, and what is told of it."""

from dataclasses import replace

import pytest
import torch

from kvloom.connectors.serving.messages import FusionWork, Loaded, LookUp, Scheduled, StepReport
from kvloom.connectors.serving.scheduler.planner import Planner
from kvloom.connectors.serving.settings import ServingSettings
from kvloom.core import KVSpec
from kvloom.kvstore.keys import content_key, prefix_keys

from .controller.test_load_control import Clock
from .test_planner import BLOCK, CHUNK, PLAIN, Shelf, blocks_for

SPEC = KVSpec("model", 8, 2, 8, torch.float32, None)
PROBED = 3 / 8  # of the layers, that every token of documents goes through: the check layer is the third one
TOKEN_S = 0.01
SIZE = 40  # tokens of a document, 0.4 s of computing
LEAD, QUESTION = 4, 10
SPANS = tuple((LEAD + index * SIZE, LEAD + (index + 1) * SIZE) for index in range(4))
TOTAL = SPANS[-1][1] + QUESTION
RATIO = 0.2


class EachShelf(Shelf):
    """A shelf that answers for each chunk alone, too."""

    def __call__(self, lookup: LookUp) -> tuple[str, ...]:
        if not lookup.is_each:
            return super().__call__(lookup)
        self.asked.append(lookup)
        return tuple(self.tiers.get(key, "") for key in lookup.keys[0])


class Bed:
    """A planner that has computed and fused; `document_s`: of loading one."""

    def __init__(self, document_s: float, *, seen: int = 3, elsewhere: bool = False, **settings: object) -> None:
        self.clock, self.document_s = Clock(), document_s
        self.shelf = EachShelf()
        self.plan = Planner(
            ServingSettings.of({"chunk_tokens": CHUNK, **settings}),
            (SPEC,),
            BLOCK,
            None if elsewhere else self.shelf,
            clock=self.clock,
        )
        self.tokens = list(range(TOTAL))
        self.store(range(4))
        for number in range(seen):
            self.compute(f"p{number}")
            assert self.ask(f"f{number}") > 0
            self.fuse(f"f{number}")
            self.plan.close(f"f{number}")
        self.plan.take_counts()

    def store(self, numbers: range | tuple[int, ...]) -> None:
        self.shelf.tiers = {content_key(SPEC, self.tokens[a:b]): "disk" for a, b in (SPANS[i] for i in numbers)}

    def compute(self, name: str, tokens: int = 400) -> None:
        self.plan.open(name, list(range(1000, 1000 + tokens)), b"", replace(PLAIN, load=False))
        self.plan.matched_tokens(name, 0)
        self.plan.allocated(name, 0, blocks_for(tokens))
        step = self.plan.plan_step([Scheduled(name, tokens, blocks_for(tokens), tokens)])
        self.clock.now_s += TOKEN_S * tokens
        self.plan.apply_report(StepReport(number=step.number))
        self.plan.close(name)

    def open(self, name: str, ratio: float = RATIO) -> int | None:
        return self.plan.open(name, self.tokens, b"", replace(PLAIN, documents=SPANS, ratio=ratio))

    def ask(self, name: str, local: int = 0, ratio: float = RATIO) -> int:
        """Asked until it is answered; takes the offer."""
        self.open(name, ratio)
        return self.take(name, local)

    def take(self, name: str, local: int = 0) -> int:
        for _ in range(6):
            offered = self.plan.matched_tokens(name, local)
            if offered is not None:
                self.plan.allocated(name, offered, blocks_for(TOTAL))
                return offered
            for lookup in self.plan.plan_step([]).lookups:
                self.plan.apply_report(StepReport(found_prefixes={lookup.number: self.shelf(lookup)}))
        raise AssertionError("never decided")

    def fuse(self, name: str) -> tuple[int, int, float]:
        """It is fused; its first and last token, and the ratio."""
        (fusion,) = self.plan.plan_step([]).fusions
        loaded = len(fusion.documents)
        left = sum(each.stop - each.start for each in fusion.documents)
        passed = PROBED * (fusion.stop - fusion.documents[0].start) + fusion.ratio * left
        seconds, waited_s = passed * TOKEN_S, loaded * self.document_s
        self.clock.now_s += waited_s + seconds
        work = FusionWork({"disk": loaded}, passed, fusion.stop / 2, seconds, waited_s)
        told = Loaded({"disk": left}, False, 0.0, int(passed), read_s={"disk": waited_s}, fused=work)
        self.plan.apply_report(StepReport(loaded={name: told}))
        self.plan.arrived({name})
        return fusion.start, fusion.stop, fusion.ratio

    def told(self, name: str) -> tuple[object, object]:
        usage = self.plan.close(name) or {}
        return usage["decision"], usage["fused"]


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_fast_tier_is_fused_as_asked(elsewhere: bool) -> None:
    bed = Bed(0.001, elsewhere=elsewhere)
    name = bed.open("r"), bed.plan.fusion_name("r")
    assert bed.take("r") == SPANS[-1][1]
    assert bed.plan.fusion_name("r") == name[1] and name[0] == LEAD
    assert bed.fuse("r") == (0, SPANS[-1][1], RATIO)
    assert bed.told("r") == ("fuses", "yes")
    assert bed.plan.take_counts()["decisions.fuses"] == 1


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_slow_tier_is_computed_under_plain_names(elsewhere: bool) -> None:
    bed = Bed(3.0, elsewhere=elsewhere)
    assert bed.open("r") == LEAD, "it may be fused yet"
    assert bed.plan.matched_tokens("r", 0) is None, "the engine has to look under other names"
    assert bed.take("r") == 0
    assert bed.plan.fusion_name("r") == (None, b"")
    plan = bed.plan.plan_step([Scheduled("r", TOTAL, blocks_for(TOTAL), TOTAL)])
    assert plan.fusions == [] and [save.keys[0] for save in plan.saves if save.is_prefix] == prefix_keys(
        SPEC, bed.tokens, chunk_tokens=CHUNK
    )
    usage = bed.plan.close("r") or {}
    assert (usage["decision"], usage["fused"]) == ("fusion does not pay", "no")
    assert usage["expected_load_s"] > usage["expected_compute_s"]  # type: ignore[operator]
    assert bed.plan.take_counts()["decisions.fusion does not pay"] == 1


def test_leading_documents_are_computed_while_others_load() -> None:
    bed = Bed(0.3)
    bed.open("r")
    asked = bed.plan.fusion_name("r")
    assert bed.plan.matched_tokens("r", 0) is None
    raised = bed.plan.fusion_name("r")
    assert raised[0] == SPANS[2][0] and raised[1] != asked[1]
    assert bed.take("r") == SPANS[-1][1]
    start, _, ratio = bed.fuse("r")
    assert start == 0 and ratio == pytest.approx(RATIO * 2), "as many tokens of two as of four"
    assert bed.told("r") == ("ratio raised", "yes")
    assert bed.plan.take_counts()["decisions.ratio raised"] == 1
    # Who names the other documents only, at that ratio, asks for the very same KV; nobody else does.
    bed.plan.open("same", bed.tokens, b"", replace(PLAIN, documents=SPANS[2:], ratio=ratio))
    assert bed.plan.fusion_name("same") == raised
    bed.plan.open("other", bed.tokens, b"", replace(PLAIN, documents=SPANS[2:], ratio=RATIO))
    assert bed.plan.fusion_name("other")[1] not in (raised[1], asked[1])


def test_blocks_of_an_equal_request_are_found_again() -> None:
    """Under the name that the last one got; and gone on with, whatever a decision would be now."""
    bed = Bed(0.3)
    bed.ask("r")
    bed.fuse("r")
    name = bed.plan.fusion_name("r")
    bed.plan.close("r")
    bed.open("again")
    assert bed.plan.fusion_name("again") == name
    bed.document_s = 10.0
    assert bed.plan.matched_tokens("again", SPANS[-1][1]) == 0, "all of it is there"
    bed.plan.allocated("again", 0, blocks_for(TOTAL))
    assert bed.told("again") == (None, "yes")
    slow = Bed(3.0)
    slow.ask("r")
    slow.plan.close("r")
    slow.open("again")
    assert slow.plan.fusion_name("again") == (None, b"")
    assert slow.take("again", local=160) == 0
    assert slow.told("again") == ("fusion does not pay", "no")


def test_a_tier_that_has_become_fast_is_fused_again() -> None:
    bed = Bed(3.0)
    bed.ask("r")
    bed.plan.close("r")
    bed.document_s = 0.001
    for number in range(12):
        bed.clock.now_s += 2000.0
        bed.compute(f"c{number}")
        bed.ask(f"r{number}")
        if bed.plan.fusion_name(f"r{number}")[0] is None:
            bed.plan.close(f"r{number}")
            continue
        bed.fuse(f"r{number}")
        reason = bed.told(f"r{number}")[0]
        if number == 0:
            assert reason == "trial"
    assert reason == "fuses"


def test_documents_that_are_not_stored_are_computed() -> None:
    bed = Bed(0.001)
    bed.store((1, 3))
    bed.open("some")
    bed.take("some")
    assert bed.plan.fusion_name("some")[0] == SPANS[1][0], "what precedes the first stored one is exact"
    assert bed.fuse("some")[2] == RATIO
    bed.store(())
    assert bed.ask("none") == 0
    assert bed.plan.fusion_name("none") == (None, b"")
    assert bed.told("none")[1] == "no"


def test_in_doubt_and_always_all_is_fused_as_asked() -> None:
    bed = Bed(3.0, seen=2)
    assert bed.ask("r") == SPANS[-1][1] and bed.fuse("r")[2] == RATIO
    assert bed.told("r") == ("untried", "yes")
    bed = Bed(3.0, load_or_recompute="always")
    assert bed.ask("r") == SPANS[-1][1] and bed.fuse("r")[2] == RATIO
    assert bed.told("r") == (None, "yes")


def test_stored_prefixes_are_loaded_where_fusion_does_not_pay() -> None:
    bed = Bed(3.0)
    bed.shelf.tiers |= dict.fromkeys(prefix_keys(SPEC, bed.tokens, chunk_tokens=CHUNK)[:6], "host")
    assert bed.ask("r") == 6 * CHUNK
    assert bed.plan.plan_step([]).loads[0].stop == 6 * CHUNK
    assert bed.told("r") == ("untried", "no"), "of loading what was computed in this very context nothing is known"


def test_a_reset_and_an_abort_leave_nothing_behind() -> None:
    bed = Bed(0.3)
    bed.open("r")
    assert bed.plan.matched_tokens("r", 0) is None
    bed.plan.reset()
    bed.open("r")
    assert bed.take("r") == 0, "nothing is stored under its new name"
    assert bed.plan.fusion_name("r") == (None, b"")
    bed.plan.close("r")
    assert bed.plan.is_idle


def test_ranks_have_what_all_of_them_have() -> None:
    one = StepReport(found_prefixes={3: ("disk", "host", "", "disk"), 4: ("host", "host")})
    two = StepReport(found_prefixes={3: ("disk", "", "host", "disk"), 4: ("host",)})
    assert one.merged(two).found_prefixes == {3: ("disk", "", "", "disk"), 4: ("host",)}


def test_a_document_without_a_whole_block_is_not_what_is_left_to_fuse() -> None:
    """What is provided ends with a whole block: to load such a document alone would provide nothing of it."""
    bed = Bed(0.001)
    spans = (SPANS[0], (SPANS[0][1], SPANS[0][1] + 3))
    tokens = bed.tokens[: spans[1][1] + 2]
    for start, stop in spans:
        bed.shelf.tiers[content_key(SPEC, tokens[start:stop])] = "disk"
    for name, given in (("both", spans), ("last", spans[1:])):
        bed.plan.open(name, tokens, b"", replace(PLAIN, documents=given, ratio=RATIO))
        bed.take(name)
    assert bed.plan.fusion_name("both")[0] in (None, LEAD)
    assert bed.plan.fusion_name("last") == (None, b"")
