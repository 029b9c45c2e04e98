"""Which engines of vLLM are refused at start, and that the line says what to do."""

from types import SimpleNamespace
from typing import Any

import pytest

from kvloom.connectors.serving.settings import ServingSettings
from kvloom.connectors.vllm.groups import groups_of
from kvloom.connectors.vllm.servable import expect_servable, settings_for
from kvloom.connectors.vllm.worker import _expect_retrieval_is_read
from kvloom.errors import EngineError

from .test_groups import FULL, WINDOW, config, states

LATENT = ("MLAAttentionSpec", {})


def engine(**changes: Any) -> Any:
    sizes = {"pipeline_parallel_size": 1, "decode_context_parallel_size": 1, "prefill_context_parallel_size": 1}
    custom_ops = changes.pop("custom_ops", ["all"])

    def is_enabled(name: str) -> bool:
        return "all" in custom_ops and f"-{name}" not in custom_ops

    return SimpleNamespace(
        parallel_config=SimpleNamespace(**{name: changes.get(name, one) for name, one in sizes.items()}),
        speculative_config=changes.get("speculative"),
        device_config=SimpleNamespace(device_type=changes.get("device", "cpu")),
        compilation_config=SimpleNamespace(is_custom_op_enabled=is_enabled),
        scheduler_config=SimpleNamespace(
            async_scheduling=changes.get("plans_ahead", False), max_num_batched_tokens=changes.get("step", 2048)
        ),
        cache_config=SimpleNamespace(use_replayssm=changes.get("replays", False)),
        use_v2_model_runner=False,
    )


LAYERWISE = {"load_mode": "layerwise"}
MAMBA2 = states(block_size=64, num_prefill_checkpoint_blocks=1)
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], list[Any], str]] = {
    "context parallelism": ({"decode_context_parallel_size": 2}, {}, [FULL], "--tensor-parallel-size instead"),
    "a draft model": ({"speculative": SimpleNamespace(method="eagle")}, {}, [FULL], "use ngram or suffix"),
    "windows, layerwise": ({}, LAYERWISE, [FULL, WINDOW], "use 'async'"),
    "states, layerwise": ({}, LAYERWISE, [FULL, states()], "use 'async'"),
    "states with inputs since": ({"replays": True}, {}, [FULL, states()], "--use-replayssm"),
    "short convolutions": ({}, {}, [FULL, states(kind="SHORT_CONV")], "other answers with every batch"),
    "states within steps": ({}, {}, [FULL, MAMBA2], "--max-num-batched-tokens 64, .*or leave the connector out"),
    "stages, layerwise": (
        {"pipeline_parallel_size": 2},
        LAYERWISE,
        [FULL],
        "another finds that KV was lost; use 'async'",
    ),
    "latents, layerwise": ({"custom_ops": ["none"]}, LAYERWISE, [LATENT], "latent caches .MLA.; use 'async'"),
    "planning ahead, layerwise": ({"plans_ahead": True}, LAYERWISE, [FULL], "needs --no-async-scheduling"),
    "latents, rotated wrongly": (
        {},
        {},
        [LATENT],
        r'--compilation-config .*"-rotary_embedding".*leave the connector out',
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str) -> None:
    changes, settings, groups, why = REFUSED[case]
    with pytest.raises(EngineError, match=why) as caught:
        expect_servable(ServingSettings.of(settings), engine(**changes), config(*groups))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "groups"),
    [
        ({}, [FULL]),
        ({"pipeline_parallel_size": 2}, [FULL, WINDOW]),
        ({"custom_ops": ["all", "-rotary_embedding"]}, [LATENT]),
        ({"custom_ops": ["none"]}, [LATENT]),
        ({"device": "cuda"}, [LATENT]),
        ({}, [FULL, states()]),
        ({"device": "cuda"}, [FULL, states(kind="SHORT_CONV")]),
        ({"step": 64}, [FULL, MAMBA2]),
        ({"device": "cuda"}, [FULL, MAMBA2]),
    ],
)
def test_what_is_served(changes: dict[str, Any], groups: list[Any]) -> None:
    served = expect_servable(ServingSettings(), engine(**changes), config(*groups))
    assert served.is_latent is (groups == [LATENT])


def test_chunks_are_as_long_as_blocks_with_states() -> None:
    settings = ServingSettings.of({"chunk_tokens": 100})
    assert settings_for(groups_of(config(FULL, WINDOW)), settings) is settings
    assert settings_for(groups_of(config(FULL, states(block_size=528))), settings).chunk_tokens == 528


@pytest.mark.parametrize("further", [WINDOW, states()])
def test_retrieval_in_groups_is_refused(further: Any) -> None:
    settings = {"budget_tokens": 512, "allow_uncertified": True}
    asked = SimpleNamespace(additional_config={"kvloom": {"retrieval": settings}})
    with pytest.raises(EngineError, match=r"in several KV cache groups, or have windows.*leave the settings out"):
        _expect_retrieval_is_read(asked, groups_of(config(FULL, further)), [])
    unasked = SimpleNamespace(additional_config={})
    _expect_retrieval_is_read(unasked, groups_of(config(FULL, further)), [])
