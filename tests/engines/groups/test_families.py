"""Models with windows, states, latents and eight-bit caches in stock vLLM: equal tokens whatever happens.

One engine for each family, which answers the same prompts computed, stored, loaded, with losses,
preempted, aborted; then no block is held any more.
"""

import random
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip(
    "vllm", reason="stock vLLM is not installed here; `make test-engines` runs this in its own environment"
)

from kvloom.bench.vllm.families import WINDOW

from ..support.engines import CHUNK, DECLINED, generate, make_model, prompts, sampling, start, tokens_of, usage
from .families import PRESSED

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]

BORDERS = (CHUNK, CHUNK + 1, CHUNK - 1, 2 * CHUNK, 2 * CHUNK + 1, WINDOW, WINDOW + 1, WINDOW - 1, 3 * CHUNK)
LENGTHS = (*BORDERS, 300, 257, 420, 38, 333)
PREEMPTED = 8  # long answers at once, more than fit


@pytest.fixture(scope="module", params=PRESSED)
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    family, folder = PRESSED[request.param], tmp_path_factory.mktemp("family")
    if (why := family.why_not_here()) is not None:
        pytest.skip(why)
    engine = start(
        make_model(folder / "model", family.architecture, **family.config),
        {"host_bytes": "256MiB", "disk_path": str(folder / "disk")},
        **{"enable_prefix_caching": True, "num_gpu_blocks_override": family.blocks, **family.options_here()},
    )
    engine.family = family
    yield engine
    engine.llm_engine.engine_core.shutdown()


def transfers_of(llm: Any) -> Any:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group().worker.transfers


def scheduler_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


def config_of(llm: Any) -> Any:
    return llm.llm_engine.vllm_config


