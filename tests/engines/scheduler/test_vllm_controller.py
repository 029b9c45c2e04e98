"""Load or recompute beside vLLM's real scheduler: whatever is decided, every answer is right."""

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import pytest

pytest.importorskip(
    "vllm", reason="stock vLLM is not installed here; `make test-engines` runs this in its own environment"
)

from kvloom.connectors.serving.controller.controller import Controller
from kvloom.connectors.serving.controller.decisions import Decision, StoredPrefix
from kvloom.connectors.serving.controller.fusion_choice import FusionChoice, FusionWay
from kvloom.connectors.serving.scheduler import load_control

from ...vllm.simulated import (
    NEEDS_SCHEDULER,
    SimulatedStore,
    SimulatedWorker,
    ask,
    documents,
    finish,
    forget,
    in_context,
    plain_answer,
    prompt,
    store_documents,
)

pytestmark = NEEDS_SCHEDULER

MakeScheduler = Callable[..., Any]
OpenWorker = Callable[..., SimulatedWorker]


def asked(worker: SimulatedWorker, text: list[int]) -> dict[str, Any]:
    """What is told of a request whose answer is right."""
    forget(worker)
    name = worker.add(text)
    worker.run()
    assert worker.answers[name] == plain_answer(text, 4)
    return worker.usage[name]


@pytest.mark.parametrize("at_once", [True, False])
def test_a_slow_tier_is_left_alone(make_scheduler: MakeScheduler, open_worker: OpenWorker, at_once: bool) -> None:
    worker = open_worker(make_scheduler(), at_once=at_once)
    texts = [prompt(seed, 100) for seed in range(5)]
    told = [asked(worker, text) for text in texts]
    assert {each["decision"] for each in told} == {"never stored"}
    worker.faults.token_s = lambda: 1.0
    told = [asked(worker, text) for text in texts]
    assert [each["decision"] for each in told] == ["untried"] + ["slow tier"] * 4
    assert [each["loaded_tokens"] for each in told] == [{"host": 96}] + [{}] * 4
    assert len(worker.probes) == 2, "which others learn from"
    finish(worker)


def test_always_loads(make_scheduler: MakeScheduler, open_worker: OpenWorker) -> None:
    worker = open_worker(make_scheduler(load_or_recompute="always"))
    worker.faults.token_s = lambda: 1.0
    for _ in range(6):
        told = asked(worker, prompt(1, 100))
    assert (told["decision"], told["loaded_tokens"]) == ("always", {"host": 96})
    finish(worker)


