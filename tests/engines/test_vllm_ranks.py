"""Two ranks, and the compiled mode: loads layer by layer, through a codec, with events; equal tokens."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip(
    "vllm", reason="stock vLLM is not installed here; `make test-engines` runs this in its own environment"
)

from vllm.config.kv_events import KVEventsConfig

from .support.engines import DECLINED, generate, make_model, prompts, start, tokens_of, usage
from .test_vllm_events import Router

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]

CASES: dict[str, dict[str, Any]] = {"two ranks": {"tensor_parallel_size": 2}, "compiled": {"enforce_eager": False}}


@pytest.fixture(params=CASES)
def llm(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    options = CASES[request.param]
    if options.get("tensor_parallel_size", 1) > (os.cpu_count() or 1):
        pytest.skip("vLLM wants a core for each rank")
    endpoint = f"ipc://{tmp_path}/events"
    engine = start(
        make_model(tmp_path / "model"),
        {"load_mode": "layerwise", "disk_path": str(tmp_path / "disk"), "disk_codec": "lossless"},
        kv_events_config=KVEventsConfig(enable_kv_cache_events=True, publisher="zmq", endpoint=endpoint),
        enable_prefix_caching=True,
        **options,
    )
    engine.router = Router(endpoint)
    time.sleep(0.5)
    yield engine
    engine.llm_engine.engine_core.shutdown()


def test_loaded_layer_by_layer_and_told(llm: Any) -> None:
    texts = prompts(3, (300, 130, 64))
    plain = tokens_of(generate(llm, texts, DECLINED))
    assert llm.reset_prefix_cache()
    assert tokens_of(generate(llm, texts)) == plain
    stored_by_s = time.monotonic() + 30
    while True:  # in the background, and perhaps in another process
        assert llm.reset_prefix_cache()
        outputs = generate(llm, texts, {"save": False})
        assert tokens_of(outputs) == plain
        if [usage(output)["loaded_tokens"] for output in outputs] == [{"host": 256}, {"host": 128}, {"host": 63}]:
            break
        assert time.monotonic() < stored_by_s
        time.sleep(0.1)
    assert not any(usage(output)["failed"] for output in outputs)
    llm.router.listen()
    for text in texts:
        whole = len(text) // 64 * 64
        assert llm.router.prefix("CPU", text) == llm.router.prefix("STORAGE", text) == whole
