"""Fuse or compute: decisions by costs that the test makes up, on a clock of its own."""

import pytest

from kvloom.connectors.serving.controller.controller import Controller
from kvloom.connectors.serving.controller.decisions import REASONS, Decision, Queue
from kvloom.connectors.serving.controller.fusion_choice import FusionChoice, FusionWay

TOKENS, BYTES = 1000, 1_000_000  # of a document
TOKEN_S = 1e-3  # of computing; a document takes 1 s
QUESTION = 100


class Machine:
    """Four documents and a question; `load_s`: of a document."""

    def __init__(self, load_s: float, *, seen: int = 12) -> None:
        self.now_s, self.load_s = 1000.0, load_s
        self.controller = Controller(lanes=1, clock=lambda: self.now_s)
        self.choice = FusionChoice(self.controller, clock=lambda: self.now_s)
        for _ in range(seen):
            self.compute()
            self.fuse()

    def compute(self) -> None:
        self.controller.observe_prefill(500, 250, 500 * TOKEN_S)

    def fuse(self) -> None:
        self.choice.observe_load("disk", 4, 4 * BYTES, 4 * self.load_s)
        self.choice.observe_passes(800.0, 2000.0, 800 * TOKEN_S)

    def decide(self, queue: Queue | None = None, ahead_s: float = 0.0) -> tuple[Decision, int | None]:
        """At ratio 0.2: 800 tokens go through the passes, however many documents are loaded."""
        ways = [
            FusionWay(
                first,
                0.2 * 4 / (4 - first),
                {"disk": 4 - first},
                {"disk": (4 - first) * BYTES},
                (0, first * TOKENS),
                800.0,
                2000.0,
                4 * TOKENS,
            )
            for first in range(4)
        ]
        queued = Queue() if queue is None else queue
        decision, way = self.choice.decide(ways, 4 * TOKENS + QUESTION, 0, queued, ahead_s)
        assert decision.reason in REASONS
        return decision, None if way is None else way.first


@pytest.mark.parametrize(
    ("load_s", "reason", "first", "expected_s"),
    [
        (0.001, "fuses", 0, 0.004 + 0.8 + 0.1),
        (0.2, "fuses", 0, 0.8 + 0.8 + 0.1),
        (0.4, "ratio raised", 1, 1.2 + 0.8 + 0.1),  # a document is computed while three are loaded
        (1.0, "ratio raised", 2, 2.0 + 0.8 + 0.1),
        (3.2, "fusion does not pay", None, 4.0),  # with one document left to load
    ],
)
def test_what_loading_hides_is_computed(load_s: float, reason: str, first: int | None, expected_s: float) -> None:
    decision, way = Machine(load_s).decide()
    assert (decision.reason, way) == (reason, first)
    assert decision.chunks == (0 if first is None else 4 - first)
    assert decision.compute_s == pytest.approx(4.1, rel=0.02)
    if first is not None:
        assert decision.load_s == pytest.approx(expected_s, rel=0.02)
    else:
        assert decision.load_s is not None and decision.load_s >= expected_s


@pytest.mark.parametrize(("seen", "reason"), [(0, "untried"), (2, "untried"), (3, "fusion does not pay")])
def test_in_doubt_it_fuses_as_it_was_asked_to(seen: int, reason: str) -> None:
    machine = Machine(100.0, seen=seen)
    decision, way = machine.decide()
    assert decision.reason == reason and (way == 0) == (reason == "untried")
    machine = Machine(0.001)
    for _ in range(2):  # of another tier: too few
        machine.choice.observe_load("far", 1, BYTES, 100.0)
    ways = [FusionWay(0, 0.2, {"far": 1}, {"far": BYTES}, (0, 0), 800.0, 2000.0, 4000)]
    assert machine.choice.decide(ways, 4100, 0)[0].reason == "untried"
    machine.choice.observe_load("far", 1, BYTES, 100.0)
    assert machine.choice.decide(ways, 4100, 0)[0].reason == "fusion does not pay"


def test_nothing_stored_is_nothing_to_fuse() -> None:
    assert Machine(0.001).choice.decide([], 4100, 0) == (Decision(0, "nothing stored"), None)


def test_what_others_wait_for_is_not_spent_on_a_higher_ratio() -> None:
    """Documents that load while the engine is busy cost nothing; to compute some of them costs the others."""
    machine = Machine(1.0)
    assert machine.decide()[1] == 2
    decision, way = machine.decide(Queue(compute_tokens=4000, compute_position=2000))
    assert (decision.reason, way) == ("fuses", 0)
    assert decision.load_s == pytest.approx(4.0 + 0.8 + 0.1, rel=0.02)
    assert decision.compute_s == pytest.approx(8.1, rel=0.02)


def test_loads_ahead_count() -> None:
    machine = Machine(0.2)
    assert machine.decide(ahead_s=10.0)[0].reason == "fusion does not pay"
    for _ in range(3):
        machine.controller.observe_load("disk", BYTES, 10.0)
    decision, _ = machine.decide(Queue(loads=1, load_bytes={"disk": BYTES}))
    assert decision.reason == "fusion does not pay"


def test_what_a_fusion_takes_beside_its_passes_counts() -> None:
    machine = Machine(0.001)
    assert machine.decide()[0].reason == "fuses"
    for _ in range(3):
        machine.choice.observe_beside(3.5)
    assert machine.decide()[0].reason == "fusion does not pay"


def test_fusions_that_do_not_pay_are_tried_again() -> None:
    """Once in a hundred times what that is expected to lose: what it teaches may change the decision."""
    machine = Machine(3.5)
    decision, way = machine.decide()
    assert decision.load_s is not None and decision.compute_s is not None
    loss_s = decision.load_s - decision.compute_s
    assert way is None and 0.0 < loss_s < 2.0
    machine.now_s += 299.0
    machine.compute()
    assert machine.decide()[0].reason == "fusion does not pay"
    machine.now_s += 2.0
    decision, way = machine.decide()
    assert decision.reason == "trial" and way is not None and decision.chunks > 0
    assert machine.decide()[0].reason == "trial", "as long as none has begun"
    machine.choice.begin(decision)
    assert machine.decide()[0].reason == "fusion does not pay"
    machine.load_s = 0.001
    for _ in range(8):
        machine.fuse()
    assert machine.decide()[0].reason == "fuses"


def test_computing_is_tried_again_where_all_is_fused() -> None:
    machine = Machine(0.001)
    machine.now_s += 301.0
    machine.fuse()
    assert machine.decide()[0].reason == "fuses", "it would lose 3.2 s, and waits for a hundred times that"
    machine.now_s += 25.0
    decision, way = machine.decide()
    assert (decision.reason, decision.chunks, way) == ("trial", 0, None)
    machine.choice.begin(decision)
    machine.compute()
    assert machine.decide()[0].reason == "fuses"
