"""LoRA in vLLM without vLLM: what is in memory, and requests whose adapter changes while they are open."""

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from kvloom.connectors.identity.adapters import AdapterNames
from kvloom.connectors.vllm.adapters import LoadedAdapters, OpenAdapters, adapter_variant

MODULES = ("q_proj", "k_proj", "o_proj")


def adapter(folder: Path, seed: int, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8, **config}))
    save_file(weights(seed), folder / "adapter_model.safetensors")
    return folder


def weights(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"lora_A": (4, 16), "lora_B": (16, 4)}
    return {
        f"base_model.model.layers.0.{module}.{name}.weight": torch.randn(shape, generator=generator)
        for module in MODULES
        for name, shape in shapes.items()
    }


class Model:
    """A `LoRAModel`."""

    def __init__(self, loras: dict[str, Any]) -> None:
        self.loras = loras


def in_memory(seed: int, dtype: torch.dtype = torch.bfloat16, scaling: float = 2.0) -> Any:
    """As vLLM keeps it: cast, multiplied, and some modules packed."""
    cast = {name: tensor.to(dtype) for name, tensor in weights(seed).items()}
    pairs = [tuple(cast[f"base_model.model.layers.0.{m}.{x}.weight"] for x in ("lora_A", "lora_B")) for m in MODULES]
    for _, b in pairs:
        b *= scaling
    packed = SimpleNamespace(lora_a=[pairs[0][0], pairs[1][0], None], lora_b=[pairs[0][1], pairs[1][1], None])
    return Model({"qkv_proj": packed, "o_proj": SimpleNamespace(lora_a=pairs[2][0], lora_b=pairs[2][1])})


def model_with(adapters: dict[int, Any]) -> nn.Module:
    model = nn.Identity()
    model.lora_manager = SimpleNamespace(list_adapters=lambda: adapters)  # type: ignore[assignment]
    return model


def test_memory_is_compared_with_files(tmp_path: Path) -> None:
    memory = LoadedAdapters(model_with({}))
    one, two = adapter(tmp_path / "one", 1), adapter(tmp_path / "two", 2)
    for dtype in (torch.bfloat16, torch.float32):
        assert memory.holds(in_memory(1, dtype), one) is True
        assert memory.holds(in_memory(1, dtype), two) is False
    assert memory.holds(in_memory(1, scaling=4.0), one) is False
    assert memory.holds(in_memory(1, scaling=4.0), adapter(tmp_path / "rs", 1, use_rslora=True)) is True
    assert memory.holds(in_memory(1), adapter(tmp_path / "patterns", 1, rank_pattern={"q_proj": 2})) is None
    assert memory.holds(SimpleNamespace(loras={}), one) is None
    assert memory.holds(in_memory(1), tmp_path / "none") is None
    assert LoadedAdapters(nn.Identity()).adapter(1) is None


def test_views_of_the_file_prove_nothing(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "one", 1, lora_alpha=4)
    a, b = list(weights(1).values())[:2]
    save_file({"a": a, "b": b}, folder / "adapter_model.safetensors")
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        a, b = file.get_tensor("a"), file.get_tensor("b")
    mapped, copied = (
        Model({"q_proj": SimpleNamespace(lora_a=a, lora_b=b)}) for a, b in ((a, b), (a.clone(), b.clone()))
    )
    memory = LoadedAdapters(nn.Identity())
    assert memory.holds(mapped, folder) is None
    assert memory.holds(copied, folder) is True


def lora(folder: Path, number: int = 1, *, load_inplace: bool = False) -> SimpleNamespace:
    return SimpleNamespace(lora_name="policy", lora_path=str(folder), lora_int_id=number, load_inplace=load_inplace)


def test_requests_without_adapters_are_none_of_its_business() -> None:
    adapters = OpenAdapters(AdapterNames())
    assert adapters.open("r", None) == b""
    assert not adapters.has_changed("r")
    assert adapters.begin_step({"r"}) == set()
    adapters.close("r")


def test_an_adapter_that_changes_before_it_is_computed(tmp_path: Path) -> None:
    folder, held = adapter(tmp_path / "live", 1), dict[int, Any]()
    adapters = OpenAdapters(AdapterNames(LoadedAdapters(model_with(held))))
    assert adapters.open("r", lora(folder)) not in (None, b"")
    assert not adapters.has_changed("r")
    adapter(folder, 2)
    assert adapters.has_changed("r"), "the engine reads it only now"
    adapters.close("r")
    assert not adapters.has_changed("r")


def test_nothing_is_saved_before_the_engine_has_read_the_adapter(tmp_path: Path) -> None:
    folder, held = adapter(tmp_path / "live", 1), dict[int, Any]()
    adapters = OpenAdapters(AdapterNames(LoadedAdapters(model_with(held))))
    adapters.open("r", lora(folder))
    assert adapters.begin_step({"r", "other"}) == {"r"}
    held[1] = in_memory(1)
    assert not adapters.has_changed("r")
    assert adapters.begin_step({"r", "other"}) == set()
    held[1] = in_memory(2)
    assert adapters.has_changed("r")


def test_in_other_processes_two_steps_are_waited_for(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "live", 1)
    adapters = OpenAdapters(AdapterNames(clock=lambda: time.time() + 60))
    adapters.open("r", lora(folder))
    assert [adapters.begin_step({"r"}) for _ in range(4)] == [{"r"}, {"r"}, set(), set()]


@pytest.mark.parametrize("load_inplace", [True, False])
def test_a_reload_changes_open_requests(tmp_path: Path, *, load_inplace: bool) -> None:
    one, two = adapter(tmp_path / "one", 1), adapter(tmp_path / "two", 2)
    adapters = OpenAdapters(AdapterNames(clock=lambda: time.time() + 60))
    first = adapters.open("r", lora(one))
    other = adapters.open("s", lora(two, load_inplace=load_inplace))
    assert (other is not None) == load_inplace and other != first
    assert adapters.has_changed("r"), "its number stands for another adapter"


def test_blocks_of_an_earlier_version_in_the_engines_own_cache(tmp_path: Path) -> None:
    """The engine files blocks by the adapter's name and path: after a reload in place it takes the old ones for new."""
    folder, other = adapter(tmp_path / "live", 1), adapter(tmp_path / "other", 3)
    adapters = OpenAdapters(AdapterNames(clock=lambda: time.time() + 60))
    adapters.open("first", lora(folder))
    adapters.open("other", lora(other, 2))
    assert not adapters.has_changed("first", local_tokens=64)
    adapter(folder, 2)
    adapters.open("second", lora(folder, load_inplace=True))
    assert adapters.has_changed("second", local_tokens=64) and not adapters.has_changed("second")
    assert not adapters.has_changed("other", local_tokens=64)


def test_the_precision_of_adapters_counts(tmp_path: Path) -> None:
    def config(lora_dtype: object) -> Any:
        dtype = torch.float16
        return SimpleNamespace(
            lora_config=SimpleNamespace(lora_dtype=lora_dtype), model_config=SimpleNamespace(dtype=dtype)
        )

    folder = adapter(tmp_path / "one", 1)
    found = set()
    for lora_dtype in (torch.float16, torch.bfloat16, torch.float32):
        names = AdapterNames(clock=lambda: time.time() + 60)
        found.add(OpenAdapters(names, adapter_variant(config(lora_dtype))).open("r", lora(folder)))
    assert len(found) == 3
    assert adapter_variant(config("auto")) == adapter_variant(config(torch.float16)) == b""
    assert adapter_variant(SimpleNamespace(lora_config=None, model_config=config("auto").model_config)) == b""
