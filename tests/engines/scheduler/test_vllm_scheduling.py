"""Pins, roles, and calls of later vLLM versions: vLLM's real scheduler, a worker without a model."""

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
    store_documents,
)

pytestmark = NEEDS_SCHEDULER

MakeScheduler = Callable[..., Any]
OpenWorker = Callable[..., SimulatedWorker]


# ------------------------------------------------------------------------------------------------------------- pins


class WithoutPins(SimulatedStore):
    """Keeps nothing from eviction."""

    def save(self, key: Any, kv: list[int]) -> None:
        self.pins.clear()
        super().save(key, kv)


def thrash(worker: SimulatedWorker, seed: int) -> dict[str, list[int]]:
    """Prompts that share beginnings, of which the store holds few, in bursts; each with its tokens."""
    rng = random.Random(seed)
    bases, texts = [prompt(seed, 150) for seed in range(8)], {}
    for _ in range(40):
        for _ in range(rng.randrange(1, 5)):
            text = [*rng.choice(bases)[: rng.randrange(30, 150)], *prompt(rng.randrange(1000), 5)]
            texts[worker.add(text, tokens=rng.randrange(1, 20))] = text
        for _ in range(rng.randrange(6)):
            if rng.random() < 0.5:
                worker.faults.held.update(worker.loads)
            worker.step()
            worker.faults.held.clear()
    worker.run()
    return texts


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_eviction_costs_no_request(
    make_scheduler: MakeScheduler, open_worker: OpenWorker, at_once: bool, seed: int
) -> None:
    """With the policy that vLLM has by default: a lost chunk would end its request with an error."""
    scheduler = make_scheduler(policy="fail", blocks=60, caching=False)
    worker = open_worker(scheduler, at_once=at_once, store=SimulatedStore(12))
    texts = thrash(worker, seed)
    assert worker.failed == set()
    assert all(worker.is_right(name, text) for name, text in texts.items())
    loaded = [name for name in texts if worker.usage[name]["loaded_tokens"]]
    assert len(loaded) > 10
    assert not any(worker.usage[name]["failed"] for name in texts)
    finish(worker)


def test_without_pins_it_does(make_scheduler: MakeScheduler, open_worker: OpenWorker) -> None:
    """What the test before would not see if it were otherwise."""
    scheduler = make_scheduler(policy="fail", blocks=60, caching=False)
    worker = open_worker(scheduler, at_once=False, store=WithoutPins(12))
    texts = thrash(worker, 0)
    assert len(worker.failed) > 1
    assert all(worker.is_right(name, text) for name, text in texts.items() if name not in worker.failed)


# ------------------------------------------------------------------------------------------------------------ roles


def test_a_producer_stores_and_a_consumer_loads(make_scheduler: MakeScheduler, open_worker: OpenWorker) -> None:
    store, text = SimulatedStore(), prompt(1, 100)
    consumer = open_worker(make_scheduler(role="kv_consumer"), store=store)
    assert ask(consumer, text) == plain_answer(text, 4)
    assert not store
    producer = open_worker(make_scheduler(role="kv_producer"), store=store)
    for _ in range(2):
        name = producer.add(text)
        producer.run()
        assert producer.answers[name] == plain_answer(text, 4)
        assert producer.usage[name]["loaded_tokens"] == {}
        forget(producer)
    assert len(store) == 6
    name = consumer.add([*text, 5])
    forget(consumer)
    consumer.run()
    assert consumer.answers[name] == plain_answer([*text, 5], 4)
    assert consumer.usage[name]["loaded_tokens"] == {"host": 96}
    for worker in (consumer, producer):
        finish(worker)


def test_documents_of_a_producer_are_computed(make_scheduler: MakeScheduler, open_worker: OpenWorker) -> None:
    """It stores those that stand alone; a consumer fuses them and stores nothing."""
    store = SimulatedStore()
    producer = open_worker(make_scheduler(role="kv_producer"), store=store)
    store_documents(producer)
    tokens, spans = in_context(31)
    assert ask(producer, tokens, documents(spans, 0.2)) == plain_answer(tokens, 4)
    forget(producer)
    stored = set(store)
    consumer = open_worker(make_scheduler(role="kv_consumer"), store=store)
    name = consumer.add(tokens, documents(spans, 0.2))
    consumer.run()
    assert consumer.usage[name]["fused"] == "yes"
    assert set(store) == stored


# ------------------------------------------------------------------------------------------------------ what returns


