"""The layers of a Hugging Face model, one step at a time: what fusion needs, from the model's own modules."""

from __future__ import annotations

import json

import blake3
import torch
from torch import Tensor

try:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
except ImportError as error:
    raise ImportError('kvloom.connectors.hf.model needs transformers: pip install "kvloom[transformers]"') from error

from ...core import KVSpec, RopeSpec
from ...errors import EngineError

_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_INCIDENTAL_FIELDS = ("_name_or_path", "transformers_version", "dtype")  # where from, read by what, and into what
_WIDENED = (torch.float16, torch.bfloat16)  # into float32, which holds all their numbers


def weights_id(model: PreTrainedModel) -> str:
    """Names the weights, wherever they lie: BLAKE3 over configuration, parameter names, shapes and values.

    Equal numbers give equal names in whatever precision they are held, so that a profile or a certificate that was made
    in float32 serves the same weights in bfloat16; a chunk's key tells precisions apart by the spec's dtype. Weights
    that were rounded are other weights. Some seconds for 10 GB.
    """
    config = {name: value for name, value in model.config.to_dict().items() if name not in _INCIDENTAL_FIELDS}
    digest = blake3.blake3(json.dumps(config, sort_keys=True).encode(), max_threads=blake3.blake3.AUTO)
    for name, tensor in sorted(model.state_dict().items()):
        values = tensor.detach().cpu().contiguous()
        if values.dtype in _WIDENED:
            values = values.float()
        digest.update(f"{name} {values.dtype} {list(values.shape)}".encode())
        digest.update(values.view(-1).view(torch.uint8).numpy().data)
    return f"{model.config.model_type}-{digest.hexdigest(32)}"


def lead_of(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens in front of every context: the BOS if the tokenizer puts one in front of a text, otherwise none."""
    first = tokenizer("").input_ids[:1]
    return tuple(first) if first == [tokenizer.bos_token_id] else ()


def check_supported(model: PreTrainedModel) -> None:
    """Refuse a model whose chunks could not be fused.

    Raises
    ------
    EngineError : another architecture, no RoPE, a partial one, or one whose frequencies depend on the context's length.
    """
    config = model.config
    if config.model_type not in _MODEL_TYPES:
        raise EngineError(
            f"model type {config.model_type!r} is not supported; kvloom fuses rotary models of type "
            f"{', '.join(_MODEL_TYPES)}"
        )
    rope_type = (config.rope_parameters or {}).get("rope_type", "default")
    if rope_type not in _ROPE_TYPES:
        raise EngineError(
            f"rope type {rope_type!r} changes its frequencies with the length of the context, so cached keys "
            f"cannot be moved; use a model with rope type {', '.join(_ROPE_TYPES)}"
        )
    pairs, head_dim = len(model.model.rotary_emb.inv_freq), model.model.layers[0].self_attn.head_dim
    if 2 * pairs != head_dim:
        raise EngineError(
            f"the rope table has {pairs} frequencies for a head dim of {head_dim}; partial rotary embeddings are not "
            "supported"
        )


class TransformersModel:
    """`LayerwiseModel` over a Hugging Face Llama, Mistral, Qwen2 or Qwen3, calling the model's own modules.

    Parameters
    ----------
    model : a causal language model of one of these types, in evaluation mode.
    model_id : names the weights; None computes `weights_id`.

    Raises
    ------
    EngineError : see `check_supported`.
    """

    def __init__(self, model: PreTrainedModel, *, model_id: str | None = None) -> None:
        check_supported(model)
        config = model.config
        self.decoder = model.model
        rotary = self.decoder.rotary_emb
        attention = self.decoder.layers[0].self_attn
        self.spec = KVSpec(
            model_id=model_id or weights_id(model),
            num_layers=config.num_hidden_layers,
            num_kv_heads=config.num_key_value_heads,
            head_dim=attention.head_dim,
            dtype=model.dtype,
            rope=RopeSpec(tuple(rotary.inv_freq.tolist()), float(rotary.attention_scaling)),
        )
        self.scale = float(attention.scaling)
        # Mistral's attention looks its window up in the configuration; Llama's ignores one that stands there.
        shared = config.sliding_window if config.model_type == "mistral" else None
        self.window_tokens = tuple(getattr(layer.self_attn, "sliding_window", shared) for layer in self.decoder.layers)
        self.max_tokens: int = config.max_position_embeddings

    def embed(self, token_ids: Tensor) -> Tensor:
        embedded: Tensor = self.decoder.embed_tokens(token_ids)
        return embedded

    def qkv(self, layer: int, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        block = self.decoder.layers[layer]
        attention, normed = block.self_attn, block.input_layernorm(hidden)
        shape = (len(hidden), -1, attention.head_dim)
        q, k = attention.q_proj(normed).view(shape), attention.k_proj(normed).view(shape)
        v = attention.v_proj(normed).view(shape).transpose(0, 1)
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm(q), attention.k_norm(k)
        cos, sin = (table[0] for table in self.decoder.rotary_emb(hidden[None], positions[None]))
        return _rotated(q.transpose(0, 1), cos, sin), _rotated(k.transpose(0, 1), cos, sin), v

    def finish(self, layer: int, hidden: Tensor, attn_out: Tensor) -> Tensor:
        block = self.decoder.layers[layer]
        hidden = hidden + block.self_attn.o_proj(attn_out.transpose(0, 1).reshape(len(hidden), -1))
        output: Tensor = hidden + block.mlp(block.post_attention_layernorm(hidden))
        return output


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`[heads, T, D]` by the model's own tables `[T, D]` and in its own arithmetic, so that results agree with it."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin
