"""vLLM's own connector tests, and its real scheduler, against the scheduler's half of `KVLoomConnector`.

vLLM's tests come from its source distribution, see tests/engines/vllm.sh; nothing of them is kept here. No model runs:
`vllm_simulated` says what stands for one. Of vLLM's files these can be pointed at a connector from outside:

    test_kv_load_failure_recovery    loads that fail while the request waits, also step by step
    test_invalid_blocks_correctness  what was not loaded never enters the prefix cache
    test_error_propagation           `kv_load_failure_policy="fail"`
    test_hma_auto_config             the connector does not turn the hybrid cache manager off

and of them the tests in which loads are asynchronous: kvloom never loads within a step. The other files test the
connector in their name, the wire between two engines that hand requests on (remote prefill and decode, `nixl`), or
nothing that a connector takes part in (output aggregator, configuration).
"""

import random
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import Mock

import pytest

pytest.importorskip(
    "vllm", reason="stock vLLM is not installed here; `make test-engines` runs this in its own environment"
)

from kvloom.connectors.serving.messages import LookUp

from ...vllm.simulated import (
    DOCUMENTS,
    NEEDS_SCHEDULER,
    SimulatedWorker,
    ask,
    documents,
    finish,
    forget,
    in_context,
    plain_answer,
    prompt,
    store_documents,
    vllm_unit,
)
from .conftest import SIMULATED_BLOCK, SIMULATED_CHUNK

pytestmark = NEEDS_SCHEDULER

BLOCK, CHUNK = SIMULATED_BLOCK, SIMULATED_CHUNK


@pytest.fixture(scope="module", autouse=True)
def their_markers(request: pytest.FixtureRequest) -> None:
    request.config.addinivalue_line("markers", "cpu_test: of vLLM's own tests")


@pytest.fixture(params=["asked at once", "asked in the next step"])
def worker(
    request: pytest.FixtureRequest, make_scheduler: Callable[..., Any], open_worker: Callable[..., SimulatedWorker]
) -> Iterator[SimulatedWorker]:
    """Where scheduler and worker are one process the store is asked at once, otherwise in the next step."""
    yield (made := open_worker(make_scheduler(), at_once=request.param == "asked at once"))
    finish(made)


# ------------------------------------------------------------------------------------------------ vLLM's own tests

POINTED: list[tuple[str, str, str, tuple[Any, ...]]] = [
    *(
        ("test_kv_load_failure_recovery", "test_async_load_failure", "recompute", (100, 99, bad))
        for bad in ({0, 98}, {50, 98}, {98})
    ),
    *(
        ("test_kv_load_failure_recovery", "test_async_progressive_load_failure", "recompute", (100, 99, bad))
        for bad in ({0, 50, 98}, {98, 50, 0})
    ),
    ("test_invalid_blocks_correctness", "test_async_recompute_blocks_not_cached_when_invalid", "recompute", ()),
    ("test_error_propagation", "test_error_propagation_async_load", "fail", ()),
]


