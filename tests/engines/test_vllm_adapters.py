"""LoRA in stock vLLM: KV of an adapter is its own, whatever the adapter is called and wherever it lies."""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip(
    "vllm", reason="stock vLLM is not installed here; `make test-engines` runs this in its own environment"
)

from safetensors.torch import save_file

from .support.engines import DECLINED, make_model, prompts, sampling, start, tokens_of, usage

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]

RANK, WIDTH, KV_WIDTH = 8, 256, 128
TEXTS = prompts(41, (200, 130, 70))
LOADED = [192, 128, 64]


def make_adapter(folder: Path, seed: int, dtype: torch.dtype = torch.float32) -> Path:
    """A random adapter of the projections of attention, as PEFT writes them."""
    folder.mkdir()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(6):
        for name, width in (("q_proj", WIDTH), ("v_proj", KV_WIDTH)):
            module = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{module}.lora_A.weight"] = torch.randn(RANK, WIDTH, generator=generator) / WIDTH**0.5
            weights[f"{module}.lora_B.weight"] = torch.randn(width, RANK, generator=generator) / RANK**0.5
    weights = {name: weight.to(dtype) for name, weight in weights.items()}
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[Any]:
    engine = start(
        make_model(folder / "model"),
        {"host_bytes": "256MiB"},
        enable_prefix_caching=True,
        enable_lora=True,
        max_loras=2,
        max_cpu_loras=4,
        max_lora_rank=RANK,
    )
    yield engine
    engine.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="module")
def adapters(folder: Path) -> dict[str, Any]:
    from vllm.lora.request import LoRARequest

    one, two = make_adapter(folder / "one", 1), make_adapter(folder / "two", 2)
    return {
        "none": None,
        "one": LoRARequest("one", 1, str(one)),
        "two": LoRARequest("two", 2, str(two)),
        "one again": LoRARequest("renamed", 3, str(shutil.copytree(one, folder / "elsewhere"))),
    }


def ask(llm: Any, adapter: Any, options: dict[str, Any] | None = None, texts: Sequence[list[int]] = TEXTS) -> list[Any]:
    assert llm.reset_prefix_cache()
    inputs = [{"prompt_token_ids": text} for text in texts]
    outputs: list[Any] = llm.generate(inputs, sampling(options), lora_request=adapter, use_tqdm=False)
    return outputs


def loaded(outputs: Sequence[Any]) -> list[int]:
    return [sum(usage(output)["loaded_tokens"].values()) for output in outputs]


def settle() -> None:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    transfers = get_kv_transfer_group().worker.transfers
    assert transfers.settle(30.0)


def test_each_adapter_has_kv_of_its_own(llm: Any, adapters: dict[str, Any]) -> None:
    plain = {name: tokens_of(ask(llm, adapter, DECLINED)) for name, adapter in adapters.items()}
    assert plain["one again"] == plain["one"]
    assert plain["none"] != plain["one"] != plain["two"] != plain["none"], "adapters that change nothing prove nothing"
    for name in ("one", "none", "two"):
        outputs = ask(llm, adapters[name])
        assert loaded(outputs) == [0, 0, 0], "nobody else's"
        assert tokens_of(outputs) == plain[name]
        settle()
    for name, adapter in adapters.items():
        outputs = ask(llm, adapter)
        assert loaded(outputs) == LOADED, "its own, by any name"
        assert tokens_of(outputs) == plain[name]


def test_side_by_side(llm: Any, adapters: dict[str, Any]) -> None:
    """Adapters only: beside them vLLM 0.32 on a processor answers requests without one wrongly, also without kvloom."""
    order = ["two", "one", "two", "one", "one", "two"]
    texts = [TEXTS[index % 3] for index in range(len(order))]
    for name in ("one", "two"):
        ask(llm, adapters[name])
        settle()
    plain = [tokens_of(ask(llm, adapters[name], DECLINED, [text]))[0] for name, text in zip(order, texts, strict=True)]
    assert llm.reset_prefix_cache()
    inputs = [{"prompt_token_ids": text} for text in texts]
    outputs = llm.generate(inputs, sampling(), lora_request=[adapters[name] for name in order], use_tqdm=False)
    assert tokens_of(outputs) == plain
    assert loaded(outputs) == [LOADED[index % 3] for index in range(len(order))]


def test_with_adapters_nothing_is_fused(llm: Any, adapters: dict[str, Any]) -> None:
    """The runner prepares adapters for its own batch; documents are computed like everything else."""
    text = prompts(42, (200,))
    for name in ("none", "one"):
        plain = tokens_of(ask(llm, adapters[name], DECLINED, text))
        (output,) = ask(llm, adapters[name], {"documents": [[20, 90], [90, 180]], "ratio": 0.1, "save": False}, text)
        assert tokens_of([output]) == plain
        assert (usage(output)["fused"], usage(output)["computed_tokens"]) == ("no", 0)


