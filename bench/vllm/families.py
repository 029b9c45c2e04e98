"""Families of models that run in stock vLLM with kvloom, as tiny random models.

The one list: tests run it, `kvloom bench vllm` counts it, docs/models.md prints it. Importing this needs no vLLM.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WINDOW = 100  # tokens; neither chunks nor blocks divide it
VOCABULARY = 512

_CONFIGS = {
    "llama": "LlamaConfig",
    "mistral": "MistralConfig",
    "qwen2": "Qwen2Config",
    "qwen3": "Qwen3Config",
    "phi3": "Phi3Config",
    "gemma": "GemmaConfig",
    "gemma2": "Gemma2Config",
    "gemma3": "Gemma3TextConfig",
    "gemma4": "Gemma4TextConfig",
    "gpt-oss": "GptOssConfig",
    "cohere2": "Cohere2Config",
    "llama4": "Llama4TextConfig",
    "exaone4": "Exaone4Config",
    "deepseek-v2": "DeepseekV2Config",
    "deepseek-v3": "DeepseekV3Config",
    "glm4": "Glm4Config",
    "qwen3-next": "Qwen3NextConfig",
    "granite-hybrid": "GraniteMoeHybridConfig",
    "falcon-h1": "FalconH1Config",
    "nemotron-h": "NemotronHConfig",
    "zamba2": "Zamba2Config",
    "mamba2": "Mamba2Config",
}


_OWN_HEADS, _COUNTS_LAYERS = {"zamba2"}, {"nemotron-h"}  # configs that work these numbers out


@dataclass(frozen=True, slots=True)
class Family:
    """A model that vLLM serves.

    Attributes
    ----------
    architecture, config : see `make_tiny_model`.
    groups : kinds of KV cache groups that vLLM makes of it: full, latent, window, local or state.
    options : of the engine, beside its defaults.
    on_processors : further ones where there is no GPU.
    fuses : whether documents are fused in such an engine.
    blocks : of the whole cache, so few that eight requests of 290 tokens do not fit; None where no test asks for that.
    """

    architecture: str
    config: Mapping[str, Any] = field(default_factory=dict)
    groups: tuple[str, ...] = ("full",)
    options: Mapping[str, Any] = field(default_factory=dict)
    on_processors: Mapping[str, Any] = field(default_factory=dict)
    fuses: bool = True
    blocks: int | None = None

    @property
    def ranks(self) -> int:
        """Processes that compute together."""
        sizes = ("tensor_parallel_size", "pipeline_parallel_size")
        return int(self.options.get(sizes[0], 1)) * int(self.options.get(sizes[1], 1))

    def options_here(self) -> dict[str, Any]:
        """Of the engine, on this machine."""
        import torch

        return {**self.options, **({} if torch.cuda.is_available() else self.on_processors)}

    def why_not_here(self) -> str | None:
        """Why vLLM cannot run this on this machine's processor; None if it can."""
        import torch

        if self.ranks > (os.cpu_count() or 1):
            return f"vLLM wants a core for each of {self.ranks} ranks"
        has_vectors = bool(getattr(torch.cpu, "_is_avx512_supported", lambda: False)())
        if str(self.options.get("kv_cache_dtype", "auto")).startswith("fp8") and not has_vectors:
            return "vLLM wants AVX-512 for fp8 caches on a processor"
        return None

    @property
    def keeps_states(self) -> bool:
        """Whether some layers keep states."""
        return "state" in self.groups


_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 128}
_LLAMA4 = {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size": 128, "intermediate_size_mlp": 256}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "rope_theta": 10000.0}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
    "rope_theta": 500000.0,
}
_TRACED = {"enforce_eager": False, "compilation_config": {"backend": "eager"}}
_WINDOWED = {"sliding_window": WINDOW}
_LATENT = {  # 512 + 64 numbers a token, the one size that vLLM's kernel for processors takes
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "q_lora_rank": None,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "n_shared_experts": 1,
    "first_k_dense_replace": 3,
    "n_group": 1,
    "topk_group": 1,
}
# vLLM's rotary kernel for processors is wrong where it rotates a slice of each head; and where there is AMX, vLLM
# prefers a backend that takes bfloat16 alone.
_LATENT_OPTIONS = {"attention_backend": "CPU_MLA", "compilation_config": {"custom_ops": ["-rotary_embedding"]}}