@pytest.mark.parametrize(("file", "name", "policy", "arguments"), POINTED)
def test_their_own(
    make_scheduler: Callable[..., Any],
    open_worker: Callable[..., SimulatedWorker],
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    name: str,
    policy: str,
    arguments: tuple[Any, ...],
) -> None:
    """Their mock of a connector passes every call on to ours, the question that they answer themselves included."""
    theirs = vllm_unit(file)
    scheduler = make_scheduler(policy=policy, max_num_batched_tokens=64)
    promised: dict[str, int] = {}

    def look_up(self: SimulatedWorker, lookup: LookUp) -> tuple[str, ...]:
        """What their test wants to be stored is stored."""
        return ("host",) * (promised[lookup.request_id] // CHUNK)

    monkeypatch.setattr(SimulatedWorker, "look_up", look_up)
    open_worker(scheduler)
    ours, asked = scheduler.connector, []

    def passed_on() -> Mock:
        return Mock(wraps=ours)

    def stored(tokens_of: dict[str, int], async_load: bool) -> Callable[[Any, int], tuple[int | None, bool]]:
        assert async_load
        promised.update(tokens_of)

        def answer(request: Any, computed: int) -> tuple[int | None, bool]:
            asked.append(ours.get_num_new_matched_tokens(request, computed))
            assert asked[-1] == (tokens_of[request.request_id] - computed, True)
            return asked[-1]

        return answer

    monkeypatch.setattr(theirs, "create_mock_connector", passed_on)
    monkeypatch.setattr(theirs, "_make_get_num_new_matched_tokens", stored)
    getattr(theirs, name)(scheduler, *arguments)
    assert asked, "our connector was asked"


def test_the_hybrid_manager_stays_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.config import KVTransferConfig
    from vllm.platforms import current_platform

    monkeypatch.setattr(current_platform, "support_hybrid_kv_cache", lambda: True)
    config = KVTransferConfig(
        kv_connector="KVLoomConnector", kv_connector_module_path="kvloom.connectors.vllm.connector", kv_role="kv_both"
    )
    vllm_unit("test_hma_auto_config").test_hma_auto_config(config, False)


# --------------------------------------------------------------------------------------------------------- prefixes


def test_stored_and_loaded(worker: SimulatedWorker) -> None:
    """All of it, part of it, more than was stored, and less than a chunk; answers are those of a plain engine."""
    long = prompt(1, 130)
    assert ask(worker, long) == plain_answer(long, 4)
    assert len(worker.store) == 8
    for tokens, found in ((long, 128), (long[:100], 96), ([*long[:70], *prompt(2, 50)], 64), (long[:10], 0)):
        forget(worker)
        name = worker.add(tokens)
        worker.step()
        if found:
            worker.step()
            assert worker.scheduler.kv_holding_waiting
        worker.run()
        assert worker.answers[name] == plain_answer(tokens, 4)
        assert sum(worker.usage[name]["loaded_tokens"].values()) == found


def test_a_prompt_that_is_all_stored_keeps_a_token_to_compute(worker: SimulatedWorker) -> None:
    tokens = prompt(3, 64)
    ask(worker, tokens)
    forget(worker)
    name = worker.add(tokens)
    worker.run()
    assert worker.answers[name] == plain_answer(tokens, 4)
    assert worker.usage[name]["loaded_tokens"] == {"host": 64}


def test_a_lost_block_is_computed_and_asked_for_once(worker: SimulatedWorker) -> None:
    tokens = prompt(4, 120)
    ask(worker, tokens)
    for lost_from in (0, 48, 96):
        forget(worker)
        name = worker.add(tokens)
        worker.faults.lost_from[name] = lost_from
        worker.run()
        assert worker.answers[name] == plain_answer(tokens, 4)
        assert worker.usage[name]["failed"] is True
        assert ask(worker, tokens) == plain_answer(tokens, 4), "nothing wrong is left in the prefix cache"


def test_aborted_while_it_loads(worker: SimulatedWorker) -> None:
    """Its blocks stay its own until the load is over: what is loaded late hits nobody else."""
    tokens, other = prompt(5, 120), prompt(6, 120)
    ask(worker, tokens)
    forget(worker)
    name = worker.add(tokens)
    worker.faults.held.add(name)
    for _ in range(3):
        worker.step()
    worker.abort(name)
    assert ask_beside(worker, other) == plain_answer(other, 4)
    assert name in worker.scheduler.requests
    worker.faults.held.clear()
    worker.run()
    assert name not in worker.scheduler.requests


def ask_beside(worker: SimulatedWorker, tokens: list[int]) -> list[int]:
    """While others hang."""
    name = worker.add(tokens)
    for _ in range(20):
        worker.step()
    return worker.answers[name]


def test_finished_while_it_is_saved(worker: SimulatedWorker) -> None:
    """A request of one token ends in the step that saves it: blocks are copied within that step and freed at once."""
    tokens = prompt(7, 64)
    name = worker.add(tokens, tokens=1)
    worker.step()
    worker.step() if name in worker.scheduler.requests else None
    assert worker.answers[name] == plain_answer(tokens, 1)
    assert worker.scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == 9_999
    assert len(worker.store) == 4
    forget(worker)
    assert ask(worker, tokens) == plain_answer(tokens, 4)


def test_preempted_requests_load_again(
    make_scheduler: Callable[..., Any], open_worker: Callable[..., SimulatedWorker]
) -> None:
    worker = open_worker(make_scheduler(blocks=24))
    texts = [prompt(10 + i, 60 + 7 * i) for i in range(6)]
    names = [worker.add(text, tokens=60) for text in texts]
    worker.run()
    assert sum(worker.requests[name].num_preemptions for name in names) > 0
    assert [worker.answers[name] for name in names] == [plain_answer(text, 60) for text in texts]
    forget(worker)
    names = [worker.add(text, tokens=60) for text in texts]
    worker.run()
    assert [worker.answers[name] for name in names] == [plain_answer(text, 60) for text in texts]
    assert sum(sum(worker.usage[name]["loaded_tokens"].values()) for name in names) > 0
    finish(worker)


# ----------------------------------------------------------------------------------------------------------- fusion


def test_plain_requests_never_meet_fused_kv(worker: SimulatedWorker) -> None:
    store_documents(worker)
    tokens, spans = in_context(30)
    fused = ask(worker, tokens, documents(spans, 0.2))
    assert fused != plain_answer(tokens, 4)
    assert ask(worker, tokens) == plain_answer(tokens, 4)
    assert ask(worker, tokens, documents(spans, 0.2)) == fused
    forget(worker)
    assert ask(worker, tokens) == plain_answer(tokens, 4), "nor in the store"
    assert ask(worker, tokens, documents(spans, 1.0)) == plain_answer(tokens, 4)


@pytest.mark.parametrize("steps", range(12))
def test_a_fusion_is_aborted(
    make_scheduler: Callable[..., Any], open_worker: Callable[..., SimulatedWorker], steps: int
) -> None:
    """In every state: waiting, fetching, choosing, computing, generating."""
    worker = open_worker(make_scheduler(), slice_tokens=20)
    store_documents(worker)
    tokens, spans = in_context(31)
    fused = ask(worker, tokens, documents(spans, 0.2))
    forget(worker)
    name = worker.add(tokens, documents(spans, 0.2))
    for _ in range(steps):
        worker.step()
    worker.abort(name)
    assert ask(worker, tokens) == plain_answer(tokens, 4)
    assert ask(worker, tokens, documents(spans, 0.2)) == fused
    finish(worker)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("caching", [True, False], ids=["prefix caching", "no prefix caching"])
def test_anything_at_any_time(
    make_scheduler: Callable[..., Any], open_worker: Callable[..., SimulatedWorker], seed: int, caching: bool
) -> None:
    """Requests of all kinds come, are aborted, preempt one another, lose chunks, hang: every answer is right."""
    rng = random.Random(seed)
    contexts = [in_context(40 + i, tuple(rng.sample(range(3), 3)), lead=20 + 9 * i) for i in range(3)]
    alone = open_worker(make_scheduler(caching=caching))
    store_documents(alone)
    fused = []
    for tokens, spans in contexts:
        fused.append(ask(alone, tokens, documents(spans, 0.2), count=40))
        if caching:
            forget(alone)
    worker = open_worker(make_scheduler(blocks=34, caching=caching), at_once=seed % 2 == 0, slice_tokens=30)
    store_documents(worker) if caching else [ask(worker, d, documents([(0, len(d))], 0.0), 1) for d in DOCUMENTS]
    expected: dict[str, list[int]] = {}
    for _ in range(60):
        kind, count = rng.randrange(4), rng.randrange(1, 40)
        index = rng.randrange(3)
        tokens, spans = contexts[index]
        if kind == 0:
            name = worker.add(tokens, documents(spans, 0.2), tokens=count)
            expected[name] = fused[index][:count]
        else:
            tokens = tokens[: rng.randrange(5, len(tokens))] + prompt(rng.randrange(4), 9)
            name = worker.add(tokens, tokens=count)
            expected[name] = plain_answer(tokens, count)
            if kind == 1:
                worker.faults.lost_from[name] = rng.randrange(len(tokens))
        if rng.random() < 0.2:
            worker.faults.held.add(name)
        for _ in range(rng.randrange(4)):
            worker.step()
        if rng.random() < 0.2:
            doomed = rng.choice(list(expected))
            worker.abort(doomed)
            del expected[doomed]
        if rng.random() < 0.3:
            worker.faults.held.clear()
    worker.faults.held.clear()
    worker.run()
    assert sum(request.num_preemptions for request in worker.requests.values()) > 0
    assert {name: worker.answers[name] for name in expected} == expected
    told = {worker.usage[name]["fused"] for name in expected if worker.requests[name].kv_transfer_params}
    assert told == {"yes"}
    finish(worker)


@pytest.mark.parametrize("remembered", [True, False])
def test_half_a_fusion_is_left(
    make_scheduler: Callable[..., Any],
    open_worker: Callable[..., SimulatedWorker],
    monkeypatch: pytest.MonkeyPatch,
    remembered: bool,
) -> None:
    """As after a preemption: it goes on as it was begun or, where nobody knows what was chosen, usage says so."""
    if not remembered:
        monkeypatch.setattr("kvloom.connectors.serving.scheduler.fusions.REMEMBERED_PLANS", 0)
    worker = open_worker(make_scheduler(blocks=34), slice_tokens=30)
    store_documents(worker)
    tokens, spans = in_context(50)
    fused, filler = ask(worker, tokens, documents(spans, 0.2)), prompt(60, 26 * BLOCK - 9)
    assert ask(worker, filler) == plain_answer(filler, 4)  # in the blocks that were used last, its end first
    worker.computed.clear()
    name = worker.add(tokens, documents(spans, 0.2))
    worker.run()
    assert worker.usage[name]["fused"] == ("yes" if remembered else "partly")
    assert (worker.answers[name] == fused) is remembered
    assert (0 < len(worker.computed) < 70) is remembered
    assert ask(worker, tokens) == plain_answer(tokens, 4)
    finish(worker)
