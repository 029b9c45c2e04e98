"""Weights of a running engine change: it finds nothing of before, for open requests either; others find what was."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip(
    "vllm", reason="stock vLLM is not installed here; `make test-engines` runs this in its own environment"
)

from .support.engines import DECLINED, generate, make_model, prompts, sampling, start, tokens_of, usage

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]

A, B, C = prompts(3, (300, 260, 280))


def other_weights(model: Any) -> None:
    for name, weight in model.named_parameters():
        if "embed_tokens" in name:
            weight.data.copy_(weight.data.roll(1, 0))


def test_requests_that_run_and_wait(tmp_path: Path) -> None:
    from vllm.distributed.kv_transfer import kv_transfer_state

    model, settings = make_model(tmp_path / "model"), {"host_bytes": "256MiB", "disk_path": str(tmp_path / "kv")}
    llm = start(model, settings, max_num_seqs=1, enable_prefix_caching=True)
    before = tokens_of(generate(llm, [C], DECLINED))
    assert llm.reset_prefix_cache()
    generate(llm, [A, B])
    assert llm.reset_prefix_cache()
    done, engine = {}, llm.llm_engine
    engine.add_request("A", {"prompt_token_ids": A}, sampling())
    for _ in range(12):
        engine.step()
    for name, text in (("B", B), ("C", C)):
        engine.add_request(name, {"prompt_token_ids": text}, sampling())
    assert llm.reset_prefix_cache(reset_running_requests=True, reset_connector=True)
    llm.apply_model(other_weights)
    while engine.has_unfinished_requests():
        done |= {output.request_id[0]: output for output in engine.step() if output.finished}
    assert llm.reset_prefix_cache()
    wanted = tokens_of(generate(llm, [B, C], DECLINED))
    assert tokens_of([done["B"], done["C"]]) == wanted
    assert [usage(done[name])["loaded_tokens"] for name in "BC"] == [{}, {}]
    llm.llm_engine.engine_core.shutdown()
    kv_transfer_state._KV_CONNECTOR_AGENT = None
    other = start(model, settings, enable_prefix_caching=True)
    (output,) = generate(other, [C])
    assert tokens_of([output]) == before, "another engine, the original weights, the same disk"
    other.llm_engine.engine_core.shutdown()