def preemptions(llm: Any, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Ids of requests that are preempted from now on."""
    scheduler, found = scheduler_of(llm), set[str]()
    preempt = scheduler._preempt_request

    def noted(request: Any, *args: Any, **kwargs: Any) -> None:
        found.add(request.request_id.rpartition("-")[0])  # to ids of its own, vLLM adds something random
        preempt(request, *args, **kwargs)

    monkeypatch.setattr(scheduler, "_preempt_request", noted)
    return found


def metric(llm: Any, name: str) -> float:
    return sum(each.value for each in llm.get_metrics() if each.name == f"vllm:{name}")


def expect_idle(llm: Any) -> None:
    scheduler = scheduler_of(llm)
    assert not scheduler.requests
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == llm.family.blocks - 1
    assert not len(transfers_of(llm).offers)


def forget(llm: Any) -> None:
    """What vLLM's own cache has; kvloom keeps what it has."""
    assert transfers_of(llm).settle(30.0)
    assert llm.reset_prefix_cache()


def reach(llm: Any, length: int) -> int:
    """Up to where a prompt of that length is loaded; where there are windows, not up to its last token.

    With states up to the last block before its last token, behind which vLLM keeps the state of every prompt.
    """
    if llm.family.keeps_states:
        return (length - 1) // CHUNK * CHUNK
    return length // CHUNK * CHUNK - (length % CHUNK == 0 and bool(transfers_of(llm)._groups))


def loaded_of(llm: Any, length: int) -> int:
    """Tokens that the first group loads for a prompt of that length."""
    stop, groups = reach(llm, length), transfers_of(llm)._groups
    return stop - min(groups[0].shape.first_kept(stop), stop) if groups else stop


def kinds_of(transfers: Any) -> tuple[str, ...]:
    kinds = dict.fromkeys(kind_of(group.shape) for group in transfers._groups)
    return tuple(kinds) or ("latent" if transfers._cache.is_latent else "full",)


def test_equal_tokens(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    transfers = transfers_of(llm)
    assert kinds_of(transfers) == llm.family.groups
    texts = prompts(5, LENGTHS)
    plain = tokens_of(generate(llm, texts, DECLINED))
    assert len({tuple(answer) for answer in plain}) == len(texts), "a model that says the same to all proves nothing"
    forget(llm)
    assert tokens_of(generate(llm, texts)) == plain, "computed in pieces, and stored"
    forget(llm)
    outputs = generate(llm, texts, {"save": False})
    assert tokens_of(outputs) == plain
    assert [sum(usage(each)["loaded_tokens"].values()) for each in outputs] == [loaded_of(llm, n) for n in LENGTHS]
    forget(llm)
    stop, before = reach(llm, 420), metric(llm, "kvloom_loaded_bytes")
    generate(llm, [texts[LENGTHS.index(420)]], {"save": False}, tokens=1)
    parts = [(group.shape.first_kept(stop), group.spec) for group in transfers._groups] or [(0, transfers._spec)]
    expected = sum((stop - first) * spec.token_bytes for first, spec in parts)
    assert metric(llm, "kvloom_loaded_bytes") - before == expected, "what windows keep, and no more"
    if transfers._groups:
        assert expected < 0.8 * stop * sum(spec.token_bytes for _, spec in parts)

    # Behind what vLLM has in its own cache, and behind a load, which is stored.
    forget(llm)
    generate(llm, [texts[-1][:100]], DECLINED, tokens=1)
    longer = [*texts[-1], *prompts(6, (90,))[0]]
    (output,) = generate(llm, [longer])
    assert usage(output)["loaded_tokens"]
    forget(llm)
    expected_tokens = tokens_of(generate(llm, [longer], DECLINED))
    forget(llm)
    (again,) = generate(llm, [longer])
    assert tokens_of([output]) == tokens_of([again]) == expected_tokens
    assert sum(usage(again)["loaded_tokens"].values()) == loaded_of(llm, len(longer))

    # A request to fuse documents, which no such engine does, is served as any other.
    forget(llm)
    spans = {"documents": [[0, 60], [60, 200]], "ratio": 0.1}
    (fused,) = generate(llm, [texts[-1]], spans)
    assert tokens_of([fused]) == plain[-1:] and usage(fused)["fused"] == "no"

    # Pieces that are lost while they are loaded.
    read, rng = transfers.store.read, random.Random(1)

    def lossy(*args: Any, **kwargs: Any) -> Any:
        return None if "timeout_s" in kwargs and rng.random() < 0.1 else read(*args, **kwargs)

    forget(llm)
    monkeypatch.setattr(transfers.store, "read", lossy)
    outputs = generate(llm, texts)
    monkeypatch.undo()
    assert tokens_of(outputs) == plain
    assert {usage(each)["failed"] for each in outputs} == {True, False}

    # More than fits: requests preempt one another, and are loaded when they come back. Not where a step has no room
    # for a request beside one that decodes: vLLM begins requests with whole blocks, where layers keep states.
    if config_of(llm).scheduler_config.max_num_batched_tokens <= CHUNK:
        expect_idle(llm)
        return
    crowd = prompts(7, (140,) * PREEMPTED)
    alone = [
        each for half in (crowd[::2], crowd[1::2]) for each in tokens_of(generate(llm, half, DECLINED, tokens=150))
    ]
    forget(llm)
    preempted = preemptions(llm, monkeypatch)
    outputs = generate(llm, [*crowd[::2], *crowd[1::2]], tokens=150)
    assert preempted
    # In 16 bits vLLM itself goes on with other tokens when it computes anew, at once, what it had decoded.
    is_exact = config_of(llm).model_config.dtype.itemsize > 2
    compared = [each for each, output in enumerate(outputs) if is_exact or output.request_id not in preempted]
    assert compared
    assert [tokens_of(outputs)[each] for each in compared] == [alone[each] for each in compared]
    expect_idle(llm)


def test_aborted_requests_leave_nothing(llm: Any) -> None:
    texts = prompts(8, (300, 200))
    plain = tokens_of(generate(llm, texts))
    for steps in range(1, 5):
        forget(llm)
        name = f"doomed-{steps}"
        llm.llm_engine.add_request(name, {"prompt_token_ids": texts[steps % 2]}, sampling(tokens=40))
        for _ in range(steps):
            llm.llm_engine.step()
        llm.llm_engine.abort_request([name])
        while scheduler_of(llm).has_requests():
            llm.llm_engine.engine_core.get_output()
    forget(llm)
    assert tokens_of(generate(llm, texts)) == plain
    expect_idle(llm)


def kind_of(shape: Any) -> str:
    if shape.keeps_state:
        return "state"
    return "full" if shape.is_full else "window" if shape.window_tokens is not None else "local"
