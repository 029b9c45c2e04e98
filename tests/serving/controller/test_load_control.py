"""What the scheduler's half makes of the controller's decisions; costs and times are made up."""

import pytest

from kvloom.connectors.serving.controller.decisions import Queue
from kvloom.connectors.serving.messages import FoundTiers, Loaded, LookUp, Scheduled, StepPlan, StepReport
from kvloom.connectors.serving.scheduler.planner import Planner
from kvloom.connectors.serving.settings import ServingSettings

from ..test_planner import BLOCK, CHUNK, PLAIN, SPEC, Shelf, blocks_for

TOKEN_S = 0.01  # of computing; a chunk takes 0.08 s


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def probed(seconds: float, tier: str = "disk") -> StepReport:
    return StepReport(probed=Loaded({tier: CHUNK}, False, seconds, read_s={tier: seconds}))


class Bed:
    """A planner on a made-up machine. `chunk_s`: of loading a chunk, by tier; `tiers`: of what is stored."""

    def __init__(self, chunk_s: dict[str, float], *, may_give_back: bool = True, **settings: object) -> None:
        self.clock, self.chunk_s = Clock(), chunk_s
        self.tiers: FoundTiers = ()
        self.plan = Planner(
            ServingSettings.of({"chunk_tokens": CHUNK, **settings}),
            (SPEC,),
            BLOCK,
            self._look_up,
            may_give_back=may_give_back,
            clock=self.clock,
        )
        self.beside_s = 0.0
        self._number = 0
        self._asked: dict[str, int] = {}  # keys of each request's first look-up
        for _ in range(10):
            self.tiers = ()
            self.compute(self.open(400), 400)
            for tier in chunk_s:
                self.tiers = (tier,) * 2
                self.finish(self.begin(self.open(18)), {tier: 2 * CHUNK})
        self.tiers = ()
        self.plan.take_counts()

    def _look_up(self, lookup: LookUp) -> FoundTiers:
        keys = len(lookup.keys[0])
        first = self._asked.setdefault(lookup.request_id, keys) - keys
        return self.tiers[first : first + keys]

    def open(self, tokens: int) -> str:
        self._number += 1
        self.plan.open(f"r{self._number}", list(range(tokens)), b"", PLAIN)
        return f"r{self._number}"

    def begin(self, name: str) -> str:
        """The engine takes the request on, with what it was offered."""
        offered = self.plan.matched_tokens(name, 0) or 0
        self.plan.allocated(name, offered, blocks_for(1000))
        return name

    def finish(self, name: str, tokens: dict[str, int], *, failed: bool = False, given_back: bool = False) -> None:
        read_s = {tier: self.chunk_s[tier] * count / CHUNK for tier, count in tokens.items()}
        self.clock.now_s += sum(read_s.values()) + self.beside_s
        self.step()
        loaded = Loaded(tokens, failed, sum(read_s.values()), read_s=read_s, given_back=given_back)
        self.plan.apply_report(StepReport(loaded={name: loaded}))
        self.plan.arrived({name})
        self.close(name)

    def step(self, *scheduled: Scheduled) -> StepPlan:
        """A step of the engine; a probe is over with it."""
        plan = self.plan.plan_step(scheduled)
        if plan.probe is not None:
            tier = self.tiers[0] if self.tiers else next(iter(self.chunk_s))
            self.plan.apply_report(probed(self.chunk_s[tier], tier))
        return plan

    def compute(self, name: str, tokens: int) -> None:
        self.begin(name)
        step = self.step(Scheduled(name, tokens, blocks_for(tokens), tokens))
        self.clock.now_s += TOKEN_S * tokens
        self.plan.apply_report(StepReport(number=step.number))
        self.close(name)

    def close(self, name: str) -> dict[str, object]:
        return self.plan.close(name) or {}


