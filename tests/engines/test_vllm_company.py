"""Within vLLM's own MultiConnector: beside a connector that needs the handshake, and beside another one of kvloom's."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip(
    "vllm", reason="stock vLLM is not installed here; `make test-engines` runs this in its own environment"
)

from .support.engines import ALWAYS, CHUNK, DECLINED, generate, make_model, prompts, start, tokens_of, usage

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]

HANDSHAKE = {
    "kv_connector": "HandshakeConnector",
    "kv_connector_module_path": f"{__package__}.support.handshake",
    "kv_role": "kv_both",
}


def kvloom(**settings: Any) -> dict[str, Any]:
    return {
        "kv_connector": "KVLoomConnector",
        "kv_connector_module_path": "kvloom.connectors.vllm_v1",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"chunk_tokens": CHUNK, **ALWAYS, "host_bytes": "64MiB", **settings},
    }


def engine(folder: Path, *connectors: dict[str, Any]) -> Any:
    from vllm.config import KVTransferConfig

    transfer = KVTransferConfig(
        kv_connector="MultiConnector",
        kv_role="kv_both",
        kv_load_failure_policy="recompute",
        kv_connector_extra_config={"connectors": list(connectors)},
    )
    return start(make_model(folder / "model"), None, kv_transfer_config=transfer, enable_prefix_caching=True)


def children() -> list[Any]:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return list(get_kv_transfer_group().sub_connectors)


def settle() -> None:
    for each in children():
        if getattr(each, "worker", None) is not None:
            assert each.worker.transfers.settle(30.0)


@pytest.mark.parametrize("is_first", [True, False], ids=["before it", "behind it"])
def test_beside_a_connector_with_a_handshake(tmp_path: Path, is_first: bool) -> None:
    both = (kvloom(), HANDSHAKE) if is_first else (HANDSHAKE, kvloom())
    llm = engine(tmp_path, *both)
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler.connector
    assert [each.met for each in scheduler.sub_connectors if hasattr(each, "met")] == [[0]]
    texts = prompts(1, (300, 190))
    plain = tokens_of(generate(llm, texts, DECLINED))
    assert llm.reset_prefix_cache()
    outputs = generate(llm, texts)
    assert tokens_of(outputs) == plain
    settle()
    assert llm.reset_prefix_cache()
    outputs = generate(llm, texts)
    assert tokens_of(outputs) == plain
    assert [sum(usage(output)["loaded_tokens"].values()) for output in outputs] == [256, 128]
    assert all(output.kv_transfer_params["handshake"] for output in outputs)
    assert any(m.name == "vllm:kvloom_hit_tokens" and m.value >= 384 for m in llm.get_metrics())
    llm.llm_engine.engine_core.shutdown()


def test_two_of_our_own(tmp_path: Path) -> None:
    """The second does not take for exact what the first has fused."""
    llm = engine(tmp_path, kvloom(salt="one"), kvloom(salt="two", fusion_ratio=1.0))
    first, second = children()
    text, question = prompts(2, (300, 23))
    documents = prompts(3, (150, 97))
    context = [*documents[1], *documents[0], *question]
    spans = {"documents": [[0, 97], [97, 247]], "ratio": 0.1}
    plain = tokens_of(generate(llm, [text, context], DECLINED))
    for document in documents:
        generate(llm, [document], {"documents": [[0, len(document)]], "ratio": 0.1}, tokens=1)
    (output,) = generate(llm, [text])
    assert set(output.kv_transfer_params) == {"kvloom", "kvloom.2"}
    settle()
    assert llm.reset_prefix_cache()
    (fused,) = generate(llm, [context], spans)
    assert usage(fused)["fused"] == "yes"
    settle()
    for each in (first, second):
        assert each.worker.transfers.store.stats().tiers[0].chunks > 0
    assert llm.reset_prefix_cache()
    outputs = generate(llm, [text, context])
    assert tokens_of(outputs) == plain, "exact, whoever had what"
    llm.llm_engine.engine_core.shutdown()
