"""What names weights, run-time choices and requests in vLLM: everything that shapes KV, and nothing that does not."""

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from kvloom.connectors.identity import loaded_weights
from kvloom.connectors.identity.adapters import AdapterNames
from kvloom.connectors.identity.weights import folder_name
from kvloom.connectors.vllm import identity as vllm_identity
from kvloom.connectors.vllm.adapters import OpenAdapters
from kvloom.connectors.vllm.identity import engine_name, request_identity
from kvloom.core import RopeSpec
from kvloom.errors import EngineError

ROPE = RopeSpec((1.0, 0.1))


class Runner:
    """Whoever calls us in vLLM has the model; a name is asked for from within."""

    def __init__(self, **weights: torch.Tensor) -> None:
        self.model = nn.ParameterDict(weights)
        self.layer = nn.Identity()
        self.model.add_module("layer", self.layer)

    def name(self, config: Any) -> str:
        return vllm_identity._weights_name(config, [self.layer])


def config_of(folder: Path | str, load_format: str = "auto", **fields: Any) -> Any:
    """A `VllmConfig` as far as it is looked at."""
    model = {
        "model": str(folder),
        "revision": None,
        "quantization": None,
        "quantization_config": None,
        "hf_overrides": {},
        "hf_config_path": None,
        "config_format": "auto",
        "dtype": torch.float16,
        "max_model_len": 1024,
        "hf_config": SimpleNamespace(to_dict=lambda: {"model_type": "llama", "rope_theta": 2.0}),
        "hf_text_config": SimpleNamespace(model_type="llama"),
        **fields,
    }
    return SimpleNamespace(model_config=SimpleNamespace(**model), load_config=SimpleNamespace(load_format=load_format))


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"embed": torch.randn(12, 4, generator=generator), "norm": torch.randn(4, generator=generator)}


def write(folder: Path, seed: int = 0, *, name: str = "model", age_s: float = 0.0) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors(seed), folder / f"{name}.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    if age_s:
        for path in folder.iterdir():
            os.utime(path, (time.time() - age_s,) * 2)
    return folder


