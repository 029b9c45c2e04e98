"""The scheduler's half, without an engine: what is offered, loaded, saved, and what is never asked twice."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvloom.blend.method import EXACT, FusionMethod
from kvloom.connectors.serving.messages import Advance, FoundTiers, Fusion, Loaded, LookUp, Scheduled, StepReport
from kvloom.connectors.serving.scheduler import fusions
from kvloom.connectors.serving.scheduler.planner import Planner
from kvloom.connectors.serving.settings import RequestOptions, ServingSettings
from kvloom.connectors.serving.worker.fuser import continued
from kvloom.core import KVSpec
from kvloom.kvstore.keys import content_key, prefix_keys

SPEC = KVSpec("model", 2, 2, 8, torch.float32, None)
PLAIN = RequestOptions()
BLOCK, CHUNK = 4, 8


class Shelf:
    """Stands for the store: which keys are there. Every lookup is noted."""

    def __init__(self) -> None:
        self.tiers: dict[bytes, str] = {}
        self.asked: list[LookUp] = []

    def __call__(self, lookup: LookUp) -> FoundTiers:
        self.asked.append(lookup)
        found = []
        for key in lookup.keys[0]:
            if key not in self.tiers:
                break
            found.append(self.tiers[key])
        return tuple(found)


def planner(
    shelf: Shelf | None,
    specs: Sequence[KVSpec] = (SPEC,),
    *,
    clock: Callable[[], float] = time.monotonic,
    **settings: object,
) -> Planner:
    return Planner(ServingSettings.of({"chunk_tokens": CHUNK, **settings}), specs, BLOCK, shelf, clock=clock)


def blocks_for(tokens: int) -> tuple[int, ...]:
    return tuple(range(100, 100 + -(-tokens // BLOCK)))


def run_prompt(plan: Planner, name: str, tokens: list[int], **options: object) -> set[bytes]:
    """A request from its beginning to its end, in one step; the keys saved."""
    plan.open(name, tokens, b"", replace(PLAIN, **options))
    saves = plan.plan_step([Scheduled(name, len(tokens), blocks_for(len(tokens)))]).saves
    plan.close(name)
    return {save.keys[0] for save in saves}


@given(st.integers(0, 40), st.integers(0, 5), st.integers(0, 10))
def test_offers_reach_from_the_local_hit_to_the_last_stored_chunk(total: int, stored: int, local: int) -> None:
    tokens = list(range(total))
    keys = prefix_keys(SPEC, tokens, chunk_tokens=CHUNK)
    shelf = Shelf()
    shelf.tiers = dict.fromkeys(keys[:stored], "host")
    plan = planner(shelf)
    plan.open("r", tokens, b"", PLAIN)
    local = min(local * BLOCK, total)
    offered = plan.matched_tokens("r", local)
    reach = min(stored, len(keys)) * CHUNK
    # chunks before the local hit are not needed, so it does not matter whether they are stored
    assert offered == max(reach - local, 0)
    if offered:
        plan.allocated("r", offered, blocks_for(total))
        (load,) = plan.plan_step([]).loads
        first = local // CHUNK
        assert (load.start, load.stop, load.first) == (local, reach, first * CHUNK)
        assert load.keys == (tuple(keys[first:stored]),)
        assert dict(plan.hit_tokens("r")) == {"host": offered}
    else:
        assert plan.plan_step([]).loads == []


def test_every_chunk_is_saved_once_when_it_is_whole() -> None:
    """Whatever the steps, also across a preemption; the last chunk only when its tokens are known."""
    plan = planner(Shelf())
    tokens = list(range(20))
    plan.open("r", tokens, b"", PLAIN)
    seen = []
    for computed in (3, 9, 16, 8, 20, 21, 24):  # back to 8: preempted; 24: four tokens ahead of what is known
        blocks = tuple(range(computed, computed + 10))
        for save in plan.plan_step([Scheduled("r", computed, blocks)]).saves:
            assert save.blocks == blocks[save.start // BLOCK : (save.start + CHUNK) // BLOCK]
            seen.append((save.keys[0], save.after and save.after[0], save.token_ids.tolist(), save.start))
    tokens += [20, 21, 22, 23]
    seen += [
        (s.keys[0], s.after[0], s.token_ids.tolist(), s.start)
        for s in plan.plan_step([Scheduled("r", 25, tuple(range(10)))]).saves
    ]  # type: ignore[index]
    keys = prefix_keys(SPEC, tokens, chunk_tokens=CHUNK)
    assert seen == [
        (keys[0], None, tokens[:8], 0),
        (keys[1], keys[0], tokens[8:16], 8),
        (keys[2], keys[1], tokens[16:24], 16),
    ]


def test_loaded_chunks_are_not_saved_again_and_lost_ones_are() -> None:
    shelf = Shelf()
    tokens = list(range(24))
    keys = prefix_keys(SPEC, tokens, chunk_tokens=CHUNK)
    shelf.tiers = dict.fromkeys(keys[:2], "disk")
    plan = planner(shelf)
    for name in ("good", "bad"):
        plan.open(name, tokens, b"", PLAIN)
        plan.allocated(name, plan.matched_tokens(name, 0) or 0, blocks_for(24))
    assert {load.request_id for load in plan.plan_step([]).loads} == {"good", "bad"}
    plan.apply_report(
        StepReport(loaded={"good": Loaded({"disk": 16}, False, 0.1), "bad": Loaded({"disk": 8}, True, 0.1)})
    )
    saved = {
        name: [save.keys[0] for save in plan.plan_step([Scheduled(name, 24, blocks_for(24))]).saves]
        for name in ("good", "bad")
    }
    assert saved == {"good": keys[2:], "bad": keys}


def test_after_a_failure_nothing_is_asked_again() -> None:
    """vLLM asks anew when nothing of a failed load is left; the same answer would make it fail for ever."""
    shelf = Shelf()
    tokens = list(range(16))
    shelf.tiers = dict.fromkeys(prefix_keys(SPEC, tokens, chunk_tokens=CHUNK), "host")
    plan = planner(shelf)
    plan.open("r", tokens, b"", PLAIN)
    assert plan.matched_tokens("r", 0) == 16
    plan.allocated("r", 16, blocks_for(16))
    plan.apply_report(StepReport(loaded={"r": Loaded({}, True, 0.1)}))
    asked = len(shelf.asked)
    assert plan.matched_tokens("r", 0) == 0
    assert len(shelf.asked) == asked
    usage = plan.close("r")
    assert usage is not None
    assert usage["failed"] is True
    plan.open("r", tokens, b"", PLAIN)
    assert plan.matched_tokens("r", 0) == 16, "another request is not punished"


def test_workers_elsewhere_answer_in_a_later_step() -> None:
    plan = planner(None, [replace(SPEC, shard=(rank, 2)) for rank in (0, 1)])
    tokens = list(range(24))
    plan.open("r", tokens, b"", PLAIN)
    assert plan.matched_tokens("r", 4) is None
    assert plan.matched_tokens("r", 4) is None
    (lookup,) = plan.plan_step([]).lookups
    assert plan.plan_step([]).lookups == [], "one question is enough"
    assert lookup.keys[0] != lookup.keys[1], "ranks hold different heads"
    assert len(lookup.keys[0]) == len(lookup.keys[1]) == 3
    first = StepReport(found_prefixes={lookup.number: ("host", "host", "disk")})
    second = StepReport(found_prefixes={lookup.number: ("host", "host")})
    plan.apply_report(first.merged(second))
    assert plan.matched_tokens("r", 4) == 12
    assert plan.matched_tokens("r", 12) == 4, "the local hit has grown meanwhile"
    plan.allocated("r", 4, blocks_for(24))
    (load,) = plan.plan_step([]).loads
    assert (load.start, load.stop, load.first) == (12, 16, 8)
    assert load.keys == tuple(keys[1:2] for keys in lookup.keys)


def test_an_answer_to_a_later_chunk_is_no_answer_to_an_earlier_one() -> None:
    plan = planner(None)
    plan.open("r", list(range(24)), b"", PLAIN)
    assert plan.matched_tokens("r", 8) is None
    (lookup,) = plan.plan_step([]).lookups
    plan.apply_report(StepReport(found_prefixes={lookup.number: ("host", "host")}))
    assert plan.matched_tokens("r", 0) is None, "chunk 0 was not asked about"
    (lookup,) = plan.plan_step([]).lookups
    assert len(lookup.keys[0]) == 3


@pytest.mark.parametrize("options", [{"load": False}, {"save": False}])
def test_requests_may_decline(options: dict[str, bool]) -> None:
    shelf = Shelf()
    tokens = list(range(16))
    plan = planner(shelf)
    shelf.tiers = dict.fromkeys(prefix_keys(SPEC, tokens, chunk_tokens=CHUNK), "host")
    plan.open("r", tokens, b"", replace(PLAIN, **options))
    assert plan.matched_tokens("r", 0) == (16 if options.get("load", True) else 0)
    saves = plan.plan_step([Scheduled("r", 16, blocks_for(16))]).saves
    assert len(saves) == (2 if options.get("save", True) else 0)


def test_tenants_and_adapters_do_not_meet() -> None:
    """Salt of the engine, identity of the request, and a reset: each makes other keys; the borders cannot be moved."""
    tokens = list(range(16))
    named = {}
    for salt, identity in (("", b""), ("a", b""), ("", b"a"), ("a", b"b"), ("ab", b""), ("", b"ab")):
        plan = planner(Shelf(), salt=salt)
        plan.open("r", tokens, identity, PLAIN)
        (one, two) = plan.plan_step([Scheduled("r", 16, blocks_for(16))]).saves
        named[salt, identity] = {one.keys[0], two.keys[0]}
    plan.reset()
    plan.open("s", tokens, b"ab", PLAIN)
    named["renewed"] = {save.keys[0] for save in plan.plan_step([Scheduled("s", 16, blocks_for(16))]).saves}
    assert len(set.union(*named.values())) == 2 * len(named)


# ------------------------------------------------------------------------------------------------------- fusion


def test_what_is_approximate_is_never_saved_as_exact() -> None:
    tokens = list(range(40))
    plan = planner(Shelf())
    exact = run_prompt(plan, "plain", tokens)
    fused = run_prompt(plan, "fused", tokens, documents=((18, 30), (30, 36)), ratio=0.2)
    assert fused == set(prefix_keys(SPEC, tokens[:16], chunk_tokens=CHUNK))
    assert fused < exact
    assert run_prompt(plan, "all", tokens, documents=((18, 30), (30, 36)), ratio=1.0) == exact, "ratio 1 computes all"


@pytest.mark.parametrize("lead_ids", [[], [0, 1]])
def test_documents_are_stored_where_they_stand_alone(lead_ids: list[int]) -> None:
    tokens = list(range(30))
    plan = planner(Shelf(), lead_ids=lead_ids)
    start = len(lead_ids)
    key = content_key(SPEC, tokens[start:13], lead_ids=lead_ids)
    whole = run_prompt(plan, "r", tokens, documents=((start, 13), (13, 20)), ratio=0.2)
    assert key in whole
    assert whole - {key} == set(prefix_keys(SPEC, tokens[:8], chunk_tokens=CHUNK))
    assert key not in run_prompt(plan, "s", tokens, documents=((start + 1, 13),), ratio=0.2)


def test_a_fusion_takes_all_up_to_the_last_document() -> None:
    shelf = Shelf()
    tokens = list(range(40))
    plan = planner(shelf)
    assert plan.open("r", tokens, b"", replace(PLAIN, documents=((10, 20), (24, 36)), ratio=0.2)) == 10
    assert plan.matched_tokens("r", 8) == 28
    plan.allocated("r", 28, blocks_for(40))
    (fusion,) = plan.plan_step([]).fusions
    assert (fusion.start, fusion.stop, fusion.ratio) == (8, 36, 0.2)
    assert np.array_equal(fusion.token_ids, tokens[:36])
    assert [(d.start, d.stop) for d in fusion.documents] == [(10, 20), (24, 36)]
    assert fusion.documents[1].keys == (content_key(SPEC, tokens[24:36]),)
    assert plan.matched_tokens("r", 12) == 0, "fused tokens of an earlier request are not chosen among again"
    assert shelf.asked == []


@pytest.mark.parametrize("select", ["deviation", "deviation+question", "question"])
def test_a_choice_by_the_question_is_of_its_question(select: str) -> None:
    """The question, and not what is generated behind it, enters the plan and reaches the workers."""
    documents = replace(PLAIN, documents=((10, 20), (24, 36)), ratio=0.2)
    plan = Planner(
        ServingSettings.of({"chunk_tokens": CHUNK}), (SPEC,), BLOCK, Shelf(), fusion=FusionMethod(1.0, select)
    )
    digests = []
    for name, tokens in (("r", [*range(40)]), ("s", [*range(36), 7, 7, 7, 7]), ("t", [*range(40)])):
        plan.open(name, tokens, b"", documents)
        digests.append(plan.fusion_name(name)[1])
        assert plan.matched_tokens(name, 0) == 36
        plan.allocated(name, 36, blocks_for(40))
        (fusion,) = plan.plan_step([]).fusions
        expected = None if select == "deviation" else tokens[36:]
        assert (None if fusion.question is None else fusion.question.tolist()) == expected
    assert digests[0] == digests[2] and (digests[0] == digests[1]) == (select == "deviation")


def test_separators_say_where_documents_are() -> None:
    tokens = [*range(1, 7), 99, *range(11, 20), 99, *range(21, 30), 99, 5, 6]
    plan = planner(Shelf(), separator_ids=[99], fusion_ratio=0.5)
    assert plan.open("r", tokens, b"", PLAIN) == 7
    plan.allocated("r", plan.matched_tokens("r", 0) or 0, blocks_for(40))
    (fusion,) = plan.plan_step([]).fusions
    assert [(d.start, d.stop) for d in fusion.documents] == [(7, 16), (17, 26)]
    assert plan.open("s", tokens, b"", replace(PLAIN, documents=((20, 22),))) == 20, "unless the request says it"


def test_fusions_share_only_when_all_is_the_same() -> None:
    plan = planner(Shelf())
    tokens = list(range(40))
    base = replace(PLAIN, documents=((4, 12), (12, 30)), ratio=0.5)
    variants = {
        "same": (tokens, base),
        "another question": ([*tokens[:30], 99], base),
        "another last document": ([*tokens[:29], 99, *tokens[30:]], base),
        "another ratio": (tokens, replace(base, ratio=0.4)),
        "other borders": (tokens, replace(base, documents=((4, 13), (13, 30)))),
    }
    digests = {}
    for name, (ids, options) in variants.items():
        plan.open(name, ids, b"", options)
        digests[name] = plan.fusion_name(name)[1]
    assert digests["same"] == digests["another question"]
    assert len(set(digests.values())) == len(variants) - 1


def test_a_fusion_leaves_the_engine_a_token() -> None:
    plan = planner(Shelf())
    plan.open("r", list(range(20)), b"", replace(PLAIN, documents=((4, 20),), ratio=0.0))
    assert plan.matched_tokens("r", 0) == 16, "whole blocks, and not the last token"


def test_ranks_fuse_together_one_request_at_a_time() -> None:
    """Nobody computes before all have fetched; a document counts as found where every rank has it."""
    plan = planner(None, [replace(SPEC, shard=(rank, 2)) for rank in (0, 1)])
    options = replace(PLAIN, documents=((4, 12), (12, 30)), ratio=0.5)
    for name in ("a", "b"):
        plan.open(name, list(range(40)), b"", options)
        plan.allocated(name, plan.matched_tokens(name, 0) or 0, blocks_for(40))
    assert [fusion.request_id for fusion in plan.plan_step([]).fusions] == ["a", "b"]
    ranks = [StepReport(found_documents={"b": ((True, found),)}) for found in (True, False)]
    plan.apply_report(ranks[0].merged(ranks[1]))
    plan.apply_report(StepReport(found_documents={"a": ((True, True),)}))
    assert plan.plan_step([]).advances == [Advance("b", (True, False))], "a waits for its second rank"
    plan.apply_report(StepReport(found_documents={"a": ((True, True),)}))
    assert plan.plan_step([]).advances == [Advance("a", (True, True))], "first come, first served"
    plan.apply_report(StepReport(loaded={"a": Loaded({"host": 26}, False, 0.1, 13, ranks=2)}))
    assert plan.plan_step([]).advances == [Advance("b", (True, False))]
    plan.close("b")
    assert plan.plan_step([]).advances == []


def test_where_nothing_can_be_fused_all_is_exact() -> None:
    """An engine that cannot, or a prompt without a whole block that would tell fused KV from exact KV."""
    tokens = list(range(40))
    options = replace(PLAIN, documents=((18, 30),), ratio=0.2)
    plan = planner(Shelf())
    assert plan.open("r", tokens, b"", options, may_fuse=False) is None
    assert len(plan.plan_step([Scheduled("r", 40, blocks_for(40))]).saves) == 5
    assert plan.open("s", tokens[:19], b"", replace(PLAIN, documents=((18, 19),), ratio=0.2)) is None
    assert plan.open("t", tokens[:20], b"", replace(PLAIN, documents=((18, 20),), ratio=0.2)) == 18


def test_requests_that_say_nothing_are_fused_as_certified() -> None:
    """Unless the settings give a number; and a request's own counts most."""
    tokens = list(range(40))
    for settings, ratio, asked, expected in (
        ({}, 1.0, None, 1.0),
        ({}, 0.15, None, 0.15),
        ({"fusion_ratio": "certified"}, 0.15, 0.4, 0.4),
        ({"fusion_ratio": 0.3}, 0.15, None, 0.3),
    ):
        plan = Planner(
            ServingSettings.of({"chunk_tokens": CHUNK, **settings}),
            (SPEC,),
            BLOCK,
            Shelf(),
            fusion=replace(EXACT, ratio=ratio),
        )
        inexact = plan.open("r", tokens, b"", RequestOptions(documents=((8, 16), (16, 32)), ratio=asked))
        assert (inexact is None) is (expected == 1.0)
        if inexact is not None:
            plan.allocated("r", plan.matched_tokens("r", 0) or 0, blocks_for(40))
            (fusion,) = plan.plan_step([]).fusions
            assert fusion.ratio == expected