def test_a_hit_is_shortened_to_what_pays() -> None:
    bed = Bed({"host": 0.001, "disk": 1.0})
    bed.tiers = ("host",) * 3 + ("disk",) * 4
    name = bed.open(60)
    assert bed.plan.matched_tokens(name, 0) == 3 * CHUNK
    assert bed.plan.matched_tokens(name, 2 * BLOCK) == 3 * CHUNK - 2 * BLOCK, "asked again, with a local hit"
    bed.plan.allocated(name, 3 * CHUNK - 2 * BLOCK, blocks_for(60))
    (load,) = bed.plan.plan_step([]).loads
    assert (load.start, load.stop, len(load.keys[0])) == (2 * BLOCK, 3 * CHUNK, 2)
    assert load.limit_s is not None and 0.1 < load.limit_s < 0.4
    assert bed.plan.take_counts()["decisions.shortened"] == 1
    usage = bed.close(name)
    assert usage["decision"] == "shortened"
    assert usage["expected_load_s"] < usage["expected_compute_s"]  # type: ignore[operator]


def test_what_a_hit_costs_beside_loading_counts() -> None:
    bed = Bed({"host": 0.001})
    bed.tiers = ("host",) * 2
    assert bed.plan.matched_tokens(bed.open(18), 0) == 2 * CHUNK
    bed.beside_s = 0.5  # until the engine goes on with a request, where computing both chunks takes 0.16 s
    for _ in range(3):
        bed.finish(bed.begin(bed.open(18)), {"host": 2 * CHUNK})
    name = bed.begin(bed.open(18))
    assert bed.close(name)["decision"] == "too short to pay"
    bed.tiers = ("host",) * 20
    assert bed.plan.matched_tokens(bed.open(162), 0) == 20 * CHUNK


def test_a_slow_tier_is_left_alone_and_its_offer_released() -> None:
    bed = Bed({"disk": 1.0})
    bed.tiers = ("disk",) * 4
    name = bed.begin(bed.open(60))
    plan = bed.plan.plan_step([Scheduled(name, 60, blocks_for(60), 60)])
    assert plan.loads == [] and len(plan.released) == 1
    assert bed.close(name)["decision"] == "slow tier"


def test_always_loads_all_of_it() -> None:
    bed = Bed({"disk": 1.0}, load_or_recompute="always")
    bed.tiers = ("disk",) * 4
    name = bed.begin(bed.open(60))
    (load,) = bed.plan.plan_step([]).loads
    assert (load.stop, load.limit_s) == (4 * CHUNK, None)
    assert bed.close(name)["decision"] == "always"
    assert bed.plan.take_counts()["decisions.always"] == 1


def test_without_a_fallback_a_load_is_never_given_up() -> None:
    """Where the engine fails a request whose load fails."""
    bed = Bed({"disk": 0.05}, may_give_back=False)
    busy = bed.begin(bed.open(1000))
    bed.tiers = ("disk",) * 10
    for _ in range(12):
        bed.begin(bed.open(90))
    assert {load.limit_s for load in bed.plan.plan_step([]).loads} == {None}
    assert bed.plan.plan_step([Scheduled(busy, 1000, blocks_for(1000))]).cancelled == []


def test_who_waits_for_a_load_is_given_back() -> None:
    bed = Bed({"disk": 0.05})
    busy = bed.begin(bed.open(4000))  # 40 s of computing
    bed.tiers = ("disk",) * 40  # 2 s of loading, while the engine is busy anyway
    names = [bed.begin(bed.open(330)) for _ in range(6)]
    planned = bed.plan.plan_step([])
    assert len(planned.loads) == 6 and planned.cancelled == []
    assert not bed.plan.is_quiet({busy: 1})
    # The engine is done sooner than expected. The fifth waits for 4 s of loads and 2 s of its own; to compute it takes
    # 3.3 s, behind 0.5 s of the others. Behind it, there is more to compute.
    assert bed.plan.plan_step([Scheduled(busy, 4000, blocks_for(4000))]).cancelled == [names[4]]
    assert bed.plan.plan_step([]).cancelled == []
    assert bed.plan.take_counts()["decisions.computes while waiting"] == 1
    bed.finish(names[4], {}, failed=True, given_back=True)
    assert bed.plan.plan_step([]).cancelled == [names[5]], "nothing is left to compute before it"


def left_alone(bed: Bed, tokens: int = 60) -> str:
    """A request that is decided to compute what is stored."""
    bed.tiers = ("disk",) * 4
    name = bed.begin(bed.open(tokens))
    assert bed.close(name)["decision"] == "slow tier"
    return name