def live(folder: Path, name: str, source: Path) -> Path:
    return Path(shutil.copytree(source, folder / name))


def replace(path: Path, source: Path) -> None:
    """In one step: what is overwritten in place changes in the engine's memory, too, which maps the file."""
    new = path / "adapter_model.new"
    shutil.copy(source / "adapter_model.safetensors", new)
    new.replace(path / "adapter_model.safetensors")


def test_files_that_change_while_the_old_ones_are_in_memory(llm: Any, adapters: dict[str, Any], folder: Path) -> None:
    """A trainer writes a new version: the engine goes on with the old one, and loads the new one as a new number."""
    from vllm.lora.request import LoRARequest

    plain = {name: tokens_of(ask(llm, adapters[name], DECLINED)) for name in ("one", "two")}
    path = live(folder, "live", folder / "one")
    texts = prompts(43, (200, 130))
    wanted = {name: tokens_of(ask(llm, adapters[name], DECLINED, texts)) for name in ("one", "two")}
    policy = LoRARequest("policy", 11, str(path))
    assert tokens_of(ask(llm, policy)) == plain["one"]
    settle()
    replace(path, folder / "two")
    outputs = ask(llm, policy, None, texts)
    assert tokens_of(outputs) == wanted["one"], "it still is"
    assert all(output.kv_transfer_params is None for output in outputs), "served without kvloom"
    outputs = ask(llm, LoRARequest("policy-2", 12, str(path)), None, texts)
    assert tokens_of(outputs) == wanted["two"]
    assert loaded(outputs) == [0, 0], "nobody has stored anything of the new version"
    settle()
    assert loaded(ask(llm, LoRARequest("policy-3", 13, str(path)), None, texts)) == [192, 128]


def test_files_that_change_between_a_load_and_the_first_request(
    llm: Any, adapters: dict[str, Any], folder: Path
) -> None:
    from vllm.lora.request import LoRARequest

    texts = prompts(44, (200, 130))
    plain = {name: tokens_of(ask(llm, adapters[name], DECLINED, texts)) for name in ("one", "two")}
    path = live(folder, "early", folder / "one")
    request = LoRARequest("early", 21, str(path))
    assert llm.llm_engine.add_lora(request)
    replace(path, folder / "two")
    assert tokens_of(ask(llm, request, None, texts)) == plain["one"]
    settle()
    outputs = ask(llm, adapters["two"], None, texts)
    assert tokens_of(outputs) == plain["two"] and loaded(outputs) == [0, 0]


def test_a_number_is_loaded_again_in_place(llm: Any, adapters: dict[str, Any], folder: Path) -> None:
    from vllm.lora.request import LoRARequest

    texts = prompts(45, (200, 130))
    one, two = (make_adapter(folder / f"{name}, cast", seed, torch.float16) for name, seed in (("one", 1), ("two", 2)))
    plain = {}
    for number, path in enumerate((one, two), start=51):
        plain[path] = tokens_of(ask(llm, LoRARequest(path.name, number, str(path)), DECLINED, texts))
    path = live(folder, "in place", one)
    request = LoRARequest("in place", 31, str(path))
    assert tokens_of(ask(llm, request, None, texts)) == plain[one]
    settle()
    replace(path, two)
    assert llm.llm_engine.add_lora(LoRARequest("in place", 31, str(path), load_inplace=True))
    for expected in ([0, 0], [192, 128]):
        outputs = ask(llm, request, None, texts)
        assert tokens_of(outputs) == plain[two] and loaded(outputs) == expected
        settle()


def test_a_number_that_stands_for_two_folders(llm: Any, adapters: dict[str, Any], folder: Path) -> None:
    """The engine goes on with the first, whatever folder a request names."""
    from vllm.lora.request import LoRARequest

    texts = prompts(46, (200, 130))
    plain = {name: tokens_of(ask(llm, adapters[name], DECLINED, texts)) for name in ("one", "two")}
    assert tokens_of(ask(llm, LoRARequest("first", 41, str(folder / "one")), None, texts)) == plain["one"]
    outputs = ask(llm, LoRARequest("second", 41, str(folder / "two")), None, texts)
    assert tokens_of(outputs) == plain["one"]
    settle()
    outputs = ask(llm, LoRARequest("third", 42, str(folder / "two")), None, texts)
    assert tokens_of(outputs) == plain["two"] and loaded(outputs) == [0, 0]
