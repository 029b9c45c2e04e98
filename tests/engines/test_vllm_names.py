"""What an engine decides when it starts is part of the name of its KV."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip(
    "vllm", reason="stock vLLM is not installed here; `make test-engines` runs this in its own environment"
)

from kvloom.connectors.identity.weights import folder_name

from .support.engines import DECLINED, generate, make_model, prompts, start, tokens_of, usage

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]


def name_in(engine: Any) -> str:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    name: str = get_kv_transfer_group().worker.info.spec.model_id
    engine.llm_engine.engine_core.shutdown()
    return name


def test_names_of_engines(tmp_path: Path) -> None:
    """The folder is younger than this process: that it holds what the engine has loaded is found in memory."""
    model = make_model(tmp_path / "model")
    plain = folder_name(model)
    settings = {"host_bytes": "64MiB"}
    assert name_in(start(model, settings)) == plain
    assert name_in(start(model, {**settings, "model_id": "mine"}, dtype="bfloat16", max_model_len=512)) == "mine"
    overridden = name_in(start(model, settings, hf_overrides={"rms_norm_eps": 0.5}))
    assert overridden.startswith(f"{plain}+overrides-")
    dummy = name_in(start(model, settings, load_format="dummy"))
    assert dummy.startswith("private-")


def test_what_depends_on_the_longest_context_is_not_shared(tmp_path: Path) -> None:
    """LongRoPE has two tables, and the engine takes one of them by `max_model_len`."""
    rope = {
        "rope_type": "longrope",
        "short_factor": [1.0] * 32,
        "long_factor": [4.0 + i / 2 for i in range(32)],
        "original_max_position_embeddings": 512,
        "rope_theta": 10000.0,
    }
    lengths = {"original_max_position_embeddings": 512, "max_position_embeddings": 2048}
    model = make_model(tmp_path / "phi3", "phi3", rope_parameters=rope, **lengths)
    texts, loaded = prompts(1, (300, 200)), []
    for length in (512, 1024, 1024):
        engine = start(model, {"host_bytes": "64MiB", "disk_path": str(tmp_path / "phi3 kv")}, max_model_len=length)
        plain = tokens_of(generate(engine, texts, DECLINED))
        assert engine.reset_prefix_cache()
        outputs = generate(engine, texts)
        assert tokens_of(outputs) == plain
        loaded.append([sum(usage(output)["loaded_tokens"].values()) for output in outputs])
        engine.llm_engine.engine_core.shutdown()
    assert loaded == [[0, 0], [0, 0], [256, 192]]