def test_a_tier_that_is_left_alone_is_probed_beside_requests() -> None:
    bed = Bed({"disk": 1.0})
    bed.clock.now_s += 40.0  # beside what the bed has computed since its last load
    left_alone(bed)
    assert bed.plan.plan_step([]).probe is None, "a chunk takes a second, so that it comes after a hundred"
    bed.clock.now_s += 40.0
    left_alone(bed)
    assert not bed.plan.is_quiet({"r": 1})
    plan = bed.plan.plan_step([])
    assert plan.loads == []
    assert plan.probe is not None and (plan.probe.start, plan.probe.stop, plan.probe.blocks) == (24, 32, ())
    assert len(plan.probe.keys[0]) == 1
    assert bed.plan.plan_step([]).probe is None and bed.plan.is_quiet({"r": 1})
    left_alone(bed)
    assert bed.plan.plan_step([]).probe is None, "one at a time"
    for _ in range(8):
        bed.plan.apply_report(probed(0.001))
        bed.clock.now_s += 200.0
        bed.tiers = ("disk",) * 4
        bed.close(bed.begin(bed.open(60)))
        if (plan := bed.plan.plan_step([])).loads:
            break
        assert plan.probe is not None
    else:
        pytest.fail("it became fast, and is still left alone")


def test_no_probe_begins_while_a_load_waits() -> None:
    bed = Bed({"disk": 1.0, "host": 0.001})
    bed.clock.now_s += 200.0
    bed.tiers = ("host",) * 2 + ("disk",) * 2
    name = bed.begin(bed.open(60))
    plan = bed.plan.plan_step([])
    assert len(plan.loads) == 1 and plan.probe is None
    bed.finish(name, {"host": 2 * CHUNK})
    probe = bed.plan.plan_step([]).probe
    assert probe is not None and probe.start == 3 * CHUNK


def test_a_tier_that_was_never_observed_is_probed_until_it_is_known() -> None:
    bed = Bed({"host": 0.001})
    bed.tiers = ("disk",) * 5
    name = bed.begin(bed.open(60))
    plan = bed.plan.plan_step([])
    (load,) = plan.loads
    assert plan.probe is None
    assert load.limit_s == pytest.approx(5 * CHUNK * TOKEN_S, rel=0.1), "no longer than computing takes"
    bed.chunk_s["disk"] = 1.0
    bed.plan.apply_report(
        StepReport(loaded={name: Loaded({"disk": CHUNK}, True, 1.0, read_s={"disk": 1.0}, given_back=True)})
    )
    bed.plan.arrived({name})
    starts = []
    while (probe := bed.plan.plan_step([]).probe) is not None:
        starts.append(probe.start)
        bed.plan.apply_report(probed(1.0))
    assert starts == [4 * CHUNK, 3 * CHUNK], "with the load's own, three observations"
    bed.close(name)
    assert bed.close(bed.begin(bed.open(61)))["decision"] == "slow tier"


def test_a_probe_ends_when_all_ranks_have_told() -> None:
    settings = ServingSettings.of({"chunk_tokens": CHUNK})
    plan = Planner(settings, (SPEC, SPEC), BLOCK, lambda lookup: ("disk",) * len(lookup.keys[0]))
    plan.open("r", list(range(20)), b"", PLAIN)
    offered = plan.matched_tokens("r", 0) or 0
    plan.allocated("r", offered, blocks_for(20))
    assert len(plan.plan_step([]).loads) == 1
    plan.apply_report(StepReport(loaded={"r": Loaded({"disk": 16}, False, 1.0, ranks=2)}))
    plan.arrived({"r"})
    first = plan.plan_step([]).probe
    assert first is not None and len(first.keys) == 2
    plan.apply_report(probed(0.5))
    assert plan.plan_step([]).probe is None
    plan.apply_report(probed(0.7))
    second = plan.plan_step([]).probe
    assert second is not None and second.start < first.start


def test_a_chunk_that_is_lost_teaches_only_that_it_takes_longer() -> None:
    bed = Bed({"disk": 1.0})
    bed.clock.now_s += 200.0
    before = bed.plan._control._controller.load_s("disk", CHUNK * SPEC.token_bytes)
    assert before is not None
    for seconds in (0.0, 5.0):
        left_alone(bed)
        assert bed.plan.plan_step([]).probe is not None
        bed.plan.apply_report(StepReport(probed=Loaded({}, True, seconds, read_s={"": seconds})))
        bed.clock.now_s += 700.0
        after = bed.plan._control._controller.load_s("disk", CHUNK * SPEC.token_bytes)
        assert after == before if not seconds else after is not None and after > before


