"""Arguments for `model.generate` that keep a promise, whatever the model's `generation_config` says.

`generate` takes what a caller leaves open from `model.generation_config`, which comes with the checkpoint: sampling,
beams, assistants, kinds of cache and of results. A call that continues from kvloom's cache and promises greedy decoding
therefore states every one of these settings. What says which tokens are allowed or end an answer stays as the model's
authors set it (`KEPT`), as it does in stock greedy decoding: end tokens, stop strings, penalties, suppressed tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

KEPT = frozenset({
    "bad_words_ids", "begin_suppress_tokens", "bos_token_id", "compile_config", "decoder_start_token_id",
    "disable_compile", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "exponential_decay_length_penalty",
    "forced_bos_token_id", "forced_eos_token_id", "guidance_scale", "max_time", "min_length", "min_new_tokens",
    "no_repeat_ngram_size", "remove_invalid_values", "renormalize_logits", "repetition_penalty", "sequence_bias",
    "suppress_tokens", "watermarking_config",
})  # fmt: skip
"""Settings that the model's `generation_config` decides, and a caller may change."""

SAMPLING = frozenset({
    "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff",
})  # fmt: skip
"""Settings that mean something with `do_sample=True` only."""

_ENDS = frozenset({"eos_token_id", "pad_token_id", "stop_strings"})
_PASSED_ON = frozenset({
    "logits_processor", "negative_prompt_attention_mask", "negative_prompt_ids", "prefix_allowed_tokens_fn", "streamer",
    "synced_gpus",
})  # fmt: skip
_WITHOUT_EFFECT = frozenset({"early_stopping", "length_penalty", "tokenizer"})  # for beams, or known here anyway
_INPUTS = frozenset({
    "attention_mask", "cache", "input_ids", "inputs", "inputs_embeds", "past_key_values", "position_ids",
})  # fmt: skip
# What every other setting is that is neither kept nor one of sampling: None, or one of these.
_FIXED = {
    "use_cache": True,
    "num_beams": 1,
    "num_return_sequences": 1,
    "return_dict_in_generate": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_logits": False,
    "output_scores": False,
    "token_healing": False,
}


@dataclass(frozen=True, slots=True)
class GenerationCall:
    """What `model.generate` is called with, beside inputs and cache.

    Attributes
    ----------
    arguments : by name.
    criteria : what ends a sequence beside `end_ids` and length: stop strings and the caller's own criteria.
    end_ids : tokens that end a sequence.
    pad_id : fills sequences that ended before others.
    """

    arguments: Mapping[str, Any]
    criteria: StoppingCriteriaList
    end_ids: tuple[int, ...]
    pad_id: int


def generation_call(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    options: Mapping[str, Any],
    *,
    prompt_tokens: int,
    max_new_tokens: int,
) -> GenerationCall:
    """Greedy decoding of one sequence a prompt, or what the caller's `options` ask for.

    Parameters
    ----------
    options : as for `model.generate`, without those that need a cache or inputs of their own: beams, several sequences
        for a prompt, assistants.
    prompt_tokens : of the longest prompt.

    Raises
    ------
    ValueError : an option that `generate` does not know, or that does not work here; the message names it.
    """
    settings = _settings()
    asked = _asked(options, settings)
    is_sampling = bool(asked.get("do_sample"))

    def setting(name: str) -> Any:
        return asked[name] if name in asked else getattr(model.generation_config, name, None)

    end_ids = _ids(setting("eos_token_id"))
    pad_id = next(iter((*_ids(setting("pad_token_id")), *end_ids)), 0)
    criteria = asked.get("stopping_criteria") or ()
    criteria = [criteria] if isinstance(criteria, StoppingCriteria) else list(criteria)
    if strings := setting("stop_strings"):
        criteria.append(StopStringCriteria(tokenizer, strings))
    stated = settings - KEPT - (SAMPLING if is_sampling else frozenset())
    passed_on = KEPT | _PASSED_ON | (SAMPLING if is_sampling else frozenset())
    arguments: dict[str, Any] = {name: _FIXED.get(name) for name in stated}
    arguments |= {name: value for name, value in asked.items() if name in passed_on and value is not None}
    arguments |= {
        "do_sample": is_sampling,
        "eos_token_id": list(end_ids) or None,
        "pad_token_id": pad_id,
        # `max_new_tokens` would warn where the model's own configuration has a `max_length`.
        "max_length": prompt_tokens + max_new_tokens,
    }
    return GenerationCall(arguments, StoppingCriteriaList(criteria), end_ids, pad_id)


def cache_argument() -> str:
    """What this release of transformers calls the cache: `cache` from 5.24 on, `past_key_values` before."""
    known = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    return "cache" if "cache" in known else "past_key_values"


def _asked(options: Mapping[str, Any], settings: frozenset[str]) -> dict[str, Any]:
    """The options, with those that a `generation_config` among them states."""
    asked = dict(options)
    config = asked.pop("generation_config", None)
    if config is not None:
        if not isinstance(config, GenerationConfig):
            raise TypeError(f"generation_config is of type {type(config).__name__}; expected a GenerationConfig")
        stated = {name: value for name, value in config.to_dict().items() if name in settings and value is not None}
        asked = stated | asked
    understood = KEPT | SAMPLING | _ENDS | _PASSED_ON | _WITHOUT_EFFECT | {"do_sample", "stopping_criteria"}
    known = understood | settings | _INPUTS | set(inspect.signature(GenerationMixin.generate).parameters)
    for name, value in asked.items():
        if name not in known:
            raise ValueError(f"{name} is no option of model.generate; check its spelling")
        if name in ("max_length", "max_new_tokens") and value is not None:
            raise ValueError(f"{name} is among the options; give max_new_tokens as an argument of its own")
        if name not in understood and value is not None and value != _FIXED.get(name, False):
            raise ValueError(f"{name} is {_shown(value)}; a session sets it itself, from its own cache: leave it out")
        if name in SAMPLING and value not in (None, 0, 1) and not asked.get("do_sample"):
            raise ValueError(f"{name} is {value!r}, but nothing is sampled; give do_sample=True, too, or leave it out")
    return asked


def _shown(value: object) -> str:
    return repr(value) if isinstance(value, str | int | float) else f"of type {type(value).__name__}"


def _settings() -> frozenset[str]:
    """All that a generation configuration of this release has."""
    return frozenset(name for name in GenerationConfig().to_dict() if name[0] != "_") - {"transformers_version"}


def _ids(value: object) -> tuple[int, ...]:
    """Token ids, where one, several or none are given."""
    if value is None:
        return ()
    if isinstance(value, torch.Tensor):
        value = value.flatten().tolist()
    return tuple(map(int, value)) if isinstance(value, Iterable) else (int(value),)  # type: ignore[call-overload]
