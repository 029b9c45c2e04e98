"""Layer-wise loads in stock vLLM: equal tokens, and whatever does not come leaves nothing wrong behind."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip(
    "vllm", reason="stock vLLM is not installed here; `make test-engines` runs this in its own environment"
)

from kvloom.connectors.serving.scheduler.planner import Planner

from .support import engines
from .support.engines import CHUNK, DECLINED, generate, make_model, prompts, tokens_of, usage

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]

BLOCKS = 72
LAYERS = 6


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("vllm")
    engine = engines.start(
        make_model(folder / "model"),
        {"host_bytes": "256MiB", "load_mode": "layerwise", "load_timeout_s": 2.0, "fusion_slice_tokens": 100},
        num_gpu_blocks_override=BLOCKS,
        enable_prefix_caching=True,
    )
    yield engine
    engine.llm_engine.engine_core.shutdown()


@pytest.fixture(autouse=True)
def a_cold_engine(llm: Any) -> Iterator[None]:
    assert llm.reset_prefix_cache()
    yield
    scheduler = scheduler_of(llm)
    assert not scheduler.requests
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == BLOCKS - 1, "blocks are still held"


def scheduler_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


def store_of() -> Any:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    transfers = get_kv_transfer_group().worker.transfers
    assert transfers.settle(20.0)
    return transfers.store


def stored(llm: Any, seed: int, lengths: tuple[int, ...], *, tokens: int = 20) -> tuple[list[list[int]], Any]:
    """Prompts whose KV is in the store and not in vLLM's cache, and what plain vLLM answers to them."""
    texts = prompts(seed, lengths)
    plain = tokens_of(generate(llm, texts, DECLINED, tokens=tokens))
    assert llm.reset_prefix_cache()
    assert tokens_of(generate(llm, texts, tokens=tokens)) == plain
    store_of()
    assert llm.reset_prefix_cache()
    return texts, plain


def metric(llm: Any, name: str) -> float:
    return sum(m.value for m in llm.get_metrics() if m.name == f"vllm:{name}")