def test_always_probes_nothing_and_a_reset_forgets_what_was_to_be_probed() -> None:
    bed = Bed({"disk": 1.0}, load_or_recompute="always")
    bed.clock.now_s += 200.0
    bed.tiers = ("disk",) * 4
    bed.finish(bed.begin(bed.open(60)), {"disk": 4 * CHUNK})
    assert bed.plan.plan_step([]).probe is None
    bed = Bed({"disk": 1.0})
    bed.clock.now_s += 200.0
    left_alone(bed)
    bed.plan.reset()
    assert bed.plan.plan_step([]).probe is None


def test_loads_that_run_at_once_are_learned_together() -> None:
    """The first has waited for nobody, the last for all: alone, the next one is expected to take what they took."""
    bed = Bed({"disk": 0.01})
    bed.tiers = ("disk",) * 4
    for _ in range(3):
        names = [bed.begin(bed.open(34)) for _ in range(4)]
        for name, share in zip(names, (0.25, 0.58, 1.08, 2.09), strict=True):  # of one device that serves in turn
            bed.chunk_s["disk"] = 0.01 * share
            bed.finish(name, {"disk": 4 * CHUNK})
    name = bed.begin(bed.open(34))
    expected = bed.close(name)["expected_load_s"]
    assert expected == pytest.approx(4 * 0.01 + 2 * TOKEN_S, rel=0.1)


def test_a_load_that_was_given_back_is_no_failure_and_not_offered_again() -> None:
    bed = Bed({"disk": 0.001})
    bed.tiers = ("disk",) * 4
    name = bed.begin(bed.open(60))
    bed.plan.plan_step([])
    bed.plan.apply_report(StepReport(loaded={name: Loaded({}, True, 0.2, given_back=True)}))
    bed.plan.arrived({name})
    assert bed.plan.matched_tokens(name, 0) == 0
    usage = bed.close(name)
    assert (usage["decision"], usage["failed"]) == ("computes while waiting", False)
    assert bed.plan.take_counts()["decisions.computes while waiting"] == 1


def test_what_never_pays_is_not_saved() -> None:
    def saved(bed: Bed) -> int:
        name = bed.begin(bed.open(60))
        count = len(bed.plan.plan_step([Scheduled(name, 60, blocks_for(60), 60)]).saves)
        bed.close(name)
        return count

    assert saved(Bed({"disk": 1.0})) == 7, "whose tiers are not known stores"
    bed = Bed({"disk": 1.0})
    bed.plan._control.tiers = ("disk",)
    assert saved(bed) == 0
    bed.plan._control.tiers = ("host", "disk")
    assert saved(bed) == 7


@pytest.mark.parametrize("at_once", [True, False])
def test_why_nothing_was_found_is_said(at_once: bool) -> None:
    plan = Planner(
        ServingSettings.of({"chunk_tokens": CHUNK}),
        (SPEC,),
        BLOCK,
        Shelf() if at_once else None,
        why_missing=lambda _: "evicted",
    )
    plan.open("r", list(range(20)), b"", PLAIN)
    offered = plan.matched_tokens("r", 0)
    if not at_once:
        assert offered is None
        (lookup,) = plan.plan_step([]).lookups
        plan.apply_report(StepReport(found_prefixes={lookup.number: ()}, missing={lookup.number: "expired"}))
        offered = plan.matched_tokens("r", 0)
    assert offered == 0
    plan.allocated("r", 0, blocks_for(20))
    usage = plan.close("r")
    assert usage is not None
    assert usage["decision"] == ("evicted" if at_once else "expired")


def test_what_others_compute_is_told_without_counting_anew() -> None:
    bed = Bed({"disk": 0.05})
    bed.begin(bed.open(4000))
    bed.tiers = ("disk",) * 40
    names = [bed.begin(bed.open(330)) for _ in range(6)]
    control = bed.plan._control
    for name in (*names, "unknown"):
        queue = control.queue(name)
        assert control._without(control.queue(""), name) == pytest.approx(
            (queue.compute_tokens, queue.compute_position)
        )
    assert control._without(Queue(), names[0]) == (0, 0.0)