# ------------------------------------------------------------------------------------------------ without hints


def matching(shelf: Shelf | None, disk_path: str | None = None, **settings: object) -> Planner:
    return planner(shelf, match_tokens=8, fusion_ratio=0.2, disk_path=disk_path, **settings)


def test_stored_documents_are_recognised_anywhere() -> None:
    shelf, one, two = Shelf(), list(range(100, 115)), list(range(200, 210))
    plan = matching(shelf, lead_ids=[1])
    for document in (one, two):
        saved = run_prompt(plan, "d", [1, *document], documents=((1, 1 + len(document)),))
        shelf.tiers |= dict.fromkeys(saved, "host")
    tokens = [1, 5, 6, *two, 7, *one, 8, *two[:9], 9, 9]
    assert plan.open("r", tokens, b"", PLAIN) == 3
    plan.allocated("r", plan.matched_tokens("r", 0) or 0, blocks_for(len(tokens)))
    (fusion,) = plan.plan_step([]).fusions
    assert [(d.start, d.stop) for d in fusion.documents] == [(3, 13), (14, 29)]
    assert plan.open("said", tokens, b"", replace(PLAIN, documents=((14, 29),))) == 14, "who says it is believed"
    assert plan.open("exact", tokens, b"", replace(PLAIN, ratio=1.0)) is None
    assert plan.open("declined", tokens, b"", replace(PLAIN, load=False)) is None
    assert plan.open("engine", tokens, b"", PLAIN, may_fuse=False) is None
    assert plan.open("other tenant", tokens, b"other", PLAIN) is None
    assert plan.open("in its place", [1, *one, 5, 6, 7, 8], b"", PLAIN) is None, "stored there: nothing to fuse"
    shelf.tiers.clear()
    assert plan.open("gone", tokens, b"", PLAIN) is None, "what is gone is no reason to leave exact prefixes"


