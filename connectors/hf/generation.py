"""Calls of `model.generate` that keep their promise, whatever the model's `generation_config` says.

`generate` takes what a caller leaves open from `model.generation_config`, which comes with the checkpoint: sampling,
beams, assistants, kinds of cache and of results. A call that continues from kvloom's cache and promises greedy decoding
brings a configuration of its own. What says which tokens are allowed or end an answer stays as the model's authors set
it (`KEPT`), as it does in stock greedy decoding: end tokens, stop strings, penalties, suppressed tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
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
"""Settings that the model's `generation_config` decides and a caller may change, beside end tokens and stop strings."""

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
_SINGLE = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True}


@dataclass(frozen=True, slots=True)
class GenerationCall:
    """What `generate` is called with, beside inputs and cache.

    Attributes
    ----------
    config : in place of the model's own.
    arguments : further ones, by name.
    criteria : what ends a sequence beside end tokens and length: stop strings and the caller's own criteria.
    end_ids : tokens that end a sequence.
    """

    config: GenerationConfig
    arguments: Mapping[str, Any]
    criteria: StoppingCriteriaList
    end_ids: tuple[int, ...]

    def run(
        self, model: PreTrainedModel, cache: object | None, criteria: StoppingCriteriaList, **inputs: Tensor
    ) -> Tensor:
        """`model.generate`, from a cache or from the beginning: `[B, T]`, the inputs included."""
        caller: Any = copy(model)  # shares everything with the model but this attribute
        caller.generation_config = self.config
        held = {} if cache is None else {cache_argument(): cache}
        tokens: Tensor = caller.generate(**inputs, **self.arguments, **held, stopping_criteria=criteria)
        return tokens


def generation_call(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any], *, max_new_tokens: int
) -> GenerationCall:
    """Greedy decoding of one sequence a prompt, or what the caller's `options` ask for.

    Parameters
    ----------
    options : as for `model.generate`, without those that need a cache or inputs of their own: beams, several sequences
        for a prompt, assistants.

    Raises
    ------
    ValueError : an option that `generate` does not know, or that does not work here; the message names it.
    """
    asked = _asked(options)
    is_sampling = bool(asked.get("do_sample"))
    used = KEPT | _ENDS | (SAMPLING if is_sampling else frozenset())
    settings = {name: asked[name] if name in asked else getattr(model.generation_config, name, None) for name in used}
    end_ids, pad_ids = _ids(settings.pop("eos_token_id")), _ids(settings.pop("pad_token_id"))
    criteria = asked.get("stopping_criteria") or ()
    criteria = [criteria] if isinstance(criteria, StoppingCriteria) else list(criteria)
    if strings := settings.pop("stop_strings"):
        criteria.append(StopStringCriteria(tokenizer, strings))
    config = GenerationConfig(
        do_sample=is_sampling,
        eos_token_id=list(end_ids) or None,
        pad_token_id=next(iter((*pad_ids, *end_ids)), 0),
        max_new_tokens=max_new_tokens,
        **{name: value for name, value in settings.items() if value is not None},
    )
    arguments = {name: value for name, value in asked.items() if name in _PASSED_ON and value is not None}
    return GenerationCall(config, arguments, StoppingCriteriaList(criteria), end_ids)


def cache_argument() -> str:
    """What this release of transformers calls the cache: `cache` from 5.24 on, `past_key_values` before."""
    known = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    return "cache" if "cache" in known else "past_key_values"


def _asked(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, with those that a `generation_config` among them states."""
    settings = {name for name in GenerationConfig().to_dict() if name[0] != "_"} - {"transformers_version"}
    asked = dict(options)
    config = asked.pop("generation_config", None)
    if config is not None:
        if not isinstance(config, GenerationConfig):
            raise TypeError(f"generation_config is of type {type(config).__name__}; expected a GenerationConfig")
        stated = {name: getattr(config, name) for name in settings if getattr(config, name, None) is not None}
        asked = stated | asked
    understood = KEPT | SAMPLING | _ENDS | _PASSED_ON | _WITHOUT_EFFECT | {"do_sample", "stopping_criteria"}
    known = understood | settings | _INPUTS | set(inspect.signature(GenerationMixin.generate).parameters)
    for name, value in asked.items():
        is_plain = isinstance(value, str | int | float)
        if name not in known:
            raise ValueError(f"{name} is no option of model.generate; check its spelling")
        if value is None or name in _WITHOUT_EFFECT:
            continue
        if name in ("max_length", "max_new_tokens"):
            raise ValueError(f"{name} is among the options; give max_new_tokens as an argument of its own")
        if name not in understood and not (is_plain and value == _SINGLE.get(name, False)):
            shown = repr(value) if is_plain else f"of type {type(value).__name__}"
            raise ValueError(f"{name} is {shown}; a session sets it itself, from its own cache: leave it out")
        if name in SAMPLING and value not in (0, 1) and not asked.get("do_sample"):
            raise ValueError(f"{name} is {value!r}, but nothing is sampled; give do_sample=True, too, or leave it out")
    return asked


def _ids(value: Any) -> tuple[int, ...]:
    """Token ids, where one, several or none are given."""
    if value is None:
        return ()
    if isinstance(value, torch.Tensor):
        value = value.flatten().tolist()
    return tuple(map(int, value)) if isinstance(value, Iterable) else (int(value),)
