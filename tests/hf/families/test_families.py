"""Every family of docs/models.md, and the table itself."""

from collections.abc import Callable

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kvloom.blend.attention import causal_attention
from kvloom.connectors.hf.model import TransformersModel
from kvloom.connectors.hf.retrieval.attention import with_retrieval
from kvloom.connectors.hf.stock_layers import StockLayers
from kvloom.core import LayerRopes, RopeSpec
from kvloom.errors import EngineError

from ...support.models import DOCUMENTS, QUESTION, make_model
from .catalog import (
    FAMILIES,
    RETRIEVAL,
    Family,
    codecs,
    committed,
    connect,
    fusion,
    greedy,
    long_prompt,
    make_family,
    prefix,
    refusal,
    retrieval,
    row,
    section,
)

SERVED = [family for family in FAMILIES if family.refused is None]
BY_TYPE = {family.model_type: family for family in FAMILIES}


def of(families: list[Family]) -> Callable[..., object]:
    return pytest.mark.parametrize("family", families, ids=[family.model_type for family in families])


@of(SERVED)
def test_ratio_one_is_full_prefill_and_documents_move_exactly(family: Family) -> None:
    fusion(family)


@of(SERVED)
def test_contexts_are_reused_bit_for_bit(family: Family) -> None:
    prefix(family)


@of(SERVED)
def test_sessions_say_what_the_model_says_or_are_refused(family: Family) -> None:
    retrieval(family)


@of(SERVED)
def test_codecs_move_chunks(family: Family) -> None:
    codecs(family)


@of([family for family in FAMILIES if family.refused is not None])
def test_refused_with_the_reason(family: Family) -> None:
    refusal(family)


def test_the_table_is_what_was_verified() -> None:
    """`python -m kvloom.tests.hf.families.catalog` writes it."""
    assert committed() == section([row(family) for family in FAMILIES])


# ------------------------------------------------------------------------------------------------------- structures


@of(SERVED)
def test_a_model_as_its_config_says_has_no_changed_settings(family: Family) -> None:
    assert StockLayers(make_family(family)).changed_settings() == {}


def test_what_was_measured() -> None:
    """Each peculiarity is there in the tiny model, so that the tests above say something about it."""
    layers = {family.model_type: TransformersModel(make_family(family), model_id="m") for family in SERVED}
    assert layers["llama"].window_tokens == (None,) * 4
    assert layers["mistral"].window_tokens == (16,) * 4
    for name in ("gemma2", "gemma3_text", "cohere2", "gpt_oss"):
        assert layers[name].window_tokens == (16, None) * 2, name
    assert [layer.softcap for layer in layers["gemma2"].attention] == [2.0] * 4
    assert all(layer.sinks is not None and len(layer.sinks) == 4 for layer in layers["gpt_oss"].attention)
    assert layers["granite"].attention[0].scale == 0.2
    gemma = layers["gemma3_text"].spec.rope
    assert isinstance(gemma, LayerRopes) and gemma.layers[0] == gemma.layers[2] != gemma.layers[1] == gemma.layers[3]
    for name in ("smollm3", "cohere2"):
        rope = layers[name].spec.rope
        assert isinstance(rope, LayerRopes) and rope.layers[0] is not None and rope.layers[1] is None, name
    interleaved = {name for name, each in layers.items() if getattr(each.spec.rope_of(0), "interleaved", False)}
    assert interleaved == {"cohere2", "glm4"}
    passed = {name: getattr(each.spec.rope_of(0), "passed_channels", 0) for name, each in layers.items()}
    assert {name: count for name, count in passed.items() if count} == {"phi3": 4, "glm4": 8, "gpt_neox": 12}
    assert layers["phi3"].max_tokens == 900 and layers["phi3"].is_length_bound


def test_logits_are_the_models_own() -> None:
    """Multipliers and caps behind the last layer included."""
    for family in (BY_TYPE["gemma2"], BY_TYPE["granite"], BY_TYPE["cohere2"], BY_TYPE["gpt_neox"]):
        model = make_family(family)
        layers, ids = TransformersModel(model, model_id="m"), torch.arange(20) + 5
        positions = torch.arange(len(ids))
        with torch.no_grad():
            hidden = layers.embed(ids)
            for layer in range(4):
                q, k, v = layers.qkv(layer, hidden, positions)
                here = layers.attention[layer]
                attended = causal_attention(
                    q, k, v, positions, scale=here.scale, window_tokens=here.window_tokens, softcap=here.softcap
                )
                hidden = layers.finish(layer, hidden, attended)
            assert torch.allclose(layers.logits(hidden), model(ids[None]).logits[0], atol=1e-4), family.title


