"""Adapters in transformers: KV is of what is active when it is computed, merged or not, however PEFT wraps it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from kvloom.errors import EngineError

from ..support.models import DOCUMENTS, QUESTION, make_model
from ..support.named import Rag, name_of

peft = pytest.importorskip("peft")


def lora(**options: Any) -> Any:
    return peft.LoraConfig(r=4, target_modules=["k_proj", "v_proj"], init_lora_weights=False, **options)


def with_adapters(*seeds: int, **options: Any) -> PreTrainedModel:
    """Each under the name of its seed; the last one is active."""
    model = make_model("llama")
    for seed in seeds:
        torch.manual_seed(seed)
        model.add_adapter(lora(**options), str(seed))
    return model.eval()


@pytest.fixture
def adapted() -> Iterator[tuple[PreTrainedModel, Rag]]:
    model = with_adapters(1, 2)
    rag = Rag(model)
    rag.precompute(DOCUMENTS[:2])
    yield model, rag
    assert rag.store.check() == []


def layers_of(model: PreTrainedModel) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "lora_A")]


def test_active_adapters_have_names(adapted: tuple[PreTrainedModel, Rag]) -> None:
    model, rag = adapted
    rag.is_renamed(lambda: model.set_adapter("1"))
    rag.is_renamed(model.disable_adapters)
    assert rag.spec.model_id == name_of(make_model("llama")), "the model's own"
    model.enable_adapters()
    assert rag.precompute(DOCUMENTS[:2]).stored == 2
    rag.is_renamed(lambda: [layer.scale_layer(0.25) for layer in layers_of(model)])
    rag.is_renamed(lambda: model.set_adapter(["1", "2"]))
    rag.is_renamed(lambda: [layer.merge() for layer in layers_of(model)])
    rag.is_renamed(model.disable_adapters)  # takes out again what was merged
    assert rag.error() < 1e-4


def test_a_trained_adapter_has_another_name(adapted: tuple[PreTrainedModel, Rag]) -> None:
    model, rag = adapted
    base = rag.spec.model_id.partition("+")[0]
    rag.is_renamed(lambda: [layer.lora_A["2"].weight.data.mul_(2.0) for layer in layers_of(model)])
    assert rag.spec.model_id.partition("+")[0] == base, "the model below is what it was"


def test_an_adapter_is_what_it_does_not_what_it_is_called(tmp_path: Path) -> None:
    first = with_adapters(1, 2)
    first.set_adapter("1")
    other = make_model("llama")
    torch.manual_seed(1)
    other.add_adapter(lora(), "another name")
    assert name_of(first) == name_of(other.eval()) != name_of(with_adapters(2))
    assert name_of(with_adapters(1), "mine").startswith("mine+adapter-")
    assert name_of(make_model("llama"), "mine") == "mine"
    rescaled = make_model("llama")
    torch.manual_seed(1)
    rescaled.add_adapter(lora(lora_alpha=99), "1")
    assert name_of(rescaled.eval()) != name_of(first)


@pytest.mark.parametrize(
    "config",
    [
        lora(use_dora=True),
        lora(modules_to_save=["embed_tokens"]),
        lora(trainable_token_indices=[3, 4, 5]),
        peft.IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[], init_ia3_weights=False),
        peft.LoHaConfig(r=2, target_modules=["k_proj"], init_weights=False),
    ],
    ids=["dora", "embeddings", "tokens", "ia3", "loha"],
)
def test_adapters_of_other_kinds(config: Any) -> None:
    plain = make_model("llama")
    torch.manual_seed(1)
    model = peft.get_peft_model(plain, config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    rag = Rag(model)
    rag.precompute(DOCUMENTS[:2])
    assert rag.error() < 1e-4
    assert "+adapter-" in rag.spec.model_id
    rag.is_renamed(lambda: [parameter.data.add_(0.1) for parameter in model.parameters() if parameter.requires_grad])
    with model.disable_adapter():
        rag.is_renamed(lambda: None)
        assert rag.spec.model_id == name_of(make_model("llama"))


def test_a_peft_model_serves_like_the_model_in_it(tmp_path: Path) -> None:
    plain = make_model("llama")
    torch.manual_seed(1)
    model = peft.get_peft_model(plain, lora(task_type="CAUSAL_LM"))
    rag = Rag(model)
    assert rag.precompute(DOCUMENTS[:2]).computed == 2
    assert rag.error() < 1e-4
    assert rag.answer(DOCUMENTS[:2], QUESTION, max_new_tokens=3)
    same = make_model("llama")
    torch.manual_seed(1)
    same.add_adapter(lora(), "x")
    assert name_of(same.eval()) == rag.spec.model_id
    merged = model.merge_and_unload()
    assert name_of(merged) != rag.spec.model_id


def virtual_tokens() -> torch.nn.Module:
    made: torch.nn.Module = peft.get_peft_model(
        make_model("llama"), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    )
    return made


def test_virtual_tokens_are_refused() -> None:
    with pytest.raises(EngineError, match="virtual tokens"):
        Rag(virtual_tokens())
