"""A host tier that holds a few chunks, many prompts, and vLLM's default policy: eviction fails no request."""

from pathlib import Path

import pytest

pytest.importorskip(
    "vllm", reason="stock vLLM is not installed here; `make test-engines` runs this in its own environment"
)

from .support.engines import CHUNK, DECLINED, generate, make_model, prompts, start, tokens_of, usage

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]


def test_eviction_fails_no_request(tmp_path: Path) -> None:
    from vllm.config import KVTransferConfig

    transfer = KVTransferConfig(
        kv_connector="KVLoomConnector",
        kv_connector_module_path="kvloom.connectors.vllm_v1",
        kv_role="kv_both",
        kv_connector_extra_config={
            "chunk_tokens": CHUNK,
            "load_or_recompute": "always",
            "host_bytes": "4MiB",
        },  # ten chunks
    )
    llm = start(make_model(tmp_path / "model"), None, kv_transfer_config=transfer, enable_prefix_caching=False)
    bases = prompts(1, (260, 200, 330, 140))
    texts = [[*bases[i % 4][: 140 - i], *prompts(50 + i, (9,))[0]] for i in range(36)]
    plain = tokens_of(generate(llm, texts, DECLINED, tokens=8))
    loaded = 0
    for _ in range(4):
        outputs = generate(llm, texts, tokens=8)
        assert tokens_of(outputs) == plain
        assert not any(usage(output)["failed"] for output in outputs)
        loaded += sum(bool(usage(output)["loaded_tokens"]) for output in outputs)
    assert loaded > 20
    assert sum(m.value for m in llm.get_metrics() if m.name == "vllm:kvloom_failed_loads") == 0
    llm.llm_engine.engine_core.shutdown()