def test_caps_and_sinks_and_windows_shape_the_result() -> None:
    """Left out, each would be seen."""
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(heads, 30, 16, generator=random) for heads in (4, 2, 2))
    positions = torch.arange(30)
    plain = causal_attention(q, k, v, positions, scale=0.25)
    for options in ({"softcap": 0.5}, {"sinks": torch.ones(4)}, {"window_tokens": 5}):
        assert not torch.allclose(causal_attention(q, k, v, positions, scale=0.25, **options), plain, atol=1e-2)
    sinks = torch.tensor([0.5, 1.0, -1.0, 2.0])
    scattered = causal_attention(q[:, 5:9], k, v, positions[5:9], scale=0.25, sinks=sinks, softcap=3.0)
    scores = (q[:, 5:9] @ k.repeat_interleave(2, 0).mT) * 0.25
    scores = 3.0 * torch.tanh(scores / 3.0)
    scores = scores.masked_fill(positions > positions[5:9, None], -torch.inf)
    weights = torch.cat((scores, sinks[:, None, None].expand(-1, 4, 1)), dim=-1).softmax(-1)[..., :-1]
    assert torch.allclose(scattered, weights @ v.repeat_interleave(2, 0), atol=1e-5)


def test_fusions_that_ask_the_question_and_choose_tokens_run_everywhere() -> None:
    """Below ratio 1, by deviation and by the question, in layers of each kind."""
    for name in ("gemma2", "gemma3_text", "gpt_oss", "cohere2"):
        rag = connect(make_family(BY_TYPE[name]))
        rag.blender = type(rag.blender)(0.3)
        inputs, cache = rag.assemble(DOCUMENTS, QUESTION)
        close, _ = greedy(rag.model, inputs, cache, 2)
        assert len(close) == 2


# --------------------------------------------------------------------------------------------------------- refusals


def test_attention_that_sees_the_future_is_refused() -> None:
    family = BY_TYPE["gemma3_text"]
    plain = make_family(family).config
    config = type(plain)(**(plain.to_dict() | {"use_bidirectional_attention": True}))
    with pytest.raises(EngineError, match="gives something else"):
        TransformersModel(AutoModelForCausalLM.from_config(config).eval(), model_id="m")


def test_chunked_attention_is_refused() -> None:
    config = AutoConfig.for_model(
        "llama4_text",
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        intermediate_size_mlp=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=2,
        attention_chunk_size=16,
        max_position_embeddings=512,
        pad_token_id=None,
    )
    with pytest.raises(EngineError):
        TransformersModel(AutoModelForCausalLM.from_config(config).eval(), model_id="m")


def test_layers_that_are_not_their_classs_are_refused() -> None:
    """A forward that somebody replaced is not what a pass in steps would run."""
    model = make_model("llama")
    attention = model.model.layers[2].self_attn
    own = attention.forward
    attention.forward = lambda *args, **kwargs: (own(*args, **kwargs)[0] * 1.1, None)
    with pytest.raises(EngineError, match=r"layer 2 .* gives something else"):
        TransformersModel(model, model_id="m")


def test_long_rope_is_served_within_its_first_table() -> None:
    """Behind a longer call of the model, too, which leaves the other table behind."""
    model = make_family(BY_TYPE["phi3"])
    rag = connect(model)
    spec = rag.spec
    assert isinstance(spec.rope, RopeSpec)
    with torch.no_grad():
        model(torch.randint(2, 400, (1, 950)))
    inputs, cache = rag.assemble(DOCUMENTS, QUESTION)
    assert rag.spec == spec
    assert greedy(model, inputs, cache)[0] == greedy(model, inputs, None)[0]
    with pytest.raises(ValueError, match="context 900"):
        rag.assemble(["word " * 900], QUESTION)
    with rag.session(RETRIEVAL) as session, pytest.raises(ValueError, match="another table"):
        session.generate([long_prompt()], max_new_tokens=500)


def test_others_get_the_models_own_attention_while_a_session_decodes() -> None:
    """Sinks included, which torch's kernels do not know."""
    model, ids = make_family(BY_TYPE["gpt_oss"]), torch.arange(2, 40)[None]
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(with_retrieval(model, lambda: model(ids).logits), expected)
        assert model.config._attn_implementation == "eager"


def test_configs_that_change_are_measured_again() -> None:
    """Windows follow the configuration, and so does the spec."""
    model = AutoModelForCausalLM.from_config(make_family(BY_TYPE["mistral"]).config).eval()
    layers = TransformersModel(model, model_id="m")
    before = layers.spec
    model.config.sliding_window = 20
    assert layers.refresh() and layers.window_tokens == (20,) * 4 and layers.spec != before
    model.config.sliding_window = 16
    assert layers.refresh() and layers.spec.rope == before.rope