def test_workers_elsewhere_are_trusted_to_tell_later() -> None:
    """Nobody can be asked at once: a document that is gone is found to be so when it is fetched."""
    specs, document = [replace(SPEC, shard=(rank, 2)) for rank in (0, 1)], list(range(100, 115))
    plan = planner(None, specs, match_tokens=8, fusion_ratio=0.2)
    run_prompt(plan, "d", document, documents=((0, 15),))
    tokens = [1, 2, 3, *document, 4, 5, 6]
    assert plan.open("r", tokens, b"", PLAIN) == 3
    plan.allocated("r", plan.matched_tokens("r", 0) or 0, blocks_for(len(tokens)))
    (fusion,) = plan.plan_step([]).fusions
    assert fusion.documents[0].keys == tuple(content_key(spec, document) for spec in specs)


def test_a_later_process_and_one_beside_it_recognise_them(tmp_path: Path) -> None:
    shelf, document = Shelf(), list(range(100, 115))
    first, beside = matching(shelf, str(tmp_path)), matching(shelf, str(tmp_path))
    saved = run_prompt(first, "d", document, documents=((0, 15),))
    shelf.tiers = dict.fromkeys(saved, "disk")
    tokens = [1, 2, 3, *document, 4, 5, 6]
    assert [p.open("r", tokens, b"", PLAIN) for p in (first, beside, matching(shelf, str(tmp_path)))] == [3, 3, 3]
    assert matching(shelf).open("r", tokens, b"", PLAIN) is None
    assert planner(shelf, fusion_ratio=0.2, disk_path=str(tmp_path)).open("r", tokens, b"", PLAIN) is None, "opt-in"


