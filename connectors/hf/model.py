"""The layers of a Hugging Face model, one step at a time: what fusion needs, from the model's own modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn

try:
    from transformers import PreTrainedModel
except ImportError as error:
    raise ImportError('kvloom.connectors.hf.model needs transformers: pip install "kvloom[transformers]"') from error

from ...core import KVSpec, RopeSpec
from ...errors import EngineError
from ..identity.rope import settled_rope
from ..identity.weights import windows_of, with_state
from .identity import ModelIdentity, unwrapped

_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


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
    model : a causal language model of one of these types, in evaluation mode; PEFT's and torch.compile's wrappers
        around one are taken off.
    model_id : names the weights as they are now; None reads them, see `ModelIdentity`.

    Attributes
    ----------
    model : the model without wrappers.
    spec : of the KV that it would have computed when `refresh` was called last.
    device : where its inputs belong.

    Raises
    ------
    EngineError : see `unwrapped`, `check_supported` and `ModelIdentity`.
    """

    spec: KVSpec
    device: torch.device
    window_tokens: tuple[int | None, ...]

    def __init__(self, model: nn.Module, *, model_id: str | None = None) -> None:
        self.model = unwrapped(model)
        check_supported(self.model)
        self.decoder = self.model.model
        self.scale = float(self.decoder.layers[0].self_attn.scaling)
        self.max_tokens: int = self.model.config.max_position_embeddings
        self._identity = ModelIdentity(self.model, model_id)
        self.refresh()

    def refresh(self) -> bool:
        """Look whether the model still computes KV as `spec` says, and make it say so.

        Returns
        -------
        bool : whether the spec had to be changed.

        Raises
        ------
        EngineError : see `ModelIdentity.name`.
        """
        config, attention = self.model.config, self.decoder.layers[0].self_attn
        rotary, before = self.decoder.rotary_emb, getattr(self, "spec", None)
        # Mistral's attention looks its window up in the configuration; Llama's ignores one that stands there.
        shared = config.sliding_window if config.model_type == "mistral" else None
        self.window_tokens = tuple(getattr(layer.self_attn, "sliding_window", shared) for layer in self.decoder.layers)
        self.device = input_device(self.decoder.embed_tokens)
        actual = RopeSpec(tuple(rotary.inv_freq.tolist()), float(rotary.attention_scaling))
        self.spec = KVSpec(
            model_id=with_state(self._identity.name(), windows=windows_of(self.window_tokens)),
            num_layers=config.num_hidden_layers,
            num_kv_heads=config.num_key_value_heads,
            head_dim=attention.head_dim,
            dtype=self.model.dtype,
            rope=settled_rope(actual, config.rope_parameters),
        )
        return before is not None and before != self.spec

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


def input_device(module: nn.Module) -> torch.device:
    """Where a module computes: where its weights lie, unless accelerate fetches them for every call."""
    hook = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):
        if (device := getattr(each, "execution_device", None)) is not None:
            return torch.device(device)
    return next(module.parameters()).device


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`[heads, T, D]` by the model's own tables `[T, D]` and in its own arithmetic, so that results agree with it."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin
