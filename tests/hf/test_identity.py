"""Names of models in memory: of what computes the KV, at the moment it computes."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, LlamaForCausalLM, PreTrainedModel

from kvloom.connectors.hf import identity as hf_identity
from kvloom.connectors.hf.identity import unwrapped
from kvloom.connectors.hf.model import TransformersModel
from kvloom.connectors.identity.weights import folder_name
from kvloom.errors import EngineError
from kvloom.kvstore.store import KVStore
from kvloom.kvstore.tiers.host import HostTier
from kvloom.retrieval.settings import Retrieval

from ..support.models import DOCUMENTS, QUESTION, make_model, make_variant
from ..support.named import Rag, load, name_of, saved

# ----------------------------------------------------------------------------------------------------- in memory


def test_a_name_stands_for_values(tmp_path: Path) -> None:
    model = make_model("llama")
    name = name_of(model)
    assert name.startswith("llama-") and name == name_of(make_model("llama"))
    assert len({name, name_of(make_model("llama", seed=1)), name_of(make_model("mistral"))}) == 3
    assert name_of(make_model("llama", rope="linear")) != name, "no weight, but another function"
    rounded = name_of(make_model("llama").to(torch.bfloat16))
    assert rounded != name and rounded == name_of(make_model("llama").to(torch.bfloat16).float())
    model.model.layers[2].mlp.up_proj.weight.data.view(-1)[7] += 1e-3
    assert name_of(model) != name


def test_windows_count() -> None:
    assert name_of(make_variant("window"), "m") != name_of(make_model("mistral"), "m") == "m"


# ------------------------------------------------------------------------------------------------------ in folders


def test_weights_of_a_folder_have_its_name(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    assert name_of(load(folder)) == name_of(load(folder, "bfloat16")) == folder_name(folder)
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert name_of(load(copy)) == folder_name(folder)
    make_model("llama").save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 1
    assert name_of(load(tmp_path / "sharded")) == folder_name(tmp_path / "sharded")
    tied = make_variant("tied")
    tied.save_pretrained(tmp_path / "tied")
    assert name_of(load(tmp_path / "tied")) == folder_name(tmp_path / "tied")


def test_the_config_counts_as_far_as_it_shapes_kv(tmp_path: Path) -> None:
    name = folder_name(saved(tmp_path / "model"))
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    for field, value in (
        ("use_cache", False),
        ("dtype", "bfloat16"),
        ("transformers_version", "9"),
        ("pad_token_id", 3),
    ):
        path.write_text(json.dumps({**config, field: value}))
        assert folder_name(tmp_path / "model") == name, field
    for field, value in (("rms_norm_eps", 0.1), ("num_attention_heads", 2), ("something_new", 1)):
        path.write_text(json.dumps({**config, field: value}))
        assert folder_name(tmp_path / "model") != name, field


def test_other_weights_than_the_folders_have_a_name_of_their_own(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    model = load(folder)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 3] += 1.0
    assert name_of(model) != folder_name(folder)
    model = load(folder)
    model.config.rms_norm_eps = 0.5
    assert name_of(model) != folder_name(folder)
    model = load(folder)
    weights = load_file(folder / "model.safetensors")  # the folder changes behind the model
    weights["model.norm.weight"] *= 2
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    name = name_of(model)
    assert name != folder_name(folder) and name_of(load(folder)) == folder_name(folder)


# --------------------------------------------------------------------------------------------------------- changes


@torch.no_grad()
def scale(model: PreTrainedModel) -> None:
    for parameter in model.parameters():
        parameter.mul_(1.2)


def scale_data(model: PreTrainedModel) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(1.2)


def replace_data(model: PreTrainedModel) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.2


def one_bias(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight[0, 0] += 3.0


def one_value_data(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.down_proj.weight.data[3, 4] += 3.0


def optimise(model: PreTrainedModel) -> None:
    optimiser = torch.optim.SGD(model.parameters(), 0.5)
    model(torch.arange(3, 9)[None], labels=torch.arange(3, 9)[None]).loss.backward()
    optimiser.step()


def load_state(model: PreTrainedModel) -> None:
    model.load_state_dict(make_model("llama", seed=3).state_dict())


def rotate(model: PreTrainedModel) -> None:
    model.model.rotary_emb.inv_freq *= 0.5


def sharpen(model: PreTrainedModel) -> None:
    model.model.layers[1].self_attn.scaling *= 2.0  # neither a weight nor in the config


def smooth(model: PreTrainedModel) -> None:
    model.model.layers[1].input_layernorm.variance_epsilon *= 100.0


SETTINGS = (sharpen, smooth)
CHANGES = (scale, scale_data, replace_data, one_bias, one_value_data, optimise, load_state, rotate, *SETTINGS)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("model_id", [None, "mine"])
def test_weights_that_change_get_another_name(change: Callable[[PreTrainedModel], None], model_id: str | None) -> None:
    model = make_model("llama")
    rag = Rag(model, model_id=model_id)
    assert rag.precompute(DOCUMENTS[:2]).computed == 2
    rag.is_renamed(lambda: change(model))
    if model_id is not None and change not in (rotate, *SETTINGS):
        assert rag.spec.model_id.startswith("mine+changed-")


@pytest.mark.parametrize("change", SETTINGS, ids=lambda change: change.__name__)
def test_settings_that_changed_before_have_another_name(change: Callable[[PreTrainedModel], None]) -> None:
    names = []
    for changes in (False, True, True):
        model = make_model("llama")
        if changes:
            change(model)
        names.append(TransformersModel(model).spec.model_id)
    assert names[0] != names[1] == names[2]


def test_a_model_that_cannot_be_made_anew_is_served_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model("llama")
    expected = TransformersModel(model).spec

    def fail(*_: object) -> None:
        raise TypeError("needs a name")

    monkeypatch.setattr(type(model), "__init__", fail)
    assert TransformersModel(model).spec == expected
    assert "no LlamaForCausalLM can be made anew of its config (needs a name)" in caplog.text


def test_a_change_of_precision_is_another_dtype() -> None:
    model = make_model("llama")
    rag = Rag(model, model_id="m")
    rag.precompute(DOCUMENTS[:1])
    model.to(torch.bfloat16)
    assert rag.precompute(DOCUMENTS[:1]).computed == 1
    assert rag.spec.dtype == torch.bfloat16


@pytest.mark.parametrize("change", [scale_data, replace_data, load_state], ids=lambda change: change.__name__)
def test_changes_of_larger_models(change: Callable[[PreTrainedModel], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which a check reads some values."""
    monkeypatch.setattr(hf_identity, "_WHOLE_BYTES", 0)
    model = make_model("llama")
    model.lm_head.weight.data = model.lm_head.weight.data.T.contiguous().T
    rag = Rag(model)
    rag.precompute(DOCUMENTS[:2])
    assert rag.precompute(DOCUMENTS[:2]).stored == 2
    rag.is_renamed(lambda: change(model))