# ------------------------------------------------------------------------------------- taken up again, half there


def fused_once(plan: Planner, name: str, local: int, chosen: tuple[int, ...] | None) -> Fusion | None:
    """Taken up by an engine that has `local` tokens itself; what is to be fused."""
    tokens = list(range(40))
    plan.open(name, tokens, b"", replace(PLAIN, documents=((10, 20), (24, 36)), ratio=0.2))
    plan.allocated(name, plan.matched_tokens(name, local) or 0, blocks_for(40))
    fusions = plan.plan_step([]).fusions
    picked = None if chosen is None else np.array(chosen, dtype=np.int32)
    loaded = {name: Loaded({"host": 20}, False, 0.1, 12, chosen=picked)} if fusions else {}
    plan.apply_report(StepReport(loaded=loaded))
    return fusions[0] if fusions else None


def test_half_a_fusion_goes_on_with_its_own_choice() -> None:
    """Of a preempted request, or of one like an earlier one, the engine may have half the blocks."""
    plan = planner(Shelf())
    first = fused_once(plan, "first", 8, (8, 9, 12, 20, 21, 22, 23, 30))
    assert first is not None
    assert first.chosen is None
    half = fused_once(plan, "half", 20, None)
    assert half is not None
    assert (half.start, half.stop) == (20, 36)
    assert np.array_equal(half.chosen, (8, 9, 12, 20, 21, 22, 23, 30))
    assert continued(half, (True, True)).tolist() == [20, 21, 22, 23, 30]
    assert continued(half, (True, False)).tolist() == list(range(20, 36)), "what is lost is computed"
    whole = fused_once(plan, "whole", 8, (8, 9, 13, 20, 21, 22, 23, 31))
    assert whole is not None
    assert whole.chosen is None, "all of it is chosen anew"
    assert fused_once(plan, "all there", 36, None) is None
    assert [plan.close(name)["fused"] for name in ("first", "half", "whole", "all there")] == ["yes"] * 4  # type: ignore[index]


