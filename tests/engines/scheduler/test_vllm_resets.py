"""After a reset nothing of before is loaded, stored, or remembered: vLLM's real scheduler, other weights, no model.

The worker's KV tells by which weights it was computed; an answer is right if each of its tokens is what the weights of
its step make of all tokens before it.
"""

import random
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip(
    "vllm", reason="stock vLLM is not installed here; `make test-engines` runs this in its own environment"
)

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
    step_and_reset,
    store_documents,
)
from .conftest import SIMULATED_BLOCK

pytestmark = NEEDS_SCHEDULER

MakeScheduler = Callable[..., Any]
OpenWorker = Callable[..., SimulatedWorker]


def update_weights(worker: SimulatedWorker) -> None:
    """As users do it: requests are preempted, everything is forgotten, then the weights change."""
    assert worker.scheduler.reset_prefix_cache(True, True)
    worker.weights += 1


@pytest.mark.parametrize("at_once", [True, False])
def test_requests_that_run_and_wait(make_scheduler: MakeScheduler, open_worker: OpenWorker, at_once: bool) -> None:
    store, texts = SimulatedStore(), [prompt(seed, 100 + seed) for seed in range(3)]
    worker = open_worker(make_scheduler(blocks=16), at_once=at_once, store=store)
    for text in texts[:2]:
        ask(worker, text)
    forget(worker)
    names = [worker.add(text, tokens=30) for text in texts]
    for _ in range(12):
        worker.step()
    running, waiting = (queue_of(worker, kind) for kind in ("running", "waiting"))
    assert running
    assert waiting
    update_weights(worker)
    before = len(store)
    worker.run()
    assert all(worker.is_right(name, text) for name, text in zip(names, texts, strict=True))
    assert {1} <= {by for name in names for by in worker.weights_of[name]}
    assert all(worker.usage[name]["loaded_tokens"] == {} for name in waiting), "what was stored is not found"
    assert len(store) > before, "and stored again, under other names"
    finish(worker)
    other = open_worker(make_scheduler(), at_once=at_once, store=store)
    assert [ask(other, text) for text in texts] == [plain_answer(text, 4) for text in texts], "another engine's names"


def queue_of(worker: SimulatedWorker, kind: str) -> list[str]:
    return [request.request_id for request in getattr(worker.scheduler, kind)]


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("steps", range(1, 6))
@pytest.mark.parametrize("is_in_flight", [False, True], ids=["between steps", "while a step is under way"])
def test_a_load_that_is_under_way_is_lost(
    make_scheduler: MakeScheduler, open_worker: OpenWorker, at_once: bool, steps: int, is_in_flight: bool
) -> None:
    """It may even be over, and vLLM not know of it yet. vLLM cannot preempt such a request, and says so."""
    worker = open_worker(make_scheduler(caching=False), at_once=at_once)
    text, other = prompt(1, 120), prompt(2, 90)
    ask(worker, text)
    name, beside = worker.add(text), worker.add(other)
    if not step_and_reset(worker, name, steps, is_in_flight=is_in_flight):
        assert worker.is_right(name, text)
    again = worker.add(text), worker.add(other)
    worker.run()
    assert worker.is_right(again[0], text), "nothing old was stored under a new name"
    assert worker.is_right(again[1], other)
    assert worker.answers[beside]
    finish(worker)


@pytest.mark.parametrize("steps", range(1, 9))
@pytest.mark.parametrize("is_in_flight", [False, True], ids=["between steps", "while a step is under way"])
def test_a_fusion_that_is_under_way_is_lost(
    make_scheduler: MakeScheduler, open_worker: OpenWorker, steps: int, is_in_flight: bool
) -> None:
    worker = open_worker(make_scheduler(caching=False), slice_tokens=20)
    store_documents(worker)
    tokens, spans = in_context(31)
    name = worker.add(tokens, documents(spans, 0.2))
    if not step_and_reset(worker, name, steps, is_in_flight=is_in_flight):
        assert worker.is_right(name, tokens), "no document of before is found, so that all is computed"
    found = worker.add(tokens)
    worker.run()
    assert worker.is_right(found, tokens)
    finish(worker)


