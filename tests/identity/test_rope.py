"""The shared rope table: what transformers computes, to the last digits but those that programs disagree about."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from kvloom.connectors.identity.rope import derived_rope, settled_rope
from kvloom.core import RopeSpec

from ..support.models import ROPES, make_model

PARAMETERS: dict[str, dict[str, Any]] = {
    **{
        name: {"rope_theta": 1000.0, **rope}
        for name, rope in ROPES.items()
        if name not in ("dynamic", "longrope")  # their tables are taken as engines have them
    },
    "llama 3.1": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "qwen2.5 128k": {
        "rope_type": "yarn",
        "rope_theta": 1000000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
    },
    "yarn, all fields": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 16.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 0.7,
        "mscale_all_dim": 1.0,
        "truncate": False,
    },
    "yarn, amplitude": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 4096,
        "attention_factor": 1.3,
    },
}


def actual_of(parameters: dict[str, Any], head_dim: int) -> RopeSpec:
    model = make_model("llama", rope_parameters=parameters, head_dim=head_dim)
    rotary = model.model.rotary_emb
    return RopeSpec(tuple(rotary.inv_freq.tolist()), float(rotary.attention_scaling))


@pytest.mark.parametrize("head_dim", [8, 128])
@pytest.mark.parametrize("parameters", PARAMETERS.values(), ids=PARAMETERS)
def test_the_table_is_that_of_transformers(parameters: dict[str, Any], head_dim: int) -> None:
    actual, derived = actual_of(parameters, head_dim), derived_rope(parameters, head_dim)
    assert derived is not None
    assert torch.allclose(torch.tensor(actual.inv_freq), torch.tensor(derived.inv_freq), rtol=2e-6, atol=0.0)
    assert actual.attention_scaling == pytest.approx(derived.attention_scaling, rel=1e-6)
    assert settled_rope(actual, parameters) == derived
    assert all(value == float(torch.tensor(value, dtype=torch.float32)) for value in derived.inv_freq)


def test_programs_that_disagree_about_last_digits_share_a_table() -> None:
    parameters = PARAMETERS["llama 3.1"]
    actual = actual_of(parameters, 128)
    other = replace(actual, inv_freq=tuple(f * (1 + 3e-7) for f in actual.inv_freq))
    assert other != actual and settled_rope(other, parameters) == settled_rope(actual, parameters)
    rounded = replace(actual_of(PARAMETERS["qwen2.5 128k"], 128), attention_scaling=1.140625)  # read from bfloat16
    assert settled_rope(rounded, PARAMETERS["qwen2.5 128k"]).attention_scaling == pytest.approx(1.1386294, rel=1e-6)


def test_a_table_that_the_config_does_not_explain_is_taken_as_it_is() -> None:
    parameters = PARAMETERS["default"]
    actual = actual_of(parameters, 8)
    for other in (
        replace(actual, inv_freq=tuple(f * 1.001 for f in actual.inv_freq)),
        replace(actual, attention_scaling=1.1),
    ):
        assert settled_rope(other, parameters) == other
    assert settled_rope(actual, None) == settled_rope(actual, {}) == actual
    assert settled_rope(replace(actual, interleaved=True), parameters).interleaved
    for kind in ({"rope_type": "dynamic", "factor": 2.0}, {"partial_rotary_factor": 0.5}, {"rope_type": "yarn"}):
        assert derived_rope({"rope_theta": 1e4, **kind}, 8) is None
    assert derived_rope({"full_attention": {"rope_theta": 1e4}}, 8) is None