def test_usage_says_what_is_only_half_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planner(Shelf())
    assert fused_once(plan, "unknown choice", 20, None) is None
    assert plan.close("unknown choice")["fused"] == "partly"  # type: ignore[index]
    monkeypatch.setattr(fusions, "REMEMBERED_PLANS", 0)
    assert fused_once(plan, "forgotten", 8, (8, 9)) is not None
    assert plan.matched_tokens("forgotten", 20) == 0
    plan.allocated("forgotten", 0, blocks_for(40))
    assert plan.close("forgotten")["fused"] == "partly"  # type: ignore[index]
    plan.open("plain", list(range(40)), b"", PLAIN)
    assert plan.close("plain")["fused"] == "no"  # type: ignore[index]
    tokens, options = list(range(40)), replace(PLAIN, documents=((10, 20),), ratio=0.2)
    for local, told in ((8, "no"), (12, "partly")):
        monkeypatch.setattr(fusions, "REMEMBERED_PLANS", 9)
        fused_once(plan, "before", 8, (8, 9))
        plan.open("failed", tokens, b"", replace(options, documents=((10, 20), (24, 36))))
        plan.allocated("failed", plan.matched_tokens("failed", local) or 0, blocks_for(40))
        plan.apply_report(StepReport(loaded={"failed": Loaded({}, True, 0.1)}))
        assert plan.close("failed")["fused"] == told  # type: ignore[index]