@pytest.mark.parametrize("recognised", [False, True], ids=["named", "recognised"])
def test_documents_are_forgotten(
    make_scheduler: MakeScheduler, open_worker: OpenWorker, recognised: bool, tmp_path: Any
) -> None:
    """Also those that are recognised by what they say, and what fusions have chosen; new ones are stored anew."""
    settings = {"match_tokens": 16, "disk_path": str(tmp_path), "fusion_ratio": 0.2} if recognised else {}
    worker = open_worker(make_scheduler(**settings))
    store_documents(worker)
    tokens, spans = in_context(31)
    options = None if recognised else documents(spans, 0.2)
    fused = ask(worker, tokens, options)
    assert fused != plain_answer(tokens, 4)
    update_weights(worker)
    name = worker.add(tokens, options)
    worker.run()
    assert worker.is_right(name, tokens)
    store_documents(worker)
    again = ask(worker, tokens, options)
    assert again != plain_answer(tokens, 4, 1), "fused, of documents of the new weights"
    assert again != fused
    assert ask(worker, tokens, {"ratio": 1.0}) == plain_answer(tokens, 4, 1)
    finish(worker)
    beside = open_worker(make_scheduler(**settings), store=worker.store)
    assert ask(beside, tokens, options) == fused, "another engine finds what there was, and nothing of the new weights"


@pytest.mark.parametrize("seed", range(8))
def test_anything_at_any_time(make_scheduler: MakeScheduler, open_worker: OpenWorker, seed: int) -> None:
    """Requests come, are aborted, preempt one another, lose chunks, hang, are fused; weights change in between."""
    rng = random.Random(seed)
    worker = open_worker(make_scheduler(blocks=34), at_once=seed % 2 == 0, slice_tokens=30)
    store_documents(worker)
    plain: dict[str, list[int]] = {}
    for _ in range(80):
        kind = rng.randrange(5)
        tokens, spans = in_context(40 + rng.randrange(3))
        if kind == 0:
            worker.add(tokens, documents(spans, 0.2), tokens=rng.randrange(1, 40))
        else:
            tokens = tokens[: rng.randrange(5, len(tokens))] + prompt(rng.randrange(4), 9)
            name = worker.add(tokens, tokens=rng.randrange(1, 40))
            plain[name] = tokens
            if kind == 1:
                worker.faults.lost_from[name] = rng.randrange(len(tokens))
        if rng.random() < 0.2:
            worker.faults.held.add(rng.choice(list(worker.requests)))
        for _ in range(rng.randrange(4)):
            worker.step()
        if rng.random() < 0.1:
            worker.abort(rng.choice(list(worker.requests)))
        if rng.random() < 0.3:
            worker.faults.held.clear()
        if rng.random() < 0.25:
            try:
                update_weights(worker)
            except RuntimeError:  # a load is under way: vLLM does not preempt, and the weights stay
                worker.faults.held.clear()
    worker.faults.held.clear()
    worker.run()
    assert worker.weights > 3
    assert [name for name, tokens in plain.items() if not worker.is_right(name, tokens)] == []
    assert sum(sum(worker.usage[name]["loaded_tokens"].values()) for name in plain if name in worker.usage) > 0
    finish(worker)


def test_before_the_workers_have_introduced_themselves(make_scheduler: MakeScheduler) -> None:
    worker = SimulatedWorker(make_scheduler())
    text = prompt(1, 5 * SIMULATED_BLOCK)
    name = worker.add(text)
    assert worker.scheduler.reset_prefix_cache(True, True)
    worker.run()
    assert worker.answers[name] == plain_answer(text, 4)
    assert worker.usage[name]["saved_chunks"] == 5, "it waited a step for them"