@pytest.fixture
def young(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process began after all files were written."""
    monkeypatch.setattr(loaded_weights, "process_start_s", lambda: time.time() + 60)


# --------------------------------------------------------------------------------------------------------- weights


@pytest.mark.usefixtures("young")
def test_an_engine_has_the_name_of_its_folder(tmp_path: Path) -> None:
    folder = write(tmp_path / "model")
    assert Runner().name(config_of(folder)) == folder_name(folder)
    assert Runner().name(config_of(folder, "safetensors")) == folder_name(folder)
    write(folder, 1, name="consolidated")
    mistral = Runner().name(config_of(folder, "mistral"))
    assert mistral == Runner().name(config_of(folder)) != folder_name(folder), "vLLM reads Mistral's own files"
    assert Runner().name(config_of(folder, "safetensors")) == folder_name(folder)


def test_files_that_changed_since_the_process_began_are_compared_with_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write(tmp_path / "model")
    name = folder_name(folder)
    padded = {"embed": torch.cat((tensors()["embed"], torch.zeros(4, 4))), "norm": tensors()["norm"]}
    assert Runner(**tensors()).name(config_of(folder)) == name
    assert Runner(**padded).name(config_of(folder)) == name
    half = {"embed": tensors()["embed"][:6], "norm": tensors()["norm"]}
    assert Runner(**half).name(config_of(folder)) == name, "one of two ranks"
    bf16 = {key: value.bfloat16() for key, value in tensors().items()}
    assert Runner(**bf16).name(config_of(folder)) == name
    assert not caplog.messages
    write(folder, 1)  # while the engine has the old ones in memory
    first, second = (Runner(**tensors()).name(config_of(folder)) for _ in range(2))
    assert first.startswith("private-") and second.startswith("private-") and first != second
    assert "have changed since this process began" in caplog.text
    assert Runner(norm=tensors(1)["norm"]).name(config_of(folder)).startswith("private-"), "norms alone prove nothing"


@pytest.mark.usefixtures("young")
@pytest.mark.parametrize("load_format", ["dummy", "sharded_state", "pt", "tensorizer", "my_own"])
def test_other_load_formats_are_not_shared(tmp_path: Path, load_format: str, caplog: pytest.LogCaptureFixture) -> None:
    folder = write(tmp_path / "model")
    assert Runner().name(config_of(folder, load_format)).startswith("private-")
    assert f"load_format '{load_format}'" in caplog.text and "model_id" in caplog.text


def test_weights_that_are_not_there_have_no_name(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(EngineError, match=r"no weights .* as model_id"):
        Runner().name(config_of(tmp_path / "empty"))
    with pytest.raises(EngineError, match=r"neither a folder nor in the hub's cache.*model_id"):
        Runner().name(config_of("no/such-model"))


# ------------------------------------------------------------------------------------------------ run-time choices


def named(config: Any, *, rope: RopeSpec | None = ROPE, windows: tuple[int | None, ...] = (None, None)) -> str:
    layers = [SimpleNamespace(sliding_window=window) for window in windows]
    return engine_name("m", config, layers, rope, torch.float16)


def test_choices_at_run_time_count(tmp_path: Path) -> None:
    folder = write(tmp_path / "model")
    plain = named(config_of(folder))
    assert plain == "m"
    assert named(config_of(folder, max_model_len=2048)) == "m", "which changes nothing in a Llama"
    found = {
        plain,
        named(config_of(folder, hf_overrides={"rope_theta": 2.0})),
        named(config_of(folder, quantization="fp8")),
        named(config_of(folder, quantization="online", quantization_config={"linear": "fp8_per_tensor"})),
        named(config_of(folder, quantization="online", quantization_config={"linear": "int8"})),
        named(config_of(folder, dtype=torch.bfloat16)),
        named(config_of(folder), windows=(None, 128)),
        named(config_of(folder), windows=(128, 128)),
        named(config_of(folder), rope=None),
        named(config_of(folder, max_model_len=2048), rope=None),
        named(config_of(folder, max_model_len=4096, hf_text_config=SimpleNamespace(model_type="llama4"))),
    }
    assert len(found) == 11
    assert all(name.startswith("m") for name in found)
    (folder / "config.json").write_text('{"model_type": "llama", "quantization_config": {"quant_method": "fp8"}}')
    assert named(config_of(folder, quantization="fp8")) == "m", "the folder says so itself"


# -------------------------------------------------------------------------------------------------------- requests


def request(**more: Any) -> SimpleNamespace:
    fields = {
        "request_id": "r",
        "prompt_token_ids": [1, 2],
        "prompt_embeds": None,
        "mm_features": [],
        "resumable": False,
        "sampling_params": object(),
        "cache_salt": None,
        "lora_request": None,
    }
    return SimpleNamespace(**{**fields, **more})


def adapters_of() -> OpenAdapters:
    """Of an engine that starts after all that a test writes."""
    return OpenAdapters(AdapterNames(clock=lambda: time.time() + 60))


def lora(folder: Path | str, number: int = 1) -> SimpleNamespace:
    return SimpleNamespace(lora_name="policy", lora_path=str(folder), lora_int_id=number, load_inplace=False)


@pytest.mark.parametrize(
    "more",
    [
        {"prompt_token_ids": None},
        {"prompt_embeds": object()},
        {"mm_features": [object()]},
        {"resumable": True},
        {"sampling_params": None},
        {"lora_request": lora("hub/name")},
    ],
    ids=lambda more: next(iter(more)),
)
def test_requests_that_kvloom_cannot_tell_apart_are_left_alone(more: dict[str, Any]) -> None:
    assert request_identity(request(**more), adapters_of()) is None


def test_tenants_adapters_and_ways_of_decoding_have_identities(tmp_path: Path) -> None:
    """An adapter is what its files hold, not where they lie or what it is called."""
    folders = [write(tmp_path / str(i), seed) for i, seed in enumerate((1, 1, 2))]
    names = adapters_of()
    found = [
        request_identity(request(), names),
        request_identity(request(cache_salt="a"), names),
        request_identity(request(cache_salt="b"), names),
        *(request_identity(request(lora_request=lora(folder, i + 1)), names) for i, folder in enumerate(folders)),
        request_identity(request(cache_salt="a", lora_request=lora(folders[0])), names),
        request_identity(request(), names, b"landmarks"),
    ]
    assert None not in found
    assert found[0] == b"", "as in every other connector"
    assert found[3] == found[4]
    assert len(set(found)) == 7
