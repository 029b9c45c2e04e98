"""Engines with windows or eight-bit caches find what another one has left on disk; of latents test_vllm_bench tells."""

from pathlib import Path

import pytest

pytest.importorskip(
    "vllm", reason="stock vLLM is not installed here; `make test-engines` runs this in its own environment"
)

from ..support.engines import generate, make_model, prompts, start, tokens_of, usage
from .families import PRESSED
from .test_families import transfers_of

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.parametrize("title", ["Gemma 3", "Llama, fp8 cache"])
def test_another_engine_finds_what_the_first_has_left_on_disk(tmp_path: Path, title: str) -> None:
    family = PRESSED[title]
    if (why := family.why_not_here()) is not None:
        pytest.skip(why)
    model, texts, plain = make_model(tmp_path / "model", family.architecture, **family.config), prompts(9, (300,)), []
    for loaded in ({}, {"disk": 256}):
        engine = start(model, {"host_bytes": "64MiB", "disk_path": str(tmp_path / "disk")}, **family.options_here())
        (output,) = generate(engine, texts)
        plain.append(tokens_of([output]))
        assert usage(output)["loaded_tokens"] == loaded
        assert transfers_of(engine).settle(30.0)
        engine.llm_engine.engine_core.shutdown()
    assert plain[0] == plain[1]