def test_what_did_not_change_keeps_its_name() -> None:
    model = make_model("llama")
    rag = Rag(model)
    name = rag.spec.model_id
    rag.answer(DOCUMENTS[:2], QUESTION, max_new_tokens=2)
    model.config.use_cache = False
    model.requires_grad_(requires_grad=False)
    assert rag.precompute(DOCUMENTS[:2]).stored == 2
    assert rag.spec.model_id == name


def test_a_model_in_training_is_refused() -> None:
    model = make_model("llama")
    rag = Rag(model)
    model.train()
    with pytest.raises(EngineError, match="call its eval"):
        rag.precompute(DOCUMENTS[:1])
    model.eval()
    assert rag.precompute(DOCUMENTS[:1]).computed == 1


def test_a_session_ends_with_its_weights() -> None:
    model = make_model("llama")
    rag = Rag(model, allow_uncertified=True)
    retrieval = Retrieval("exact", break_even_tokens=0)
    with rag.session(retrieval) as session:
        session.generate(DOCUMENTS[0], max_new_tokens=2)
        scale(model)
        with pytest.raises(EngineError, match="have changed since this session began"):
            session.generate(QUESTION, max_new_tokens=2)
        with rag.session(retrieval) as other:
            other.generate(DOCUMENTS[0], max_new_tokens=2)


# -------------------------------------------------------------------------------------------------------- wrappers


