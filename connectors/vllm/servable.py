"""Whether kvloom can serve an engine of vLLM as it is set up, and what it changes of its own settings for it."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from ...errors import EngineError
from ..serving.settings import ServingSettings
from .groups import EngineGroups, groups_of

_LOG = logging.getLogger("kvloom")


def expect_servable(settings: ServingSettings, vllm_config: Any, kv_cache_config: Any) -> EngineGroups:
    """The groups of the engine's layers.

    Raises
    ------
    EngineError : the engine is another one, or cannot do what the settings ask for; says what to change.
    """
    parallel, speculative = vllm_config.parallel_config, vllm_config.speculative_config
    groups, why = groups_of(kv_cache_config), None
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        why = "it divides the context among ranks; use --tensor-parallel-size instead of context parallelism"
    elif speculative is not None and speculative.method not in ("ngram", "suffix"):
        why = f"it drafts with a model ({speculative.method}), whose KV kvloom does not store; use ngram or suffix"
    if why is not None:
        raise EngineError(f"kvloom cannot serve this engine exactly: {why}; or leave the connector out")
    if groups.keeps_states:
        _expect_states_are_kept(vllm_config, groups)
    if groups.is_latent and _rotates_wrongly(vllm_config):
        raise EngineError(
            "vLLM's rotary kernel for processors gives latent attention (MLA) other keys with every batch: give "
            '--compilation-config \'{"custom_ops": ["-rotary_embedding"]}\'; or leave the connector out'
        )
    if settings.load_mode == "layerwise":
        if not groups.is_plain:
            raise EngineError(
                "load_mode 'layerwise' needs one KV cache group of full attention: this engine's layers are in groups, "
                "or have windows, and vLLM cannot take back a step for some blocks of them; use 'async'"
            )
        if groups.is_latent:
            raise EngineError("load_mode 'layerwise' is not there for latent caches (MLA); use 'async'")
        if parallel.pipeline_parallel_size > 1:
            raise EngineError(
                "load_mode 'layerwise' needs one stage: with --pipeline-parallel-size a stage has begun the next step "
                "when another finds that KV was lost; use 'async'"
            )
        # vLLM 0.32 (issue 49250) goes on from tokens sampled of KV that was lost, where it plans ahead.
        if vllm_config.scheduler_config.async_scheduling:
            raise EngineError(
                "load_mode 'layerwise' needs --no-async-scheduling: vLLM cannot take back a step otherwise"
            )
        if vllm_config.use_v2_model_runner:
            raise EngineError("load_mode 'layerwise' needs VLLM_USE_V2_MODEL_RUNNER=0: V2 cannot take back a step")
    return groups


def settings_for(groups: EngineGroups, settings: ServingSettings) -> ServingSettings:
    """The settings as they are in use: an engine that has states behind blocks has chunks of as many tokens."""
    chunk_tokens = groups.chunk_tokens(settings.chunk_tokens)
    if chunk_tokens == settings.chunk_tokens:
        return settings
    _LOG.info(
        "chunk_tokens is %d instead of %d: layers of this engine keep states, behind blocks of so many tokens",
        chunk_tokens,
        settings.chunk_tokens,
    )
    return replace(settings, chunk_tokens=chunk_tokens)


def _expect_states_are_kept(vllm_config: Any, groups: EngineGroups) -> None:
    """Raises `EngineError` where the states of blocks are not what they are taken for, or vLLM itself fails on them."""
    if getattr(vllm_config.cache_config, "use_replayssm", False):
        raise EngineError(
            "kvloom cannot serve this engine exactly: with --use-replayssm a block holds a state and the inputs since; "
            "or leave the connector out"
        )
    block_tokens = min(shape.block_tokens for shape in groups.shapes if shape.keeps_state)
    is_cpu = vllm_config.device_config.device_type == "cpu"
    if groups.convolves and is_cpu:
        raise EngineError(
            "vLLM's short convolutions for processors (LFM2) give other answers with every batch, with and without "
            "kvloom, so that a hit could give another token; leave the connector out"
        )
    if groups.saves_within_steps and is_cpu and vllm_config.scheduler_config.max_num_batched_tokens > block_tokens:
        raise EngineError(
            "vLLM's kernels for processors fail where Mamba 2 layers are to give the state behind a block from within "
            f"a step, with prefix caching: give --max-num-batched-tokens {block_tokens}, so that no step goes beyond a "
            "block, or a larger --block-size; or leave the connector out"
        )


def _rotates_wrongly(vllm_config: Any) -> bool:
    """Whether keys of latent attention are rotated by the processors' kernel of vLLM 0.32.

    It takes the rotated parts of heads to lie side by side. In latent attention they are slices of heads, so that it
    rotates other numbers of other tokens.
    """
    is_cpu = vllm_config.device_config.device_type == "cpu"
    return is_cpu and bool(vllm_config.compilation_config.is_custom_op_enabled("rotary_embedding"))
