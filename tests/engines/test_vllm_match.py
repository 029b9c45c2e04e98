"""Documents that stock vLLM finds in prompts by itself, also after a restart; fused requests that are preempted."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip(
    "vllm", reason="stock vLLM is not installed here; `make test-engines` runs this in its own environment"
)

from .support.engines import BLOCK, DECLINED, generate, make_model, prompts, sampling, start, tokens_of, usage

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]

BLOCKS = 78
LENGTHS = (170, 203, 131)
LEAD = 1
DOCUMENTS = prompts(5, LENGTHS)
SYSTEM, BETWEEN, QUESTION = prompts(6, (70, 11, 23))
SETTINGS = {
    "host_bytes": "64MiB",
    "lead_ids": [LEAD],
    "match_tokens": 32,
    "fusion_ratio": 0.2,
    "fusion_slice_tokens": 100,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[Any]:
    engine = open_engine(make_model(folder / "model"), folder / "disk")
    for document in DOCUMENTS:
        alone = [LEAD, *document]
        generate(engine, [alone], {"documents": [[1, len(alone)]]}, tokens=1)
    settle()
    yield engine
    engine.llm_engine.engine_core.shutdown()


def open_engine(model: Path, disk: Path) -> Any:
    return start(
        model, {**SETTINGS, "disk_path": str(disk)}, num_gpu_blocks_override=BLOCKS, enable_prefix_caching=True
    )


@pytest.fixture(autouse=True)
def a_cold_engine(llm: Any) -> Iterator[None]:
    assert llm.reset_prefix_cache()
    yield
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    assert not scheduler.requests
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == BLOCKS - 1


def settle() -> None:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    transfers = get_kv_transfer_group().worker.transfers
    assert transfers.settle(30.0)


def plain(llm: Any, tokens: Sequence[int], count: int = 20) -> list[int]:
    answer = tokens_of(generate(llm, [tokens], DECLINED, tokens=count))[0]
    assert llm.reset_prefix_cache()
    return answer


def context(order: Sequence[int], system: Sequence[int] = SYSTEM) -> tuple[list[int], list[list[int]]]:
    """Documents in another order, with other text between them; and where they stand."""
    tokens, spans = [LEAD, *system], []
    for index in order:
        spans.append([len(tokens), len(tokens) + LENGTHS[index]])
        tokens += [*DOCUMENTS[index], *BETWEEN]
    return tokens + QUESTION, spans


@pytest.mark.parametrize("order", [(2, 0, 1), (1, 2), (0,)])
def test_found_without_hints(llm: Any, order: Sequence[int]) -> None:
    """What a request that names its documents gets; at ratio 1 what plain vLLM gives."""
    tokens, spans = context(order)
    expected = plain(llm, tokens)
    (told,) = generate(llm, [tokens], {"documents": spans, "save": False})
    assert llm.reset_prefix_cache()
    (found,) = generate(llm, [tokens], {"save": False})
    assert tokens_of([found]) == tokens_of([told])
    assert {**usage(found), "load_s": 0, "seconds_saved": 0} == {**usage(told), "load_s": 0, "seconds_saved": 0}
    assert usage(found)["fused"] == "yes"
    inside = sum(LENGTHS[index] for index in order) - max(spans[-1][1] % BLOCK - 0, 0)
    assert sum(usage(found)["loaded_tokens"].values()) == inside
    assert usage(found)["computed_tokens"] < 0.2 * inside + len(tokens) - inside
    for ratio in (1.0, 0.9999):
        assert llm.reset_prefix_cache()
        (exact,) = generate(llm, [tokens], {"ratio": ratio, "save": False})
        assert tokens_of([exact]) == [expected]
        assert usage(exact)["fused"] == ("no" if ratio == 1.0 else "yes")


def test_part_of_a_document_is_none(llm: Any) -> None:
    tokens = [LEAD, *SYSTEM, *DOCUMENTS[0][:-1], *BETWEEN, *DOCUMENTS[1][1:], *QUESTION]
    expected = plain(llm, tokens)
    (output,) = generate(llm, [tokens], {"save": False})
    assert tokens_of([output]) == [expected]
    assert (usage(output)["fused"], usage(output)["loaded_tokens"]) == ("no", {})


def test_fused_requests_that_are_preempted(llm: Any) -> None:
    """Four fill the cache and grow. Each fusion ends as if alone, at any ratio; plain requests beside them, too."""
    contexts = [context(order, SYSTEM[:40])[0] for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0), (1, 0, 2))]
    kinds = [{"save": False}, {"save": False, "ratio": 0.9999}, {"save": False, "ratio": 1.0}, {"save": False}]
    alone = []
    for tokens, options in zip(contexts, kinds, strict=True):
        alone += tokens_of(generate(llm, [tokens], options, tokens=150))
        assert llm.reset_prefix_cache()
    exact = [plain(llm, tokens, 150) for tokens in contexts]
    assert alone[1:3] == exact[1:3]
    assert alone[0] != exact[0]
    before = preemptions(llm)
    inputs = [{"prompt_token_ids": tokens} for tokens in contexts]
    outputs = llm.generate(inputs, [sampling(options, tokens=150) for options in kinds], use_tqdm=False)
    assert preemptions(llm) > before
    assert tokens_of(outputs) == alone
    assert [usage(output)["fused"] for output in outputs] == ["yes", "yes", "no", "yes"]
    for tokens, answer in zip(contexts, exact, strict=True):
        assert tokens_of(generate(llm, [tokens], {"load": False, "ratio": 1.0}, tokens=150)) == [answer], "no pollution"


def test_preempted_and_forgotten(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody remembers what was chosen, the rest is computed behind what is left, and usage says so."""
    monkeypatch.setattr("kvloom.connectors.serving.scheduler.fusions.REMEMBERED_PLANS", 0)
    tokens, _ = context((0, 1, 2), SYSTEM[:40])
    (whole,) = generate(llm, [tokens], {"save": False})
    assert usage(whole)["fused"] == "yes"
    generate(llm, prompts(9, (1000, 1000)), DECLINED, tokens=1)  # in the blocks that were used last, its end first
    (rest,) = generate(llm, [tokens], {"save": False})
    assert usage(rest)["fused"] == "partly"


def preemptions(llm: Any) -> float:
    return sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")


def test_found_after_a_restart(llm: Any, folder: Path, request: pytest.FixtureRequest) -> None:
    """The last test: another engine, on the same folder, before it was told of any document."""
    tokens, _ = context((2, 0, 1))
    fused = tokens_of(generate(llm, [tokens], {"save": False}))
    assert llm.reset_prefix_cache()
    from vllm.distributed.kv_transfer import kv_transfer_state

    first = kv_transfer_state._KV_CONNECTOR_AGENT
    kv_transfer_state._KV_CONNECTOR_AGENT = None
    later = open_engine(folder / "model", folder / "disk")
    try:
        (output,) = generate(later, [tokens], {"save": False})
        assert tokens_of([output]) == fused
        assert usage(output)["fused"] == "yes"
        assert set(usage(output)["loaded_tokens"]) == {"disk"}
    finally:
        later.llm_engine.engine_core.shutdown()
        kv_transfer_state._KV_CONNECTOR_AGENT = first