def test_a_proxy_sends_back_what_it_got(make_scheduler: MakeScheduler, open_worker: OpenWorker) -> None:
    """vLLM's proxies give the first engine's `kv_transfer_params` to the second; its own keys may stand beside."""
    worker = open_worker(make_scheduler())
    text = prompt(1, 100)
    name = worker.add(text)
    worker.run()
    forget(worker)
    again = worker.add(text, {**worker.usage[name], "save": False})
    worker.requests[again].kv_transfer_params["do_remote_prefill"] = False
    worker.run()
    assert worker.usage[again]["loaded_tokens"] == {"host": 96}
    assert worker.usage[again]["saved_chunks"] == 0
    refused = worker.add(text, {"usage": 1})
    worker.run()
    assert worker.answers[refused] == plain_answer(text, 4)
    assert refused not in worker.usage, "served without kvloom"
    finish(worker)


# ----------------------------------------------------------------------------------------------------- introductions


def test_requests_that_come_first_wait_for_the_workers(make_scheduler: MakeScheduler) -> None:
    worker = SimulatedWorker(make_scheduler())
    text = prompt(1, 100)
    names = [worker.add(text) for _ in range(2)]
    worker.run()
    assert all(worker.answers[name] == plain_answer(text, 4) for name in names)
    assert worker.usage[names[0]]["saved_chunks"] == 6
    finish(worker)


def test_workers_that_do_not_answer_are_not_waited_for(
    make_scheduler: MakeScheduler, caplog: pytest.LogCaptureFixture
) -> None:
    class Silent(SimulatedWorker):
        def step(self, meanwhile: Callable[[], object] | None = None) -> Any:
            self.info = None
            return super().step(meanwhile)

    worker = Silent(make_scheduler())
    text = prompt(1, 100)
    name = worker.add(text)
    worker.run()
    assert worker.answers[name] == plain_answer(text, 4)
    assert name not in worker.usage
    assert sum("do not answer" in record.message for record in caplog.records) == 1
    assert ask(worker, text) == plain_answer(text, 4)
    assert worker.scheduler.connector.scheduler_half.is_idle


def test_a_request_that_vllm_does_not_let_wait_is_served_without_us(make_scheduler: MakeScheduler) -> None:
    """One with prompt logprobs, which reads no cache."""
    worker = SimulatedWorker(make_scheduler())
    text = prompt(1, 100)
    name = worker.add(text)
    worker.requests[name].skip_reading_prefix_cache = True
    worker.run()
    assert worker.answers[name] == plain_answer(text, 4)
    assert name not in worker.usage
    finish(worker)


# ------------------------------------------------------------------------------------------------- vLLM 0.33, called


def test_an_offer_may_be_taken_some_steps_later(make_scheduler: MakeScheduler, open_worker: OpenWorker) -> None:
    """vLLM 0.33 admits a request at once, and begins its load when the steps under way are done."""
    worker = open_worker(make_scheduler())
    text, other = prompt(1, 100), prompt(2, 400)
    ask(worker, text)
    forget(worker)
    connector, late = worker.scheduler.connector, []
    take = connector.update_state_after_alloc
    connector.update_state_after_alloc = lambda *arguments: late.append(arguments)
    name = worker.add(text)
    worker.step()
    connector.update_state_after_alloc = take
    beside = worker.add(other)
    for _ in range(3):
        worker.step()
    assert worker.store.pins, "the offer stands"
    for arguments in late:
        take(*arguments)
    worker.run()
    assert worker.answers[name] == plain_answer(text, 4)
    assert worker.usage[name]["loaded_tokens"] == {"host": 96}
    assert worker.answers[beside] == plain_answer(other, 4)
    finish(worker)


def test_an_offer_may_be_reset_before_it_is_taken(make_scheduler: MakeScheduler, open_worker: OpenWorker) -> None:
    worker = open_worker(make_scheduler(caching=False))
    text = prompt(1, 100)
    ask(worker, text)
    connector, late = worker.scheduler.connector, []
    take = connector.update_state_after_alloc
    connector.update_state_after_alloc = lambda *arguments: late.append(arguments)
    name = worker.add(text)
    worker.step()
    connector.update_state_after_alloc = take
    worker.scheduler.reset_prefix_cache(False, True)
    worker.weights += 1
    for arguments in late:
        take(*arguments)
    worker.run()
    assert worker.is_right(name, text)
    assert worker.usage[name]["loaded_tokens"] == {}
    finish(worker)