_STATE_SPACE = {"mamba_n_heads": 8, "mamba_d_head": 64, "mamba_d_state": 16, "mamba_n_groups": 1}
_LINEAR = {  # heads of 64 numbers, of which vLLM's kernels for processors take no fewer
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "num_key_value_heads": 4,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
_STATES = {"block_size": 64, "enable_prefix_caching": True}
# vLLM's kernels for processors cannot give a state from within a step, as its scheduler asks Mamba 2 layers to. Then
# a step has no room for the first block of a request beside one that decodes: vLLM serves one at a time.
_STEPS_OF_BLOCKS = {"max_num_batched_tokens": 64}

FAMILIES: Mapping[str, Family] = {
    "Llama, two ranks": Family("llama", options={"tensor_parallel_size": 2}),
    # vLLM's CPU build runs stages compiled only: an eager stage has no buffers for what the one before it sends
    "Llama, two stages": Family("llama", options={"pipeline_parallel_size": 2, **_TRACED}, fuses=False),
    "Llama, compiled": Family("llama", {"rope_parameters": _LLAMA3}, options={"enforce_eager": False}),
    "Mistral, larger blocks than chunks": Family("mistral", options={"block_size": 128}),
    "Qwen2": Family("qwen2"),
    "Qwen3, YaRN": Family("qwen3", {"rope_parameters": _YARN}),
    "Phi-3": Family("phi3"),
    "Gemma": Family("gemma"),
    "GLM-4, part of a head rotated": Family("glm4", {"partial_rotary_factor": 0.5}),
    # layers with a window rotate otherwise than those without
    "Gemma 3, one group for all windows": Family(
        "gemma3", {"sliding_window": 128}, options={"disable_hybrid_kv_cache_manager": True}, fuses=False
    ),
    "Llama, fp8 cache": Family("llama", options={"kv_cache_dtype": "fp8"}, fuses=False, blocks=60),
    "DeepSeek V3, two ranks": Family(
        "deepseek-v3",
        {**_LATENT, "q_lora_rank": 64, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
        ("latent",),
        options={"tensor_parallel_size": 2},
        on_processors=_LATENT_OPTIONS,
        fuses=False,
    ),
    "DeepSeek V2": Family("deepseek-v2", _LATENT, ("latent",), on_processors=_LATENT_OPTIONS, fuses=False, blocks=100),
    "Gemma 3": Family("gemma3", _WINDOWED, ("full", "window"), fuses=False, blocks=200),
    "GPT-OSS": Family("gpt-oss", {**_WINDOWED, **_MOE}, ("full", "window"), fuses=False, blocks=90),
    "Cohere2": Family("cohere2", _WINDOWED, ("full", "window"), fuses=False, blocks=200),
    "Llama 4": Family(
        "llama4",
        {"attention_chunk_size": 96, **_LLAMA4},
        ("full", "local"),
        options={"block_size": 32},  # which divides the length of a local part
        fuses=False,
        blocks=110,
    ),
    "Mistral with windows": Family("mistral", _WINDOWED, ("window",), fuses=False, blocks=36),
    "Qwen3-Next": Family(
        "qwen3-next",
        {
            "layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2,
            "shared_expert_intermediate_size": 128,
            **_LINEAR,
            **_EXPERTS,
        },
        ("full", "state"),
        options={"dtype": "bfloat16", **_STATES},  # the one that vLLM's kernels of linear attention take
        fuses=False,
        blocks=50,
    ),
    "Granite 4, hybrid": Family(
        "granite-hybrid",
        {
            "layer_types": ["mamba", "attention", "mamba"] * 2,
            "mamba_expand": 2,
            "shared_intermediate_size": 512,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "position_embedding_type": "rope",
            **_STATE_SPACE,
        },
        ("full", "state"),
        options=_STATES,
        on_processors=_STEPS_OF_BLOCKS,
        fuses=False,
        blocks=28,
    ),
    "Falcon H1": Family(
        "falcon-h1",
        {"mamba_d_ssm": 512, **_STATE_SPACE},
        ("full", "state"),
        options=_STATES,
        on_processors=_STEPS_OF_BLOCKS,
        fuses=False,
        blocks=24,
    ),
    "Nemotron-H": Family(
        "nemotron-h",
        {
            "layers_block_type": ["mamba", "attention", "mlp"] * 2,
            "mamba_num_heads": 8,
            "mamba_head_dim": 64,
            "ssm_state_size": 16,
            "n_groups": 1,
        },
        ("full", "state"),
        options=_STATES,
        on_processors=_STEPS_OF_BLOCKS,
        fuses=False,
        blocks=24,
    ),
    "Zamba 2": Family(
        "zamba2",
        {
            "layers_block_type": ["mamba", "mamba", "hybrid", "mamba", "hybrid", "mamba"],
            "n_mamba_heads": 8,
            "mamba_headdim": 64,
            "mamba_d_state": 16,
            "mamba_ngroups": 1,
            "mamba_expand": 2,
            "num_mem_blocks": 1,
            "use_mem_rope": True,
            "num_key_value_heads": 4,
            "adapter_rank": 16,
        },
        ("full", "state"),
        options=_STATES,
        on_processors=_STEPS_OF_BLOCKS,
        fuses=False,
        blocks=32,
    ),
    "Mamba 2": Family(
        "mamba2",
        {"num_heads": 8, "head_dim": 64, "state_size": 16, "n_groups": 1, "expand": 2, "chunk_size": 64},
        ("state",),
        options=_STATES,
        on_processors=_STEPS_OF_BLOCKS,
        fuses=False,
        blocks=12,
    ),
}


def make_tiny_model(folder: Path, architecture: str = "llama", **config: object) -> Path:
    """Save a random model of six layers, or as many as `config` lists, without a tokenizer; equal arguments, equal
    weights.

    A model with default initialisation says the same token whatever came before, so that equal tokens prove nothing.
    Here weights are scaled so that hidden states keep their size and attention is sharp.
    """
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "sliding_window": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **config,
    }
    if architecture in _OWN_HEADS:
        del settings["head_dim"]
    if architecture in _COUNTS_LAYERS:
        del settings["num_hidden_layers"]
    model = AutoModelForCausalLM.from_config(getattr(transformers, _CONFIGS[architecture])(**settings)).float()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.ndim == 2:
            sharp = "q_proj" in name or "k_proj" in name
            scale = 1.0 if "embed" in name else (3.0 if sharp else 1.5) / parameter.shape[1] ** 0.5
            parameter.data = scale * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return folder
