"""Load or recompute: the decisions of the controller, by costs that the test makes up."""

import subprocess
import sys
from pathlib import Path

import pytest

import kvloom
from kvloom.connectors.serving.controller.controller import Controller
from kvloom.connectors.serving.controller.decisions import REASONS, Decision, Queue, StoredPrefix, StoredRun

CHUNK_TOKENS, CHUNK_BYTES = 256, 1_000_000
TOKEN_S, CONTEXT_S, STEP_S = 1e-3, 1e-7, 0.01  # of computing: a token, a token for each token before it, a step


class Machine:
    """A made-up machine: `latency_s`, `byte_s` by tier. Its controller has seen it work, unless `seen` is False."""

    def __init__(self, tiers: dict[str, tuple[float, float]], *, seen: bool = True, overlaps: bool = True) -> None:
        self.now_s = 1000.0
        self.tiers = tiers
        self.controller = Controller(lanes=4, overlaps=overlaps, clock=lambda: self.now_s)
        for _ in range(12 if seen else 0):
            self.compute(512, 0)
            self.compute(256, 1024)
            self.compute(1024, 2048)
            for tier in tiers:
                self.load(tier, 1)
                self.load(tier, 7)

    def compute(self, tokens: int, first: int) -> None:
        self.controller.observe_prefill(tokens, first + tokens / 2, self.compute_s(tokens, first))

    def load(self, tier: str, chunks: int) -> None:
        self.controller.observe_load(tier, chunks * CHUNK_BYTES, self.load_s(tier, chunks))

    def compute_s(self, tokens: int, first: int) -> float:
        return STEP_S + tokens * TOKEN_S + tokens * (first + tokens / 2) * CONTEXT_S if tokens else 0.0

    def load_s(self, tier: str, chunks: int) -> float:
        latency_s, byte_s = self.tiers[tier]
        return latency_s + byte_s * chunks * CHUNK_BYTES

    def decide(self, *runs: tuple[str, int], prompt: int | None = None, queue: Queue | None = None) -> Decision:
        stored = prefix(*runs, prompt=prompt)
        return self.controller.decide(stored) if queue is None else self.controller.decide(stored, queue)


def prefix(*runs: tuple[str, int], prompt: int | None = None, computed: int = 0) -> StoredPrefix:
    total = sum(chunks for _, chunks in runs) * CHUNK_TOKENS
    each = [StoredRun(tier, chunks, CHUNK_BYTES, CHUNK_TOKENS) for tier, chunks in runs]
    return StoredPrefix(each, 0, computed, total + 16 if prompt is None else prompt)


FAST, SLOW, FAR = (1e-4, 1e-9), (0.01, 1e-6), (2.0, 1e-9)  # computing a chunk takes about 0.27 s


def test_costs_are_learned() -> None:
    machine = Machine({"host": FAST, "far": FAR})
    controller = machine.controller
    assert controller.load_s("far", 20 * CHUNK_BYTES) == pytest.approx(machine.load_s("far", 20), rel=1e-2)
    assert controller.load_s("host", 3 * CHUNK_BYTES) == pytest.approx(machine.load_s("host", 3), rel=1e-2)
    assert controller.prefill_s(4096, 8192) == pytest.approx(machine.compute_s(4096, 8192), rel=1e-2)
    assert controller.load_s("disk", 1) is None


def test_without_observations_all_is_loaded() -> None:
    machine = Machine({"host": FAST}, seen=False)
    assert machine.decide(("host", 9)) == Decision(9, "untried")
    machine.compute(512, 0)
    machine.load("host", 1)
    assert machine.decide(("host", 9)).reason == "untried", "first observations warm up"
    assert Machine({"host": FAST}).decide(("host", 2), ("disk", 3)).reason == "untried"
    assert machine.decide() == Decision(0, "nothing stored")


def test_a_fast_tier_is_loaded_and_a_slow_one_left_alone() -> None:
    machine = Machine({"host": FAST, "disk": SLOW})
    decision = machine.decide(("host", 8))
    assert (decision.chunks, decision.reason) == (8, "loads")
    assert decision.load_s == pytest.approx(machine.load_s("host", 8) + machine.compute_s(16, 2048), rel=0.02)
    assert decision.compute_s == pytest.approx(machine.compute_s(2064, 0), rel=0.02)
    decision = machine.decide(("disk", 8))
    assert (decision.chunks, decision.reason) == (0, "slow tier")
    assert decision.load_s == pytest.approx(machine.load_s("disk", 8) + machine.compute_s(16, 2048), rel=0.02)
    decision = machine.decide(("host", 3), ("disk", 5))
    assert (decision.chunks, decision.reason) == (3, "shortened")


