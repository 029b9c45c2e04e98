"""What names weights and requests in vLLM: everything that shapes KV, and nothing that does not."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvloom.connectors.vllm.identity import model_id_of, request_identity
from kvloom.errors import EngineError


class Config:
    """A `ModelConfig` as far as it is looked at."""

    def __init__(self, folder: Path | str, quantization: str | None = None, **fields: object) -> None:
        self.model, self.revision, self.quantization = str(folder), None, quantization
        self.hf_config = SimpleNamespace(to_dict=lambda: {"model_type": "llama", "rope_theta": 1.0, **fields})


def weights(folder: Path, **files: bytes) -> Path:
    folder.mkdir()
    for name, data in files.items():
        (folder / f"{name}.safetensors").write_bytes(data)
    (folder / "config.json").write_text("{}")
    return folder


def test_a_name_stands_for_weights_and_configuration(tmp_path: Path) -> None:
    first = weights(tmp_path / "first", a=b"1" * 999, b=b"2" * 999)
    same = weights(tmp_path / "elsewhere", a=b"1" * 999, b=b"2" * 999)
    swapped = weights(tmp_path / "swapped", a=b"2" * 999, b=b"1" * 999)
    flipped = weights(tmp_path / "flipped", a=b"1" * 999, b=b"2" * 998 + b"3")
    name = model_id_of(Config(first))
    assert name.startswith("llama-")
    assert model_id_of(Config(same)) == name
    assert model_id_of(Config(same, _name_or_path="x", dtype="bfloat16", transformers_version="6")) == name
    others = [Config(swapped), Config(flipped), Config(first, quantization="fp8"), Config(first, rope_theta=2.0)]
    assert len({name, *map(model_id_of, others)}) == 5


def test_weights_that_are_not_there_have_no_name(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r'no weights .* as "model_id"'):
        model_id_of(Config(weights(tmp_path / "empty")))


def request(**more: Any) -> SimpleNamespace:
    fields = {
        "prompt_token_ids": [1, 2],
        "prompt_embeds": None,
        "mm_features": [],
        "resumable": False,
        "sampling_params": object(),
        "cache_salt": None,
        "lora_request": None,
    }
    return SimpleNamespace(**{**fields, **more})


@pytest.mark.parametrize(
    "more",
    [
        {"prompt_token_ids": None},
        {"prompt_embeds": object()},
        {"mm_features": [object()]},
        {"resumable": True},
        {"sampling_params": None},
        {"lora_request": SimpleNamespace(lora_path="hub/name")},
    ],
    ids=lambda more: next(iter(more)),
)
def test_requests_that_kvloom_cannot_tell_apart_are_left_alone(more: dict[str, Any]) -> None:
    assert request_identity(request(**more)) is None


def test_tenants_and_adapters_have_identities(tmp_path: Path) -> None:
    """An adapter is what its files hold, not where they lie or what it is called."""
    adapters = [weights(tmp_path / str(i), adapter=data) for i, data in enumerate((b"1" * 99, b"1" * 99, b"2" * 99))]
    found = [
        request_identity(request()),
        request_identity(request(cache_salt="a")),
        request_identity(request(cache_salt="b")),
        *(request_identity(request(lora_request=SimpleNamespace(lora_path=str(folder)))) for folder in adapters),
        request_identity(request(cache_salt="a", lora_request=SimpleNamespace(lora_path=str(adapters[0])))),
    ]
    assert None not in found
    assert found[3] == found[4]
    assert len(set(found)) == 6
    (adapters[0] / "config.json").write_text(json.dumps({"r": 8}))
    changed = request_identity(request(lora_request=SimpleNamespace(lora_path=str(adapters[0]))))
    assert changed not in found, "its configuration counts, and changes on disk are seen"
