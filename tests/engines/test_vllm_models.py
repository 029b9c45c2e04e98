"""Architectures, two ranks, the compiled mode: equal prompts plain, stored, loaded and fused."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip(
    "vllm", reason="stock vLLM is not installed here; `make test-engines` runs this in its own environment"
)

from .groups.families import PLAIN
from .support.engines import DECLINED, generate, make_model, prompts, start, tokens_of, usage

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(params=PLAIN)
def llm(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    family = PLAIN[request.param]
    if (why := family.why_not_here()) is not None:
        pytest.skip(why)
    model = make_model(tmp_path / "model", family.architecture, **family.config)
    engine = start(model, {"fusion_slice_tokens": 100}, **family.options_here())
    engine.fuses = family.fuses
    yield engine
    engine.llm_engine.engine_core.shutdown()


def test_plain_stored_loaded_and_fused(llm: Any) -> None:
    """A fusion that computes all: what passes of our own give is what plain vLLM gives. Then one that does not."""
    texts, documents, (system, question) = prompts(3, (300, 130, 64)), prompts(5, (170, 203)), prompts(6, (70, 23))
    plain = tokens_of(generate(llm, texts, DECLINED))
    assert llm.reset_prefix_cache()
    assert tokens_of(generate(llm, texts)) == plain
    stored_by_s = time.monotonic() + 20
    while True:  # in the background, and perhaps in another process
        assert llm.reset_prefix_cache()
        outputs = generate(llm, texts, {"save": False})
        assert tokens_of(outputs) == plain
        if [usage(output)["loaded_tokens"] for output in outputs] == [{"host": 256}, {"host": 128}, {"host": 64}]:
            break
        assert time.monotonic() < stored_by_s
        time.sleep(0.1)

    for document in documents:
        generate(llm, [document], {"documents": [[0, len(document)]], "ratio": 0.0}, tokens=1)
    context = [*system, *documents[1], *documents[0], *question]
    borders = (70, 273, 443)
    spans = [[borders[0], borders[1]], [borders[1], borders[2]]]
    assert llm.reset_prefix_cache()
    expected = tokens_of(generate(llm, [context], DECLINED))
    stored_by_s = time.monotonic() + 20
    while True:
        assert llm.reset_prefix_cache()
        (output,) = generate(llm, [context], {"documents": spans, "ratio": 0.99999})
        assert tokens_of([output]) == expected
        if usage(output)["loaded_tokens"]:
            break
        assert time.monotonic() < stored_by_s
        time.sleep(0.1)
    assert llm.reset_prefix_cache()
    (output,) = generate(llm, [context], {"documents": spans, "ratio": 0.1})
    told = usage(output)
    assert told["failed"] is False
    if llm.fuses:
        assert 70 < told["computed_tokens"] < 70 + 0.1 * 373 + 1, "the rotation is understood: not all is computed"
    else:
        assert told["computed_tokens"] == 0
        assert tokens_of([output]) == expected