def test_offloaded_weights_have_the_name_of_those_in_memory(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    folder = saved(tmp_path / "model")
    cpu = torch.device("cpu")
    for offloaded in (
        accelerate.cpu_offload(load(folder), execution_device=cpu),
        accelerate.disk_offload(load(folder), str(tmp_path / "offload"), execution_device=cpu),
    ):
        assert all(parameter.device.type == "meta" for parameter in offloaded.parameters())
        rag = Rag(offloaded)
        assert rag.spec.model_id == folder_name(folder)
        assert rag.precompute(DOCUMENTS[:2]).computed == 2
        plain = Rag(load(folder), store=rag.store)
        assert plain.precompute(DOCUMENTS[:2]).stored == 2
        assert plain.error() < 1e-5
        assert rag.answer(DOCUMENTS[:2], QUESTION, max_new_tokens=3)


def test_offloaded_weights_that_change(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(make_model("llama"), execution_device=torch.device("cpu"))
    rag = Rag(model)
    rag.precompute(DOCUMENTS[:1])
    name = rag.spec.model_id
    held = model.model.layers[0].self_attn.k_proj._hf_hook.weights_map
    held["weight"].mul_(1.5)
    assert rag.precompute(DOCUMENTS[:1]).computed == 1 and rag.spec.model_id != name


def test_compiled_models_are_unwrapped() -> None:
    model = make_model("llama")
    rag = Rag(torch.compile(model))
    assert rag.model is model
    assert rag.precompute(DOCUMENTS[:1]).computed == 1
    inside = make_model("llama")
    inside.compile()
    assert unwrapped(inside) is inside


def test_tensors_of_other_classes_are_read(tmp_path: Path) -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    def wrapped(offset: float) -> PreTrainedModel:
        model = make_model("llama")
        weight = model.lm_head.weight.data
        model.lm_head.weight = torch.nn.Parameter(TwoTensor(weight, weight + offset), requires_grad=False)
        return model

    assert name_of(wrapped(0.0)) == name_of(wrapped(0.0)) != name_of(wrapped(1.0))


class Linear4bit(torch.nn.Linear):
    """As bitsandbytes has it: saving changes the weights, and quantisation's scales hang at the weight."""

    __module__ = "bitsandbytes.nn.modules"

    def _save_to_state_dict(self, *_: Any, **__: Any) -> None:
        self.weight.data.zero_()


def test_weights_of_bitsandbytes_are_read_without_saving_them() -> None:
    def quantised(scale: float) -> PreTrainedModel:
        model = make_model("llama")
        head = Linear4bit(32, 512, bias=False)
        head.weight.data = model.lm_head.weight.data
        head.weight.quant_state = SimpleNamespace(as_dict=lambda packed: {"absmax": torch.tensor([scale])})  # type: ignore[assignment]
        model.lm_head = head
        return model

    model = quantised(1.0)
    assert name_of(model) == name_of(quantised(1.0)) != name_of(quantised(2.0))
    assert model.lm_head.weight.any()


def packed() -> PreTrainedModel:
    kinds = {torch.nn.Linear}
    model: PreTrainedModel = torch.ao.quantization.quantize_dynamic(make_model("llama"), kinds, dtype=torch.qint8)
    return model


def unreadable() -> PreTrainedModel:
    model = make_model("llama")
    model.lm_head.weight = torch.nn.Parameter(torch.empty(512, 32, device="meta"))
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: AutoModel.from_pretrained(saved(folder)), "is a LlamaModel, which has no language-model head"),
        (lambda _: torch.nn.Linear(2, 2), "is a Linear; expected a transformers model"),
        (lambda _: "meta-llama/Llama-3.1-8B", "is a str; expected a transformers model"),
        (lambda _: unreadable(), "lm_head.weight .* cannot be read.* give a name of your own as model_id"),
        (lambda _: packed(), "_packed_params.* cannot be read.* give a name of your own as model_id"),
    ],
    ids=["no head", "no model", "text", "no data", "packed"],
)
def test_models_that_have_no_name_are_refused(make: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=message) as caught:
        Rag(make(tmp_path / "model"))
    assert "\n" not in str(caught.value)


def test_the_user_may_name_what_cannot_be_read() -> None:
    assert name_of(unreadable(), "mine") == "mine"
    rag = Rag(packed(), model_id="mine")
    assert rag.precompute(DOCUMENTS[:1]).computed == 1 and rag.spec.model_id == "mine"


def test_documents_are_shared_between_precisions_of_adapters_only_by_name(tmp_path: Path) -> None:
    """Two connectors on one store, one model each: who computes the same shares, and no other."""
    folder = saved(tmp_path / "model")
    store = KVStore([HostTier(None)])
    models: Sequence[PreTrainedModel] = (load(folder), load(folder), load(folder, "bfloat16"))
    computed = [Rag(model, store=store).precompute(DOCUMENTS).computed for model in models]
    assert computed == [len(DOCUMENTS), 0, len(DOCUMENTS)]
    assert isinstance(models[0], LlamaForCausalLM)