def test_a_latency_pays_for_long_prompts_only() -> None:
    machine = Machine({"far": FAR})
    assert machine.decide(("far", 2)).reason == "too short to pay"
    assert machine.decide(("far", 12)).reason == "loads"


def test_tokens_behind_a_long_context_take_longer_to_compute() -> None:
    machine = Machine({"disk": (0.0, 0.5e-6)})  # 0.5 s a chunk
    assert machine.decide(("disk", 2)).chunks == 0
    begin = 20_000
    stored = StoredPrefix([StoredRun("disk", 2, CHUNK_BYTES, CHUNK_TOKENS)], begin, begin, begin + 528)
    assert machine.controller.decide(stored).chunks == 2


def test_what_the_engine_has_is_not_worth_loading() -> None:
    machine = Machine({"disk": (0.0, 0.2e-6)})  # 0.2 s a chunk
    assert machine.decide(("disk", 1)).chunks == 1
    stored = prefix(("disk", 1), computed=192)
    assert machine.controller.decide(stored).chunks == 0


def test_what_loads_while_the_engine_is_busy_is_free() -> None:
    machine = Machine({"disk": SLOW})
    queue = Queue(compute_tokens=3500, compute_position=0)
    decision = machine.decide(("disk", 8), queue=queue)
    assert (decision.chunks, decision.reason) == (3, "shortened"), "three chunks of a second each"
    assert Machine({"disk": SLOW}, overlaps=False).decide(("disk", 8), queue=queue).chunks == 0


def test_a_queue_of_loads_is_avoided() -> None:
    machine = Machine({"disk": (0.0, 0.1e-6)})
    ahead = {"disk": 200 * CHUNK_BYTES}
    assert machine.decide(("disk", 8), queue=Queue(3, ahead)).reason == "loads", "a lane is free"
    decision = machine.decide(("disk", 8), queue=Queue(4, ahead))
    assert (decision.chunks, decision.reason) == (0, "load queue")


def test_who_waits_for_a_load_computes_when_that_is_faster() -> None:
    machine = Machine({"disk": (0.0, 0.1e-6)})
    stored, ahead = prefix(("disk", 8)), {"disk": 200 * CHUNK_BYTES}
    assert machine.controller.pays_to_wait(stored, Queue(4, ahead, compute_tokens=5000))
    assert not machine.controller.pays_to_wait(stored, Queue(4, ahead))
    assert machine.controller.pays_to_wait(stored, Queue(3, ahead))
    assert Machine({"disk": SLOW}, seen=False).controller.pays_to_wait(stored, Queue(4, ahead))


def test_all_or_nothing_where_a_part_is_of_no_use() -> None:
    machine = Machine({"host": FAST, "disk": SLOW})
    stored = prefix(("host", 3), ("disk", 5))
    assert machine.controller.decide(stored, may_shorten=False).chunks == 0
    stored = prefix(("host", 30), ("disk", 1))
    assert machine.controller.decide(stored, may_shorten=False).chunks == 31


def test_a_slow_tier_is_probed_beside_requests_and_found_to_be_fast() -> None:
    machine = Machine({"disk": SLOW})
    due = machine.controller.is_probe_due
    assert machine.decide(("disk", 8)).reason == "slow tier"
    machine.now_s += 4.0
    assert not due("disk", CHUNK_BYTES)
    machine.now_s += 95.0  # one chunk takes 1.01 s
    assert not due("disk", CHUNK_BYTES)
    machine.now_s += 3.0
    assert due("disk", CHUNK_BYTES)
    assert machine.decide(("disk", 8)).reason == "slow tier", "no request pays for it"
    machine.controller.begin_probe("disk")
    assert not due("disk", CHUNK_BYTES), "whatever comes of it, not again for a while"
    machine.tiers["disk"] = FAST
    machine.load("disk", 1)
    probes = 1
    while machine.decide(("disk", 8)).chunks < 7:  # or a trial of computing
        machine.now_s += 5.0
        if due("disk", CHUNK_BYTES):
            probes += 1
            machine.controller.begin_probe("disk")
            machine.load("disk", 1)
        assert machine.now_s < 2000.0
    assert 2 <= probes <= 8


def test_a_tier_of_unknown_cost_is_due_at_once_until_it_is_known() -> None:
    machine = Machine({"host": FAST})
    machine.tiers["disk"] = SLOW
    for _ in range(3):
        assert machine.controller.is_probe_due("disk", CHUNK_BYTES)
        machine.controller.begin_probe("disk")
        machine.load("disk", 1)
    assert not machine.controller.is_probe_due("disk", CHUNK_BYTES)
    assert machine.decide(("disk", 8)).reason == "slow tier"


