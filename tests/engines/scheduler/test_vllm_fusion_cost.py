"""Fusions by cost in stock vLLM on a processor, with a disk made slow: fused, at a raised ratio, or computed."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

pytest.importorskip(
    "vllm", reason="stock vLLM is not installed here; `make test-engines` runs this in its own environment"
)

from kvloom.bench.vllm.throttle import Throttle
from kvloom.connectors.serving.controller.decisions import Decision
from kvloom.connectors.serving.controller.fusion_choice import FusionChoice, FusionWay

from ..support.engines import DECLINED, generate, make_model, prompts, start, tokens_of, usage

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]

DOCUMENTS = prompts(5, (230, 210, 250, 220))
SYSTEM, QUESTION = prompts(6, (40, 23))
RATIO = 0.1
ORDERS = (
    (0, 1, 2, 3),
    (3, 2, 1, 0),
    (1, 3, 0, 2),
    (2, 0, 3, 1),
    (1, 0, 3, 2),
    (3, 0, 2, 1),
    (2, 3, 1, 0),
    (0, 2, 1, 3),
)


def in_context(order: Sequence[int]) -> tuple[list[int], list[list[int]]]:
    tokens, spans = list(SYSTEM), []
    for index in order:
        spans.append([len(tokens), len(tokens) + len(DOCUMENTS[index])])
        tokens += DOCUMENTS[index]
    return [*tokens, *QUESTION], spans


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """An engine whose disk has the documents, and which knows what it takes to compute."""
    folder = tmp_path_factory.mktemp("vllm")
    model = make_model(folder / "model", num_hidden_layers=16, hidden_size=256, intermediate_size=1024)
    settings = {
        "host_bytes": "64KiB",  # too small for a document: all of them lie on the disk
        "disk_path": str(folder / "disk"),
        "load_or_recompute": "auto",
        "load_timeout_s": 60,
        "check_layer": 1,
    }
    engine = start(model, settings, enable_prefix_caching=True)
    for document in DOCUMENTS:
        generate(engine, [document], {"documents": [[0, len(document)]], "ratio": 0.0}, tokens=1)
    assert transfers_of().settle(30.0)
    for seed in range(4):
        generate(engine, prompts(100 + seed, (900 + 20 * seed,)), DECLINED, tokens=1)
    yield engine
    engine.llm_engine.engine_core.shutdown()


def transfers_of() -> Any:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group().worker.transfers


def asked(llm: Any, order: Sequence[int], spans: Sequence[Sequence[int]] = (), ratio: float = RATIO) -> Any:
    """The answer to the documents in this order, by an engine whose own cache is empty."""
    assert llm.reset_prefix_cache()
    tokens, all_spans = in_context(order)
    return generate(llm, [tokens], {"documents": list(spans or all_spans), "ratio": ratio, "save": False})[0]


def until(llm: Any, decision: str) -> tuple[Any, tuple[int, ...]]:
    """Ask, in one order after the other, until it is decided so; the output and the order."""
    told = []
    for order in ORDERS * 2:
        output = asked(llm, order)
        told.append((usage(output)["decision"], usage(output)["expected_load_s"], usage(output)["expected_compute_s"]))
        if told[-1][0] == decision:
            return output, order
    raise AssertionError(f"never decided {decision!r}: {told}")


def plain(llm: Any, order: Sequence[int]) -> list[int]:
    assert llm.reset_prefix_cache()
    return tokens_of(generate(llm, [in_context(order)[0]], DECLINED))[0]


def test_by_the_speed_of_the_disk(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    throttle, ways = Throttle(transfers_of()), []
    decide = FusionChoice.decide

    def noted(*args: Any, **more: Any) -> tuple[Decision, FusionWay | None]:
        ways.append(decide(*args, **more))
        return ways[-1]

    monkeypatch.setattr(FusionChoice, "decide", noted)
    # Fast: fused at the ratio that was asked for, once fusions are known.
    fast, _ = until(llm, "fuses")
    told = usage(fast)
    assert told["fused"] == "yes" and told["expected_load_s"] < told["expected_compute_s"]
    assert sum(told["loaded_tokens"].values()) >= 900 - 32
    compute_s, nbytes = told["expected_compute_s"], transfers_of()._spec.token_bytes * sum(map(len, DOCUMENTS))

    # Slower: while documents load, leading ones are computed. It is the fusion of the others, at a higher ratio.
    throttle.byte_s = 0.45 * compute_s / nbytes
    raised, order = until(llm, "ratio raised")
    way = ways[-1][1]
    assert way is not None and way.first > 0 and way.ratio > RATIO
    assert usage(raised)["fused"] == "yes"
    assert usage(raised)["computed_tokens"] > told["computed_tokens"]
    assert sum(usage(raised)["loaded_tokens"].values()) < sum(told["loaded_tokens"].values())
    spans = in_context(order)[1][way.first :]
    monkeypatch.setattr(FusionChoice, "decide", lambda _, ways, *__, **___: (Decision(0, "fuses"), ways[0]))
    assert tokens_of([asked(llm, order, spans, way.ratio)]) == tokens_of([raised])
    assert tokens_of([asked(llm, order)]) != [plain(llm, order)], "what would be taken for exact otherwise is not"
    monkeypatch.setattr(FusionChoice, "decide", noted)

    # Slow: all is computed, and found by who asks for no fusion.
    throttle.byte_s = 10.0 * compute_s / nbytes
    slow, order = until(llm, "fusion does not pay")
    assert usage(slow)["fused"] == "no" and usage(slow)["loaded_tokens"] == {}
    again = generate(llm, [in_context(order)[0]], DECLINED)[0]
    assert again.num_cached_tokens >= 900
    assert tokens_of([slow]) == tokens_of([again]) == [plain(llm, order)]
