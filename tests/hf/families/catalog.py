"""Families of models, tiny and random, and what kvloom does with each: verified here, printed in docs/models.md.

`python -m kvloom.tests.hf.families.catalog` writes the table anew.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from kvloom.blend.blender import Blender
from kvloom.blend.choosers import no_tokens
from kvloom.compress.registry import codec_by_name
from kvloom.connectors.hf.connector import TransformersConnector
from kvloom.connectors.hf.generation import cache_argument
from kvloom.core import KVChunk
from kvloom.errors import EngineError
from kvloom.kvstore.store import KVStore
from kvloom.kvstore.tiers.host import HostTier
from kvloom.retrieval.settings import Retrieval

from ...support.models import DOCUMENTS, QUESTION, make_tokenizer, prefill

WINDOW = 16
MIXED = ["sliding_attention", "full_attention"] * 2
CODECS = ("raw", "lossless", "fp8", "int8", "int4")
EXACT, REFUSED, NONE = "exact", "refused", "-"
PAGE = Path(__file__).parents[3] / "docs" / "models.md"
_BEGIN, _END = "<!-- transformers: begin -->", "<!-- transformers: end -->"


@dataclass(frozen=True, eq=False)
class Family:
    """One row of the table.

    Attributes
    ----------
    model_type : of transformers.
    has : what is peculiar to it, for readers.
    config : beside the sizes of `make_family`.
    refused : a pattern in the error with which the connector refuses it; None if it serves.
    no_sessions : the same of sessions.
    """

    title: str
    model_type: str
    has: str
    config: Mapping[str, Any] = field(default_factory=dict)
    refused: str | None = None
    no_sessions: str | None = None


FAMILIES = (
    Family("Llama 2, 3", "llama", "the plain case"),
    Family("Mistral 7B v0.1", "mistral", "windows in all layers", {"sliding_window": WINDOW}),
    Family("Qwen2, 2.5", "qwen2", "biases in projections"),
    Family("Qwen3", "qwen3", "norms of queries and keys"),
    Family(
        "Gemma 2",
        "gemma2",
        "capped attention logits, norms before and after, windows in every other layer",
        {"sliding_window": WINDOW, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0, "layer_types": MIXED},
        no_sessions="caps its attention logits",
    ),
    Family(
        "Gemma 3",
        "gemma3_text",
        "two rope tables, norms of queries and keys, windows in five of six layers",
        {
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 16,
            "layer_types": MIXED,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 50000.0},
            },
        },
    ),
    Family(
        "Phi-3, Phi-4",
        "phi3",
        "fused projections, partial rotation, longrope: served up to `original_max_position_embeddings`",
        {
            "original_max_position_embeddings": 900,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1000.0,
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
                "long_factor": [4.0] * 6,
                "original_max_position_embeddings": 900,
            },
        },
    ),
    Family("OLMo 2", "olmo2", "norms behind each half of a layer, and over all queries and keys"),
    Family("SmolLM3", "smollm3", "every fourth layer without rotation", {"no_rope_layers": [1, 0, 1, 0]}),
    Family(
        "Granite 3, 4 (dense)",
        "granite",
        "multipliers of embeddings, residuals, attention and logits",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.2,
            "logits_scaling": 0.5,
        },
    ),
    Family(
        "Cohere2 (Command A, R7B)",
        "cohere2",
        "attention and feed-forward side by side, neighbours are rotated, no rotation in full layers",
        {"sliding_window": WINDOW, "layer_types": MIXED, "logit_scale": 1.0},
    ),
    Family(
        "GPT-OSS",
        "gpt_oss",
        "attention sinks, windows in every other layer, experts, YaRN",
        {
            "sliding_window": WINDOW,
            "layer_types": MIXED,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1000.0,
                "factor": 4.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 256,
            },
        },
    ),
    Family("Mixtral", "mixtral", "experts", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    Family(
        "Qwen3-MoE",
        "qwen3_moe",
        "experts, norms of queries and keys",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    Family("GLM-4", "glm4", "half of each head is rotated, neighbours; norms before and after"),
    Family(
        "GPT-NeoX, Pythia", "gpt_neox", "a quarter of each head is rotated; attention and feed-forward side by side"
    ),
    Family(
        "DeepSeek V2, V3",
        "deepseek_v3",
        "latent attention",
        {
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 4,
            "head_dim": 8,
        },
        refused="rotated in a way",
    ),
    Family(
        "Qwen3-Next",
        "qwen3_next",
        "linear attention",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
        refused="0 attention modules",
    ),
    Family(
        "Gemma 4",
        "gemma4_text",
        "layers of different head dims",
        {"vocab_size_per_layer_input": 512, "hidden_size_per_layer_input": 16, "global_head_dim": 32},
        refused="different query heads",
    ),
    Family("GPT-2", "gpt2", "learned positions", refused="no decoder with a list of layers"),
)


@cache
def make_family(family: Family) -> PreTrainedModel:
    """Four layers, so that both kinds of mixed ones occur twice; every parameter random, norms and sinks included."""
    sizes = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    config = AutoConfig.for_model(family.model_type, **(sizes | dict(family.config)))
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in sorted(model.named_parameters()):
        scale, mean = (0.1, 1.0) if "norm" in name else (1.0, 1.0) if "sinks" in name else (0.2, 0.0)
        parameter.data = mean + scale * torch.randn(parameter.shape, generator=generator)
    model.tie_weights()
    return model.eval()


def connect(
    model: PreTrainedModel, store: KVStore | None = None, ratio: float = 1.0, **options: Any
) -> TransformersConnector:
    return TransformersConnector(
        model,
        make_tokenizer(bos=True),
        store or KVStore([HostTier(None)]),
        Blender(ratio, no_tokens) if ratio < 1 else Blender(ratio),
        model_id="m",
        **options,
    )


# ----------------------------------------------------------------------------------------------------- verification


def greedy(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], cache: object, count: int = 10
) -> tuple[list[int], Tensor]:
    out = model.generate(
        **inputs,
        **{cache_argument(): cache},
        max_new_tokens=count,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences[0, inputs["input_ids"].shape[1] :].tolist(), torch.cat(out.logits).float()


def expect_plain(rag: TransformersConnector, inputs: Mapping[str, Tensor], cache: object) -> None:
    """Greedy tokens and logits over a cache are those of the stock model over the same tokens."""
    tokens, logits = greedy(rag.model, inputs, cache)
    expected_tokens, expected = greedy(rag.model, inputs, None)
    assert tokens == expected_tokens
    assert float(expected.std()) > 0.3  # so that the bound below says something
    assert float((logits - expected).abs().max()) < 5e-4


def expect_same(found: Tensor, expected: Tensor, atol: float = 2e-5) -> None:
    assert found.shape == expected.shape and float(expected.std()) > 0.05
    error = float((found - expected).abs().max())
    assert error < atol * max(1.0, float(expected.abs().max())), error


@cache
def fusion(family: Family) -> str:
    """Ratio 1 over stored documents is a full prefill; documents placed elsewhere are moved exactly."""
    rag = connect(make_family(family))
    rag.precompute(DOCUMENTS)
    rows = [rag.encode_document(text) for text in DOCUMENTS]
    context = rag.fuse(rows)
    truth = prefill(rag.model, context.token_ids.tolist())
    expect_same(context.blended.keys, truth.keys)
    expect_same(context.blended.values, truth.values)
    expect_plain(rag, *rag.as_inputs(context, rag.encode_question(QUESTION)))
    # Keys and values of the first layer depend on token and position alone: naive reuse has them exactly.
    moved = connect(rag.model, rag.store, ratio=0.0).fuse(rows)
    assert moved.computed_tokens == 0 and not moved.is_exact
    expect_same(moved.blended.keys[0], truth.keys[0])
    expect_same(moved.blended.values[0], truth.values[0])
    # In every layer, keys of one hidden state at two positions differ by the layer's rotation.
    here, there = torch.tensor([0, 1, 2, 3, 40]), torch.tensor([0, 100, 33, 250, 41])
    hidden = rag.layers.embed(torch.arange(5) + 7)
    for layer in range(4):
        with torch.no_grad():
            (_, near, _), (_, far, _) = (rag.layers.qkv(layer, hidden, at) for at in (here, there))
        expect_same(rag.spec.shift(near[None], there - here, layer)[0], far)
        assert torch.allclose(near, far, atol=1e-2) == (rag.spec.rope_of(layer) is None)
    return EXACT


@cache
def prefix(family: Family) -> str:
    """What a context begins with is loaded as it was computed in it, bit for bit, and nothing is computed again."""
    rag = connect(make_family(family), reuse_contexts=True)
    rows = [rag.encode_document(text) for text in DOCUMENTS]
    first = rag.fuse(rows)
    again = connect(rag.model, rag.store, reuse_contexts=True).fuse(rows)
    assert again.exact_documents == len(rows) and again.computed_tokens == 0 and again.is_exact
    assert torch.equal(again.blended.keys, first.blended.keys)
    assert torch.equal(again.blended.values, first.blended.values)
    expect_plain(rag, *rag.as_inputs(again, rag.encode_question(QUESTION)))
    return EXACT


RETRIEVAL = Retrieval("exact", budget_ratio=1.0, break_even_tokens=0)


def long_prompt(vocabulary: int = 400) -> list[int]:
    """Longer than a chunk, sinks and the window of a session, so that chunks are retrieved."""
    return [0, *torch.randint(2, vocabulary, (449,), generator=torch.Generator().manual_seed(3)).tolist()]


@cache
def retrieval(family: Family) -> str:
    """A session that may retrieve everything says what the stock model says, also when it is resumed from the store."""
    rag, prompt = connect(make_family(family)), long_prompt()
    if family.no_sessions is not None:
        try:
            rag.session(RETRIEVAL)
        except EngineError as error:
            assert re.search(family.no_sessions, str(error)), error
            return f"{REFUSED}: {family.no_sessions}"
        raise AssertionError("sessions are not refused")
    ids = torch.tensor([prompt])
    expected, _ = greedy(rag.model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, None, 16)
    with rag.session(RETRIEVAL) as session:
        assert list(session.generate([prompt], max_new_tokens=8).token_ids[0]) == expected[:8]
        assert session.sequences[0].stop == 256
        is_sparse = session.sequences[0].counts.chosen_tokens > 0
        assert is_sparse == any(window is None for window in rag.layers.window_tokens)
        session.save()
        history = session.token_ids
    with connect(rag.model, rag.store).session(RETRIEVAL, history=history) as later:
        assert list(later.generate([[]], max_new_tokens=8).token_ids[0]) == expected[8:]
        assert later.sequences[0].counts.computed_tokens == 0
    return EXACT if is_sparse else "dense: every layer has a window"


@cache
def codecs(family: Family) -> str:
    """Chunks come back from codecs at other positions: lossless ones exactly, others within an eighth."""
    rag = connect(make_family(family))
    chunk: KVChunk = rag.compute([rag.encode_document(DOCUMENTS[1])])[0]
    placed = chunk.positions + 37
    expected = rag.spec.shift(chunk.keys, placed - chunk.positions)
    for name in CODECS:
        codec = codec_by_name(name)
        blob = codec.encode(chunk)
        found, part = codec.decode(blob, placed), codec.decode(blob.layers(1, 3), placed)
        assert torch.equal(part.keys, found.keys[1:3]), name
        if codec.is_lossless:
            assert torch.equal(found.keys, expected) and torch.equal(found.values, chunk.values), name
        for got, wanted in ((found.keys, expected), (found.values, chunk.values)):
            assert float((got - wanted).norm() / wanted.norm()) < 0.125, name
    return ", ".join(CODECS)


def refusal(family: Family) -> str:
    """The family is refused, by an error that says why."""
    try:
        connect(make_family(family))
    except EngineError as error:
        assert family.refused is not None and re.search(family.refused, str(error)), error
        assert "\n" not in str(error)
        return REFUSED
    raise AssertionError("the family is not refused")


# ------------------------------------------------------------------------------------------------------------ table


def row(family: Family) -> str:
    """The row of a family, every cell verified now or before in this process."""
    if family.refused is not None:
        cells = [refusal(family), *[NONE] * 3]
    else:
        cells = [prefix(family), fusion(family), retrieval(family), codecs(family)]
    return f"| {family.title} (`{family.model_type}`) | {family.has} | {' | '.join(cells)} |"


def section(rows: list[str]) -> str:
    """The part of the page between its marks."""
    head = "| family (`model_type`) | has | prefix | fusion | sessions with retrieval | codecs |\n" + "|---" * 6 + "|"
    return "\n".join([_BEGIN, "", head, *rows, "", _END])


def committed() -> str:
    text = PAGE.read_text(encoding="utf-8")
    return text[text.index(_BEGIN) : text.index(_END) + len(_END)]


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(text.replace(committed(), section([row(family) for family in FAMILIES])), encoding="utf-8")


if __name__ == "__main__":
    main()