def test_a_hit_ends_where_the_slow_tier_begins(
    make_scheduler: MakeScheduler, open_worker: OpenWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    look_up = SimulatedWorker.look_up

    def tiers(self: SimulatedWorker, lookup: Any) -> tuple[str, ...]:
        return tuple("host" if index < 2 else "disk" for index, _ in enumerate(look_up(self, lookup)))

    monkeypatch.setattr(SimulatedWorker, "look_up", tiers)
    worker = open_worker(make_scheduler())
    for seed in range(4):
        asked(worker, prompt(seed, 100))
    connector = worker.scheduler.connector
    controller = connector.scheduler_half._planner._control._controller
    for _ in range(4):
        controller.observe_load("host", 32 * 256, 1e-6)
        controller.observe_load("disk", 32 * 256, 10.0)
    told = asked(worker, prompt(1, 100))
    assert (told["decision"], told["loaded_tokens"]) == ("shortened", {"host": 32})
    finish(worker)


@pytest.mark.parametrize("at_once", [True, False])
def test_loads_that_wait_are_given_back(
    make_scheduler: MakeScheduler, open_worker: OpenWorker, at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that have not begun: vLLM computes them, from a local hit if there is one, and asks for them no more."""
    worker = open_worker(make_scheduler(blocks=500), at_once=at_once)
    texts = [prompt(seed, 100) for seed in range(7)]
    for text in texts:
        ask(worker, text)
    forget(worker)
    names = [worker.add(text) for text in texts]
    worker.faults.held.update(names)
    for _ in range(3):
        worker.step()
    assert list(worker.loads) == names
    monkeypatch.setattr(Controller, "pays_to_wait", lambda *_: False)
    for _ in range(8):
        worker.step()
    done = [name for name in names if worker.answers[name]]
    assert done == names[4:]
    worker.faults.held.clear()
    worker.run()
    assert [worker.answers[name] for name in names] == [plain_answer(text, 4) for text in texts]
    told = [worker.usage[name] for name in names]
    assert [each["decision"] for each in told] == ["untried"] * 4 + ["computes while waiting"] * 3
    assert not any(each["failed"] for each in told)
    assert [each["loaded_tokens"] for each in told] == [{"host": 96}] * 4 + [{}] * 3
    finish(worker)


@pytest.mark.parametrize("policy", ["recompute", "fail"])
@pytest.mark.parametrize("seed", range(4))
def test_any_decision_at_any_time(
    make_scheduler: MakeScheduler,
    open_worker: OpenWorker,
    seed: int,
    policy: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Any part of a hit is loaded, loads wait and are given back, requests are aborted and preempted."""
    rng = random.Random(seed)
    caching = seed % 2 == 0
    scheduler = make_scheduler(policy=policy, blocks=60 if caching else 100, caching=caching)
    worker = open_worker(scheduler, at_once=seed < 2, store=SimulatedStore(40))

    def decide(_: Controller, stored: StoredPrefix, *__: object, may_shorten: bool) -> Decision:
        assert may_shorten
        return Decision(rng.randrange(stored.chunks + 1), "loads" if stored.chunks else "nothing stored")

    monkeypatch.setattr(Controller, "decide", decide)
    monkeypatch.setattr(load_control, "LOADERS", 1)  # so that more of them wait
    monkeypatch.setattr(Controller, "pays_to_wait", lambda *_: rng.random() < 0.5)
    bases, texts = [prompt(each, 150) for each in range(8)], {}
    for _ in range(60):
        for _ in range(rng.randrange(1, 6)):
            text = [*rng.choice(bases)[: rng.randrange(30, 150)], *prompt(rng.randrange(1000), 5)]
            texts[worker.add(text, tokens=rng.randrange(1, 20))] = text
        for _ in range(rng.randrange(6)):
            if rng.random() < 0.8:
                worker.faults.held.update(worker.loads)
            worker.step()
            worker.faults.held.clear()
        if rng.random() < 0.1:
            doomed = rng.choice(list(texts))
            worker.abort(doomed)
            del texts[doomed]
    worker.run()
    assert worker.failed == set()
    assert all(worker.is_right(name, text) for name, text in texts.items())
    reasons = {worker.usage[name]["decision"] for name in texts}
    assert {"never stored", "loads"} <= reasons
    is_given_back = "computes while waiting" in reasons
    assert not is_given_back if policy == "fail" else is_given_back or caching
    finish(worker)


@pytest.mark.parametrize("seed", range(4))
def test_any_fusion_at_any_time(
    make_scheduler: MakeScheduler, open_worker: OpenWorker, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests of documents are fused in any way or computed, beside plain ones of the same tokens: whose KV is exact
    answers exactly, and requests whose KV has one name answer alike.
    """
    rng = random.Random(seed)
    scheduler = make_scheduler(blocks=80 if seed % 2 else 200)
    worker = open_worker(scheduler, at_once=seed < 2, slice_tokens=40)
    store_documents(worker)
    half = scheduler.connector.scheduler_half

    def decide(_: object, ways: Sequence[FusionWay], *__: object) -> tuple[Decision, FusionWay | None]:
        way = rng.choice([*ways, None])
        reason = "fusion does not pay" if way is None else "fuses"
        return Decision(0 if way is None else 1, reason), way  # type: ignore[arg-type]

    names: dict[str, tuple[int | None, bytes]] = {}
    close = half._planner.close

    def closed(request_id: str) -> Any:
        if request_id in half._planner._tracked:
            names[request_id] = half._planner.fusion_name(request_id)
        return close(request_id)

    monkeypatch.setattr(FusionChoice, "decide", decide)
    monkeypatch.setattr(FusionChoice, "is_known", property(lambda _: True))
    monkeypatch.setattr(half._planner, "close", closed)
    contexts = [in_context(each, order) for each, order in ((1, (2, 0, 1)), (1, (0, 2, 1)), (2, (1, 2, 0)))]
    texts: dict[str, list[int]] = {}
    for _ in range(50):
        for _ in range(rng.randrange(1, 4)):
            tokens, spans = rng.choice(contexts)
            options = documents(spans, rng.choice((0.2, 0.5))) if rng.random() < 0.7 else None
            texts[worker.add(tokens, options, tokens=6)] = tokens
        for _ in range(rng.randrange(8)):
            if rng.random() < 0.3:
                worker.faults.held.update(worker.fusions)
            worker.step()
            worker.faults.held.clear()
        if rng.random() < 0.1:
            doomed = rng.choice(list(texts))
            worker.abort(doomed)
            del texts[doomed]
        if rng.random() < 0.1:
            worker.run()
            forget(worker)
    worker.run()
    assert worker.failed == set()
    fused = {name for name in texts if worker.usage[name]["fused"] != "no"}
    exact = [name for name in texts if names[name][0] is None]
    assert not fused & set(exact) and len(fused) > 20 and len(exact) > 20
    assert all(worker.is_right(name, texts[name]) for name in exact)
    alike = defaultdict(set)
    for name in fused:
        if worker.usage[name]["fused"] == "yes":
            alike[names[name], tuple(texts[name])].add(tuple(worker.answers[name]))
    assert len(alike) > 6 and all(len(answers) == 1 for answers in alike.values())
    told = {worker.usage[name]["decision"] for name in texts}
    assert {"fuses", "fusion does not pay"} <= told
    finish(worker)