def test_what_was_never_observed_is_loaded_no_longer_than_computing_takes() -> None:
    machine = Machine({"host": FAST})
    decision = machine.decide(("disk", 8))
    assert (decision.chunks, decision.reason, decision.load_s) == (8, "untried", None)
    assert decision.compute_s == pytest.approx(machine.compute_s(2064, 0), rel=0.02)
    assert decision.limit_s == pytest.approx(machine.compute_s(2048, 0), rel=0.02)
    busy = machine.decide(("disk", 8), queue=Queue(compute_tokens=10_000)).limit_s
    assert busy is not None and busy > 10.0, "what loads while the engine is busy is free"
    assert Machine({"host": FAST}, seen=False).decide(("disk", 8)).limit_s is None


def test_computing_is_tried_again_with_one_chunk() -> None:
    machine = Machine({"host": FAST})
    machine.now_s += 299.0
    assert machine.decide(("host", 8)).chunks == 8
    machine.now_s += 301.0
    decision = machine.decide(("host", 8))
    assert (decision.chunks, decision.reason) == (7, "trial")
    assert machine.controller.decide(prefix(("host", 8)), may_shorten=False).chunks == 8, "not with all of it"
    machine.controller.begin(decision)
    assert machine.decide(("host", 8)).chunks == 8


def test_a_trial_never_loses_more_than_a_hundredth_of_the_time() -> None:
    machine = Machine({"host": FAST})
    machine.now_s += 1000.0
    stored = StoredPrefix([StoredRun("host", 8, CHUNK_BYTES, 40_000)], 0, 0, 320_016)  # a chunk takes a minute
    assert machine.controller.decide(stored).reason == "loads"
    machine.now_s += 500_000.0
    assert machine.controller.decide(stored).reason == "trial"


def test_a_tier_that_becomes_slow_is_left_after_few_loads() -> None:
    machine = Machine({"disk": FAST})
    machine.tiers["disk"] = SLOW
    loads = 0
    while machine.decide(("disk", 8)).chunks:
        machine.load("disk", 8)
        loads += 1
    assert loads <= 3


def test_one_stall_does_not_condemn_a_tier() -> None:
    machine = Machine({"disk": FAST})
    machine.controller.observe_load("disk", CHUNK_BYTES, 10.0)
    assert machine.decide(("disk", 8)).reason == "loads"


def test_a_load_is_given_up_when_computing_could_have_been_over() -> None:
    machine = Machine({"host": FAST})
    limit_s = machine.decide(("host", 8)).limit_s
    assert limit_s is not None
    assert limit_s == pytest.approx(machine.load_s("host", 8) + machine.compute_s(2048, 0), rel=0.02)
    busy = machine.decide(("host", 8), queue=Queue(compute_tokens=100_000)).limit_s
    assert busy is not None and busy > 100.0


def test_only_what_never_pays_is_not_stored() -> None:
    machine = Machine({"disk": SLOW, "host": FAST})
    ask = machine.controller.pays_to_store
    assert not ask(["disk"], CHUNK_BYTES, CHUNK_TOKENS, 2048)
    assert ask(["disk"], CHUNK_BYTES, CHUNK_TOKENS, 40_000), "computing takes longer behind a long context"
    assert ask(["host", "disk"], CHUNK_BYTES, CHUNK_TOKENS, 2048)
    assert ask(["disk", "new"], CHUNK_BYTES, CHUNK_TOKENS, 2048)
    assert ask([], CHUNK_BYTES, CHUNK_TOKENS, 2048)
    machine.now_s += 601.0
    assert ask(["disk"], CHUNK_BYTES, CHUNK_TOKENS, 2048), "what was slow long ago may be fast now"
    assert Machine({"disk": SLOW}, seen=False).controller.pays_to_store(["disk"], CHUNK_BYTES, CHUNK_TOKENS, 0)


def test_decisions_are_the_same_for_the_same_history() -> None:
    first, second = (Machine({"host": FAST, "disk": SLOW}) for _ in range(2))
    for runs in ([("host", 3), ("disk", 9)], [("disk", 2)], [("host", 40)]):
        assert first.decide(*runs) == second.decide(*runs) == first.decide(*runs)
        assert first.decide(*runs).reason in REASONS


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, kvloom.connectors.serving.controller.controller; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(kvloom.__file__).parent.parent, timeout=240)