class Faults:
    """Stands before a store's `read` and does harm to some calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, harm: Callable[[Any, int], Any]) -> None:
        store = store_of()
        self.read, self.harm, self.calls = store.read, harm, 0
        self.keys: list[bytes] = []
        monkeypatch.setattr(store, "read", self)

    def __call__(self, key: bytes, *args: Any, **kwargs: Any) -> Any:
        if "timeout_s" not in kwargs:  # the store's own call within
            return self.read(key, *args, **kwargs)
        self.calls += 1
        if key not in self.keys:
            self.keys.append(key)
        if self.harm(self.keys.index(key), kwargs["layers"][0]):
            return None
        return self.read(key, *args, **kwargs)


def test_tokens_are_identical_over_many_prompts(llm: Any) -> None:
    """Lengths around chunks and blocks, whole prompts stored, batches, pieces, preemption."""
    edges = (CHUNK, CHUNK + 1, CHUNK - 1, 2 * CHUNK, 4 * CHUNK)
    lengths = (*(1 + (37 * i) % 420 for i in range(40)), *edges, 600, 610, 620)
    texts, plain = stored(llm, 5, lengths, tokens=70)
    before = metric(llm, "num_preemptions")
    outputs = generate(llm, texts, tokens=70)
    assert tokens_of(outputs) == plain
    assert metric(llm, "num_preemptions") > before
    loaded = [sum(usage(output)["loaded_tokens"].values()) for output in outputs]
    assert sum(loaded) > 0.7 * sum(lengths)
    assert not any(usage(output)["failed"] for output in outputs)


def test_a_whole_prompt_is_loaded_but_for_one_token(llm: Any) -> None:
    """And where one step is the whole life of the request, its usage says so, too."""
    (text,), (plain,) = stored(llm, 7, (256,))
    (output,) = generate(llm, [text])
    assert tokens_of([output]) == [plain]
    assert usage(output)["loaded_tokens"] == {"host": 255}
    assert llm.reset_prefix_cache()
    (output,) = generate(llm, [text], tokens=1)
    assert tokens_of([output]) == [plain[:1]]
    assert usage(output)["loaded_tokens"] == {"host": 255}


def test_loads_continue_what_the_engine_has_itself(llm: Any) -> None:
    (text,), (plain,) = stored(llm, 21, (300,))
    generate(llm, [text[:100]], DECLINED)
    (output,) = generate(llm, [text])
    assert tokens_of([output]) == [plain]
    assert sum(usage(output)["loaded_tokens"].values()) == 256 - 96


def late(chunk: int, layer: int) -> bool:
    time.sleep(2.5 if layer == 3 else 0)
    return False


def raising(chunk: int, layer: int) -> bool:
    if layer == 2:
        raise ZeroDivisionError
    return False


@pytest.mark.parametrize(
    ("harm", "kept"),
    [
        (lambda chunk, layer: True, 0),
        (lambda chunk, layer: chunk == 2, 128),
        (lambda chunk, layer: (chunk, layer) == (3, 4), 192),
        (lambda chunk, layer: (chunk, layer) == (0, LAYERS - 1), 0),
        (raising, 0),
        (late, 0),
    ],
    ids=["all", "the third", "the last in a late layer", "the first in the last layer", "raising", "late"],
)
def test_lost_chunks_are_computed_and_leave_nothing(
    llm: Any, monkeypatch: pytest.MonkeyPatch, harm: Callable[[int, int], bool], kept: int
) -> None:
    """Equal tokens: of the request itself, of others that begin alike and come at once or after it, from the engine's
    own cache and from the store."""
    (text, more), (plain, _) = stored(llm, 31, (300, 90))
    longer = text + more
    (plain_longer,) = tokens_of(generate(llm, [longer], DECLINED))
    assert llm.reset_prefix_cache()
    before = metric(llm, "kvloom_failed_loads")
    Faults(monkeypatch, harm)
    outputs = generate(llm, [text])
    assert tokens_of(outputs) == [plain]
    assert (usage(outputs[0])["failed"], sum(usage(outputs[0])["loaded_tokens"].values())) == (True, kept)
    assert metric(llm, "kvloom_failed_loads") == before + 1
    assert tokens_of(generate(llm, [text, longer], DECLINED)) == [plain, plain_longer], "vLLM's own cache"
    assert llm.reset_prefix_cache()
    answers = tokens_of(generate(llm, [text, longer, text]))
    assert answers == [plain, plain_longer, plain], "requests that begin alike, in one batch"
    monkeypatch.undo()
    store_of()
    assert llm.reset_prefix_cache()
    outputs = generate(llm, [longer, text])
    assert tokens_of(outputs) == [plain_longer, plain], "the store"
    assert not any(usage(output)["failed"] for output in outputs)


def test_an_aborted_request_does_not_leave_what_did_not_come(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Aborted right behind the step that lost it, before anything is computed again."""
    (text,), (plain,) = stored(llm, 41, (500,))
    Faults(monkeypatch, lambda chunk, layer: chunk >= 1)
    engine = llm.llm_engine
    engine.add_request("doomed", {"prompt_token_ids": text}, engines.sampling(tokens=40))
    engine.step()
    (request,) = scheduler_of(llm).requests.values()
    assert request.num_computed_tokens == CHUNK, "taken back"
    engine.abort_request(["doomed"])
    assert not scheduler_of(llm).requests
    assert tokens_of(generate(llm, [text], DECLINED)) == [plain]


def test_an_aborted_request_would_leave_it_without_us(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """That vLLM itself leaves such blocks filed: what the test before would not see if it were otherwise."""
    (text,), (plain,) = stored(llm, 42, (500,))
    Faults(monkeypatch, lambda chunk, layer: chunk >= 1)
    monkeypatch.setattr(Planner, "take_unwritten_blocks", set)
    engine = llm.llm_engine
    engine.add_request("doomed", {"prompt_token_ids": text}, engines.sampling(tokens=40))
    engine.step()
    engine.abort_request(["doomed"])
    assert tokens_of(generate(llm, [text], DECLINED)) != [plain]


def test_fusions_go_on_beside(llm: Any) -> None:
    """Fused and loaded requests in one batch."""
    texts, plain = stored(llm, 51, (300, 200))
    documents, (question,) = prompts(52, (170, 203)), prompts(53, (23,))
    for document in documents:
        generate(llm, [document], {"documents": [[0, len(document)]], "ratio": 0.0}, tokens=1)
    store_of()
    context = [*documents[1], *documents[0], *question]
    (expected,) = tokens_of(generate(llm, [context], DECLINED))
    assert llm.reset_prefix_cache()
    spans = {"documents": [[0, 203], [203, 373]], "ratio": 0.99999}
    inputs = [{"prompt_token_ids": row} for row in (context, *texts)]
    params = [engines.sampling(spans), engines.sampling({}), engines.sampling({})]
    outputs = llm.generate(inputs, params, use_tqdm=False)
    assert tokens_of(outputs) == [expected, *plain]
    assert usage(outputs[0])["computed_tokens"] > 0
    assert [usage(output)["loaded_tokens"] for output in outputs[1:]] == [{"host": 256}, {"host": 192}]
