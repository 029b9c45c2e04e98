"""Models whose layers are in several KV cache groups, or have windows: tiny random ones of each family."""

from dataclasses import dataclass
from typing import Any

WINDOW = 100  # tokens; neither chunks nor blocks divide it


@dataclass(frozen=True)
class Family:
    """A model that vLLM serves with its defaults.

    Attributes
    ----------
    architecture, config : see `make_model`.
    groups : kinds of KV cache groups that vLLM makes of it.
    blocks : of the whole cache, so few that eight requests of 290 tokens do not fit.
    """

    architecture: str
    config: dict[str, Any]
    groups: tuple[str, ...]
    blocks: int


_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 128}
_LLAMA4 = {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size": 128, "intermediate_size_mlp": 256}

FAMILIES: dict[str, Family] = {
    "Gemma 3": Family("gemma3", {"sliding_window": WINDOW}, ("full", "window"), 200),
    "GPT-OSS": Family("gpt-oss", {"sliding_window": WINDOW, **_MOE}, ("full", "window"), 90),
    "Cohere2": Family("cohere2", {"sliding_window": WINDOW}, ("full", "window"), 200),
    "Llama 4": Family("llama4", {"attention_chunk_size": 96, **_LLAMA4}, ("full", "local"), 110),
    "Mistral with windows": Family("mistral", {"sliding_window": WINDOW}, ("window",), 36),
}
