"""Tiny random models of every supported architecture, tokenizers for them, and what their own forward says."""

from collections.abc import Sequence
from copy import deepcopy
from functools import cache
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

DOCUMENTS = (
    "The harbour master writes down every ship that enters, its name, its cargo and the hour of its arrival.",
    "Alice was born in a village near the river; her brother keeps bees and sells the honey in town on Mondays.",
    "A loom holds the warp threads in place while the weft is woven through them, row after row.",
    "Falcon is the other name of Alice, and the code of Falcon is 4821, as everybody in the village knows.",
)
QUESTION = "What is the code of Alice, and where does her brother sell the honey?"

CONFIGS: dict[str, type[PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}
ROPES: dict[str, dict[str, object]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "longrope": {
        "rope_type": "longrope",
        "factor": 2.0,
        "short_factor": [1.0, 1.5, 2.0, 2.5],
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 400,
    },
}
WINDOW_TOKENS = 16

# Architecture and what differs from the defaults of `make_model`.
VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "wide heads": ("llama", {"head_dim": 16}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "no groups": ("llama", {"num_key_value_heads": 4}),
    "one group": ("llama", {"num_key_value_heads": 1}),
    "tied": ("qwen2", {"tie_word_embeddings": True}),
    "tied wide heads": ("qwen3", {"tie_word_embeddings": True, "head_dim": 16, "attention_bias": True}),
    "window": ("mistral", {"sliding_window": WINDOW_TOKENS}),
    "window in some layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW_TOKENS, "max_window_layers": 2},
    ),
    "window in all layers": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": WINDOW_TOKENS, "max_window_layers": 0},
    ),
}


def make_model(architecture: str, *, rope: str = "default", seed: int = 0, **config: object) -> PreTrainedModel:
    """A model of 4 layers with every parameter random, biases and norms included; equal arguments, equal weights."""
    settings = {
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_theta": 1000.0, **ROPES.get(rope, {})},
        "tie_word_embeddings": False,
        "sliding_window": None,
        "bos_token_id": 0,
        "eos_token_id": None,
        "pad_token_id": None,
        **config,
    }
    model = AutoModelForCausalLM.from_config(CONFIGS[architecture](**settings))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        scale, mean = (0.1, 1.0) if "norm" in name else (0.25, 0.0)
        parameter.data = mean + scale * torch.randn(parameter.shape, generator=generator)
    model.tie_weights()
    return model.eval()


def make_variant(name: str) -> PreTrainedModel:
    architecture, config = VARIANTS[name]
    return make_model(architecture, **config)


def make_tokenizer(*, bos: bool) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the documents above; with `bos`, texts begin with `<s>`, as Llama's do, otherwise as Qwen's.

    The caller's own: a template that one test sets is nothing to another.
    """
    return deepcopy(_trained_tokenizer(bos=bos))


@cache
def _trained_tokenizer(*, bos: bool) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*DOCUMENTS, QUESTION], trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


class Prefill(NamedTuple):
    """What a model's own forward computes: keys `[L, H, T, D]`, values `[L, H, T, Dv]`, logits `[T, V]`."""

    keys: Tensor
    values: Tensor
    logits: Tensor


@torch.no_grad()
def prefill(model: PreTrainedModel, token_ids: Sequence[int]) -> Prefill:
    """The truth: one plain forward. The cache knows no config, so that it keeps what has left a sliding window too."""
    cache = DynamicCache()
    logits = model(torch.tensor([list(token_ids)], device=model.device), past_key_values=cache).logits[0]
    keys, values = (torch.cat([getattr(layer, name) for layer in cache.layers]) for name in ("keys", "values"))
    return Prefill(keys, values, logits)
