"""A lossy tier in an engine, with a profile and certificates that transformers has made; refused without them."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip(
    "vllm", reason="stock vLLM is not installed here; `make test-engines` runs this in its own environment"
)

from transformers import AutoModelForCausalLM

from .support import engines
from .support.engines import DECLINED, generate, make_model, prompts, tokens_of, usage

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its profile, and certificates for `nuq4` and for fusions of a tenth."""
    folder = tmp_path_factory.mktemp("vllm")
    make_model(folder / "model")
    soften(folder / "model" / "model.safetensors")
    script = Path(__file__).parent.joinpath("support", "quality_records.py")
    made = subprocess.run([sys.executable, script, folder], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr[-3000:]
    return folder


def soften(weights: Path) -> None:
    """Attention as broad as real models': what is chosen by a hair's breadth would be another after any rounding."""
    tensors = load_file(weights)
    for name, tensor in tensors.items():
        if "q_proj" in name or "k_proj" in name:
            tensor *= 0.4
    save_file(tensors, weights, {"format": "pt"})


def settings(folder: Path, *certificates: str) -> dict[str, Any]:
    return {
        "model_id": "tiny",
        "host_bytes": "1KiB",  # nothing fits
        "disk_path": str(folder / "disk"),
        "disk_codec": "nuq4",
        "profile": str(folder / "profile.safetensors"),
        "certificates": [str(folder / f"{name}.json") for name in certificates],
    }


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[Any]:
    engine = engines.start(folder / "model", settings(folder, "nuq4", "fusion"))
    yield engine
    engine.llm_engine.engine_core.shutdown()


def stored(llm: Any, texts: list[list[int]], expected: list[int], options: dict[str, Any] | None = None) -> list[Any]:
    """Outputs of requests that load so many tokens, once they are stored."""
    until_s = time.monotonic() + 20
    while True:
        assert llm.reset_prefix_cache()
        outputs = generate(llm, texts, options)
        if [sum(usage(output)["loaded_tokens"].values()) for output in outputs] == expected:
            return outputs
        assert time.monotonic() < until_s
        time.sleep(0.1)


def test_a_certified_codec_serves(llm: Any) -> None:
    """From the disk, in 4 bits: keys and values that differ by little, and first tokens that mostly do not."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    texts = prompts(21, (140, 200, 260, 130, 150, 210, 320, 400))
    plain = tokens_of(generate(llm, texts, DECLINED))
    assert llm.reset_prefix_cache()
    assert tokens_of(generate(llm, texts)) == plain
    wanted = [(len(text)) // 64 * 64 for text in texts]
    outputs = stored(llm, texts, wanted)
    assert {name for output in outputs for name in usage(output)["loaded_tokens"]} == {"disk"}
    firsts = [tokens[0] for tokens in tokens_of(outputs)]
    assert sum(first == tokens[0] for first, tokens in zip(firsts, plain, strict=True)) >= 6

    transfers = get_kv_transfer_group().worker.transfers
    store = transfers.store
    key = store.tiers[1].entries()[0].key
    assert store.stats().tiers[0].chunks == 0
    there = store.tiers[1].get(key)
    assert there is not None
    assert there.codec == "nuq"
    chunk = store.get(key)
    assert chunk is not None
    assert there.nbytes < 0.2 * (chunk.keys.nbytes + chunk.values.nbytes)
    place = next(start for start in range(0, 400, 64) if int(chunk.positions[0]) == start)
    text = next(text for text in texts if text[place : place + 64] == chunk.token_ids.tolist())
    model = AutoModelForCausalLM.from_pretrained(llm.llm_engine.vllm_config.model_config.model)
    with torch.no_grad():
        cache = model(torch.tensor([text])).past_key_values
    for layer, (keys, values) in enumerate(zip(chunk.keys, chunk.values, strict=True)):
        for ours, theirs in ((keys, cache.layers[layer].keys), (values, cache.layers[layer].values)):
            exact = theirs[0, :, place : place + 64]
            assert 0.001 < float((ours - exact).norm() / exact.norm()) < 0.2


def test_fusions_compute_the_certified_share(llm: Any) -> None:
    documents, question = prompts(31, (170, 203)), prompts(32, (20,))[0]
    for document in documents:
        generate(llm, [document], {"documents": [[0, len(document)]], "ratio": 0.0}, tokens=1)
    spans = [[0, 203], [203, 373]]
    (output,) = stored(llm, [[*documents[1], *documents[0], *question]], [352], {"documents": spans})
    told = usage(output)
    assert told["failed"] is False
    assert told["computed_tokens"] == -(-149 // 10), "a tenth of the second document up to the last whole block"
    assert llm.reset_prefix_cache()
    (output,) = generate(llm, [[*documents[1], *documents[0], *question]], {"documents": spans, "ratio": 0.5})
    assert usage(output)["computed_tokens"] == -(-149 // 2), "a request may ask for another"


def test_without_its_certificate_an_engine_does_not_start(folder: Path) -> None:
    code = "import json, pathlib, sys, engines as e; e.start(pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]))"
    refused = subprocess.run(
        [sys.executable, "-c", code, folder / "model", json.dumps(settings(folder, "fusion"))],
        cwd=Path(__file__).parent / "support",
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 1
    expected = r"UncertifiedError: the lossy codec 'nuq' may not be used for tiny: .*--model-id tiny"
    assert re.search(expected, refused.stderr)
